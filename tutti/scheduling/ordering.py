"""Answers in the order in which their requests came, whatever is executed first: Triton's `preserve_ordering`."""

import logging
import threading
from collections import deque
from collections.abc import Sequence

from tutti.core.types import Call, Infer, Sink, settle

_log = logging.getLogger(__name__)


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
