"""Prometheus metrics on Triton's names, read from the statistics at scrape time: nothing is counted per request."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from tutti.engine import Engine
from tutti.statistics import Counts

# name, help, value of one model version's counts
_COUNTERS: tuple[tuple[str, str, Callable[[Counts], float]], ...] = (
    ("nv_inference_request_success", "Number of successful inference requests", lambda c: c.success.count),
    ("nv_inference_request_failure", "Number of failed inference requests", lambda c: c.fail.count),
    ("nv_inference_count", "Number of inferences performed (rows)", lambda c: c.inferences),
    ("nv_inference_exec_count", "Number of model executions performed (batches)", lambda c: c.executions),
    ("nv_inference_request_duration_us", "Cumulative request time", lambda c: c.success.ns / 1000),
    ("nv_inference_queue_duration_us", "Cumulative queueing time", lambda c: c.queue.ns / 1000),
    ("nv_inference_compute_input_duration_us", "Cumulative input time", lambda c: c.compute_input.ns / 1000),
    ("nv_inference_compute_infer_duration_us", "Cumulative inference time", lambda c: c.compute_infer.ns / 1000),
    ("nv_inference_compute_output_duration_us", "Cumulative output time", lambda c: c.compute_output.ns / 1000),
)

Collect = Callable[[], Iterable[Metric]]


class Metrics:
    """The metrics page of one process. `extra` adds families, as a gateway's pools do."""

    def __init__(self, engine: Engine, extra: Collect | None = None) -> None:
        self._engine = engine
        self._extra = extra
        self._registry = CollectorRegistry()
        self._registry.register(self)  # type: ignore[arg-type]

    def render(self) -> tuple[bytes, str]:
        """The page in Prometheus's text format, and its content type.

        Triton's counters are named without the library's `_total`, and its dashboards ask for those names.
        """
        page = generate_latest(self._registry)
        for name, _, _ in _COUNTERS:
            page = page.replace(f"{name}_total".encode(), name.encode())
        return page, CONTENT_TYPE_LATEST

    def collect(self) -> Iterator[Any]:
        models = self._engine.models()
        for name, text, value in _COUNTERS:
            family = CounterMetricFamily(name, text, labels=["model", "version"])
            for model in models:
                family.add_metric([model.config.name, str(model.version)], value(model.statistics.counts))
            yield family
        ready = GaugeMetricFamily("tutti_model_ready", "1 while the model answers", labels=["model", "version"])
        for model in models:
            ready.add_metric([model.config.name, str(model.version)], float(model.is_ready()))
        yield ready
        if self._extra is not None:
            yield from self._extra()
