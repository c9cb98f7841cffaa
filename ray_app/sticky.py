"""Requests that a hop cannot carry as one of many: decoupled ones, and sequences, which stay with their replica."""

import asyncio
import logging
import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from tutti.core.errors import InferError, Internal, Unavailable
from tutti.core.types import Call, InferRequest, InferResponse, now_ns, settle
from tutti.observing.statistics import BatchTimes, ModelStatistics
from tutti.ray_app.members import Member
from tutti.ray_app.pools import Pool, Router
from tutti.scheduling.scheduler import as_infer_error, trace
from tutti.scheduling.sequences import SequenceId, check_starts, sequence_id

_log = logging.getLogger(__name__)

_MAX_HOP = 64


class Streams:
    """An `Infer` for decoupled models: a stream from a replica for each call."""

    def __init__(
        self, router: Router, key: str, pools: Sequence[Pool], statistics: ModelStatistics, max_calls: int
    ) -> None:
        """`key` is the model's to replicas."""
        self._router = router
        self._key = key
        self._pools = pools
        self._statistics = statistics
        self._max_calls = max_calls
        self._open = 0
        self._lock = threading.Lock()

    def __call__(self, calls: Sequence[Call]) -> None:
        for call in calls:
            with self._lock:
                is_full = self._open >= self._max_calls
                self._open += not is_full
            if is_full:
                self._statistics.record_failures([call], now_ns())
                call.finish(Unavailable(f"model '{call.request.model_name}' has {self._max_calls} open streams"))
            else:
                self._router.spawn(self._run(call))

    def pending(self) -> int:
        return 0

    async def _run(self, call: Call) -> None:
        start_ns = now_ns()
        try:
            answer = await self._router.stream(call, self._key, self._pools)
        except InferError as error:
            answer = error
        except asyncio.CancelledError:
            answer = Unavailable(f"model '{call.request.model_name}': the gateway is stopping")
        except Exception as error:
            _log.exception("model '%s': a stream could not be sent on", call.request.model_name)
            answer = as_infer_error(f"model '{call.request.model_name}'", error)
        call.answer = answer
        end_ns = now_ns()
        times = BatchTimes(start_ns, start_ns, end_ns, end_ns)
        self._statistics.record_batch([call], times)
        trace([call], times)
        with self._lock:
            self._open -= 1
        settle([call])


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
    """An `Infer` for models with sequences: each goes, in order, to the replica on which it began."""

    def __init__(
        self, name: str, router: Router, statistics: ModelStatistics, idle_ns: int, max_queued_rows: int
    ) -> None:
        self._name = name
        self._max_queued_rows = max_queued_rows
        self._queued = 0
        self._router = router
        self._statistics = statistics
        # The replica forgets an idle sequence; only then may its pin go.
        self._idle_ns = 2 * idle_ns + 1_000_000_000
        self._lock = threading.Lock()
        self._pins: dict[SequenceId, _Pin] = {}
        self._swept_ns = 0

    def __call__(self, calls: Sequence[Call]) -> None:
        start: list[tuple[SequenceId, _Pin]] = []
        refused: list[Call] = []
        with self._lock:
            self._sweep()
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
            counts = Counter(id(one.replica) for one in self._pins.values())
            pool, replica = min(places, key=lambda place: counts[id(place[1])])
            pin = self._pins[key] = _Pin(pool, replica, used_ns=now_ns())
        return key, pin

    async def _drain(self, key: SequenceId, pin: _Pin) -> None:
        while True:
            with self._lock:
                batch = [pin.waiting.popleft() for _ in range(min(len(pin.waiting), _MAX_HOP))]
                self._queued -= len(batch)
                if not batch:
                    pin.is_busy = False
                    pin.used_ns = now_ns()
                    return
            is_lost = await self._send(pin, batch)
            if is_lost and not pin.has_answered and self._move(pin):
                is_lost = await self._send(pin, batch)  # it has not begun: it may begin elsewhere
            pin.has_answered = True
            is_end = bool(batch[-1].request.parameters.get("sequence_end"))
            with self._lock:
                if (is_lost or (is_end and not pin.waiting)) and self._pins.get(key) is pin:
                    del self._pins[key]  # what waits behind a loss fails like it: it has no START
            try:
                settle(batch)
            except Exception:  # a broken sink must not hold up those behind
                _log.exception("model '%s': could not deliver answers", self._name)

    def _move(self, pin: _Pin) -> bool:
        """Give a sequence another replica; returns whether there is one."""
        places = [place for place in self._router.places(self._name) if place[1] is not pin.replica]
        if places:
            pin.pool, pin.replica = places[0]
        return bool(places)

    async def _send(self, pin: _Pin, batch: list[Call]) -> bool:
        """Fill in the answers; returns whether the replica was lost."""
        start_ns = now_ns()
        is_lost = False
        try:
            answers: Sequence[InferResponse | InferError] = await self._router.send_to(pin.pool, pin.replica, batch)
            if len(answers) != len(batch):
                raise Internal(f"expected {len(batch)} answers from the replica, got {len(answers)}")
        except Unavailable as error:
            is_lost = True
            what = f"model '{self._name}': the sequence's replica was lost ({error.message}): start the sequence again"
            answers = [Unavailable(what)] * len(batch)
        except asyncio.CancelledError:
            answers = [Unavailable(f"model '{self._name}': the gateway is stopping")] * len(batch)
        except Exception as error:  # the sequence's state is not known any more
            is_lost = True
            _log.exception("model '%s': a sequence's requests could not be sent", self._name)
            answers = [as_infer_error(f"model '{self._name}'", error)] * len(batch)
        for call, answer in zip(batch, answers, strict=True):
            call.answer = answer
        end_ns = now_ns()
        times = BatchTimes(start_ns, start_ns, end_ns, end_ns)
        self._statistics.record_batch(batch, times)
        if any(call.trace is not None for call in batch):
            trace(batch, times, pool=pin.replica.pool, replica=pin.replica.name)
        return is_lost

    def _sweep(self) -> None:
        now = now_ns()
        if now - self._swept_ns < self._idle_ns:
            return
        self._swept_ns = now
        for key, pin in list(self._pins.items()):
            if not pin.is_busy and not pin.waiting and now - pin.used_ns > self._idle_ns:
                del self._pins[key]
