"""Prometheus metrics on Triton's names, read from the statistics at scrape time: nothing is counted per request."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from tutti.devices import engine_metrics, gpu_metrics
from tutti.observing import custom_metrics
from tutti.observing.host_metrics import HostMetrics
from tutti.observing.statistics import BUCKETS_NS, Counts, Histogram, StepCounts
from tutti.serving.engine import Engine
from tutti.serving.model import Model

# name, help, value of one model version's counts
_COUNTERS: tuple[tuple[str, str, Callable[[Counts], float]], ...] = (
    ("nv_inference_request_success", "Number of successful inference requests", lambda c: c.success.count),
    ("nv_inference_count", "Number of inferences performed (rows)", lambda c: c.inferences),
    ("nv_inference_exec_count", "Number of model executions performed (batches)", lambda c: c.executions),
    ("nv_inference_request_duration_us", "Cumulative request time", lambda c: c.success.ns / 1000),
    ("nv_inference_queue_duration_us", "Cumulative queueing time", lambda c: c.queue.ns / 1000),
    ("nv_inference_compute_input_duration_us", "Cumulative input time", lambda c: c.compute_input.ns / 1000),
    ("nv_inference_compute_infer_duration_us", "Cumulative inference time", lambda c: c.compute_infer.ns / 1000),
    ("nv_inference_compute_output_duration_us", "Cumulative output time", lambda c: c.compute_output.ns / 1000),
    ("tutti_deadline_misses", "Requests late, or refused because they would be", lambda c: c.late),
    ("nv_cache_num_hits_per_model", "Number of cache hits per model", lambda c: c.cache_hit.count),
    ("nv_cache_num_misses_per_model", "Number of cache misses per model", lambda c: c.cache_miss.count),
    ("nv_cache_hit_duration_per_model", "Cumulative cache hit time (us)", lambda c: c.cache_hit.ns / 1000),
    ("nv_cache_miss_duration_per_model", "Cumulative cache miss time (us)", lambda c: c.cache_miss.ns / 1000),
)
_GAUGES: tuple[tuple[str, str, Callable[[Model], float]], ...] = (
    ("nv_inference_pending_request_count", "Requests waiting for execution", lambda m: m.pending()),
    ("tutti_stuck_instances", "Instances that have executed one batch for over a minute", lambda m: m.stuck()),
    ("tutti_model_ready", "1 while the model answers", lambda m: float(m.is_ready())),
)
# Of the same buckets everywhere: sums over models, processes and machines are right.
_HISTOGRAMS: tuple[tuple[str, str, Callable[[Counts], Histogram]], ...] = (
    ("tutti_request_duration_seconds", "Time of successful requests, from arrival to answer", lambda c: c.request_time),
    ("tutti_queue_duration_seconds", "Time of executed requests in the queue", lambda c: c.queue_time),
)

_OF_STEPS: tuple[tuple[str, str, Callable[[StepCounts], int]], ...] = (
    ("tutti_ensemble_skipped_rows", "Rows for which a step was left out by its condition", lambda c: c.skipped_rows),
    ("tutti_ensemble_shed_requests", "Requests for which an optional step had no time", lambda c: c.shed_requests),
    ("tutti_ensemble_items", "Items for which a step ran, of all its rows", lambda c: c.items),
)

_STEP = "tutti_ensemble_step"
_FAILURE = "nv_inference_request_failure"
# A counter's name where the library has put its `_total` behind it.
_TOTAL = re.compile(rb"^((?:# (?:HELP|TYPE) )?)([a-zA-Z_:][a-zA-Z0-9_:]*?)_total(?=[ {])", re.MULTILINE)

Collect = Callable[[], Iterable[Metric]]


class Metrics:
    """The metrics page of one process. `extra` adds families, as a gateway's pools do.

    `shows_host`: the machine's processors and memory are on it.
    """

    def __init__(self, engine: Engine, extra: Collect | None = None, shows_host: bool = True) -> None:
        self._engine = engine
        self._extra = extra
        self._host = HostMetrics() if shows_host else None
        self._registry = CollectorRegistry()
        self._registry.register(self)  # type: ignore[arg-type]

    def render(self) -> tuple[bytes, str]:
        """The page in Prometheus's text format, and its content type.

        Triton's counters are named without the library's `_total`, and its dashboards ask for those names; those of
        models are named as the models say.
        """
        tritons = {*(name for name, _, _ in _COUNTERS if name.startswith("nv_")), _FAILURE, gpu_metrics.ENERGY}
        names = {name.encode() for name in tritons | set(custom_metrics.counters())}
        page = _TOTAL.sub(lambda m: m[1] + m[2] if m[2] in names else m[0], generate_latest(self._registry))
        return page, CONTENT_TYPE_LATEST

    def collect(self) -> Iterator[Any]:
        yield from _of_models(_Labelled(self._engine.models()))
        if self._host is not None:
            yield from self._host.collect()
        yield from engine_metrics.collect()
        yield from custom_metrics.collect()
        if self._extra is not None:
            yield from self._extra()


class _Labelled:
    """Models and their labels. A model's metric_tags are labels of all: the others leave them empty."""

    def __init__(self, models: Sequence[Model]) -> None:
        self.models = models
        self._tags = sorted({tag for model in models for tag in model.config.metric_tags})
        self.names = ["model", "version", *self._tags]

    def __iter__(self) -> Iterator[tuple[Model, list[str]]]:
        for model in self.models:
            tags = (model.config.metric_tags.get(tag, "") for tag in self._tags)
            yield model, [model.config.name, str(model.version), *tags]


def _of_models(labelled: _Labelled) -> Iterator[Any]:
    names = labelled.names
    for name, text, count in _COUNTERS:
        counter = CounterMetricFamily(name, text, labels=names)
        for model, labels in labelled:
            counter.add_metric(labels, count(model.statistics.counts))
        yield counter
    failures = CounterMetricFamily(_FAILURE, "Number of failed inference requests", labels=[*names, "reason"])
    for model, labels in labelled:
        for reason, failed in model.statistics.counts.fail_reasons.items():
            failures.add_metric([*labels, reason], failed)
    yield failures
    for name, text, value in _GAUGES:
        gauge = GaugeMetricFamily(name, text, labels=names)
        for model, labels in labelled:
            gauge.add_metric(labels, value(model))
        yield gauge
    for name, text, histogram in _HISTOGRAMS:
        family = HistogramMetricFamily(name, text, labels=names)
        for model, labels in labelled:
            durations = histogram(model.statistics.counts)
            family.add_metric(labels, _buckets(durations), durations.ns / 1e9)
        yield family
    yield from _of_steps(labelled)


def _of_steps(labelled: _Labelled) -> Iterator[Any]:
    """What is counted of ensembles' steps, and which models are steps of which."""
    names = [*labelled.names, "step"]
    for name, text, of_step in _OF_STEPS:
        counter = CounterMetricFamily(name, text, labels=names)
        for model, labels in labelled:
            for step, counts in dict(model.statistics.counts.steps).items():
                counter.add_metric([*labels, step], of_step(counts))
        yield counter
    steps = GaugeMetricFamily(_STEP, "1 for each model that does an ensemble's work", labels=names)
    for model, labels in labelled:
        for step in _steps_below(model, labelled.models):
            steps.add_metric([*labels, step], 1.0)
    yield steps


def _steps_below(model: Model, models: Sequence[Model]) -> list[str]:
    """The models of an ensemble's steps, and of theirs where they are ensembles; each once."""
    steps = {other.config.name: other.config.steps for other in models}
    below: dict[str, None] = {}
    left = [step.model_name for step in model.config.steps]
    while left:
        name = left.pop()
        if name not in below:
            below[name] = None
            left += [step.model_name for step in steps.get(name, ())]
    return sorted(below)


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [*(str(ns / 1e9) for ns in BUCKETS_NS), "+Inf"]
    return list(zip(bounds, accumulate(histogram.counts), strict=True))
