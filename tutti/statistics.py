"""Counts and times per model version, as Triton's statistics extension defines them. Counted once per batch.

Times are cumulative nanoseconds. Knows nothing of Prometheus or of any protocol.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tutti.errors import InferError
from tutti.types import Call


@dataclass(slots=True)
class Duration:
    """How often something happened, and the total nanoseconds it took."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        self.count += count
        self.ns += ns


@dataclass(slots=True)
class BatchTimes:
    """When one batch of requests passed each stage, monotonic nanoseconds."""

    start_ns: int
    infer_start_ns: int
    infer_end_ns: int
    end_ns: int


@dataclass(slots=True)
class Counts:
    """The statistics of one model version. `inferences` are rows, `executions` batches."""

    inferences: int = 0
    executions: int = 0
    last_inference_ms: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    batches: dict[int, list[Duration]] = field(default_factory=dict)


class ModelStatistics:
    """Thread-safe Counts of one model version."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts = Counts()

    def record_batch(self, calls: Sequence[Call], times: BatchTimes) -> None:
        """Count one executed batch whose calls all have their answers."""
        answered = [call for call in calls if not isinstance(call.answer, InferError)]
        n, rows = len(answered), sum(call.rows for call in answered)
        arrived = sum(call.arrived_ns for call in answered)
        stages = (
            times.infer_start_ns - times.start_ns,
            times.infer_end_ns - times.infer_start_ns,
            times.end_ns - times.infer_end_ns,
        )
        with self._lock:
            counts = self.counts
            counts.executions += 1
            if len(answered) != len(calls):
                failed = [call for call in calls if isinstance(call.answer, InferError)]
                counts.fail.add(sum(times.end_ns - call.arrived_ns for call in failed), len(failed))
            if not answered:
                return
            counts.inferences += rows
            counts.last_inference_ms = time.time_ns() // 1_000_000
            counts.success.add(times.end_ns * n - arrived, n)
            counts.queue.add(times.start_ns * n - arrived, n)
            counts.compute_input.add(stages[0] * n, n)
            counts.compute_infer.add(stages[1] * n, n)
            counts.compute_output.add(stages[2] * n, n)
            of_size = counts.batches.setdefault(rows, [Duration(), Duration(), Duration()])
            for duration, stage_ns in zip(of_size, stages, strict=True):
                duration.add(stage_ns)

    def record_failures(self, calls: Sequence[Call], now_ns: int) -> None:
        """Count calls that failed without being executed: refused, invalid or cancelled."""
        with self._lock:
            self.counts.fail.add(sum(max(0, now_ns - (call.arrived_ns or now_ns)) for call in calls), len(calls))

    def record_successes(self, calls: Sequence[Call], now_ns: int) -> None:
        """Count calls that succeeded without an execution of their own, as an ensemble's do."""
        with self._lock:
            self.counts.inferences += sum(call.rows for call in calls)
            self.counts.last_inference_ms = time.time_ns() // 1_000_000
            self.counts.success.add(sum(now_ns - call.arrived_ns for call in calls), len(calls))
