"""The server's own side of a run: batch sizes, queue against compute, replicas and fallback, once a second."""

import http.client
import re
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from tutti.loadtest.scenario import Target

_LINE = re.compile(r"^([a-z_]+)(?:\{(.*)\})? ([0-9.eE+-]+|NaN)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
# Pages are read without a proxy, as the clients send.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_SUMMED = (
    "nv_inference_request_success", "nv_inference_request_failure", "nv_inference_count", "nv_inference_exec_count",
    "nv_inference_queue_duration_us", "nv_inference_compute_infer_duration_us",
)  # fmt: skip
_BY_POOL = (
    "tutti_pool_replicas",
    "tutti_pool_wanted_replicas",
    "tutti_pool_requests_total",
    "tutti_fallback_requests_total",
)


@dataclass(slots=True)
class Sample:
    """Counters of one moment, over all pages: by model, of those that are looked at, and by pool."""

    at_s: float
    counts: dict[str, dict[str, float]] = field(default_factory=dict)
    pools: dict[str, dict[str, float]] = field(default_factory=dict)


def parse(pages: Sequence[str], models: Collection[str], at_s: float) -> Sample:
    """What Prometheus pages say of some models, and of pools of replicas. Replicas are the same on each page."""
    counts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    pools: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for page in pages:
        for name, labels, value in _LINE.findall(page):
            label_of = dict(_LABEL.findall(labels))
            if name in _SUMMED and label_of.get("model") in models:
                counts[label_of["model"]][name] += float(value)
            elif name in _BY_POOL:
                known = pools[label_of.get("pool", "")]
                is_gauge = name == "tutti_pool_replicas"
                known[name] = max(known[name], float(value)) if is_gauge else known[name] + float(value)
    return Sample(
        at_s,
        {model: dict(values) for model, values in counts.items()},
        {pool: dict(values) for pool, values in pools.items()},
    )


Row = dict[str, Any]


def between(before: Sample, after: Sample, asked: Collection[str], parts: Collection[str]) -> Row:
    """One second of the time line, as rates and means; what cannot be told is left out.

    `asked` are the models that the run asks, which succeed; `parts` are those that do the work, ensembles replaced by
    their steps: an ensemble neither queues nor computes. Their means are over all of them, and of each in `models`.
    """
    row: Row = {"at_s": after.at_s}
    seconds = max(1e-9, after.at_s - before.at_s)
    more = {model: _more(before.counts.get(model, {}), counts) for model, counts in after.counts.items()}
    row["success_per_s"] = (
        sum(more[model]["nv_inference_request_success"] for model in asked if model in more) / seconds
    )
    working = {model: more[model] for model in parts if model in more}
    row |= _means({name: sum(counts[name] for counts in working.values()) for name in _SUMMED})
    row["models"] = {model: means for model, counts in working.items() if (means := _means(counts))}
    replicas = {pool: counts.get("tutti_pool_replicas", 0.0) for pool, counts in after.pools.items()}
    if replicas:
        row["replicas"] = replicas
        row["wanted"] = {pool: counts.get("tutti_pool_wanted_replicas", 0.0) for pool, counts in after.pools.items()}
        requests = _pools(after, "tutti_pool_requests_total") - _pools(before, "tutti_pool_requests_total")
        helped = _pools(after, "tutti_fallback_requests_total") - _pools(before, "tutti_fallback_requests_total")
        row["fallback"] = helped / requests if requests > 0 else 0.0
    return row


def _more(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: after.get(name, 0.0) - before.get(name, 0.0) for name in _SUMMED}


def _means(more: dict[str, float]) -> dict[str, float]:
    """The means of a second, from what counters have grown by in it."""
    means: dict[str, float] = {}
    succeeded, executed = more["nv_inference_request_success"], more["nv_inference_exec_count"]
    if executed > 0:
        means["batch"] = more["nv_inference_count"] / executed
    if succeeded > 0:
        means["queue_ms"] = more["nv_inference_queue_duration_us"] / succeeded / 1e3
        means["compute_ms"] = more["nv_inference_compute_infer_duration_us"] / succeeded / 1e3
    return means


def _pools(sample: Sample, name: str) -> float:
    return sum(counts.get(name, 0.0) for counts in sample.pools.values())


class Sampler:
    """Reads the pages once a second while a run is on, in a thread."""

    def __init__(self, target: Target, asked: Collection[str], parts: Collection[str]) -> None:
        self.rows: list[Row] = []
        self._addresses = target.metrics
        self._headers = dict(target.headers)
        self._asked, self._parts = asked, parts
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Sampler":
        if self._addresses:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._addresses:
            self._thread.join(15)

    def _run(self) -> None:
        last: Sample | None = None
        while not self._stop.wait(1.0):
            pages = []
            for address in self._addresses:
                try:
                    asks = urllib.request.Request(f"http://{address}/metrics", headers=self._headers)
                    with _OPENER.open(asks, timeout=5) as page:
                        pages.append(page.read().decode())
                except (OSError, http.client.HTTPException, UnicodeDecodeError):
                    continue  # some tests are about a server that is gone for a while
            if pages:
                sample = parse(pages, {*self._asked, *self._parts}, time.time())
                if last is not None:
                    self.rows.append(between(last, sample, self._asked, self._parts))
                last = sample
