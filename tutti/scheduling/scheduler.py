"""The shell over batching.py: gives batches to instances as they become free.

An instance executes one batch at a time, wherever it lives: a thread with a session, or a replica on another
machine. No thread and no task of its own: work moves on in the caller's thread and in the instances' callbacks.
What executions took before decides what can still be done in time, which of several kinds of instances takes a batch,
and whether it is worth a thread.
"""

import contextlib
import logging
import math
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Protocol

from tutti.core.errors import Cancelled, DeadlineExceeded, InferError, Internal, OutOfMemory, TooLate, Unavailable
from tutti.core.types import Call, Infer, InferResponse, Sink, Spent, now_ns, settle, settle_all
from tutti.observing.statistics import BatchTimes, ModelStatistics
from tutti.scheduling.batching import BatchLimit, Cut, Decision, Returns
from tutti.scheduling.cost import Costs, LatencyModel

_log = logging.getLogger(__name__)

Timer = Callable[[float, Callable[[], None]], None]
"""`timer(delay_s, callback)` calls back once after a delay, from any thread. Thread-safe."""


# An execution that is known to take no more of the processor than this runs in the thread that brings the calls: a
# hand-over between threads, and their quarrel over the interpreter's lock, would cost more.
INLINE_NS = 250_000
# A batch that has been executed for so long is taken to be stuck.
HANG_S = 60.0
# How long what waits may take when its model is closed.
CLOSE_S = 30.0
_MOMENT_S = 1.0
MAX_INLINE_NS = 4_000_000
# Steps of an ensemble that run so call each other: not without end.
MAX_INLINE_DEPTH = 4
# What is known to be quick is not asked, and not measured, every time.
_LOOK_EVERY = 32
_LEARN_EVERY = 4
_MAX_QUICK = 1024
# Of very many free instances so many, at random, are compared.
_MOST_COMPARED = 16
# One that is not preferred helps out where the others would need so many times as long as it does.
_PATIENCE = 3
# One looks whether a busy instance is free when it ought to be, but no more often than this.
_LOOK_AGAIN_S = 0.002
# Clients that are expected back at once are given so long.
_LEAST_PATIENCE_NS = 100_000
# After an execution of this length the next one begins before the answers are delivered.
PIPELINE_NS = 500_000


Answers = Sequence[InferResponse | Exception | None]
Executed = Answers | Callable[[], Answers]


class Backend(Protocol):
    """One model instance's way to execute. Called by one thread at a time.

    `runs_inline`: execute waits for nothing but the processor, so that any thread may call it. `kind` is equal for
    instances that take the same time.
    """

    runs_inline: bool
    kind: str

    def execute(self, calls: Sequence[Call]) -> Executed:
        """One answer per call, in order: an InferError fails only its own call. A raise fails them all.

        None means that the backend settles the call itself, now or later, from any thread. OutOfMemory, raised, means
        that fewer calls at a time might fit. Where making the answers takes time of its own, a function that makes
        them: it is called once, by any thread, maybe while the next batch executes.
        """

    def close(self) -> None: ...


@contextlib.contextmanager
def undone(loaded: Sequence[Backend]) -> Iterator[None]:
    """Where this fails, whatever raises it, nothing stays of what is loaded until then."""
    try:
        yield
    except BaseException:
        for backend in loaded:
            try:
                backend.close()
            except Exception:  # the others are to be closed, too
                _log.exception("what was loaded could not be closed")
        raise


class Instance(Protocol):
    """Executes one batch at a time: settles every call of it, then tells the scheduler `release`.

    Instances that take the same time share their `costs`, and record in it what they execute. Those of the lowest
    `rank` are preferred: others help out. One may have a `cut` (batching.py), which says where its batches end.
    """

    costs: Costs
    rank: int

    def ahead_ns(self, at_ns: int) -> int:
        """How long it will take to begin, since something else is before it."""

    def start(self, batch: list[Call]) -> None:
        """Begin without blocking for long."""

    def close(self) -> None: ...


class Turn(Protocol):
    """An instance's right to execute, where instances share resources that do not suffice for all."""

    def begin(self) -> None:
        """Wait for it."""

    def end(self, goes_on: bool = False) -> None:
        """Give it up; an instance that `goes_on` asks with this for the next."""

    def close(self) -> None: ...


class Waiting(Protocol):
    """What a scheduler queues calls in: a BatchQueue, or one for sequences."""

    rows: int
    calls: int
    max_rows: int
    limit: BatchLimit
    configured_rows: int
    soonest_ns: int
    is_eager: bool

    def has_room(self, call: Call) -> bool: ...
    def rows_ahead(self, call: Call) -> int: ...
    def batch_rows(self) -> int: ...
    def may_grow(self) -> bool: ...
    def more(self, key: Hashable, rows: int) -> Decision: ...
    def push(self, call: Call) -> int: ...
    def take(self, now_ns: int, costs: Costs | None = None, cut: Cut | None = None) -> Decision: ...
    def expire(self, now_ns: int) -> list[Call]: ...
    def drain(self) -> list[Call]: ...


class Scheduler:
    """An `Infer`: queues calls, and hands a batch to an instance whenever one is free to take it."""

    def __init__(
        self, name: str, waiting: Waiting, statistics: ModelStatistics, timer: Timer, spill: float = 0.0
    ) -> None:
        """`spill` is which share of the instances that are not preferred may help out while preferred ones are busy."""
        self._spill = spill
        self._best_rank = 0
        # Instances that were removed while they executed.
        self._removed: set[int] = set()
        self._name = name
        self._queue = waiting
        self._statistics = statistics
        self._timer = timer
        self._lock = threading.RLock()
        self._condition = threading.Condition(self._lock)
        self._instances: list[Instance] = []
        self._free: list[Instance] = []
        # What each busy instance executes: (since when, of which key, how many rows).
        self._busy: dict[int, tuple[int, Hashable, int]] = {}
        self._is_mixed = False
        # Set once an execution was long enough for waiting to be worth a thought.
        self._returns: Returns | None = None
        # How many rows wake the instance that waits for them.
        self._wanted_rows = 0
        self._when_back: Callable[[], None] | None = None
        self._wake_ns: int | None = None
        self._expire_ns: int | None = None
        self._is_closing = False

    def add(self, instance: Instance) -> None:
        """Let an instance take batches from now on."""
        with self._lock:
            self._instances.append(instance)
            self._rank()
        self.release(instance)

    def remove(self, instance: Instance) -> None:
        """Give an instance no more batches; one that it executes goes on."""
        with self._lock:
            if instance not in self._instances:  # it has been closed with all others
                return
            self._instances.remove(instance)
            if instance in self._free:
                self._free.remove(instance)
            else:
                self._removed.add(id(instance))
            self._rank()
        self._dispatch()  # what waited for it, rather than for another, need not any longer

    def refuse_waiting(self, error: InferError) -> None:
        """Settle what waits with an error."""
        waiting = self.take_waiting()
        if waiting:
            self._fail(waiting, error)

    def take_waiting(self) -> list[Call]:
        """What waits, which somebody else is to execute."""
        with self._lock:
            return self._queue.drain()

    def _rank(self) -> None:
        self._is_mixed = len({id(one.costs) for one in self._instances}) > 1
        self._best_rank = min((one.rank for one in self._instances), default=0)

    def __call__(self, calls: Sequence[Call]) -> None:
        if len(calls) == 1 and self._start_at_once(calls[0]):
            return
        refused: list[Call] = []
        late: list[tuple[Call, InferError]] = []
        expires_ns = 0
        back: Callable[[], None] | None = None
        with self._lock:
            forecast: Forecast | None = None
            for call in calls:
                if self._is_closing or not self._queue.has_room(call):
                    refused.append(call)
                    continue
                if call.deadline_ns:
                    forecast = forecast or self._forecast()
                    needed_ns = forecast.needed_ns(call, self._queue.rows_ahead(call))
                    if needed_ns > call.deadline_ns - forecast.now_ns:
                        late.append((call, _too_late(self._name, call, forecast.now_ns, needed_ns)))
                        continue
                call_expires_ns = self._queue.push(call)
                if call_expires_ns and (not expires_ns or call_expires_ns < expires_ns):
                    expires_ns = call_expires_ns
            expires_ns = self._set_alarm(expires_ns)
            if self._returns is not None:
                self._returns.arrived(now_ns(), sum([call.rows for call in calls]))
                if self._wanted_rows and self._queue.rows >= self._wanted_rows:
                    self._condition.notify_all()
                    back = self._when_back
        if refused:
            self._refuse(refused)
        for call, error in late:
            self._fail([call], error)
        if back is not None:
            self._are_back(back)
        self._dispatch()
        if expires_ns:
            self._timer(max(0, expires_ns - now_ns()) / 1e9, self._expire)

    def _start_at_once(self, call: Call) -> bool:
        """Give a call that finds nobody before it to a free instance, as `_dispatch` would."""
        with self._lock:
            waiting = self._queue
            if not self._free or waiting.rows or not waiting.is_eager or self._is_mixed or self._is_closing:
                return False
            if call.deadline_ns or call.is_cancelled or self._returns is not None or call.rows > waiting.batch_rows():
                return False
            instance = self._free.pop()
            self._busy[id(instance)] = now_ns(), call.key, call.rows
        instance.start([call])
        if self._queue.rows:
            self._dispatch()
        return True

    def executing(self, at_ns: int) -> list[tuple[float, bool]]:
        """For how long each instance has executed its batch, 0 where it has none; and whether it is stuck with it."""
        with self._lock:
            instances = list(self._instances)
            begun = [self._busy.get(id(instance), (at_ns,))[0] for instance in instances]
        taken_s = [max(0, at_ns - since_ns) / 1e9 for since_ns in begun]
        return [
            (seconds, seconds > (getattr(instance, "hang_s", None) or HANG_S))
            for instance, seconds in zip(instances, taken_s, strict=True)
        ]

    def queued_rows(self) -> int:
        return self._queue.rows

    def queued_calls(self) -> int:
        return self._queue.calls

    def release(self, instance: Instance) -> None:
        """The instance has settled its batch and is free again."""
        with self._lock:
            self._set_free(instance)
        self._dispatch()

    def next_batch(self, instance: Instance) -> list[Call]:
        """As `release`, for an instance that goes on in its own thread: its next batch, or [] and it is free."""
        with self._lock:
            if not self._queue.rows:
                self._set_free(instance)
                return []
            is_left = self._is_mixed and self._better_waits(instance)
            decision = Decision([]) if is_left else self._take(instance)
            if not decision.batch:
                self._set_free(instance)
        self._settle_unserved(decision)
        return decision.batch

    def answers(self, rows: int, took_ns: int) -> None:
        """A batch that took long gets its answers now."""
        with self._lock:
            if self._returns is None:
                self._returns = Returns()
            self._returns.answered(now_ns(), rows, took_ns)

    def has_full_batch(self) -> bool:
        """Whether as many rows wait as a batch takes. Takes no lock: it may be asked by who is asked under one."""
        return self._queue.rows >= self._queue.batch_rows()

    def gathers(self, executing_rows: int, idle_ns: int, model: LatencyModel) -> bool:
        """Whether an instance that could take its next batch is to wait for the clients of what it executes."""
        with self._lock:
            if self._returns is None or self._is_closing or len(self._instances) > 1 or not self._queue.may_grow():
                return False
            limit = self._queue.batch_rows()
            return self._returns.pays(self._queue.rows, executing_rows, limit, idle_ns, model)

    def when_back(self, callback: Callable[[], None]) -> None:
        """Call back once, when the clients answered last have asked again, or take longer than they use to."""
        with self._lock:
            returns = self._returns
            coming = returns.coming(self._queue.batch_rows()) if returns is not None else 0
            patience_ns = int(returns.delay_ns * 1.5) + _LEAST_PATIENCE_NS if returns is not None else 0
            if coming and not self._is_closing:
                self._wanted_rows = self._queue.rows + coming
                self._when_back = callback
                self._timer(patience_ns / 1e9, lambda: self._are_back(callback))
                return
        callback()

    def _are_back(self, callback: Callable[[], None]) -> None:
        with self._lock:
            if self._when_back is not callback:
                return
            self._when_back = None
            self._wanted_rows = 0
        callback()

    def top_up(self, instance: Instance, batch: list[Call]) -> int:
        """Add calls that came meanwhile to a batch that has not begun; returns how long to wait for more, ns."""
        key = batch[0].key
        rows = sum([call.rows for call in batch])
        with self._lock:
            if self._returns is None or self._is_closing or len(self._instances) > 1:
                return 0
            limit = self._queue.batch_rows()
            decision = self._queue.more(key, limit - rows)
            batch += decision.batch
            rows += sum([call.rows for call in decision.batch])
            wait_ns = 0
            if rows < limit and self._queue.may_grow():
                wait_ns = self._returns.wait_ns(now_ns(), rows, limit, instance.costs.of(key))
            self._wanted_rows = self._returns.coming(limit - rows) if wait_ns else 0
        self._settle_unserved(decision)
        return wait_ns

    def wait_for_more(self, timeout_ns: int) -> None:
        """Until all that top_up expected has come."""
        with self._lock:
            if self._wanted_rows:
                self._condition.wait(timeout_ns / 1e9)
                self._wanted_rows = 0

    def ran_out_of_memory(self, rows: int) -> None:
        """A batch of `rows` rows was too large: make smaller ones for a while."""
        with self._lock:
            self._queue.limit.failed(rows)
            most = self._queue.limit.rows
        _log.warning("model '%s': out of memory with %d rows: batches of at most %s", self._name, rows, most)

    def limit_batches(self, rows: int) -> None:
        """Make batches of at most so many rows, whatever the queue allows."""
        self._queue.limit.rows = rows

    def executed(self, batch: Sequence[Call]) -> None:
        """A batch succeeded."""
        if self._queue.limit.rows is not None:
            with self._lock:
                self._queue.limit.succeeded(sum([call.rows for call in batch]), self._queue.configured_rows)

    def close(self, timeout_s: float | None = None) -> None:
        """Refuse new calls, execute the waiting ones, close the instances.

        Past the timeout, CLOSE_S or a moment where all instances are stuck, what waits is refused.
        """
        if timeout_s is None:
            executing = self.executing(now_ns())
            is_stuck = bool(executing) and all(is_stuck for _, is_stuck in executing)
            timeout_s = _MOMENT_S if is_stuck else CLOSE_S
        with self._lock:
            self._is_closing = True
            self._condition.wait_for(lambda: self._queue.rows == 0 and not self._busy, timeout_s)
            left = self._queue.drain()
        settle_all(left, Unavailable(f"model '{self._name}' is being unloaded"))
        for instance in self._instances:
            try:
                instance.close()
            except Exception:  # the others are to be closed, too
                _log.exception("model '%s': an instance could not be closed", self._name)
        # They refer to this: without the garbage collector, which comes late, the model's memory would stay.
        self._instances.clear()
        self._free.clear()

    def _dispatch(self) -> None:
        while self._queue.rows:
            with self._lock:
                instance = self._choose()
                if instance is None:
                    if self._free:
                        self._look_again()
                    return
                decision = self._take(instance)
                if decision.batch:
                    self._free.remove(instance)
            self._settle_unserved(decision)
            if not decision.batch:
                return
            instance.start(decision.batch)

    def _choose(self) -> Instance | None:
        """The free instance that takes the next batch; None where none is, or a busy one would be done earlier."""
        if not self._free:
            return None
        if not self._is_mixed or not self._queue.rows:
            return self._free[-1]
        rows = min(self._queue.rows, self._queue.batch_rows())
        now = now_ns()
        free = self._free if len(self._free) <= _MOST_COMPARED else random.sample(self._free, _MOST_COMPARED)
        quickest = min(free, key=lambda one: (one.rank, one.ahead_ns(now) + one.costs.of(None).mean_ns(rows)))
        if quickest.rank > self._best_rank and not self._may_spill(quickest, rows):
            return None
        return None if self._better_waits(quickest) else quickest

    def _may_spill(self, instance: Instance, rows: int) -> bool:
        """Whether one that is not preferred may help out: within its share, and of those not known one at a time."""
        others = [one for one in self._instances if one.rank > self._best_rank]
        busy = sum(id(one) in self._busy for one in others)
        if not instance.costs.of(None).mean_ns(rows):
            return bool(self._spill) and not busy and self._queue.rows > self._queue.batch_rows()
        return busy < self._spill * len(others)

    def _look_again(self) -> None:
        """What waits for a busy instance, though another is free, is looked at again when that one ought to be done."""
        soonest = min((until_ns for one in self._instances if (until_ns := self._until_ns(one))), default=0)
        if soonest and (self._wake_ns is None or soonest < self._wake_ns):
            self._wake_ns = soonest
            self._timer(max(_LOOK_AGAIN_S, (soonest - now_ns()) / 1e9), self._wake)

    def _better_waits(self, instance: Instance) -> bool:
        """Whether another instance, though busy, will have served all that waits before this one served a batch."""
        most = self._queue.batch_rows()
        rows = min(self._queue.rows, most)
        mean_ns = instance.costs.of(None).mean_ns(rows)
        if not mean_ns:
            return False  # it is tried
        patience = 1 if instance.rank == self._best_rank else _PATIENCE
        own_ns = now_ns() + patience * mean_ns
        rounds = -(-self._queue.rows // most)
        return any(
            until_ns + rounds * others_ns < own_ns
            for one in self._instances
            if one is not instance
            and (others_ns := one.costs.of(None).mean_ns(rows))
            and (until_ns := self._until_ns(one))
        )

    def _until_ns(self, instance: Instance) -> int:
        """When a busy instance is expected to be free; 0 where it is."""
        busy = self._busy.get(id(instance))
        if busy is None:
            return 0
        start_ns, key, rows = busy
        mean_ns = instance.costs.of(key).mean_ns(rows)
        late_ns = now_ns() - start_ns - mean_ns if mean_ns else 0
        # What is late already may be late for as long again: it may be stuck.
        return start_ns + mean_ns + 2 * max(0, late_ns)

    def _take(self, instance: Instance) -> Decision:
        now = now_ns()
        decision = self._queue.take(now, instance.costs, getattr(instance, "cut", None))
        if decision.batch:
            begin_ns = now + instance.ahead_ns(now)
            self._busy[id(instance)] = begin_ns, decision.batch[0].key, sum([call.rows for call in decision.batch])
        elif decision.wake_ns is not None and (self._wake_ns is None or decision.wake_ns < self._wake_ns):
            self._wake_ns = decision.wake_ns
            self._timer(max(0, decision.wake_ns - now) / 1e9, self._wake)
        return decision

    def _set_free(self, instance: Instance) -> None:
        self._busy.pop(id(instance), None)
        if id(instance) in self._removed:
            self._removed.remove(id(instance))
        else:
            self._free.append(instance)
        if self._is_closing:
            self._condition.notify_all()

    def _wake(self) -> None:
        with self._lock:
            self._wake_ns = None
        self._dispatch()

    def _forecast(self) -> "Forecast":
        now = now_ns()
        busy = [(self._begins_ns(one, now), one.costs) for one in self._instances if one.rank == self._best_rank]
        return Forecast(now, busy, self._queue.batch_rows())

    def _begins_ns(self, instance: Instance, at_ns: int) -> int:
        """When an instance is expected to begin with another batch; 0 where it begins at once.

        One that takes a batch before the last one has ended is free, but not idle.
        """
        until_ns = self._until_ns(instance)
        ahead_ns = 0 if until_ns else instance.ahead_ns(at_ns)
        return until_ns or (at_ns + ahead_ns if ahead_ns else 0)

    def _set_alarm(self, expires_ns: int) -> int:
        """When to look for calls whose time is up; 0 when a look is due before."""
        if not expires_ns or (self._expire_ns is not None and self._expire_ns <= expires_ns):
            return 0
        self._expire_ns = expires_ns
        return expires_ns

    def _expire(self) -> None:
        """Refuse what has waited for its timeout, though no instance is free."""
        with self._lock:
            self._expire_ns = None
            expired = self._queue.expire(now_ns())
            expires_ns = self._set_alarm(self._queue.soonest_ns)
        self._settle_unserved(Decision([], [], None, expired))
        if expires_ns:
            self._timer(max(0, expires_ns - now_ns()) / 1e9, self._expire)

    def _settle_unserved(self, decision: Decision) -> None:
        if decision.dropped:
            what = f"the request to model '{self._name}' was cancelled by its caller"
            self._fail(decision.dropped, Cancelled(what))
        now = now_ns()
        for call in decision.expired:
            call.times = Spent(now - call.arrived_ns)
            if call.expires_ns and call.expires_ns <= now:
                what = f"model '{self._name}': the request waited in the queue for its timeout"
                self._fail([call], Unavailable(what))
            else:
                what = f"model '{self._name}': the request's deadline passed, or came too near, while it waited"
                self._fail([call], DeadlineExceeded(what))

    def _refuse(self, calls: list[Call]) -> None:
        why = "is being unloaded" if self._is_closing else f"has a full queue ({self._queue.max_rows} rows)"
        self._fail(calls, Unavailable(f"model '{self._name}' {why}: the request was refused, try again later"))

    def _fail(self, calls: list[Call], error: InferError) -> None:
        for call in calls:
            call.answer = error
        self._statistics.record_failures(calls, now_ns())
        if calls:
            settle(calls)


class ThreadInstance:
    """A backend in a thread of its own, or in its callers' where that is quicker."""

    def __init__(
        self,
        name: str,
        backend: Backend,
        scheduler: Scheduler,
        statistics: ModelStatistics,
        costs: Costs | None = None,
        turn: Turn | None = None,
    ) -> None:
        """With `turn` it executes when it is its turn, in its thread only."""
        self._name = name
        self._turn = turn
        self._backend = backend
        self._device: str = getattr(backend, "device", "cpu")
        self._scheduler = scheduler
        self._statistics = statistics
        self.rank = 0
        self.costs = costs or Costs()
        # What its executions take of the processor: unlike their duration, no other thread can lengthen it.
        self._cpu = Costs()
        # What was quick the last time one looked, and how many executions until one looks, and learns, again.
        self._quick: dict[tuple[Hashable, int], int] = {}
        # What a batch may take before it counts as stuck, seconds; None: HANG_S.
        self.hang_s: float | None = getattr(backend, "hang_s", None)
        self._inbox: queue.SimpleQueue[list[Call] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[list[Call], Executed, BatchTimes] | None] = queue.SimpleQueue()
        # Batches that are in its threads, and since when: whoever takes one out settles its calls.
        self._held: dict[int, tuple[list[Call], int]] = {}
        self._is_abandoned = False
        # Whether its thread has come to its end: who comes first, that or its being abandoned, is told the other by it.
        self._has_left = False
        self._leaving = threading.Lock()
        self._deliverer: threading.Thread | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def ahead_ns(self, at_ns: int) -> int:
        """It begins at once."""
        return 0

    def start(self, batch: list[Call]) -> None:
        if self._may_run_here(batch):
            _here.depth = getattr(_here, "depth", 0) + 1
            try:
                self._deliver(batch, *self._execute(batch))
            finally:
                _here.depth -= 1
            batch = self._scheduler.next_batch(self)  # others' calls, by now: not for this thread to serve
        if batch:
            self._inbox.put(batch)

    def close(self) -> None:
        """Let it end. One that has executed a batch for longer than it may is abandoned."""
        self._inbox.put(None)
        now = now_ns()
        begun_ns = min((since_ns for _, since_ns in list(self._held.values())), default=now)
        limit_s = self.hang_s or HANG_S
        left_s = max(_MOMENT_S, limit_s - (now - begun_ns) / 1e9)
        self._thread.join(None if limit_s == math.inf else left_s)
        with self._leaving:
            self._is_abandoned = not self._has_left
        if self._is_abandoned:
            self._abandon()
            return
        if self._deliverer is not None:
            self._done.put(None)
            self._deliverer.join(HANG_S)
        if self._turn is not None:
            self._turn.close()
        self._backend.close()

    def _abandon(self) -> None:
        """Answer the callers of what is stuck. Its thread cannot be ended: should it come back, it closes the backend.

        A backend that can give up what it waits for, as a process of its own, does.
        """
        _log.error("instance %s: its batch does not end, and it is abandoned", self._name)
        limit_s = self.hang_s or HANG_S
        error = Internal(f"{self._name} had executed the request for {limit_s:g} s or more, and was abandoned")
        for key in list(self._held):
            held = self._held.pop(key, None)
            if held is not None:
                unanswered = [call for call in held[0] if call.answer is None]  # the backend may have settled some
                try:
                    if unanswered:
                        settle_all(unanswered, error)
                except Exception:
                    _log.exception("instance %s: could not deliver errors", self._name)
                for call in held[0]:  # the backend may settle some itself, should it come back
                    call.is_cancelled, call.sink = True, _NOBODY
                    if call.emit is not None:
                        call.emit = _emit_to_nobody
        if self._turn is not None:
            self._turn.close()
        give_up = getattr(self._backend, "give_up", None)
        if give_up is not None:
            give_up()

    def _may_run_here(self, batch: list[Call]) -> bool:
        if not self._backend.runs_inline or self._turn is not None or getattr(_here, "depth", 0) >= MAX_INLINE_DEPTH:
            return False
        key = batch[0].key
        rows = batch[0].rows if len(batch) == 1 else sum([call.rows for call in batch])
        left = self._quick.get((key, rows), 0)
        if left:
            self._quick[key, rows] = left - 1
            return True
        if not 0 < self._cpu.of(key).tail_ns(rows) <= INLINE_NS:
            return False
        if self.costs.of(key).mean_ns(rows) > MAX_INLINE_NS:  # it may wait for threads of its own
            return False
        if len(self._quick) >= _MAX_QUICK:
            self._quick.clear()
        self._quick[key, rows] = _LOOK_EVERY
        return True

    def _run(self) -> None:
        try:
            while (batch := self._inbox.get()) is not None:
                while batch:
                    self._held[id(batch)] = batch, now_ns()
                    batch = self._execute_and_go_on(batch)
        finally:
            with self._leaving:
                self._has_left = True
            if self._is_abandoned:
                self._backend.close()

    def _execute_and_go_on(self, batch: list[Call]) -> list[Call]:
        if self._turn is not None:
            self._turn.begin()
        until_ns = 0
        while wait_ns := self._scheduler.top_up(self, batch):
            now = now_ns()
            until_ns = until_ns or now + wait_ns
            if now >= until_ns:
                break
            self._scheduler.wait_for_more(until_ns - now)
        answers, times = self._execute(batch)
        if self._is_abandoned:
            return []
        if times.end_ns - times.start_ns < PIPELINE_NS:
            self._hand_over(batch, answers, times)
            return self._next_batch()
        self._scheduler.answers(sum([call.rows for call in batch]), times.end_ns - times.start_ns)
        following = self._next_batch()
        if not following:
            self._hand_over(batch, answers, times)
            return []
        if self._deliverer is None:
            self._deliverer = threading.Thread(target=self._deliver_forever, name=f"{self._name} answers", daemon=True)
            self._deliverer.start()
        self._done.put((batch, answers, times))
        return following

    def _next_batch(self) -> list[Call]:
        following = self._scheduler.next_batch(self)
        if self._turn is not None:
            self._turn.end(goes_on=bool(following))
        return following

    def _deliver_forever(self) -> None:
        while (done := self._done.get()) is not None:
            self._hand_over(*done)
            del done  # its memory may be another process's

    def _execute(self, batch: list[Call]) -> tuple[Executed, BatchTimes]:
        key = batch[0].key
        rows = batch[0].rows if len(batch) == 1 else sum([call.rows for call in batch])
        learns = not self._quick.get((key, rows), 0) % _LEARN_EVERY
        is_inline = self._backend.runs_inline
        start_cpu_ns = time.thread_time_ns() if learns and is_inline else 0
        start_ns = now_ns()
        answers = self._answers(batch)
        end_ns = now_ns()
        if learns:
            self.costs.record(key, rows, end_ns - start_ns)
            if is_inline:
                self._cpu.record(key, rows, max(1, time.thread_time_ns() - start_cpu_ns))
        return answers, BatchTimes(start_ns, start_ns, end_ns, end_ns)

    def _answers(self, batch: Sequence[Call]) -> Executed:
        try:
            answers = self._backend.execute(batch)
        except OutOfMemory as error:
            if len(batch) == 1:
                return [error]
            self._scheduler.ran_out_of_memory(sum(call.rows for call in batch))
            middle = len(batch) // 2
            halves = [self._answers(batch[:middle]), self._answers(batch[middle:])]
            return [answer for half in halves for answer in (half() if callable(half) else half)]
        except Exception as error:
            _log.debug("instance %s failed a batch of %d", self._name, len(batch), exc_info=True)
            return [as_infer_error(self._name, error)] * len(batch)
        self._scheduler.executed(batch)
        return answers

    def _hand_over(self, batch: list[Call], executed: Executed, times: BatchTimes) -> None:
        """Deliver, unless its callers have been told that it was abandoned."""
        if self._held.pop(id(batch), None) is not None:
            self._deliver(batch, executed, times)

    def _deliver(self, batch: list[Call], executed: Executed, times: BatchTimes) -> None:
        try:
            answers = executed() if callable(executed) else executed
        except Exception as error:
            _log.debug("instance %s failed a batch of %d", self._name, len(batch), exc_info=True)
            answers = [as_infer_error(self._name, error)] * len(batch)
        deliver(self._name, batch, answers, times, self._statistics, self._device)


class _Nobody:
    """The sink of calls that have been answered already."""

    def settle(self, calls: Sequence[Call]) -> None:
        pass


_NOBODY = _Nobody()


def _emit_to_nobody(response: InferResponse) -> None: ...


# How many executions the current thread is within.
_here = threading.local()


def deliver(
    name: str,
    batch: Sequence[Call],
    answers: Answers,
    times: BatchTimes,
    statistics: ModelStatistics,
    device: str = "",
) -> None:
    """Count an executed batch, and settle those of its calls that the backend has not settled itself."""
    answered: list[Call] = []
    is_traced = False
    for call, answer in zip(batch, answers, strict=True):
        if answer is not None:
            call.answer = answer if isinstance(answer, InferResponse) else as_infer_error(name, answer)
            answered.append(call)
        is_traced = is_traced or call.trace is not None
    statistics.record_batch(batch, times)
    if is_traced:
        trace(batch, times, instance=name, device=device)
    try:
        if answered:
            settle(answered)
    except Exception:  # a broken sink must not end the instance
        _log.exception("instance %s: could not deliver answers", name)


class Forecast:
    """What calls that come now may expect: how long until all before them, and they, have been executed."""

    def __init__(self, at_ns: int, instances: Sequence[tuple[int, Costs]], batch_rows: int) -> None:
        """`instances` are (when it is expected to be free, 0 where it is; its costs)."""
        self.now_ns = at_ns
        self._instances = instances
        self._batch_rows = batch_rows
        self._free_in_ns = min((max(0, until_ns - at_ns) for until_ns, _ in instances), default=0)
        self._is_idle = any(not until_ns for until_ns, _ in instances)
        self._known: dict[tuple[Hashable, int], tuple[float, int]] = {}

    def needed_ns(self, call: Call, rows_ahead: int) -> int:
        """0 where an instance is idle and nothing waits: then a call is tried whatever is known, and teaches."""
        if self._is_idle and not rows_ahead:
            return 0
        rows = rows_ahead + call.rows
        batches_before, rest = divmod(rows - 1, self._batch_rows)
        last_rows = self._batch_rows if batches_before else rest + 1
        known = self._known.get((call.key, last_rows))
        if known is None:
            known = self._known[call.key, last_rows] = self._learned(call.key, last_rows)
        round_ns, tail_ns = known
        return int(self._free_in_ns + batches_before * round_ns) + tail_ns

    def _learned(self, key: Hashable, rows: int) -> tuple[float, int]:
        """(time per full batch with all instances at work, the tail of one execution of `rows` rows)."""
        models = [costs.of(key) for _, costs in self._instances]
        means = [mean for model in models if (mean := model.mean_ns(self._batch_rows))]
        round_ns = 1 / sum(1 / mean for mean in means) if means else 0.0
        return round_ns, min((model.tail_ns(rows) for model in models), default=0)


def _too_late(name: str, call: Call, at_ns: int, needed_ns: int) -> InferError:
    left_ms = (call.deadline_ns - at_ns) / 1e6
    if left_ms <= 0:
        return DeadlineExceeded(f"model '{name}': the request's deadline had passed when it came")
    return TooLate(
        f"model '{name}': cannot finish in time: {left_ms:.0f} ms are left and about {needed_ns / 1e6:.0f} ms needed; "
        "the request was refused, try again later"
    )


def trace(batch: Sequence[Call], times: BatchTimes, **where: str) -> None:
    """Tell the batch's traced calls when it was executed, and where."""
    rows = sum([call.rows for call in batch])
    requests = sum([call.requests for call in batch])
    for call in batch:
        if call.trace is not None:
            call.trace.note("batch_rows", rows)
            call.trace.note("batch_requests", requests)
            for what, name in where.items():
                call.trace.note(what, name)
            call.trace.record("QUEUE_START", call.arrived_ns)
            call.trace.record("COMPUTE_START", times.start_ns)
            call.trace.record("COMPUTE_INPUT_END", times.infer_start_ns)
            call.trace.record("COMPUTE_OUTPUT_START", times.infer_end_ns)
            call.trace.record("COMPUTE_END", times.end_ns)


class InOrder:
    """An `Infer` that settles calls in the order they came, for `preserve_ordering`."""

    def __init__(self, infer: Infer) -> None:
        self._infer = infer
        # An ensemble may submit to this again from within a settling.
        self._lock = threading.RLock()
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
                try:
                    settle([ready.call])  # under the lock: another thread must not overtake
                except Exception:  # those behind it have their answers, too
                    _log.exception("an answer could not be handed over")


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
