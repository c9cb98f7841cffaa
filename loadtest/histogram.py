"""A histogram of durations with three significant digits, which adds up over workers, machines and stages. Pure.

Log-linear, as HdrHistogram: every power of two from 2048 ns on is cut into 1024 equal steps, so that a value is kept
within 1/2048 of itself; below that exactly.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

_BITS = 11
_STEPS = 1 << _BITS
_POWERS = 44 - _BITS  # the longest is 2^44 ns, almost five hours
_HALF = _STEPS >> 1
_SIZE = _STEPS + _HALF * _POWERS


class Histogram:
    """Counts of durations in nanoseconds."""

    def __init__(self) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros(_SIZE, np.int64)

    def add(self, ns: Any) -> None:
        """Durations, as an array of whole nanoseconds; what is longer than the longest counts as that."""
        values = np.clip(np.asarray(ns, np.int64), 0, (1 << 44) - 1)
        # The power of two above the linear part; exact for whole numbers below 2^53.
        power = np.maximum(0, np.frexp(values.astype(np.float64))[1] - _BITS).astype(np.int64)
        self.counts += np.bincount((values >> power) + power * _HALF, minlength=_SIZE)

    def merge(self, other: "Histogram") -> None:
        self.counts += other.counts

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def quantile_ns(self, share: float) -> float:
        """The middle of the step in which the quantile lies; nan when there is nothing."""
        if not self.total:
            return float("nan")
        rank = max(1, int(np.ceil(share * self.total)))
        return float(_middle(int(np.searchsorted(self.counts.cumsum(), rank))))

    def max_ns(self) -> float:
        filled = np.flatnonzero(self.counts)
        return float(_middle(int(filled[-1]))) if len(filled) else float("nan")

    def mean_ns(self) -> float:
        filled = np.flatnonzero(self.counts)
        if not len(filled):
            return float("nan")
        return float(sum(_middle(int(i)) * int(self.counts[i]) for i in filled) / self.total)

    def above(self, ns: float) -> int:
        """How many took longer, by the steps' middles."""
        filled = np.flatnonzero(self.counts)
        return int(sum(int(self.counts[i]) for i in filled if _middle(int(i)) > ns))

    def points(self, count: int = 200) -> list[tuple[float, float]]:
        """(share, milliseconds), for a curve: even in the logarithm of what is left, to 1 in 100,000."""
        shares = 1 - np.logspace(0, -5, count)
        return [(float(share), self.quantile_ns(float(share)) / 1e6) for share in shares]

    def as_json(self) -> dict[str, int]:
        """Only what is filled."""
        return {str(index): int(self.counts[index]) for index in np.flatnonzero(self.counts)}

    @classmethod
    def of_json(cls, counts: Mapping[str, int]) -> "Histogram":
        histogram = cls()
        for index, count in counts.items():
            histogram.counts[int(index)] = count
        return histogram


def _middle(index: int) -> float:
    """Nanoseconds in the middle of a step."""
    if index < _STEPS:
        return index
    power = (index - _HALF) // _HALF
    low = (index - power * _HALF) << power
    return low + ((1 << power) - 1) / 2
