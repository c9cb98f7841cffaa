"""Where a batch is best cut, if executions are of some sizes only: rows between two sizes cost as much as the next one.

With work enough, 128 of 151 rows at once and the others with the next batch can be more rows a second than all of them
in the place of 160. Pure: knows neither calls nor devices.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, takewhile

_MEAN_WEIGHT = 1 / 16
# What a smaller batch must gain: measured times are not better known than this.
_LEAST_GAIN = 1.02


class CapturedSizes:
    """The sizes to which batches are filled up, and what executions of each take; nanoseconds."""

    def __init__(self, sizes: Sequence[int], measured_ns: Mapping[int, int] | None = None) -> None:
        """`measured_ns` is what an execution of a size took when it was captured."""
        self.sizes = sorted(sizes)
        self._ns = {size: float(ns) for size, ns in (measured_ns or {}).items() if ns > 0}
        self._counts = dict.fromkeys(self._ns, 1)

    def record(self, rows: int, ns: int) -> None:
        """An execution of `rows` rows took `ns`."""
        size = self._size(rows)
        if size:
            count = self._counts[size] = self._counts.get(size, 0) + 1
            known = self._ns.get(size, 0.0)
            self._ns[size] = known + (ns - known) * max(_MEAN_WEIGHT, 1 / count)

    def cut(self, calls: Iterable[int], limit: int, is_busy: bool) -> int:
        """How many rows to take, of calls with so many each, in their order: at most `limit`.

        `is_busy`: the device has work until these begin, so that what counts is rows a second. Else a batch is cut only
        where all of it has ended earlier for it. The limit, where nothing is gained, or nothing known.
        """
        fitting = list(takewhile(lambda rows: rows <= limit, accumulate(calls)))
        whole = fitting[-1] if fitting else 0
        whole_ns = self._mean_ns(whole)
        if not whole or not whole_ns or whole in self._ns:
            return limit
        rows, ns = max(self._fillings(fitting), key=lambda filling: filling[0] / filling[1], default=(0, 0.0))
        if not rows:
            return limit
        if is_busy:
            return rows if rows * whole_ns > _LEAST_GAIN * whole * ns else limit
        rest_ns = self._mean_ns(whole - rows)
        return rows if rest_ns and (ns + rest_ns) * _LEAST_GAIN < whole_ns else limit

    def _fillings(self, fitting: Sequence[int]) -> list[tuple[int, float]]:
        """The most rows that go into each size that the whole does not need, and what they take."""
        smaller = self.sizes[: bisect_left(self.sizes, fitting[-1])]
        rows = [fitting[count - 1] for size in smaller if (count := bisect_right(fitting, size))]
        return [(some, ns) for some in rows if (ns := self._mean_ns(some))]

    def _size(self, rows: int) -> int:
        """What it is filled up to; 0 for more than there is a size for."""
        index = bisect_left(self.sizes, rows)
        return self.sizes[index] if index < len(self.sizes) else 0

    def _mean_ns(self, rows: int) -> float:
        """0 where nothing is known."""
        return self._ns.get(self._size(rows), 0.0)
