"""Models with sequences: each sequence goes, in order, to the replica on which it began.

Owns where each sequence lives, and what waits for it there. Knows nothing of how replicas are reached.
"""

import logging
import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from tutti.core.errors import InferError, Unavailable
from tutti.core.types import Call, InferRequest, now_ns, settle
from tutti.observing.statistics import ModelStatistics
from tutti.ray_app.members import Member
from tutti.ray_app.pools import Pool
from tutti.ray_app.router import Router
from tutti.ray_app.settling import Delivery, settle_batch
from tutti.scheduling.sequences import SequenceId, check_starts, sequence_id

_log = logging.getLogger(__name__)

_MAX_HOP = 64


@dataclass(eq=False)
class _Pin:
    """A sequence and where it lives."""

    pool: Pool
    replica: Member
    waiting: deque[Call] = field(default_factory=deque)
    is_busy: bool = False
    used_ns: int = 0
    has_answered: bool = False


class Sequences:
    """An `Infer` for models with sequences."""

    def __init__(
        self, name: str, router: Router, statistics: ModelStatistics, idle_ns: int, max_queued_rows: int
    ) -> None:
        self._name = name
        self._max_queued_rows = max_queued_rows
        self._queued = 0
        self._router = router
        self._statistics = statistics
        # A pin must outlive its sequence at the replica, which forgets it when it was idle for long enough.
        self._idle_ns = 2 * idle_ns + 1_000_000_000
        self._lock = threading.Lock()
        self._pins: dict[SequenceId, _Pin] = {}
        self._swept_ns = 0

    def __call__(self, calls: Sequence[Call]) -> None:
        start: list[tuple[SequenceId, _Pin]] = []
        refused: list[Call] = []
        with self._lock:
            self._sweep(now_ns())
            for call in calls:
                try:
                    key, pin = self._pin(call.request)
                except InferError as error:
                    call.answer = error
                    refused.append(call)
                    continue
                pin.waiting.append(call)
                self._queued += 1
                if not pin.is_busy:
                    pin.is_busy = True
                    start.append((key, pin))
        for key, pin in start:
            self._router.spawn(self._drain(key, pin))
        if refused:
            self._statistics.record_failures(refused, now_ns())
            settle(refused)

    def pending(self) -> int:
        return self._queued

    def _pin(self, request: InferRequest) -> tuple[SequenceId, _Pin]:
        """Where the request's sequence lives; a new one begins on the replica that has the fewest.

        Raises InvalidArgument for a mistake in the request, Unavailable when there is no replica or no room.
        """
        key = sequence_id(request)
        if self._queued >= self._max_queued_rows:
            raise Unavailable(f"model '{self._name}' has a full queue ({self._queued} requests): try again later")
        pin = self._pins.get(key)
        if pin is None:
            check_starts(request)
            places = self._router.places(self._name)
            if not places:
                raise Unavailable(f"model '{self._name}': no replica is up")
            counts = Counter(id(pinned.replica) for pinned in self._pins.values())
            pool, replica = min(places, key=lambda place: counts[id(place[1])])
            pin = self._pins[key] = _Pin(pool, replica, used_ns=now_ns())
        return key, pin

    async def _drain(self, key: SequenceId, pin: _Pin) -> None:
        """Send what waits for a sequence, a batch at a time, until nothing does."""
        while batch := self._take(pin):
            await settle_batch(
                self._name,
                batch,
                now_ns(),
                self._statistics,
                self._deliver(pin, batch),
                lambda replica, _, batch=batch: self._finished(key, pin, batch, replica is None),  # type: ignore[misc]
            )

    def _take(self, pin: _Pin) -> list[Call]:
        """The next batch of a sequence; where there is none, the sequence is idle."""
        with self._lock:
            batch = [pin.waiting.popleft() for _ in range(min(len(pin.waiting), _MAX_HOP))]
            self._queued -= len(batch)
            if not batch:
                pin.is_busy = False
                pin.used_ns = now_ns()
        return batch

    async def _deliver(self, pin: _Pin, batch: list[Call]) -> Delivery:
        """A sequence that has not begun may begin elsewhere. Raises Unavailable when its replica is lost."""
        try:
            try:
                answers = await self._router.send_to(pin.pool, pin.replica, batch)
            except Exception as error:
                if pin.has_answered or not self._move(pin):
                    raise
                _log.info("model '%s': a sequence begins on another replica: %s", self._name, error)
                answers = await self._router.send_to(pin.pool, pin.replica, batch)
        except Unavailable as error:
            problem = f"the sequence's replica was lost ({error.message}): start the sequence again"
            raise Unavailable(f"model '{self._name}': {problem}") from None
        return answers, pin.replica

    def _move(self, pin: _Pin) -> bool:
        """Give a sequence another replica; returns whether there is one."""
        places = [place for place in self._router.places(self._name) if place[1] is not pin.replica]
        if places:
            pin.pool, pin.replica = places[0]
        return bool(places)

    def _finished(self, key: SequenceId, pin: _Pin, batch: Sequence[Call], is_lost: bool) -> None:
        """Forget a sequence that has ended, or whose state is not known any more.

        What waits behind a loss fails like it: it has no START.
        """
        pin.has_answered = True
        is_end = bool(batch[-1].request.parameters.get("sequence_end"))
        with self._lock:
            if (is_lost or (is_end and not pin.waiting)) and self._pins.get(key) is pin:
                del self._pins[key]

    def _sweep(self, at_ns: int) -> None:
        if at_ns - self._swept_ns < self._idle_ns:
            return
        self._swept_ns = at_ns
        for key, pin in list(self._pins.items()):
            if not pin.is_busy and not pin.waiting and at_ns - pin.used_ns > self._idle_ns:
                del self._pins[key]
