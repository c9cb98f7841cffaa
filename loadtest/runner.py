"""One run: Locust with the open-loop engine as a process, the server's statistics beside it, and what was seen."""

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.histogram import Histogram
from loadtest.sampler import Sampler
from loadtest.scenario import Scenario, Stage
from loadtest.slo import Judgement, Seen, judge

ROOT = Path(__file__).parents[1]
LOCUSTFILE = Path(__file__).with_name("locustfile.py")


class RunError(RuntimeError):
    """The run could not be made; says why."""


@dataclass(slots=True)
class StageSeen:
    """What came of one stage, over all workers."""

    name: str
    seconds: float
    rate: float
    requests: int = 0
    errors: int = 0
    lost: int = 0
    late: int = 0
    unsent: int = 0
    slow: int = 0
    histogram: Histogram = field(default_factory=Histogram)


@dataclass(slots=True)
class Result:
    """What came of a run."""

    scenario: Scenario
    stages: list[StageSeen] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    # What the server said with one error of each kind.
    reasons: dict[str, str] = field(default_factory=dict)
    cpu: float = 0.0
    waited: int = 0
    lateness_ms: dict[str, float] = field(default_factory=dict)
    seconds: list[dict[str, Any]] = field(default_factory=list)
    server: list[dict[str, Any]] = field(default_factory=list)
    began_at: float = 0.0
    raw: list[Path] = field(default_factory=list)

    @property
    def histogram(self) -> Histogram:
        """Of all stages."""
        found = Histogram()
        for stage in self.stages:
            found.merge(stage.histogram)
        return found

    @property
    def seen(self) -> Seen:
        def total(name: str) -> int:
            return int(sum(getattr(stage, name) for stage in self.stages))

        seconds = sum(stage.seconds for stage in self.stages)
        return Seen(
            total("requests"), total("errors") + total("lost"), total("slow"), seconds, total("late"), total("unsent"),
            self.cpu, self.waited,
        )  # fmt: skip

    @property
    def judgement(self) -> Judgement:
        return judge(self.seen, self.scenario.slo)

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        histogram, seen = self.histogram, self.seen
        return {
            "scenario": json.loads(self.scenario.model_dump_json()),
            "verdict": self.judgement.verdict.name,
            "reasons": list(self.judgement.reasons),
            "requests": seen.requests,
            "errors": seen.errors,
            "error_rate": seen.errors / max(1, seen.requests),
            "goodput_per_s": seen.good / seen.seconds if seen.seconds else 0.0,
            "latency_ms": quantiles_ms(histogram),
            "generator": {"cpu": self.cpu, "lateness_ms": self.lateness_ms, "late": seen.late, "unsent": seen.unsent},
            "error_texts": dict(self.errors.most_common(20)),
            "error_reasons": self.reasons,
            "stages": [
                {
                    "name": stage.name, "seconds": stage.seconds, "rate": stage.rate, "requests": stage.requests,
                    "errors": stage.errors + stage.lost, "latency_ms": quantiles_ms(stage.histogram),
                    "histogram_ns": stage.histogram.as_json(),
                }
                for stage in self.stages
            ],
            "server": self.server,
        }  # fmt: skip


def quantiles_ms(histogram: Histogram) -> dict[str, float]:
    """By name; empty when nothing was answered."""
    if not histogram.total:
        return {}
    shares = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}
    found = {name: histogram.quantile_ns(share) / 1e6 for name, share in shares.items()}
    return {**found, "max": histogram.max_ns() / 1e6, "mean": histogram.mean_ns() / 1e6}


def run(
    scenario: Scenario,
    folder: Path | None = None,
    processes: int = 1,
    locust: Sequence[str] = (),
    is_quiet: bool = True,
) -> Result:
    """Run a scenario; raw requests and Locust's log go to `folder`. Raises RunError when it cannot be."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="tutti-loadtest-") as own:
            return run(scenario, Path(own), processes, locust, is_quiet)
    folder.mkdir(parents=True, exist_ok=True)
    given, result, log = folder / "scenario.json", folder / "result.json", folder / "locust.log"
    given.write_text(scenario.model_dump_json())
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--scenario", str(given), "--result", str(result)]
    command += ["-u", str(processes), "-r", str(processes), "--stop-timeout", "1"]
    if "--autostart" not in locust:
        command += ["--headless"]
    elif "--web-host" not in locust:
        command += ["--web-host", "127.0.0.1"]
    if is_quiet:
        command += ["--only-summary", "--logfile", str(log)]
    if processes > 1:
        command += ["--processes", str(processes)]
    models = [payload.model for payload in scenario.payloads]
    with log.open("ab") as file, Sampler(scenario.target.metrics, models) as sampler:
        out: Any = {"stdout": file, "stderr": file} if is_quiet else {}
        began = time.time()
        done = subprocess.run([*command, *locust], check=False, cwd=ROOT, **out)
    if not result.is_file():
        tail = log.read_text(errors="replace")[-2000:] if is_quiet else ""
        raise RunError(f"Locust ended with status {done.returncode} and left no result: {tail}")
    workers = json.loads(result.read_text())["workers"]
    failed = [one["failed"] for one in workers if "failed" in one]
    if failed:
        raise RunError("; ".join(sorted(set(failed))))
    made = gather(scenario, [one["result"] for one in workers])
    made.server, made.began_at = list(sampler.rows), began
    made.raw = sorted(folder.glob("requests.*.parquet"))
    return made


def gather(scenario: Scenario, workers: Sequence[Mapping[str, Any]]) -> Result:
    """What the workers saw, added up."""
    made = Result(scenario)
    stages: Sequence[Stage | None] = scenario.stages or [None]
    for number, stage in enumerate(stages):
        seconds = stage.seconds if stage is not None else max((len(one["seconds"]) for one in workers), default=0)
        name = (stage.name if stage is not None else "trace") or f"stage {number + 1}"
        seen = StageSeen(name, float(seconds), 0.0)
        for one in workers:
            found = one["stages"].get(str(number))
            if found is None:
                continue
            for key in ("requests", "errors", "lost", "late", "unsent", "slow"):
                setattr(seen, key, getattr(seen, key) + found[key])
            seen.histogram.merge(Histogram.of_json(found["histogram"]))
        seen.rate = seen.requests / seconds if seconds else 0.0
        made.stages.append(seen)
    for one in workers:
        made.errors.update(one["errors"])
        made.reasons.update(one["reasons"])
        made.waited += one.get("waited", 0)
        made.cpu = max(made.cpu, one["cpu"])
        for name, value in one["lateness_ms"].items():
            made.lateness_ms[name] = max(made.lateness_ms.get(name, 0.0), value)
    length = max((len(one["seconds"]) for one in workers), default=0)
    for second in range(length):
        rows = [one["seconds"][second] for one in workers if second < len(one["seconds"])]
        histogram = Histogram()
        for row in rows:
            histogram.merge(Histogram.of_json(row["histogram"]))
        made.seconds.append(
            {"second": second, **{key: sum(row[key] for row in rows) for key in ("due", "answered", "errors")},
             "p50_ms": histogram.quantile_ns(0.5) / 1e6, "p99_ms": histogram.quantile_ns(0.99) / 1e6}
        )  # fmt: skip
    return made


def medians_by_address(
    raw: Sequence[Path], addresses: int, start_s: float, seconds: float, rounds: int
) -> list[list[float]]:
    """For each address, the median latency of each round in ms: a worker's requests go to the addresses in turns.

    nan for a round without an answer.
    """
    import pyarrow.parquet

    took: list[list[list[Any]]] = [[[] for _ in range(rounds)] for _ in range(addresses)]
    for path in raw:
        table: Any = pyarrow.parquet.read_table(path, columns=["scheduled_s", "done_s", "error"])
        due, done = table["scheduled_s"].to_numpy(), table["done_s"].to_numpy()
        is_good = np.array([not one for one in table["error"].to_pylist()], bool) & np.isfinite(done)
        number = np.floor((due - start_s) / seconds).astype(int)
        for address in range(addresses):
            own = np.zeros(len(due), bool)
            own[address::addresses] = True
            for index in range(rounds):
                took[address][index].append((done - due)[own & is_good & (number == index)])
    return [
        [float(np.median(found)) * 1e3 if len(found := np.concatenate(parts)) else float("nan") for parts in one]
        for one in took
    ]
