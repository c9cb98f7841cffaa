"""The shell over batching.py: gives batches to instances as they become free.

An instance executes one batch at a time, wherever it lives: a thread with a session, or a replica on another
machine. No thread and no task of its own: work moves on in the caller's thread and in the instances' callbacks.
What executions took before decides what can still be done in time, which of several kinds of instances takes a batch
(instances.py), and whether it is worth a thread (thread_instance.py).
"""

import logging
import threading
from collections.abc import Callable, Sequence

from tutti.core.errors import Cancelled, DeadlineExceeded, InferError, Unavailable
from tutti.core.types import Call, Spent, now_ns, settle, settle_all
from tutti.observing.statistics import ModelStatistics
from tutti.scheduling.batching import Decision
from tutti.scheduling.cost import LatencyModel
from tutti.scheduling.forecast import Forecast, too_late
from tutti.scheduling.instances import Instances
from tutti.scheduling.interface import Instance, Timer, Waiting
from tutti.scheduling.returns import Returns

_log = logging.getLogger(__name__)

# How long what waits may take when its model is closed, and where all its instances are stuck.
CLOSE_S = 30.0
_MOMENT_S = 1.0
# A busy instance that is late is looked at again no more often than this.
_LOOK_AGAIN_S = 0.002
# Clients that are expected back at once are given so long.
_LEAST_PATIENCE_NS = 100_000


class Scheduler:
    """An `Infer`: queues calls, and hands a batch to an instance whenever one is free to take it."""

    def __init__(
        self, name: str, waiting: Waiting, statistics: ModelStatistics, timer: Timer, spill: float = 0.0
    ) -> None:
        """`spill` is which share of the instances that are not preferred may help out while preferred ones are busy."""
        self._name = name
        self._queue = waiting
        self._statistics = statistics
        self._timer = timer
        self._lock = threading.RLock()
        self._condition = threading.Condition(self._lock)
        self._instances = Instances(waiting, spill)
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
            self._instances.add(instance)
        self.release(instance)

    def remove(self, instance: Instance) -> None:
        """Give an instance no more batches; one that it executes goes on."""
        with self._lock:
            if not self._instances.remove(instance):
                return
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
                    forecast = forecast or self._instances.forecast()
                    needed_ns = forecast.needed_ns(call, self._queue.rows_ahead(call))
                    if needed_ns > call.deadline_ns - forecast.now_ns:
                        late.append((call, too_late(self._name, call, forecast.now_ns, needed_ns)))
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
            waiting, instances = self._queue, self._instances
            if not instances.free or waiting.rows or not waiting.is_eager or instances.is_mixed or self._is_closing:
                return False
            if call.deadline_ns or call.is_cancelled or self._returns is not None or call.rows > waiting.batch_rows():
                return False
            instance = instances.free.pop()
            instances.busy[id(instance)] = now_ns(), call.key, call.rows
        instance.start([call])
        if self._queue.rows:
            self._dispatch()
        return True

    def executing(self, at_ns: int) -> list[tuple[float, bool]]:
        """For how long each instance has executed its batch, 0 where it has none; and whether it is stuck with it."""
        with self._lock:
            return self._instances.executing(at_ns)

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
            is_left = self._instances.is_mixed and self._instances.better_waits(instance)
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
            if self._returns is None or self._is_closing or len(self._instances.all) > 1 or not self._queue.may_grow():
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
            if self._returns is None or self._is_closing or len(self._instances.all) > 1:
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
            self._condition.wait_for(lambda: self._queue.rows == 0 and not self._instances.busy, timeout_s)
            left = self._queue.drain()
        settle_all(left, Unavailable(f"model '{self._name}' is being unloaded"))
        for instance in self._instances.all:
            try:
                instance.close()
            except Exception:  # the others are to be closed, too
                _log.exception("model '%s': an instance could not be closed", self._name)
        # They refer to this: without the garbage collector, which comes late, the model's memory would stay.
        self._instances.clear()

    def _dispatch(self) -> None:
        while self._queue.rows:
            with self._lock:
                instance = self._instances.choose()
                if instance is None:
                    if self._instances.free:
                        self._look_again()
                    return
                decision = self._take(instance)
                if decision.batch:
                    self._instances.free.remove(instance)
            self._settle_unserved(decision)
            if not decision.batch:
                return
            instance.start(decision.batch)

    def _look_again(self) -> None:
        """What waits for a busy instance, though another is free, is looked at again when that one ought to be done."""
        soonest = self._instances.soonest_ns()
        if soonest and (self._wake_ns is None or soonest < self._wake_ns):
            self._wake_ns = soonest
            self._timer(max(_LOOK_AGAIN_S, (soonest - now_ns()) / 1e9), self._wake)

    def _take(self, instance: Instance) -> Decision:
        now = now_ns()
        decision = self._queue.take(now, instance.costs, getattr(instance, "cut", None))
        if decision.batch:
            self._instances.set_busy(instance, now + instance.ahead_ns(now), decision.batch)
        elif decision.wake_ns is not None and (self._wake_ns is None or decision.wake_ns < self._wake_ns):
            self._wake_ns = decision.wake_ns
            self._timer(max(0, decision.wake_ns - now) / 1e9, self._wake)
        return decision

    def _set_free(self, instance: Instance) -> None:
        self._instances.set_free(instance)
        if self._is_closing:
            self._condition.notify_all()

    def _wake(self) -> None:
        with self._lock:
            self._wake_ns = None
        self._dispatch()

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
            why = f"the request to model '{self._name}' was cancelled by its caller"
            self._fail(decision.dropped, Cancelled(why))
        now = now_ns()
        for call in decision.expired:
            call.times = Spent(now - call.arrived_ns)
            if call.expires_ns and call.expires_ns <= now:
                why = f"model '{self._name}': the request waited in the queue for its timeout"
                self._fail([call], Unavailable(why))
            else:
                why = f"model '{self._name}': the request's deadline passed, or came too near, while it waited"
                self._fail([call], DeadlineExceeded(why))

    def _refuse(self, calls: list[Call]) -> None:
        why = "is being unloaded" if self._is_closing else f"has a full queue ({self._queue.max_rows} rows)"
        self._fail(calls, Unavailable(f"model '{self._name}' {why}: the request was refused, try again later"))

    def _fail(self, calls: list[Call], error: InferError) -> None:
        for call in calls:
            call.answer = error
        self._statistics.record_failures(calls, now_ns())
        if calls:
            settle(calls)
