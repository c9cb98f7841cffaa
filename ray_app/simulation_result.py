"""What became of a simulated scenario: how long requests took, which failed, and how many replicas were up.

Knows nothing of how it was simulated.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np


class Latencies:
    """A histogram of durations between 10 us and 3 hours, in steps of 1%."""

    _LOW_S = 1e-5
    _STEP = math.log(1.01)
    _BINS = 2100

    def __init__(self) -> None:
        self.counts = np.zeros(self._BINS)

    def add(self, seconds: Any, weight: float = 1.0) -> None:
        """One duration, or an array of them."""
        bins = np.log(np.maximum(seconds, self._LOW_S) / self._LOW_S) / self._STEP
        np.add.at(self.counts, np.minimum(bins, self._BINS - 1).astype(int), weight)

    def quantile(self, share: float) -> float:
        """Seconds; nan when there is none."""
        total = self.counts.cumsum()
        if not total[-1]:
            return math.nan
        return float(self._LOW_S * math.exp((np.searchsorted(total, share * total[-1]) + 0.5) * self._STEP))


@dataclass(slots=True)
class Result:
    """What became of a scenario. `replica_s` and `most` are by pool: seconds that replicas were up, most at a time."""

    seconds: float
    requests: float = 0.0
    failed: float = 0.0
    fallbacks: float = 0.0
    latencies: Latencies = field(default_factory=Latencies)
    replica_s: dict[str, float] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)
    # The gateway's last estimate of what a row costs; seconds.
    row_s: float = 0.0

    def lines(self) -> list[str]:
        """For people."""
        quantiles = ", ".join(
            f"p{share * 100:g} {self.latencies.quantile(share) * 1e3:.1f} ms" for share in (0.5, 0.95, 0.99)
        )
        count = max(1.0, self.requests)
        lines = [
            f"{self.requests:,.0f} requests in {self.seconds:,.0f} s: {self.failed:,.0f} failed "
            f"({self.failed / count:.4%}), {self.fallbacks / count:.2%} by a fallback",
            quantiles,
        ]
        for pool, seconds in self.replica_s.items():
            mean = seconds / self.seconds
            most = self.most[pool]
            lines.append(
                f"pool '{pool}': {seconds / 3600:,.2f} replica-hours, {mean:,.1f} on average, {most:,} at most"
            )
        return lines

    def note(self, pool: str, up: int, for_s: float) -> None:
        self.replica_s[pool] = self.replica_s.get(pool, 0.0) + up * for_s
        self.most[pool] = max(self.most.get(pool, 0), up)
