"""How long an execution takes, learned from those that were: t(rows), its mean and its tail. Pure.

An instance's executions are kept by size class (powers of two). Between two classes that were seen t is a straight
line; beyond the largest it goes on as between the last two, and is flat where only one is known: what has never been
tried is not held to be slow, so that it can be tried.
"""

from collections import OrderedDict, deque
from collections.abc import Hashable, Mapping

_WINDOW = 64
_MEAN_WEIGHT = 1 / 16
TAIL = 0.95


class _Class:
    """Executions of about the same size: running means, and the latest durations."""

    __slots__ = ("_sorted_at", "_tail", "count", "latest", "ns", "rows")

    def __init__(self, rows: int, ns: int) -> None:
        self.rows = float(rows)
        self.ns = float(ns)
        self.latest = deque([ns], maxlen=_WINDOW)
        self.count = 1
        self._tail = ns
        self._sorted_at = 1

    def add(self, rows: int, ns: int) -> None:
        # A plain mean of the first ones, then one that forgets.
        self.count += 1
        weight = max(_MEAN_WEIGHT, 1 / self.count)
        self.rows += (rows - self.rows) * weight
        self.ns += (ns - self.ns) * weight
        self.latest.append(ns)

    def tail(self) -> float:
        """The TAIL quantile of the latest durations, never below the mean."""
        if self.count >= self._sorted_at + 8 or self.count < 8:
            self._sorted_at = self.count
            self._tail = sorted(self.latest)[int(TAIL * (len(self.latest) - 1))]
        return max(self._tail, self.ns)


class LatencyModel:
    """t(rows) of one kind of execution; nanoseconds."""

    __slots__ = ("_classes",)

    def __init__(self) -> None:
        self._classes: dict[int, _Class] = {}

    def record(self, rows: int, ns: int) -> None:
        """An execution of `rows` rows took `ns`."""
        number = rows.bit_length()
        known = self._classes.get(number)
        if known is not None:
            known.add(rows, ns)
            return
        # A new dict: other threads may be looking through the old one.
        self._classes = dict(sorted({**self._classes, number: _Class(rows, ns)}.items()))

    def sizes(self) -> list[float]:
        """The mean rows of each size class that was seen."""
        return [size_class.rows for size_class in self._classes.values()]

    def mean_ns(self, rows: int) -> int:
        """0 when nothing is known."""
        return self._at(rows, is_tail=False)

    def tail_ns(self, rows: int) -> int:
        """What an execution of `rows` rows seldom exceeds; 0 when nothing is known."""
        return self._at(rows, is_tail=True)

    def rows_within(self, budget_ns: int, limit: int) -> int:
        """The most rows, up to `limit`, whose tail fits the budget; 0 when not even one does."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            if self.tail_ns(middle) <= budget_ns:
                low = middle
            else:
                high = middle - 1
        return low

    def _at(self, rows: int, is_tail: bool) -> int:
        exact = self._classes.get(rows.bit_length())
        if exact is not None and len(self._classes) == 1:
            return int(exact.tail() if is_tail else exact.ns)
        points = [
            (size_class.rows, size_class.tail() if is_tail else size_class.ns) for size_class in self._classes.values()
        ]
        if not points:
            return 0
        if rows <= points[0][0] or len(points) == 1:
            return int(points[0][1])
        after = next((index for index, point in enumerate(points) if point[0] >= rows), len(points) - 1)
        (low, low_ns), (high, high_ns) = points[after - 1], points[after]
        slope = max(0.0, (high_ns - low_ns) / (high - low)) if high > low else 0.0
        return int(low_ns + slope * (rows - low)) if rows <= high else int(high_ns + slope * (rows - high))


class Alternatives:
    """Which of two ways to do a thing costs less for each unit: the better one so far, the other one now and then.

    Judged by the least of the latest costs: others at work on the machine, and first times, only add to them.
    """

    TRY_EVERY = 32
    MIN_TRIALS = 3
    _WINDOW = 8

    def __init__(self) -> None:
        self._latest: tuple[deque[float], deque[float]] = (deque(maxlen=self._WINDOW), deque(maxlen=self._WINDOW))
        self._turns = 0

    def choose(self) -> int:
        """0 or 1."""
        counts = [len(latest) for latest in self._latest]
        if min(counts) < self.MIN_TRIALS:
            return 0 if counts[0] <= counts[1] else 1
        self._turns += 1
        best = 0 if min(self._latest[0]) <= min(self._latest[1]) else 1
        return 1 - best if self._turns % self.TRY_EVERY == 0 else best

    def record(self, way: int, ns: int, units: int) -> None:
        self._latest[way].append(ns / units)


class Costs:
    """The latency models of one kind of instance, by batch key: shapes decide how long a row takes.

    A key that has not been seen is taken to cost what all have cost.
    """

    MAX_KEYS = 64

    def __init__(self, told_ns: Mapping[int, int] | None = None) -> None:
        """`told_ns` is what executions of so many rows took elsewhere, as where the model was exported."""
        self._all = LatencyModel()
        for rows, ns in (told_ns or {}).items():
            self._all.record(rows, ns)
        self._by_key: OrderedDict[Hashable, LatencyModel] = OrderedDict()

    def record(self, key: Hashable, rows: int, ns: int) -> None:
        self._all.record(rows, ns)
        model = self._by_key.get(key)
        if model is None:
            if len(self._by_key) >= self.MAX_KEYS:
                self._by_key.popitem(last=False)
            model = self._by_key[key] = LatencyModel()
        model.record(rows, ns)

    def of(self, key: Hashable) -> LatencyModel:
        return self._by_key.get(key, self._all)
