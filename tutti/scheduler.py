"""The shell over batching.py: gives batches to instances as they become free.

An instance executes one batch at a time, wherever it lives: a thread with a session, or a replica on another
machine. No thread and no task of its own: work moves on in the caller's thread and in the instances' callbacks.
"""

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from tutti.batching import Decision
from tutti.errors import Cancelled, InferError, Internal, Unavailable
from tutti.statistics import BatchTimes, ModelStatistics
from tutti.types import Call, Infer, InferResponse, Sink, now_ns, settle, settle_all

_log = logging.getLogger(__name__)

Timer = Callable[[float, Callable[[], None]], None]
"""`timer(delay_s, callback)` calls back once after a delay, from any thread. Thread-safe."""


class Backend(Protocol):
    """One model instance's way to execute. Called by one thread at a time."""

    def execute(self, calls: Sequence[Call]) -> Sequence[InferResponse | Exception | None]:
        """One answer per call, in order: an InferError fails only its own call. A raise fails them all.

        None means that the backend settles the call itself, now or later, from any thread.
        """

    def close(self) -> None: ...


class Instance(Protocol):
    """Executes one batch at a time: settles every call of it, then tells the scheduler `release`."""

    def start(self, batch: list[Call]) -> None:
        """Begin without blocking."""

    def close(self) -> None: ...


class Waiting(Protocol):
    """What a scheduler queues calls in: a BatchQueue, or one for sequences."""

    rows: int
    calls: int
    max_rows: int

    def has_room(self, call: Call) -> bool: ...
    def push(self, call: Call) -> int: ...
    def take(self, now_ns: int) -> Decision: ...
    def expire(self, now_ns: int) -> list[Call]: ...
    def drain(self) -> list[Call]: ...


class Scheduler:
    """An `Infer`: queues calls, and hands a batch to an instance whenever one is free to take it."""

    def __init__(self, name: str, waiting: Waiting, statistics: ModelStatistics, timer: Timer) -> None:
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
        expires_ns = 0
        with self._condition:
            for call in calls:
                if self._is_closing or not self._queue.has_room(call):
                    refused.append(call)
                else:
                    call_expires_ns = self._queue.push(call)
                    if call_expires_ns and (not expires_ns or call_expires_ns < expires_ns):
                        expires_ns = call_expires_ns
        if refused:
            self._refuse(refused)
        self._dispatch()
        if expires_ns:
            self._timer(max(0, expires_ns - now_ns()) / 1e9, self._expire)

    def queued_rows(self) -> int:
        return self._queue.rows

    def queued_calls(self) -> int:
        return self._queue.calls

    def release(self, instance: Instance) -> None:
        """The instance has settled its batch and is free again."""
        with self._condition:
            self._free.append(instance)
            self._condition.notify_all()
        self._dispatch()

    def next_batch(self, instance: Instance) -> list[Call]:
        """As `release`, for an instance that goes on in its own thread: its next batch, or [] and it is free."""
        with self._condition:
            decision = self._take()
            if not decision.batch:
                self._free.append(instance)
                self._condition.notify_all()
        self._settle_unserved(decision)
        return decision.batch

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
        # They refer to this: without the garbage collector, which comes late, the model's memory would stay.
        self._instances.clear()
        self._free.clear()

    def _dispatch(self) -> None:
        while True:
            with self._condition:
                if not self._free:
                    return
                decision = self._take()
                instance = self._free.pop() if decision.batch else None
            self._settle_unserved(decision)
            if instance is None:
                return
            instance.start(decision.batch)

    def _take(self) -> Decision:
        decision = self._queue.take(now_ns())
        if decision.wake_ns is not None and (self._wake_ns is None or decision.wake_ns < self._wake_ns):
            self._wake_ns = decision.wake_ns
            self._timer(max(0, decision.wake_ns - now_ns()) / 1e9, self._wake)
        return decision

    def _wake(self) -> None:
        with self._condition:
            self._wake_ns = None
        self._dispatch()

    def _expire(self) -> None:
        """Refuse what has waited for its timeout, though no instance is free."""
        with self._condition:
            expired = self._queue.expire(now_ns())
        self._settle_unserved(Decision([], [], None, expired))

    def _settle_unserved(self, decision: Decision) -> None:
        if decision.dropped:
            what = f"the request to model '{self._name}' was cancelled by its caller"
            self._fail(decision.dropped, Cancelled(what))
        if decision.expired:
            what = f"model '{self._name}': the request waited in the queue for its timeout"
            self._fail(decision.expired, Unavailable(what))

    def _refuse(self, calls: list[Call]) -> None:
        why = "is being unloaded" if self._is_closing else f"has a full queue ({self._queue.max_rows} rows)"
        self._fail(calls, Unavailable(f"model '{self._name}' {why}: the request was refused, try again later"))

    def _fail(self, calls: list[Call], error: InferError) -> None:
        self._statistics.record_failures(calls, now_ns())
        settle_all(calls, error)


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
        answers: Sequence[InferResponse | Exception | None]
        try:
            answers = self._backend.execute(batch)
        except Exception as error:
            _log.debug("instance %s failed a batch of %d", self._name, len(batch), exc_info=True)
            answers = [as_infer_error(self._name, error)] * len(batch)
        end_ns = now_ns()
        answered: list[Call] = []
        is_traced = False
        for call, answer in zip(batch, answers, strict=True):
            if answer is not None:
                call.answer = answer if isinstance(answer, InferResponse) else as_infer_error(self._name, answer)
                answered.append(call)
            is_traced = is_traced or call.trace is not None
        times = BatchTimes(start_ns, start_ns, end_ns, end_ns)
        self._statistics.record_batch(batch, times)
        if is_traced:
            trace(batch, times)
        try:
            if answered:
                settle(answered)
        except Exception:  # a broken sink must not end the instance
            _log.exception("instance %s: could not deliver answers", self._name)


def trace(batch: Sequence[Call], times: BatchTimes) -> None:
    """Tell the batch's traced calls when it was executed."""
    for call in batch:
        if call.trace is not None:
            call.trace.record("QUEUE_START", call.arrived_ns)
            call.trace.record("COMPUTE_START", times.start_ns)
            call.trace.record("COMPUTE_INPUT_END", times.infer_start_ns)
            call.trace.record("COMPUTE_OUTPUT_START", times.infer_end_ns)
            call.trace.record("COMPUTE_END", times.end_ns)


class InOrder:
    """An `Infer` that settles calls in the order they came, for `preserve_ordering`."""

    def __init__(self, infer: Infer) -> None:
        self._infer = infer
        self._lock = threading.Lock()
        self._waiting: deque[_Turn] = deque()

    def __call__(self, calls: Sequence[Call]) -> None:
        turns = [_Turn(call, call.sink) for call in calls]
        with self._lock:
            self._waiting.extend(turns)
        for turn in turns:
            turn.call.sink = _Waiter(self, turn)
        self._infer(calls)

    def settled(self, turn: "_Turn") -> None:
        """The turn's call has its answer: hand over what no earlier call holds up."""
        with self._lock:
            turn.is_answered = True
            while self._waiting and self._waiting[0].is_answered:
                ready = self._waiting.popleft()
                ready.call.sink = ready.sink
                settle([ready.call])  # under the lock: another thread must not overtake


class _Turn:
    __slots__ = ("call", "is_answered", "sink")

    def __init__(self, call: Call, sink: Sink) -> None:
        self.call = call
        self.sink = sink
        self.is_answered = False


class _Waiter:
    """The sink of one call that waits for its turn."""

    __slots__ = ("_order", "_turn")

    def __init__(self, order: InOrder, turn: _Turn) -> None:
        self._order = order
        self._turn = turn

    def settle(self, calls: Sequence[Call]) -> None:
        self._order.settled(self._turn)


def as_infer_error(name: str, error: Exception) -> InferError:
    """The error itself if it is an InferError, else an Internal one that names the instance."""
    if isinstance(error, InferError):
        return error
    return Internal(f"{name} failed: {type(error).__name__}: {error}")
