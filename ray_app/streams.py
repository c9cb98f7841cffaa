"""Decoupled models, whose calls have many answers each: every call is a stream of its own from a replica.

Owns the limit of open streams. Knows nothing of how a stream begins again elsewhere, which is the router's.
"""

import threading
from collections.abc import Sequence

from tutti.core.errors import Unavailable
from tutti.core.types import Call, now_ns
from tutti.observing.statistics import ModelStatistics
from tutti.ray_app.members import Member
from tutti.ray_app.pools import Pool
from tutti.ray_app.router import Router
from tutti.ray_app.settling import Delivery, settle_batch


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
        model = call.request.model_name
        await settle_batch(model, [call], now_ns(), self._statistics, self._deliver(call), self._finished)

    async def _deliver(self, call: Call) -> Delivery:
        return [await self._router.stream(call, self._key, self._pools)], None

    def _finished(self, _replica: Member | None, _end_ns: int) -> None:
        with self._lock:
            self._open -= 1
