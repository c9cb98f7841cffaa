"""Metrics that python models make themselves, as Triton's `pb_utils.MetricFamily`. Shown on the metrics page.

One set per process: families are made by name, and a model that is loaded anew finds its own again.
"""

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

COUNTER, GAUGE, HISTOGRAM = range(3)
_KINDS = ("COUNTER", "GAUGE", "HISTOGRAM")

_lock = threading.Lock()
_families: dict[str, "Family"] = {}
# Where the families are, should it not be in this process.
_elsewhere: "Callable[[str, str, int], Family] | None" = None


class Value:
    """One metric of a family: its labels, and what it counts. Thread-safe."""

    def __init__(self, kind: int, buckets: Sequence[float]) -> None:
        self._kind = kind
        self._buckets = tuple(buckets)
        self._counts = [0] * (len(self._buckets) + 1)
        self._number = 0.0
        self._lock = threading.Lock()

    def increment(self, by: float) -> None:
        """Raises ValueError for a counter that would go down, and for a histogram."""
        if self._kind == HISTOGRAM or (self._kind == COUNTER and by < 0):
            raise ValueError(f"a {_KINDS[self._kind]} cannot be incremented by {by}")
        with self._lock:
            self._number += by

    def set(self, to: float) -> None:
        """Raises ValueError for anything but a gauge."""
        if self._kind != GAUGE:
            raise ValueError(f"a {_KINDS[self._kind]} cannot be set")
        with self._lock:
            self._number = to

    def observe(self, value: float) -> None:
        """Raises ValueError for anything but a histogram."""
        if self._kind != HISTOGRAM:
            raise ValueError(f"a {_KINDS[self._kind]} cannot observe")
        with self._lock:
            self._counts[bisect_left(self._buckets, value)] += 1
            self._number += value

    def value(self) -> float:
        """Raises ValueError for a histogram, which has many."""
        if self._kind == HISTOGRAM:
            raise ValueError("a HISTOGRAM has no value of its own")
        return self._number

    def total(self) -> float:
        """What was counted, set or observed, in sum."""
        return self._number

    def cumulated(self) -> list[tuple[str, float]]:
        """(upper bound as Triton writes it, observations up to it) of each bucket."""
        bounds = [*(f"{bound:.16g}" for bound in self._buckets), "+Inf"]
        return list(zip(bounds, accumulate(self._counts), strict=True))


class Family:
    """Metrics of one name and kind, apart by their labels."""

    def __init__(self, name: str, description: str, kind: int) -> None:
        self.name = name
        self.description = description
        self.kind = kind
        self.values: dict[tuple[tuple[str, str], ...], Value] = {}

    def metric(self, labels: Mapping[str, str], buckets: Sequence[float] | None) -> Value:
        """The metric of these labels, made at the first call.

        Raises ValueError for a histogram without ascending buckets, and for anything else with some.
        """
        if (buckets is None) == (self.kind == HISTOGRAM):
            problem = "Missing required buckets" if buckets is None else "Unexpected buckets found"
            raise ValueError(f"Failed to create metric. {problem}: '{self.name}' is a {_KINDS[self.kind]}")
        bounds = tuple(buckets or ())
        if any(upper <= lower for lower, upper in pairwise(bounds)):
            raise ValueError(f"Failed to create metric. Buckets of '{self.name}' do not ascend: {list(bounds)}")
        with _lock:
            key = tuple(sorted(labels.items()))
            if key not in self.values:
                self.values[key] = Value(self.kind, bounds)
            return self.values[key]

    def collect(self) -> Metric:
        with _lock:
            values = dict(self.values)
        names = sorted({name for key in values for name, _ in key})
        shown = {key: [dict(key).get(name, "") for name in names] for key in values}
        if self.kind == HISTOGRAM:
            histogram = HistogramMetricFamily(self.name, self.description, labels=names)
            for key, value in values.items():
                histogram.add_metric(shown[key], value.cumulated(), value.total())
            return histogram
        metric = (CounterMetricFamily if self.kind == COUNTER else GaugeMetricFamily)(
            self.name, self.description, labels=names
        )
        for key, value in values.items():
            metric.add_metric(shown[key], value.total())
        return metric


def keep_in(elsewhere: Callable[[str, str, int], Family]) -> None:
    """Let another process have this one's families: `elsewhere` does what `family` does."""
    global _elsewhere
    _elsewhere = elsewhere


def family(name: str, description: str, kind: int) -> Family:
    """The family of a name, made at the first call. Raises ValueError when it is of another kind."""
    if _elsewhere is not None:
        return _elsewhere(name, description, kind)
    with _lock:
        known = _families.setdefault(name, Family(name, description, kind))
    if known.kind != kind:
        raise ValueError(f"metric family '{name}' is a {_KINDS[known.kind]}, not a {_KINDS[kind]}")
    return known


def counters() -> list[str]:
    """The names of the counters, but for those that end as the metrics library would have them."""
    with _lock:
        return [
            family.name
            for family in _families.values()
            if family.kind == COUNTER and not family.name.endswith("_total")
        ]


def collect() -> Iterator[Metric]:
    """Every family, for the metrics page."""
    with _lock:
        families = list(_families.values())
    for family in families:
        yield family.collect()
