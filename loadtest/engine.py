"""One worker's shard of a run: sends each request when it is due, whatever became of those before it, and notes all.

    python -m tutti.loadtest.engine JOB.json

A process of its own, without gevent: Locust's worker starts it, tells it on its standard input the headers of requests
(keys are in no file that is left behind), and then when to begin, and reads its progress (a line of JSON each half
second) and its results. Latency counts from when a request was due, so that a server that stalls cannot stop the clock
by keeping clients waiting.
"""

import asyncio
import gc
import json
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from tutti.loadtest.arrivals import Schedule, schedule
from tutti.loadtest.clients import CLIENTS
from tutti.loadtest.errors import RunError, ScenarioError
from tutti.loadtest.histogram import Histogram
from tutti.loadtest.payloads import Message, messages
from tutti.loadtest.scenario import Scenario
from tutti.loadtest.server import metadata
from tutti.loadtest.shared import Region
from tutti.loadtest.timers import Alarm

_PROGRESS_S = 0.5
# Of requests that are due together, this many are sent before answers are looked at again.
_BURST = 32
# When this many at the beginning have all failed alike, the run is ended: the others would fail, too.
_FIRST = 20
# Seconds to wait for a model's metadata: all workers ask for it at once.
_METADATA_S = 10.0


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker is to do: its shard, and where the raw requests go."""

    scenario: Scenario
    shard: int
    shards: int
    raw: Path


class Shard:
    """The requests of one worker. Times are seconds of time.perf_counter() from the start."""

    def __init__(self, scenario: Scenario, schedule: Schedule, sent: Sequence[Message]) -> None:
        self.scenario = scenario
        self.schedule = schedule
        count = len(schedule)
        self._due_s: list[float] = schedule.due_s.tolist()
        self.sent = np.full(count, np.nan)
        self.done = np.full(count, np.nan)
        self.errors: Counter[str] = Counter()
        self.error_of: dict[int, str] = {}
        # What the server said with the first error of each kind.
        self.reasons: dict[str, str] = {}
        # What the first requests have all failed with, where they have.
        self.stopped = ""
        self._first_errors: Counter[str] = Counter()
        self._sending: asyncio.Task[None] | None = None
        self._in_flight = 0
        self._recent_s: list[float] = []
        self.cpu: list[float] = []
        self._start = 0.0
        self._start_at = 0.0
        self._left = count
        self._ended: asyncio.Event = asyncio.Event()
        self._client = CLIENTS[scenario.target.protocol](scenario.target, sent, self._answered, scenario.timeout_s)
        self._client.sent = self._note_sent

    async def run(self, begin: Callable[[], float]) -> None:
        """Until everything has been answered, or given up. `begin` says when to begin (time.time()); it may block."""
        await self._client.start()
        start_at = self._start_at = await asyncio.to_thread(begin)
        gc.collect()
        gc.freeze()
        gc.disable()  # a pause would look like the server's
        alarm = Alarm()
        self._start = time.perf_counter() + (start_at - time.time())
        watching = asyncio.create_task(self._watch(alarm))
        self._sending = asyncio.create_task(self._send_all(alarm))
        try:
            await asyncio.wait({self._sending})
            if not self._sending.cancelled():
                self._sending.result()
            if self._left and not self.stopped:
                async with asyncio.timeout(self.scenario.timeout_s + 5):
                    await self._ended.wait()
        except TimeoutError:
            pass
        finally:
            self._sending.cancel()
            watching.cancel()
            alarm.close()
            gc.enable()
            await self._client.close()

    async def _send_all(self, alarm: Alarm) -> None:
        due, payloads, start = self._due_s, self.schedule.payloads.tolist(), self._start
        number, count, send, clock = 0, len(due), self._client.send, time.perf_counter
        while number < count:
            if clock() - start < due[number]:
                self._client.prepare(number, payloads[number])
                await alarm.until(start + due[number])
            burst = min(count, number + _BURST)
            now = clock() - start
            while number < burst and due[number] <= now:
                send(number, payloads[number])
                number += 1
            await asyncio.sleep(0)

    def _note_sent(self, number: int) -> None:
        if self.sent[number] != self.sent[number]:  # not a number yet: the first time counts
            self.sent[number] = time.perf_counter() - self._start
            self._in_flight += 1

    def _answered(self, number: int, at_s: float, error: str, reason: str) -> None:
        done_s = at_s - self._start
        self.done[number] = done_s
        self._in_flight -= 1
        self._recent_s.append(done_s - self._due_s[number])
        if error:
            self.errors[error] += 1
            self.error_of[number] = error
            self.reasons.setdefault(error, reason)
            if number < _FIRST:
                self._note_first_error(error)
        self._left -= 1
        if not self._left:
            self._ended.set()

    def _note_first_error(self, error: str) -> None:
        self._first_errors[error] += 1
        if self._first_errors[error] == _FIRST < len(self.schedule) and self._sending is not None:
            self.stopped = error
            self._sending.cancel()
            self._ended.set()

    async def _watch(self, alarm: Alarm) -> None:
        """Progress for whoever started us; how busy we are; what waits too long."""
        last_cpu, last_s, last_errors = time.process_time(), time.perf_counter(), Counter[str]()
        while True:
            await asyncio.sleep(_PROGRESS_S)
            # Time spent awake only to be punctual is not load: a busy generator could do without it.
            now, cpu = time.perf_counter(), time.process_time() - alarm.awake_s
            self._client.expire(now)
            share = max(0.0, cpu - last_cpu) / max(1e-9, now - last_s)
            if now > self._start:
                self.cpu.append(share)
            last_cpu, last_s = cpu, now
            took, self._recent_s = self._recent_s, []
            progress = {
                "new": len(took),
                "errors": dict(self.errors - last_errors),
                "in_flight": self._in_flight,
                "ms": [round(value * 1e3, 3) for value in sorted(took)[:: max(1, len(took) // 200)]],
            }
            try:
                print(json.dumps({"progress": progress, "cpu": share}), flush=True)
            except BrokenPipeError:
                os._exit(1)  # whoever started us is gone, and nobody wants the load
            last_errors = self.errors.copy()

    def result(self) -> dict[str, Any]:
        """Counts and histograms by stage; what warmed up is left out."""
        latency_ns = (self.done - self.schedule.due_s) * 1e9
        late = self.sent - self.schedule.due_s > self.scenario.slo.late_s
        has_error = np.zeros(len(self.schedule), bool)
        has_error[list(self.error_of)] = True
        is_done, goal_ms = np.isfinite(self.done), self.scenario.slo.p99_ms
        # A run that was ended early counts what was answered, warm-up included: the rest tells nothing.
        counts = is_done if self.stopped else np.ones(len(self.schedule), bool)
        stages = np.maximum(self.schedule.stages, 0) if self.stopped else self.schedule.stages
        by_stage: dict[str, Any] = {}
        for stage in sorted(set(stages.tolist()) - {-1}):
            mine = (stages == stage) & counts
            good = mine & is_done & ~has_error
            histogram = Histogram()
            histogram.add(np.maximum(0, latency_ns[good]).astype(np.int64))
            by_stage[str(stage)] = {
                "requests": int(mine.sum()),
                "errors": int((mine & is_done & has_error).sum()),
                # They never got an answer: the goal counts them as errors.
                "lost": int((mine & ~is_done).sum()),
                "late": int((mine & late).sum()),
                "unsent": int((mine & np.isnan(self.sent)).sum()),
                "slow": int((latency_ns[good] > goal_ms * 1e6).sum()) if goal_ms is not None else 0,
                "histogram": histogram.as_json(),
            }
        return {
            "stages": by_stage,
            "errors": dict(Counter(error for number, error in self.error_of.items() if stages[number] >= 0)),
            "reasons": self.reasons,
            "stopped": self.stopped,
            "waited": self._client.waited,
            "cpu": max(self.cpu, default=0.0),
            "cpu_by_time": [round(value, 3) for value in self.cpu],
            "lateness_ms": _quantiles(self.sent - self.schedule.due_s),
            "began_at": self._start_at,
            "seconds": self._seconds(),
        }

    def _seconds(self) -> list[dict[str, Any]]:
        """A line for each second: sent, answered, errors, and the latency of what was due then."""
        last = int(max(float(np.nanmax(self.done, initial=0.0)), 0.0 if self.stopped else self.schedule.seconds)) + 1
        rows: list[dict[str, Any]] = []
        took_ms = (self.done - self.schedule.due_s) * 1e3
        due = self.schedule.due_s.astype(int)
        errors = np.zeros(len(self.schedule), bool)
        errors[list(self.error_of)] = True
        answered = np.bincount(self.done[np.isfinite(self.done)].clip(0).astype(int), minlength=last + 1)
        order = np.argsort(due, kind="stable")
        bounds = np.searchsorted(due[order], np.arange(last + 1))
        for second in range(last):
            requests = order[bounds[second] : bounds[second + 1]]
            good = requests[np.isfinite(took_ms[requests]) & ~errors[requests]]
            histogram = Histogram()
            histogram.add((took_ms[good] * 1e6).clip(0).astype(np.int64))
            rows.append(
                {"second": second, "due": len(requests), "answered": int(answered[second]),
                 "errors": int(errors[requests].sum()), "histogram": histogram.as_json()}
            )  # fmt: skip
        return rows

    def save(self, path: Path, shard: int) -> None:
        """Every request, as Parquet."""
        import pyarrow
        import pyarrow.parquet

        errors = [self.error_of.get(number, "") for number in range(len(self.schedule))]
        columns = {
            "scheduled_s": self.schedule.due_s, "sent_s": self.sent, "done_s": self.done, "stage": self.schedule.stages,
            "payload": self.schedule.payloads, "error": errors, "worker": np.full(len(self.schedule), shard, np.int16),
        }  # fmt: skip
        pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _quantiles(seconds: Any) -> dict[str, float]:
    known = seconds[np.isfinite(seconds)]
    if not len(known):
        return {}
    return {name: float(np.quantile(known, share)) * 1e3 for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}


def prepare(scenario: Scenario, region: Region | None = None) -> tuple[Schedule, list[Message]]:
    """The whole schedule, and all messages."""
    address = scenario.target.urls[0]
    sent, weights = messages(
        scenario, lambda model, version: metadata(scenario.target, address, model, version, _METADATA_S), region
    )
    return schedule(scenario, weights), sent


def run(job: Job) -> dict[str, Any]:
    """Send the shard and return what came of it."""
    region = Region(job.scenario.target) if job.scenario.target.shared_memory else None
    everything, sent = prepare(job.scenario, region)
    if region is not None:
        region.register()
    shard = Shard(job.scenario, everything.shard(job.shard, job.shards), sent)

    def begin() -> float:
        """All begin when the slowest is ready."""
        print(json.dumps({"ready": len(shard.schedule)}), flush=True)
        return float(sys.stdin.readline())

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(shard.run(begin))
    if region is not None:
        region.close()
    shard.save(job.raw, job.shard)
    return shard.result()


def main() -> int:
    document = json.loads(Path(sys.argv[1]).read_text())
    document["scenario"]["target"]["headers"] = json.loads(sys.stdin.readline())
    scenario = Scenario(**document["scenario"])
    # Each connection takes a file descriptor, and the soft limit is low.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else max(soft, 65_536), hard))
    job = Job(scenario, document["shard"], document["shards"], Path(document["raw"]))
    try:
        result = run(job)
    except (ScenarioError, RunError) as error:
        print(json.dumps({"failed": str(error)}), flush=True)
        return 1
    except Exception as error:
        print(json.dumps({"failed": f"{type(error).__name__}: {error}"}), flush=True)
        return 1
    print(json.dumps({"result": result}), flush=True)
    return 0


def enter() -> None:
    """Be this process."""
    status = main()
    sys.stdout.flush()
    os._exit(status)  # channels that are closed at interpreter exit may hang


if __name__ == "__main__":
    enter()
