"""From two looks at a server's metrics to what happened between them, by model and by pool. Pure.

Knows the metrics page of tutti and of Triton, and Triton's statistics in JSON, which have less. What a server does not
tell is None, and so is what nothing happened for: no request has no mean.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

Labels = tuple[tuple[str, str], ...]
# A page of these names is a server's.
_OURS = re.compile(r"^# (?:HELP|TYPE) (?:nv|tutti)_", re.MULTILINE)
_REQUEST_TIME, _QUEUE_TIME = "tutti_request_duration_seconds_bucket", "tutti_queue_duration_seconds_bucket"
_EXECUTION = tuple(f"nv_inference_compute_{part}_duration_us" for part in ("input", "infer", "output"))
# A field of the statistics: the counters of its count and of its time.
_STATISTICS = {
    "success": ("nv_inference_request_success", "nv_inference_request_duration_us"),
    "fail": ("nv_inference_request_failure", ""),
    "queue": ("", "nv_inference_queue_duration_us"),
    "compute_input": ("", _EXECUTION[0]),
    "compute_infer": ("", _EXECUTION[1]),
    "compute_output": ("", _EXECUTION[2]),
    "cache_hit": ("nv_cache_num_hits_per_model", ""),
    "cache_miss": ("nv_cache_num_misses_per_model", ""),
}


class NotAServer(ValueError):
    """What came is neither metrics nor statistics of an inference server."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """One look: every sample, by its name and labels. `time_s` is of a clock that never goes back."""

    time_s: float
    samples: Mapping[str, Mapping[Labels, float]]


@dataclass(frozen=True, slots=True)
class ModelRates:
    """One model, all its versions: rates a second, means of a request in ms, gauges of the last look."""

    name: str
    requests: float = 0.0
    failed: float = 0.0
    refused: float = 0.0
    cancelled: float = 0.0
    late: float | None = None
    # Requests that were inside, on average: those that succeeded.
    in_flight: float = 0.0
    queued: float | None = None
    queue_ms: float | None = None
    execution_ms: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    queue_p99_ms: float | None = None
    batch: float | None = None
    # Of the requests that looked into the cache.
    cache_hits: float | None = None
    is_ready: bool = True
    is_step: bool = False
    # In the sums of all models.
    is_counted: bool = True
    # It has answered, or failed to, and so may have asked its steps.
    is_busy_ensemble: bool = False


@dataclass(frozen=True, slots=True)
class PoolRates:
    name: str
    replicas: float = 0.0
    wanted: float | None = None
    requests: float = 0.0
    fallbacks: float = 0.0


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or the machine as "cpu"; utilization from 0 to 1, memory in bytes."""

    name: str
    utilization: float | None = None
    used_bytes: float | None = None
    total_bytes: float | None = None


@dataclass(frozen=True, slots=True)
class Total:
    """Sums over some models, a second."""

    requests: float = 0.0
    failed: float = 0.0
    refused: float = 0.0

    @classmethod
    def of(cls, models: Iterable[ModelRates]) -> "Total":
        chosen = list(models)
        return cls(
            sum(model.requests for model in chosen),
            sum(model.failed for model in chosen),
            sum(model.refused for model in chosen),
        )


@dataclass(frozen=True, slots=True)
class Rates:
    """What happened in `seconds`. Models: the busiest first.

    `requests`, `failed` and `refused` are of all models but the steps of ensembles that were busy: a request to such a
    step is an ensemble's, which counts, or was sent directly, and no metric tells which. `at_steps` has theirs.
    """

    seconds: float
    requests: float
    failed: float
    refused: float
    models: tuple[ModelRates, ...] = ()
    pools: tuple[PoolRates, ...] = ()
    devices: tuple[Device, ...] = field(default=())
    at_steps: Total = Total()
    # False where the server does not tell which models are steps: all are counted, those of ensembles twice.
    knows_steps: bool = True


def parse_page(text: str, time_s: float) -> Scrape:
    """A metrics page. Raises NotAServer."""
    if not _OURS.search(text):
        raise NotAServer("it answers, but not with metrics of an inference server")
    samples: dict[str, dict[Labels, float]] = defaultdict(dict)
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples[sample.name.removesuffix("_total")][tuple(sorted(sample.labels.items()))] = sample.value
    except ValueError as error:
        raise NotAServer(f"its metrics cannot be read: {error}") from None
    return Scrape(time_s, samples)


def parse_statistics(text: str, time_s: float) -> Scrape:
    """The JSON of /v2/models/stats, as the counters that it is of. Raises NotAServer."""
    samples: dict[str, dict[Labels, float]] = defaultdict(dict)
    try:
        for model in json.loads(text)["model_stats"]:
            labels = (("model", str(model["name"])), ("version", str(model["version"])))
            for name, value in _counters(model):
                samples[name][labels] = value
    except (ValueError, LookupError, TypeError, AttributeError):
        raise NotAServer("it answers, but not with statistics of an inference server") from None
    return Scrape(time_s, samples)


def _counters(model: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    yield "nv_inference_count", float(model.get("inference_count", 0))
    yield "nv_inference_exec_count", float(model.get("execution_count", 0))
    for key, (count, time) in _STATISTICS.items():
        part = model["inference_stats"].get(key, {})
        if count:
            yield count, float(part.get("count", 0))
        if time:
            yield time, float(part.get("ns", 0)) / 1000


def rates(before: Scrape, after: Scrape, lately_busy: Collection[str] = ()) -> Rates:
    """What happened between two looks. A counter that fell has begun anew, with its server, at 0.

    `lately_busy` names ensembles that were busy before: what they have begun may still ask their steps.
    """
    seconds = after.time_s - before.time_s
    if seconds <= 0:
        raise ValueError(f"expected a look after the first, got one {-seconds:g} s before it")
    change = _Change(before, after, seconds)
    names = sorted({dict(labels)["model"] for labels in after.samples.get("nv_inference_request_success", ())})
    models = _with_roles([_model(change, name) for name in names], _steps_of(after), lately_busy)
    counted = Total.of(model for model in models if model.is_counted)
    return Rates(
        seconds,
        counted.requests,
        counted.failed,
        counted.refused,
        tuple(sorted(models, key=_idleness)),
        tuple(_pools(change)),
        tuple(_devices(after)),
        Total.of(model for model in models if not model.is_counted),
        # Only our own page has it.
        "tutti_model_ready" in after.samples,
    )


def _steps_of(scrape: Scrape) -> Mapping[str, set[str]]:
    """The models below each ensemble."""
    names: dict[str, set[str]] = defaultdict(set)
    for labels in map(dict, scrape.samples.get("tutti_ensemble_step", ())):
        names[labels.get("model", "")].add(labels.get("step", ""))
    return names


def _with_roles(
    models: Sequence[ModelRates], steps_of: Mapping[str, set[str]], lately_busy: Collection[str]
) -> list[ModelRates]:
    """The same, who know what they are to ensembles."""
    active = {model.name for model in models if model.requests or model.failed or model.refused or model.cancelled}
    steps = {step for below in steps_of.values() for step in below}
    # An ensemble that is a step itself asks no more than those above it do, or counts as sent directly.
    asked = {step for name in steps_of if name in active or name in lately_busy for step in steps_of[name]}
    return [
        replace(
            model,
            is_step=model.name in steps,
            is_counted=model.name not in asked,
            is_busy_ensemble=model.name in steps_of and model.name in active,
        )
        for model in models
    ]


def _idleness(model: ModelRates) -> tuple[float, float, str]:
    return (-model.requests - model.failed - model.refused, -(model.queued or 0.0), model.name)


class _Change:
    """Sums over samples, of what they grew by or of what they are now."""

    def __init__(self, before: Scrape, after: Scrape, seconds: float) -> None:
        self._before, self._after = before.samples, after.samples
        self.seconds = seconds

    def has(self, name: str, **labels: str) -> bool:
        return any(_fits(known, labels) for known in self._after.get(name, ()))

    def grown(self, name: str, **labels: str) -> float:
        old = self._before.get(name, {})
        return sum(
            _growth(old.get(known), value)
            for known, value in self._after.get(name, {}).items()
            if _fits(known, labels) and math.isfinite(value)
        )

    def a_second(self, name: str, **labels: str) -> float:
        return self.grown(name, **labels) / self.seconds

    def now(self, name: str, **labels: str) -> float | None:
        values = [value for known, value in self._after.get(name, {}).items() if _fits(known, labels)]
        return sum(values) if values else None

    def least(self, name: str, **labels: str) -> float | None:
        return min((value for known, value in self._after.get(name, {}).items() if _fits(known, labels)), default=None)

    def quantile_ms(self, name: str, quantile: float, model: str) -> float | None:
        grown: dict[float, float] = defaultdict(float)
        old = self._before.get(name, {})
        for labels, value in self._after.get(name, {}).items():
            if _fits(labels, {"model": model}):
                grown[float(dict(labels)["le"])] += _growth(old.get(labels), value)
        seconds = quantile_of(grown, quantile)
        return None if seconds is None else 1e3 * seconds


def _fits(labels: Labels, wanted: Mapping[str, str]) -> bool:
    return all(item in labels for item in wanted.items())


def _growth(before: float | None, after: float) -> float:
    return after if before is None or after < before else after - before


def quantile_of(cumulative: Mapping[float, float], quantile: float) -> float | None:
    """Of a histogram's buckets, upper bound -> how many are no more: straight within a bucket, as Prometheus has it.

    What lies beyond the last finite bound is that bound. None where there is nothing.
    """
    bounds = sorted(cumulative)
    total = cumulative[bounds[-1]] if bounds else 0.0
    if total <= 0:
        return None
    wanted, low, below = quantile * total, 0.0, 0.0
    for bound in bounds:
        count = cumulative[bound]
        if count >= wanted:
            if math.isinf(bound):
                return low
            return low + (bound - low) * ((wanted - below) / (count - below) if count > below else 1.0)
        low, below = bound, count
    return low


def _model(change: _Change, name: str) -> ModelRates:
    requests = change.grown("nv_inference_request_success", model=name)
    failure = "nv_inference_request_failure"
    refused = change.a_second(failure, model=name, reason="REJECTED")
    cancelled = change.a_second(failure, model=name, reason="CANCELED")
    executions = change.grown("nv_inference_exec_count", model=name)
    hits = change.grown("nv_cache_num_hits_per_model", model=name)
    looks = hits + change.grown("nv_cache_num_misses_per_model", model=name)

    def mean_ms(*times_us: str) -> float | None:
        total_us = sum(change.grown(time, model=name) for time in times_us)
        return total_us / 1e3 / requests if requests and executions else None

    return ModelRates(
        name,
        requests / change.seconds,
        change.a_second(failure, model=name) - refused - cancelled,
        refused,
        cancelled,
        change.a_second("tutti_deadline_misses", model=name) if change.has("tutti_deadline_misses") else None,
        change.a_second("nv_inference_request_duration_us", model=name) / 1e6,
        change.now("nv_inference_pending_request_count", model=name),
        None if change.has("tutti_ensemble_step", model=name) else mean_ms("nv_inference_queue_duration_us"),
        mean_ms(*_EXECUTION),
        change.quantile_ms(_REQUEST_TIME, 0.5, name),
        change.quantile_ms(_REQUEST_TIME, 0.99, name),
        change.quantile_ms(_QUEUE_TIME, 0.99, name),
        change.grown("nv_inference_count", model=name) / executions if executions else None,
        hits / looks if looks else None,
        change.least("tutti_model_ready", model=name) != 0,
    )


def _pools(change: _Change) -> Iterable[PoolRates]:
    names = {dict(labels)["pool"] for labels in change._after.get("tutti_pool_replicas", ())}
    for name in sorted(names):
        yield PoolRates(
            name,
            change.now("tutti_pool_replicas", pool=name) or 0.0,
            change.now("tutti_pool_wanted_replicas", pool=name),
            change.a_second("tutti_pool_requests", pool=name),
            change.a_second("tutti_fallback_requests", pool=name),
        )


def _devices(scrape: Scrape) -> Iterable[Device]:
    def of(name: str) -> Mapping[str, float]:
        return {dict(labels).get("gpu_uuid", ""): value for labels, value in scrape.samples.get(name, {}).items()}

    utilization, used, total = (
        of(f"nv_gpu_{figure}") for figure in ("utilization", "memory_used_bytes", "memory_total_bytes")
    )
    for uuid in sorted({*utilization, *used}):
        yield Device(uuid, utilization.get(uuid), used.get(uuid), total.get(uuid))
    cpu, used, total = (of(f"nv_cpu_{figure}") for figure in ("utilization", "memory_used_bytes", "memory_total_bytes"))
    if cpu or used:
        yield Device("cpu", cpu.get(""), used.get(""), total.get(""))
