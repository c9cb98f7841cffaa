"""Counts and times per model version, as Triton's statistics extension defines them. Counted once per batch.

Times are cumulative nanoseconds. Knows nothing of Prometheus or of any protocol.
"""

import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from tutti.core.errors import Cancelled, DeadlineExceeded, InferError, TooLate, Unavailable
from tutti.core.types import Call, Spent

# How many batches of one request wait to be counted together.
_MOST_SINGLES = 64


@dataclass(slots=True)
class Duration:
    """How often something happened, and the total nanoseconds it took."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        self.count += count
        self.ns += ns


# Upper bounds of the latency histograms' buckets, in nanoseconds: 0.25 ms to 60 s. Fixed, so that they aggregate.
BUCKETS_NS = tuple(
    int(ms * 1_000_000)
    for ms in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 125, 250, 500, 1000, 2000, 4000, 8000, 16000, 30000, 60000)
)


@dataclass(slots=True)
class Histogram:
    """Observations per bucket of BUCKETS_NS, the last one beyond them, and their sum in nanoseconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_NS) + 1))
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        """`count` observations of `ns` each."""
        self.counts[bisect_left(BUCKETS_NS, ns)] += count
        self.ns += ns * count


@dataclass(slots=True, eq=False)
class BatchTimes:
    """When one batch of requests passed each stage, monotonic nanoseconds; once it has been counted, its rows."""

    start_ns: int
    infer_start_ns: int
    infer_end_ns: int
    end_ns: int
    rows: int = 0
    replica: str = ""

    def spent(self, arrived_ns: int) -> Spent:
        """Where the time of one of its requests went."""
        queue_ns = max(0, self.start_ns - arrived_ns) if arrived_ns else 0
        return Spent(queue_ns, self.end_ns - self.start_ns, self.rows, replica=self.replica)


@dataclass(slots=True)
class StepCounts:
    """What a graph did not do for a step, or did for each item of its rows."""

    skipped_rows: int = 0
    shed_requests: int = 0
    items: int = 0


# Why requests fail, in Triton's words: by their models, by their callers, by queues and limits, or otherwise.
REASONS = ("BACKEND", "CANCELED", "OTHER", "REJECTED")


@dataclass(slots=True)
class Counts:
    """The statistics of one model version. `inferences` are rows, `executions` batches."""

    inferences: int = 0
    executions: int = 0
    # Of the failures: requests that missed their deadlines, those that were refused for them among them.
    late: int = 0
    last_inference_ms: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    fail_reasons: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    cache_hit: Duration = field(default_factory=Duration)
    cache_miss: Duration = field(default_factory=Duration)
    request_time: Histogram = field(default_factory=Histogram)
    queue_time: Histogram = field(default_factory=Histogram)
    batches: dict[int, list[Duration]] = field(default_factory=dict)
    steps: dict[str, StepCounts] = field(default_factory=dict)


class ModelStatistics:
    """Thread-safe Counts of one model version."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = Counts()
        # Batches of one request, not counted yet: (requests, rows, arrived, start, infer start, infer end, end).
        self._singles: deque[tuple[int, int, int, int, int, int, int]] = deque()

    @property
    def counts(self) -> Counts:
        if self._singles:
            self._count_singles()
        return self._counts

    def record_batch(self, calls: Sequence[Call], times: BatchTimes) -> None:
        """Count one executed batch, and give its calls the times.

        A call without an answer yet is counted as a success; one without rows, a sequence batcher's filler, not at all.
        """
        if len(calls) == 1 and calls[0].rows and not isinstance(calls[0].answer, InferError):
            call = calls[0]
            call.times = times
            times.rows = call.rows
            self._singles.append(
                (
                    call.requests, call.rows, call.arrived_ns, times.start_ns, times.infer_start_ns,
                    times.infer_end_ns, times.end_ns,
                )
            )  # fmt: skip
            if len(self._singles) >= _MOST_SINGLES:
                self._count_singles()
            return
        answered = [call for call in calls if call.rows and not isinstance(call.answer, InferError)]
        n, rows = sum([call.requests for call in answered]), sum([call.rows for call in answered])
        times.rows = rows
        arrived = sum([call.arrived_ns * call.requests for call in answered])
        stages = (
            times.infer_start_ns - times.start_ns,
            times.infer_end_ns - times.infer_start_ns,
            times.end_ns - times.infer_end_ns,
        )
        with self._lock:
            counts = self._counts
            counts.executions += 1
            if len(answered) != len(calls):
                failed = [call for call in calls if call.rows and isinstance(call.answer, InferError)]
                _add_failures(counts, failed, times.end_ns, is_executed=True)
                for call in failed:
                    call.times = times
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
            request_counts, queue_counts = counts.request_time.counts, counts.queue_time.counts
            last_ns = in_request = in_queue = -1
            for call in answered:
                call.times = times
                if call.arrived_ns != last_ns:  # what arrived together falls into the same buckets
                    last_ns = call.arrived_ns
                    in_request = bisect_left(BUCKETS_NS, times.end_ns - last_ns)
                    in_queue = bisect_left(BUCKETS_NS, times.start_ns - last_ns)
                request_counts[in_request] += call.requests
                queue_counts[in_queue] += call.requests
            counts.request_time.ns += times.end_ns * n - arrived
            counts.queue_time.ns += times.start_ns * n - arrived

    def _count_singles(self) -> None:
        """One by one they would cost a graph of quick steps a tenth of its time."""
        with self._lock:
            counts, singles = self._counts, self._singles
            requests, queues = counts.request_time.counts, counts.queue_time.counts
            executions = successes = rows_in_all = last_end_ns = 0
            total_ns = queued_ns = input_ns = infer_ns = output_ns = 0
            while singles:
                n, rows, arrived, start, infer_start, infer_end, end = singles.popleft()
                executions += 1
                successes += n
                rows_in_all += rows
                total_ns += (end - arrived) * n
                queued_ns += (start - arrived) * n
                input_ns += (infer_start - start) * n
                infer_ns += (infer_end - infer_start) * n
                output_ns += (end - infer_end) * n
                of_size = counts.batches.get(rows)
                if of_size is None:
                    of_size = counts.batches[rows] = [Duration(), Duration(), Duration()]
                of_size[0].add(infer_start - start)
                of_size[1].add(infer_end - infer_start)
                of_size[2].add(end - infer_end)
                requests[bisect_left(BUCKETS_NS, end - arrived)] += n
                queues[bisect_left(BUCKETS_NS, start - arrived)] += n
                last_end_ns = end
            if not executions:
                return
            counts.executions += executions
            counts.inferences += rows_in_all
            counts.success.add(total_ns, successes)
            counts.queue.add(queued_ns, successes)
            counts.compute_input.add(input_ns, successes)
            counts.compute_infer.add(infer_ns, successes)
            counts.compute_output.add(output_ns, successes)
            counts.request_time.ns += total_ns
            counts.queue_time.ns += queued_ns
            ago_ns = max(0, time.monotonic_ns() - last_end_ns)
            counts.last_inference_ms = max(counts.last_inference_ms, (time.time_ns() - ago_ns) // 1_000_000)

    def record_failures(self, calls: Sequence[Call], now_ns: int) -> None:
        """Count calls that failed without being executed: refused, invalid or cancelled."""
        with self._lock:
            _add_failures(self._counts, calls, now_ns)

    def record_successes(self, calls: Sequence[Call], now_ns: int) -> None:
        """Count calls that succeeded without an execution of their own, as an ensemble's do.

        As in Triton each is an execution; the time that its steps took, queues and all, counts as computing.
        """
        alike: dict[tuple[int, int, int], int] = {}
        for call in calls:  # what arrived together falls into one bucket
            key = (call.arrived_ns, call.rows, call.requests)
            alike[key] = alike.get(key, 0) + 1
        with self._lock:
            counts = self._counts
            counts.last_inference_ms = time.time_ns() // 1_000_000
            for (arrived_ns, rows, requests), count in alike.items():
                _add_successes(counts, rows, count, requests, now_ns - arrived_ns)

    def record_step(self, step: str, skipped: int, shed: int, items: int) -> None:
        """Count what a graph did not do, or did more than once, for a step: rows skipped or shed, items executed."""
        with self._lock:
            counts = self._counts.steps.setdefault(step, StepCounts())
            counts.skipped_rows += skipped
            counts.shed_requests += shed
            counts.items += items

    def record_cache(self, hits: Sequence[Call], misses: Sequence[Call], start_ns: int, end_ns: int) -> None:
        """Count look-ups in the response cache that took from `start_ns` to `end_ns` in all. A hit is a success."""
        each_ns = (end_ns - start_ns) // max(1, len(hits) + len(misses))
        with self._lock:
            counts = self._counts
            counts.cache_hit.add(each_ns * len(hits), len(hits))
            counts.cache_miss.add(each_ns * len(misses), len(misses))
            if hits:
                counts.last_inference_ms = time.time_ns() // 1_000_000
                counts.success.add(sum(end_ns - call.arrived_ns for call in hits), len(hits))
                for call in hits:
                    counts.request_time.add(end_ns - call.arrived_ns)


def _add_successes(counts: Counts, rows: int, count: int, requests: int, took_ns: int) -> None:
    """`count` calls of `rows` rows and `requests` requests each that took as long."""
    in_all, total_ns = requests * count, took_ns * count
    counts.inferences += rows * count
    counts.executions += count
    counts.success.add(took_ns * in_all, in_all)
    counts.request_time.add(took_ns, in_all)
    counts.queue.count += in_all
    counts.compute_input.count += in_all
    counts.compute_infer.add(took_ns * in_all, in_all)
    counts.compute_output.count += in_all
    of_size = counts.batches.get(rows)
    if of_size is None:
        of_size = counts.batches[rows] = [Duration(), Duration(), Duration()]
    of_size[0].count += count
    of_size[1].add(total_ns, count)
    of_size[2].count += count


def _reason(error: object, is_executed: bool) -> str:
    if isinstance(error, Cancelled):
        return "CANCELED"
    if is_executed:
        return "BACKEND"
    return "REJECTED" if isinstance(error, Unavailable | DeadlineExceeded) else "OTHER"


def _add_failures(counts: Counts, calls: Sequence[Call], now_ns: int, is_executed: bool = False) -> None:
    calls = [call for call in calls if not call.is_trial]
    if not calls:
        return
    waited_ns = sum([max(0, now_ns - (call.arrived_ns or now_ns)) * call.requests for call in calls])
    counts.late += sum([call.requests for call in calls if isinstance(call.answer, DeadlineExceeded | TooLate)])
    counts.fail.add(waited_ns, sum([call.requests for call in calls]))
    for call in calls:
        counts.fail_reasons[_reason(call.answer, is_executed)] += call.requests
