"""One run: Locust with the open-loop engine as a process, the server's statistics beside it, and what was seen."""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from tutti.console.progress import clock
from tutti.loadtest import server
from tutti.loadtest.advice import stopped_because
from tutti.loadtest.arrivals import length_s
from tutti.loadtest.errors import RunError
from tutti.loadtest.histogram import Histogram
from tutti.loadtest.process import stop
from tutti.loadtest.sampler import Sampler
from tutti.loadtest.scenario import Scenario, Stage
from tutti.loadtest.slo import Judgement, Seen, judge

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
# Locust's options that name files. Their paths are made absolute, since Locust runs in an empty folder of its own.
_FILES = ("--csv", "--html", "--json-file", "--logfile", "--config")
_LOOK_S = 0.25
# The scenario's name in that folder.
_GIVEN = "scenario.json"
Tell = Callable[[str, float], None]
"""(how far a run is, the seconds that are left of it) -> nothing."""


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
    # Why the run was ended before its end.
    stopped: str = ""

    @property
    def histogram(self) -> Histogram:
        """Of all stages."""
        merged = Histogram()
        for stage in self.stages:
            merged.merge(stage.histogram)
        return merged

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
        return judge(self.seen, self.scenario.slo, self.stopped)

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        histogram, seen = self.histogram, self.seen
        return {
            "scenario": self.scenario.as_json(),
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
    quantiles = {name: histogram.quantile_ns(share) / 1e6 for name, share in shares.items()}
    return {**quantiles, "max": histogram.max_ns() / 1e6, "mean": histogram.mean_ns() / 1e6}


def run(
    scenario: Scenario,
    folder: Path | None = None,
    processes: int = 1,
    locust: Sequence[str] = (),
    progress: Tell = lambda _text, _left_s: None,
) -> Result:
    """Run a scenario; raw requests and Locust's log go to `folder`. Raises RunError when it cannot be.

    `progress` is told, a few times a second, how far the run is and how many seconds are left.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="tutti-loadtest-") as temporary:
            return run(scenario, Path(temporary), processes, locust, progress)
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    result_file, told = folder / "result.json", folder / "progress.json"
    here = scenario.model_copy(update={"folder": scenario.folder.resolve()})
    (folder / "scenario.json").write_text(json.dumps(here.as_json()))
    for left in (result_file, told):  # of an earlier run into that folder
        left.unlink(missing_ok=True)
    command = [sys.executable, "-P", "-m", "locust", "-f", str(LOCUSTFILE), "--scenario", _GIVEN]
    command += ["--result", str(result_file), "--only-summary"]
    command += [*_workers(processes), *_page(locust), *_from_here(locust)]
    asked = {payload.model for payload in scenario.payloads}
    parts = server.parts(scenario) if scenario.target.metrics else []
    length = length_s(scenario)
    log = folder / "locust.log"
    with log.open("wb") as file, Sampler(scenario.target, asked, parts) as sampler:
        status = _follow(command, here, file, lambda: _tell(told, length, progress))
    workers = _reports(result_file, status, log)
    result = gather(scenario, workers)
    # Rows from before the first request could be due are dropped: that time is zero in all charts.
    result.server = [row for row in sampler.rows if row["at_s"] >= result.began_at]
    # Files of workers that this run has not are left of an earlier run.
    raw_files = (folder / f"requests.{number}.parquet" for number in range(len(workers)))
    result.raw = [path for path in raw_files if path.is_file()]
    return result


def _reports(path: Path, status: int, log: Path) -> list[dict[str, Any]]:
    """What each worker reports in Locust's result. Raises RunError when there is none, or a worker failed."""
    if not path.is_file():
        raise RunError(f"Locust ended with status {status} and left no result: {_last(log)}")
    workers = json.loads(path.read_text())["workers"]
    failed = sorted({worker["failed"] for worker in workers if "failed" in worker})
    if failed:
        raise RunError("; ".join(failed))
    return [worker["result"] for worker in workers]


def _workers(processes: int) -> list[str]:
    flags = ["-u", str(processes), "-r", str(processes), "--stop-timeout", "1"]
    return [*flags, "--processes", str(processes)] if processes > 1 else flags


def _page(locust: Sequence[str]) -> list[str]:
    if "--autostart" not in locust:
        return ["--headless"]
    return [] if "--web-host" in locust else ["--web-host", "127.0.0.1"]


def _from_here(locust: Sequence[str]) -> list[str]:
    """Locust's options with their files' paths made absolute."""
    words: list[str] = []
    for word in locust:
        name, equals, value = word.partition("=")
        if equals and name in _FILES:
            words.append(f"{name}={Path(value).resolve()}")
        else:
            words.append(str(Path(word).resolve()) if words and words[-1] in _FILES else word)
    return words


def _follow(command: Sequence[str], scenario: Scenario, log: IO[bytes], look: Callable[[], None]) -> int:
    """Run a command to its end, and `look` meanwhile; it ends with whoever waits for it.

    It runs in a folder that has the scenario, keys included, and nothing else: nobody else reads that, and it goes.
    """
    with tempfile.TemporaryDirectory(prefix="tutti-loadtest-") as folder:
        (Path(folder) / _GIVEN).write_text(scenario.model_dump_json())
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            while True:
                try:
                    return process.wait(_LOOK_S)
                except subprocess.TimeoutExpired:
                    look()
        finally:
            if process.poll() is None:
                stop(process, timeout_s=5.0)


def _tell(path: Path, length: float, progress: Tell) -> None:
    try:
        said = json.loads(path.read_text())
    except (OSError, ValueError):
        said = {}
    if "second" in said:
        left = max(0.0, length - said["second"])
        text = f"{said['answered']:,} answered, {said['errors']:,} errors"
        progress(f"{clock(min(length, said['second']))} of {clock(length)}, {text}", left)
    elif said.get("wanted", 1) > 1:
        progress(f"waiting for workers: {said['workers']} of {said['wanted']} are there", length)
    else:
        progress("the generator starts", length)


def _last(log: Path) -> str:
    """What Locust said last of an error, or at all."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    line = next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "it said nothing")
    return line.removeprefix("__main__.py: error: ")


def gather(scenario: Scenario, workers: Sequence[Mapping[str, Any]]) -> Result:
    """What the workers saw, added up."""
    result = Result(scenario)
    stages: Sequence[Stage | None] = scenario.stages or [None]
    result.stages = [_stage(number, stage, workers) for number, stage in enumerate(stages)]
    for worker in workers:
        result.errors.update(worker["errors"])
        result.reasons.update(worker["reasons"])
        result.waited += worker.get("waited", 0)
        if worker.get("stopped"):
            reason = worker["reasons"].get(worker["stopped"], "")
            result.stopped = stopped_because(worker["stopped"], reason)
        result.began_at = min(result.began_at or worker["began_at"], worker["began_at"])
        result.cpu = max(result.cpu, worker["cpu"])
        for name, value in worker["lateness_ms"].items():
            result.lateness_ms[name] = max(result.lateness_ms.get(name, 0.0), value)
    result.seconds = [_second(second, workers) for second in range(_length(workers))]
    return result


def _stage(number: int, stage: Stage | None, workers: Sequence[Mapping[str, Any]]) -> StageSeen:
    """What the workers saw of one stage; of a trace, where there is none."""
    last = _length(workers)
    seconds = stage.seconds if stage is not None else last
    if any(worker.get("stopped") for worker in workers):
        seconds = min(seconds, last)
    name = (stage.name if stage is not None else "trace") or f"stage {number + 1}"
    seen = StageSeen(name, float(seconds), 0.0)
    for worker in workers:
        counts = worker["stages"].get(str(number))
        if counts is None:
            continue
        for key in ("requests", "errors", "lost", "late", "unsent", "slow"):
            setattr(seen, key, getattr(seen, key) + counts[key])
        seen.histogram.merge(Histogram.of_json(counts["histogram"]))
    seen.rate = seen.requests / seconds if seconds else 0.0
    return seen


def _length(workers: Sequence[Mapping[str, Any]]) -> int:
    """Seconds of the worker that took longest."""
    return max((len(worker["seconds"]) for worker in workers), default=0)


def _second(second: int, workers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One second of the run, over the workers that were still at it."""
    rows = [worker["seconds"][second] for worker in workers if second < len(worker["seconds"])]
    histogram = Histogram()
    for row in rows:
        histogram.merge(Histogram.of_json(row["histogram"]))
    return {
        "second": second, **{key: sum(row[key] for row in rows) for key in ("due", "answered", "errors")},
        "p50_ms": histogram.quantile_ns(0.5) / 1e6, "p99_ms": histogram.quantile_ns(0.99) / 1e6,
    }  # fmt: skip


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
        is_good = np.array([not error for error in table["error"].to_pylist()], bool) & np.isfinite(done)
        number = np.floor((due - start_s) / seconds).astype(int)
        for address in range(addresses):
            of_address = np.zeros(len(due), bool)
            of_address[address::addresses] = True
            for index in range(rounds):
                took[address][index].append((done - due)[of_address & is_good & (number == index)])
    return [[_median_ms(parts) for parts in rounds_of_address] for rounds_of_address in took]


def _median_ms(parts: Sequence[Any]) -> float:
    seconds = np.concatenate(parts)
    return float(np.median(seconds)) * 1e3 if len(seconds) else float("nan")
