"""`python -m benchmarks.fuzz`: the long run of the fuzzer, with the process's memory watched.

Exits 1 when an input crashes a reader, takes too long, or the memory grows.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil

from tests import fuzz
from tests.models import Repository
from tests.serving import timer
from tutti import ensembles
from tutti.frontends.v2.api import Api
from tutti.serving import local

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "fuzz.md"
# Once warm, the memory may not grow by more than this.
MAX_GROWTH_MIB = 24.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=240_000, help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    each = -(-options.inputs // len(fuzz.TARGETS))
    rows: list[str] = []

    def report(name: str, read: int, slowest: float) -> None:
        rows.append(f"| {name} | {each:,} | {read:,} | {slowest * 1000:.1f} ms | {_rss_mib():.0f} MiB |")
        print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        repository = Repository(Path(scratch) / "models")
        repository.add_onnx()
        engine = local.make_engine(repository.root, timer, ensembles.load, is_controllable=True)
        engine.load_all()
        api = Api(engine)
        fuzz.run_all(api, options.seed, max(1, each // 10))
        before = _rss_mib()
        started = time.monotonic()
        fuzz.run_all(api, options.seed + 1, each, report)
        took = time.monotonic() - started
        growth = _rss_mib() - before
        engine.close()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    total = each * len(fuzz.TARGETS)
    RESULTS.write_text(
        "# Fuzzing\n\n"
        f"`python -m benchmarks.fuzz --inputs {options.inputs} --seed {options.seed}`, "
        f"{datetime.now(UTC):%Y-%m-%d}, commit {commit.stdout.strip()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}.\n\n"
        f"{total:,} generated inputs in {took:.0f} s: no crash, none slower than {fuzz.SLOWEST_S:g} s; the warm "
        f"process grew by {growth:.1f} MiB.\n\n"
        "| reader | inputs | read, not refused | slowest | memory |\n|---|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )
    print(f"{total:,} inputs, {took:.0f} s, memory {growth:+.1f} MiB")
    return 0 if growth <= MAX_GROWTH_MIB else 1


def _rss_mib() -> float:
    return float(psutil.Process().memory_info().rss) / 2**20


if __name__ == "__main__":
    sys.exit(main())
