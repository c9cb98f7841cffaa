"""How many replicas a pool needs: the work that comes against what a replica does. Pure.

The gateway measures, for each model, the rows that come and what one costs a replica in batches of full size; their
product is the work, in replicas. Where deadlines are missed all the same, it is taken to be more. Ray Serve's
controller asks `policy`, and applies the pool's limits and delays.
"""

import math
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from tutti.scheduling.cost import LatencyModel

# Replicas are meant to be busy for this share of their time.
UTILIZATION = 0.7
# Requests that wait should be served within this.
DRAIN_S = 2.0
METRIC = "tutti_wanted"
# For Serve. A replica is kept for a while after it is needed: a load that comes and goes would start one each time.
SERVE_SETTINGS: Mapping[str, float] = MappingProxyType(
    {"metrics_interval_s": 0.5, "look_back_period_s": 1.0, "upscale_delay_s": 0.0, "downscale_delay_s": 15.0}
)
_WINDOW_NS = 1_000_000_000
# If 1% of requests are late, the work counts for a tenth more; at 10% for twice as much. Halves every half minute.
_MISSES_WEIGHT = 10
_MISSES_FADE_NS = 30_000_000_000
_MISSES_OF = 20
# A demand is a step, not noise, above 1.25 times the last one plus half a replica, or below half of it.
_ABOVE, _ABOVE_BY, _BELOW = 1.25, 0.5, 0.5
_STEADY_NS = 5_000_000_000
# A gateway that has told nothing for this long is gone.
_TOLD_FOR_S = 5.0


@dataclass(slots=True)
class Meter:
    """The rows of one model that came during the last second. Thread-safe."""

    _arrived: deque[tuple[int, int]] = field(default_factory=deque)
    _rows: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def arrived(self, at_ns: int, rows: int) -> None:
        with self._lock:
            last = self._arrived[-1] if self._arrived else None
            # Arrivals that are close share an entry: entries stay few, however many requests come.
            if last is not None and at_ns - last[0] < _WINDOW_NS // 50:
                self._arrived[-1] = (last[0], last[1] + rows)
            else:
                self._arrived.append((at_ns, rows))
            self._rows += rows

    def rows_per_s(self, at_ns: int) -> float:
        with self._lock:
            while self._arrived and at_ns - self._arrived[0][0] > _WINDOW_NS:
                self._rows -= self._arrived.popleft()[1]
            return self._rows * 1e9 / _WINDOW_NS


def row_s(model: LatencyModel, most_rows: int) -> float:
    """What a row costs in the largest batch, seconds; 0 when nothing is known.

    Where only one batch size is known, the cost is that of a row in it: a line needs two points.
    """
    known = model.sizes()
    rows = most_rows if len(known) > 1 else max(known, default=0.0)
    return model.mean_ns(math.ceil(rows)) / rows / 1e9 if rows else 0.0


@dataclass(slots=True)
class Misses:
    """The share of a model's requests that missed their deadlines though it had the replicas wanted; it fades."""

    share: float = 0.0
    _late: int = 0
    _requests: int = 0
    _at_ns: int = 0

    def count(self, at_ns: int, late: int, requests: int, has_enough: bool) -> None:
        """Of all `requests` that have ended, `late` were late. Misses are not counted while replicas are missing."""
        if at_ns - self._at_ns < _WINDOW_NS:
            return
        self.share *= 0.5 ** ((at_ns - self._at_ns) / _MISSES_FADE_NS)
        came = requests - self._requests
        if has_enough and came >= _MISSES_OF:
            self.share = max(self.share, (late - self._late) / came)
        self._at_ns, self._late, self._requests = at_ns, late, requests


@dataclass(frozen=True, slots=True)
class Demand:
    """Of one model: rows that come in a second, rows that wait, what one costs in seconds, the share that is late."""

    rows_per_s: float
    waiting: int
    row_s: float
    late: float = 0.0


def wanted(demands: Iterable[Demand]) -> float:
    """Replicas that serve the demands, those that wait for DRAIN_S included. A model that is not known needs some."""
    work = 0.0
    for demand in demands:
        if demand.row_s:
            work += (
                (demand.rows_per_s + demand.waiting / DRAIN_S)
                * demand.row_s
                * (1 + min(1.0, _MISSES_WEIGHT * demand.late))
            )
        elif demand.rows_per_s or demand.waiting:
            work += UTILIZATION
    return work / UTILIZATION


@dataclass(slots=True)
class Steady:
    """Replicas wanted without the noise of arrivals: a mean of some seconds, unless they are well above or below it.

    A step in the load is followed at once; crowds and gaps of a steady one start and stop no replicas.
    """

    replicas: float = 0.0
    _at_ns: int = 0

    def follow(self, at_ns: int, replicas: float) -> float:
        weight = 1 - 0.5 ** ((at_ns - self._at_ns) / _STEADY_NS)
        is_step = replicas > _ABOVE * self.replicas + _ABOVE_BY or replicas < _BELOW * self.replicas
        self.replicas = (
            replicas if is_step or not self.replicas else self.replicas + weight * (replicas - self.replicas)
        )
        self._at_ns = at_ns
        return self.replicas


@dataclass(slots=True)
class Wanted:
    """What gateways have told a replica lately: how many replicas the work of each needs."""

    _told: dict[str, tuple[float, float]] = field(default_factory=dict)

    def told(self, gateway: str, replicas: float, now_s: float) -> None:
        self._told[gateway] = replicas, now_s

    def total(self, now_s: float) -> float:
        """Replicas that the work of all gateways needs that have told lately."""
        for gateway in [name for name, (_, at_s) in self._told.items() if now_s - at_s > _TOLD_FOR_S]:
            del self._told[gateway]
        return sum(replicas for replicas, _ in self._told.values())


def policy(context: Any) -> tuple[float, dict[str, Any]]:
    """The replicas to have, for Serve's controller, which applies limits and delays.

    Gateways tell replicas what they need, and replicas tell Serve. While no replica has been told, the target stays.
    """
    told = (context.aggregated_metrics or {}).get(METRIC, {})
    if not told:
        return context.target_num_replicas, {}
    return max(told.values()), {}
