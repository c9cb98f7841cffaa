"""The shell over batching.py: gives batches to instances as they become free.

An instance executes one batch at a time, wherever it lives: a thread with a session, or a replica on another
machine. No thread and no task of its own: work moves on in the caller's thread and in the instances' callbacks.
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from tutti.batching import BatchQueue
from tutti.errors import Cancelled, InferError, Internal, Unavailable
from tutti.statistics import BatchTimes, ModelStatistics
from tutti.types import Call, InferRequest, InferResponse, now_ns, settle, settle_all

_log = logging.getLogger(__name__)

Timer = Callable[[float, Callable[[], None]], None]
"""`timer(delay_s, callback)` calls back once after a delay, from any thread. Thread-safe."""


class Backend(Protocol):
    """One model instance's way to execute. Called by one thread at a time."""

    def execute(self, requests: Sequence[InferRequest]) -> Sequence[InferResponse | Exception]:
        """One answer per request, in order: an InferError fails only its own request. A raise fails them all."""

    def close(self) -> None: ...


class Instance(Protocol):
    """Executes one batch at a time: settles every call of it, then tells the scheduler `release`."""

    def start(self, batch: list[Call]) -> None:
        """Begin without blocking."""

    def close(self) -> None: ...


class Scheduler:
    """An `Infer`: queues calls, and hands a batch to an instance whenever one is free to take it."""

    def __init__(self, name: str, waiting: BatchQueue, statistics: ModelStatistics, timer: Timer) -> None:
        self._name = name
        self._queue = waiting
        self._statistics = statistics
        self._timer = timer
        self._condition = threading.Condition()
        self._instances: list[Instance] = []
        self._free: list[Instance] = []
        self._wake_ns: int | None = None
        self._is_closing = False

    def add(self, instance: Instance) -> None:
        """Let an instance take batches from now on."""
        with self._condition:
            self._instances.append(instance)
        self.release(instance)

    def __call__(self, calls: Sequence[Call]) -> None:
        refused = []
        with self._condition:
            for call in calls:
                if self._is_closing or not self._queue.has_room(call):
                    refused.append(call)
                else:
                    self._queue.push(call)
        if refused:
            self._refuse(refused)
        self._dispatch()

    def queued_rows(self) -> int:
        return self._queue.rows

    def release(self, instance: Instance) -> None:
        """The instance has settled its batch and is free again."""
        with self._condition:
            self._free.append(instance)
            self._condition.notify_all()
        self._dispatch()

    def next_batch(self, instance: Instance) -> list[Call]:
        """As `release`, for an instance that goes on in its own thread: its next batch, or [] and it is free."""
        with self._condition:
            batch, dropped = self._take()
            if not batch:
                self._free.append(instance)
                self._condition.notify_all()
        self._drop(dropped)
        return batch

    def close(self, timeout_s: float = 30.0) -> None:
        """Refuse new calls, execute the waiting ones, close the instances. Past the timeout what waits is refused."""
        with self._condition:
            self._is_closing = True
            self._condition.wait_for(
                lambda: self._queue.rows == 0 and len(self._free) == len(self._instances), timeout_s
            )
            left = self._queue.drain()
        settle_all(left, Unavailable(f"model '{self._name}' is being unloaded"))
        for instance in self._instances:
            instance.close()

    def _dispatch(self) -> None:
        while True:
            with self._condition:
                if not self._free:
                    return
                batch, dropped = self._take()
                instance = self._free.pop() if batch else None
            self._drop(dropped)
            if instance is None:
                return
            instance.start(batch)

    def _take(self) -> tuple[list[Call], list[Call]]:
        decision = self._queue.take(now_ns())
        if decision.wake_ns is not None and (self._wake_ns is None or decision.wake_ns < self._wake_ns):
            self._wake_ns = decision.wake_ns
            self._timer(max(0, decision.wake_ns - now_ns()) / 1e9, self._wake)
        return decision.batch, decision.dropped

    def _wake(self) -> None:
        with self._condition:
            self._wake_ns = None
        self._dispatch()

    def _drop(self, calls: list[Call]) -> None:
        if calls:
            self._statistics.record_failures(calls, now_ns())
            settle_all(calls, Cancelled(f"the request to model '{self._name}' was cancelled by its caller"))

    def _refuse(self, calls: list[Call]) -> None:
        self._statistics.record_failures(calls, now_ns())
        why = "is being unloaded" if self._is_closing else f"has a full queue ({self._queue.max_rows} rows)"
        settle_all(calls, Unavailable(f"model '{self._name}' {why}: the request was refused, try again later"))


class ThreadInstance:
    """A backend in a thread of its own."""

    def __init__(self, name: str, backend: Backend, scheduler: Scheduler, statistics: ModelStatistics) -> None:
        self._name = name
        self._backend = backend
        self._scheduler = scheduler
        self._statistics = statistics
        self._inbox: queue.SimpleQueue[list[Call] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def start(self, batch: list[Call]) -> None:
        self._inbox.put(batch)

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join()
        self._backend.close()

    def _run(self) -> None:
        while (batch := self._inbox.get()) is not None:
            while batch:
                self._execute(batch)
                batch = self._scheduler.next_batch(self)

    def _execute(self, batch: list[Call]) -> None:
        start_ns = now_ns()
        try:
            answers = self._backend.execute([call.request for call in batch])
        except Exception as error:
            _log.debug("instance %s failed a batch of %d", self._name, len(batch), exc_info=True)
            answers = [as_infer_error(self._name, error)] * len(batch)
        end_ns = now_ns()
        for call, answer in zip(batch, answers, strict=True):
            call.answer = answer if isinstance(answer, InferResponse) else as_infer_error(self._name, answer)
        self._statistics.record_batch(batch, BatchTimes(start_ns, start_ns, end_ns, end_ns))
        try:
            settle(batch)
        except Exception:  # a broken sink must not end the instance
            _log.exception("instance %s: could not deliver answers", self._name)


def as_infer_error(name: str, error: Exception) -> InferError:
    """The error itself if it is an InferError, else an Internal one that names the instance."""
    if isinstance(error, InferError):
        return error
    return Internal(f"{name} failed: {type(error).__name__}: {error}")
