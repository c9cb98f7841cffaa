"""`make bench`: tutti beside a real tritonserver, and its Ray application beside plain Ray Serve.

Both sides of a comparison are measured in turn, round after round, in one run; figures are medians.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from benchmarks import clients
from benchmarks.clients import Figures
from benchmarks.models import MLP, write_repository
from demo.client import Client, load_items
from loadtest.process import free_ports, stop, wait_until_ready
from tests.peers import tritonserver
from tests.serving import serving

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks"
SAMPLE = ROOT / "model_repository"


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison: medians of both sides over the rounds."""

    what: str
    ours: Figures
    theirs: Figures

    @property
    def ratio(self) -> float:
        return self.ours.rate / self.theirs.rate


def median(figures: list[Figures]) -> Figures:
    return Figures(*(statistics.median(getattr(one, key) for one in figures) for key in ("rate", "p50_ms", "p99_ms")))


def interleave(ours: Callable[[], Figures], theirs: Callable[[], Figures], rounds: int) -> tuple[Figures, Figures]:
    """Each side once per round, in turn, after a warm-up of both."""
    ours(), theirs()
    measured = [(ours(), theirs()) for _ in range(rounds)]
    return median([a for a, _ in measured]), median([b for _, b in measured])


def against_triton(scratch: Path, rounds: int, seconds: int) -> list[Row]:
    repository = scratch / "mlp-repository"
    write_repository(repository, MLP)
    script = clients.http_script(scratch / "mlp.lua", *clients.infer_body())
    message = clients.grpc_message(scratch / "mlp.grpc")
    rows = []
    with (
        serving(repository, scratch / "tutti.log") as ours,
        tritonserver.running(repository, scratch) as theirs,
    ):
        route = "/v2/models/mlp/infer"
        for count in (16, 64):

            def http(address: str, count: int = count) -> Callable[[], Figures]:
                return lambda: clients.wrk(f"http://{address}{route}", script, count, seconds)

            def grpc(address: str, count: int = count) -> Callable[[], Figures]:
                return lambda: clients.h2load(address, message, count, seconds)

            rows.append(Row(f"HTTP, {count} clients", *interleave(http(ours.http), http(theirs.http), rounds)))
            rows.append(Row(f"gRPC, {count} clients", *interleave(grpc(ours.grpc), grpc(theirs.grpc), rounds)))
    return rows


def against_plain_ray_serve(scratch: Path, rounds: int, seconds: int) -> list[Row]:
    """One cluster at a time: they would take each other's cores."""
    model = write_repository(scratch / "ray-repository", MLP)
    script = clients.http_script(scratch / "ray.lua", *clients.infer_body())
    body, header_length = clients.infer_body()
    plain_script = clients.http_script(scratch / "plain.lua", body[header_length:], None)
    measured: dict[int, list[tuple[Figures, Figures]]] = {64: [], 256: []}
    for number in range(rounds):
        with serving(model.parents[2], scratch / f"gateway-{number}.log", "--ray") as ours:
            url = f"http://{ours.http}/v2/models/mlp/infer"
            clients.wrk(url, script, 64, seconds)
            gateway = {count: clients.wrk(url, script, count, seconds) for count in measured}
        with plain_ray_serve(model, scratch / f"plain-{number}.log") as url:
            clients.wrk(url, plain_script, 64, seconds)
            for count, figures in measured.items():
                figures.append((gateway[count], clients.wrk(url, plain_script, count, seconds)))
    return [
        Row(f"HTTP through the gateway, {count} clients", median([a for a, _ in pairs]), median([b for _, b in pairs]))
        for count, pairs in measured.items()
    ]


@contextmanager
def plain_ray_serve(model: Path, log: Path) -> Iterator[str]:
    (port,) = free_ports(1)
    with log.open("wb") as file:
        command = [sys.executable, "-m", "benchmarks.plain_ray_serve", str(model), str(port)]
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT)
        url = f"http://127.0.0.1:{port}/"
        try:
            wait_until_ready(process, url + "-/ready", log)
            yield url
        finally:
            family = psutil.Process(process.pid).children(recursive=True)
            stop(process)
            _, alive = psutil.wait_procs(family, timeout=10)
            for one in alive:
                one.kill()


def first_inference(scratch: Path, rounds: int) -> dict[str, float]:
    """Seconds from the start of the process to the ensemble's first answer, medians."""
    item = load_items()[0]

    def ours() -> float:
        started = time.monotonic()
        with serving(SAMPLE, scratch / "cold.log") as served:
            Client("http", served.http).infer("content_intelligence", item.inputs())
            return time.monotonic() - started

    def theirs() -> float:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder, tritonserver.running(SAMPLE, Path(folder)) as running:
            Client("http", running.http).infer("content_intelligence", item.inputs())
            return time.monotonic() - started

    measured = [(ours(), theirs()) for _ in range(rounds)]
    return {
        "tutti": statistics.median(a for a, _ in measured),
        "tritonserver": statistics.median(b for _, b in measured),
    }


def hardware() -> str:
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    memory = psutil.virtual_memory().total / 2**30
    return f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB, no GPU, Python {platform.python_version()}"


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return done.stdout.strip() or "unknown"


def table(rows: list[Row], theirs: str) -> list[str]:
    lines = [f"| | tutti, requests/s | {theirs}, requests/s | ratio | tutti p50 / p99 ms | {theirs} p50 / p99 ms |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        a, b = row.ours, row.theirs
        latencies = f"{a.p50_ms:.2f} / {a.p99_ms:.2f} | {b.p50_ms:.2f} / {b.p99_ms:.2f}"
        lines.append(f"| {row.what} | {a.rate:,.0f} | {b.rate:,.0f} | **{row.ratio:.2f}** | {latencies} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--only", choices=("triton", "ray", "cold"), action="append")
    options = parser.parse_args()
    parts = options.only or ["triton", "ray", "cold"]
    clients.require_tools()
    record: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "hardware": hardware(),
        "command": "python -m benchmarks " + " ".join(sys.argv[1:]),
    }
    lines = ["# Results", "", *(f"- {key}: {value}" for key, value in record.items()), ""]
    lines.append(
        f"Medians of {options.rounds} interleaved rounds of {options.seconds} s. One [1, 384] FP32 item a request,"
    )
    lines.append(
        "three dense layers in onnxruntime with one thread, batches of up to 64; wrk and h2load on the same machine."
    )
    lines.append("For gRPC the latencies are h2load's mean and maximum.")
    with tempfile.TemporaryDirectory(prefix="tutti-bench-") as folder:
        scratch = Path(folder)
        if "triton" in parts:
            rows = against_triton(scratch, options.rounds, options.seconds)
            record["triton"] = [asdict(row) for row in rows]
            lines += ["", "## One process, beside tritonserver 2.51 (its python-based onnxruntime backend)", ""]
            lines += table(rows, "tritonserver")
        if "ray" in parts:
            rows = against_plain_ray_serve(scratch, options.rounds, options.seconds)
            record["ray"] = [asdict(row) for row in rows]
            lines += ["", "## On Ray, beside a plain Ray Serve deployment behind Serve's HTTP proxy", ""]
            lines += table(rows, "Ray Serve")
        if "cold" in parts:
            cold = first_inference(scratch, options.rounds)
            record["first_inference_s"] = cold
            lines += ["", "## From process start to the sample ensemble's first answer", ""]
            lines += [f"- {name}: {seconds:.2f} s" for name, seconds in cold.items()]
    (RESULTS / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
