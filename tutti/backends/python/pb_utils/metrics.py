"""Metrics of models' own, on the server's metrics page."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tutti.backends.python.pb_utils.errors import TritonModelException
from tutti.observing import custom_metrics


class Metric:
    """One metric of a MetricFamily."""

    def __init__(self, value: custom_metrics.Value) -> None:
        self._value = value

    def increment(self, value: float) -> None:
        _counted(self._value.increment, value)

    def set(self, value: float) -> None:
        _counted(self._value.set, value)

    def observe(self, value: float) -> None:
        _counted(self._value.observe, value)

    def value(self) -> float:
        return float(_counted(self._value.value))


class MetricFamily:
    """A family of a model's own metrics, on the server's metrics page."""

    COUNTER, GAUGE, HISTOGRAM = custom_metrics.COUNTER, custom_metrics.GAUGE, custom_metrics.HISTOGRAM

    def __init__(self, name: str, description: str, kind: int) -> None:
        self._family: custom_metrics.Family = _counted(custom_metrics.family, name, description, kind)

    def Metric(  # noqa: N802
        self, labels: Mapping[str, str] | None = None, buckets: Sequence[float] | None = None
    ) -> Metric:
        """`buckets`, upper bounds, are a histogram's. Raises TritonModelException."""
        return Metric(_counted(self._family.metric, labels or {}, buckets))


def _counted(do: Callable[..., Any], *values: Any) -> Any:
    """What metrics are asked for; what they have against it is Triton's exception."""
    try:
        return do(*values)
    except ValueError as error:
        raise TritonModelException(str(error)) from None
