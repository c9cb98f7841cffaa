"""A backend in a thread of its own, one batch after the other; or in its callers' threads where that is quicker."""

import logging
import math
import queue
import threading
import time
from collections.abc import Hashable, Sequence

from tutti.core.errors import Internal, OutOfMemory
from tutti.core.types import Call, InferResponse, now_ns, settle_all
from tutti.observing.statistics import BatchTimes, ModelStatistics
from tutti.scheduling.cost import Costs
from tutti.scheduling.delivery import as_infer_error, deliver
from tutti.scheduling.interface import HANG_S, Backend, Executed, Turn
from tutti.scheduling.scheduler import Scheduler

_log = logging.getLogger(__name__)

# An execution that is known to take no more of the processor than this runs in the thread that brings the calls: a
# hand-over between threads, and their quarrel over the interpreter's lock, would cost more.
INLINE_NS = 250_000
MAX_INLINE_NS = 4_000_000
# Steps of an ensemble that run so call each other: not without end.
MAX_INLINE_DEPTH = 4
# What is known to be quick is not asked, and not measured, every time.
_LOOK_EVERY = 32
_LEARN_EVERY = 4
_MAX_QUICK = 1024
# After an execution of this length the next one begins before the answers are delivered.
PIPELINE_NS = 500_000
# How long the thread of a stuck instance is waited for at least.
_MOMENT_S = 1.0

# How many executions the current thread is within.
_here = threading.local()


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
