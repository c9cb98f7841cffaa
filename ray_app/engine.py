"""An engine whose models execute in pools of replicas: what waits, is batched and is sent where."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ensembles import graph
from ensembles.placed import Arriving, PlacedExecutor
from ray_app import merging
from ray_app.autoscaling import Demand
from ray_app.control import Control
from ray_app.hops import Hop
from ray_app.placement import PoolSpec, home
from ray_app.pools import Pool, Router
from ray_app.sticky import Sequences, Streams
from tutti import local
from tutti.batching import BatchingPolicy, BatchQueue
from tutti.cache import Cached, ResponseCache
from tutti.config import DEFAULT_MAX_QUEUED_ROWS, ModelConfig, as_decoupled
from tutti.engine import Engine, Override
from tutti.errors import ConfigError
from tutti.model import Served
from tutti.repository import ModelFolder
from tutti.scheduler import InOrder, Scheduler, Timer
from tutti.statistics import ModelStatistics
from tutti.types import Call, Infer

_log = logging.getLogger(__name__)

# A hop may carry more than the model's batch: the replica's own scheduler cuts it to size.
MIN_HOP_ROWS = 128
MAX_STREAMS = 1000
FALLBACK = "tutti.fallback"
FALLBACK_PARAMETER = "tutti_fallback"
# Which share of a lower pool's slots for a model may be taken while the preferred pool is up, but busy.
MAX_SPILL = 0.5


def make_engine(
    root: Path,
    is_controllable: bool,
    cache_bytes: int,
    specs: Sequence[PoolSpec],
    router: Router,
    timer: Timer,
    control: Control,
) -> Engine:
    """An engine that reads configurations only: every model executes in its pools."""
    cache = ResponseCache(cache_bytes)

    def config_of(name: str, version: str) -> ModelConfig:
        return engine.model(name, version).config

    def load(folder: ModelFolder, version: int, statistics: ModelStatistics) -> Served:
        config = folder.config
        place = home(config, specs, config_of)
        if config.is_ensemble:
            checked = graph.plan(config, config_of)
            config = as_decoupled(config) if checked.is_decoupled else config
        _log.info("model '%s': %s: %s", config.name, " and ".join(place.pools) or "in segments", place.why)
        served = (
            _serve_in(config, version, statistics, router, router.of(place.pools), timer, engine)
            if place.pools
            else _serve_cut(config, checked, version, statistics)
        )
        if config.is_cached and cache_bytes:
            served = replace(served, infer=Cached(served.infer, cache, version, statistics))
        return served

    def _serve_cut(config: ModelConfig, checked: graph.Plan, version: int, statistics: ModelStatistics) -> Served:
        if any(step.max_inflight for step in checked.steps):
            what = "max_inflight_requests: is not supported on Ray for a graph whose models live in several pools"
            raise ConfigError(f"ensemble '{config.name}': {what}")
        segments = Segments(control, router, timer)
        infer = PlacedExecutor(
            checked,
            str(version),
            engine,
            statistics,
            lambda step: home(config_of(step.model_name, step.version), specs, config_of).pools or None,
            segments.serve,
        )
        served = local.serve_ensemble(config, infer, engine)
        return replace(
            served,
            close=segments.close,
            is_ready=lambda: served.is_ready() and segments.are_ready(),
            reason=lambda: served.reason() or ("" if segments.are_ready() else "a segment is not loaded yet"),
        )

    def propagate(name: str, override: Override | None, config: ModelConfig | None) -> None:
        control.models(name, override, home(config, specs, config_of).pools if config is not None else ())

    engine = Engine(root, load, is_controllable, propagate)
    return engine


def _serve_in(
    config: ModelConfig,
    version: int,
    statistics: ModelStatistics,
    router: Router,
    pools: Sequence[Pool],
    timer: Timer,
    successor: Infer,
) -> Served:
    """A model, or a whole ensemble, that its pools execute. `successor` takes what waits when it is closed."""
    key = f"{config.name}/{version}"
    if config.is_decoupled and config.sequences is not None:
        raise ConfigError(f"model '{config.name}': a decoupled model with sequences is not supported on Ray")
    infer: Infer
    close: Callable[[], None] = lambda: None  # noqa: E731
    if config.is_decoupled:
        streams = Streams(router, key, pools, statistics, MAX_STREAMS)
        infer, pending = streams, streams.pending
    elif config.sequences is not None:
        sequences = Sequences(config.name, router, statistics, config.sequences.idle_ns, config.max_queued_rows)
        infer, pending = sequences, sequences.pending
    else:
        way = Fallback(config, key, router, pools, statistics, timer)
        infer, close, pending = way, lambda: way.close(successor), way.pending
        if config.batching is not None and config.batching.preserves_ordering:
            infer = InOrder(infer)
    return Served(
        infer,
        close,
        lambda: router.has_model(key, pools),
        pending,
        lambda: router.reason(key, pools),
        config,
    )


class Fallback:
    """An `Infer` over a model's pools: the first, and as its configuration and each request allow, the others.

    `tutti.fallback` in the configuration: "late", the default, has others help out when all of the first are busy and
    they would be done earlier; "missing" only when the first has no replica; "never" not at all. A request whose
    parameter `tutti_fallback` is false waits for the first.
    """

    def __init__(
        self,
        config: ModelConfig,
        key: str,
        router: Router,
        pools: Sequence[Pool],
        statistics: ModelStatistics,
        timer: Timer,
    ) -> None:
        when = config.parameters.get(FALLBACK, "late")
        if when not in ("late", "missing", "never"):
            what = f"expected late, missing or never, got '{when}'"
            raise ConfigError(f"model '{config.name}': parameters.{FALLBACK}: {what}")

        def hop(own: Sequence[Pool]) -> Hop:
            queue = BatchQueue(hop_policy(config), config.max_queued_rows)
            scheduler = Scheduler(config.name, queue, statistics, timer, MAX_SPILL if when == "late" else 0.0)
            most_rows = merging.rows_at_most(config)
            batch_rows = max(1, config.max_batch_size)
            # A graph works on several requests at once, whatever a batch of it is.
            least_rows = queue.configured_rows if config.is_ensemble else batch_rows * _instances(config)
            return Hop(scheduler, config.name, key, router, own, statistics, most_rows, batch_rows, least_rows)

        self._make_strict: Callable[[], Hop] = lambda: hop(pools[:1])
        self._hop = hop(pools[:1] if when == "never" else pools)
        self._strict = self._hop if len(self._hop.pools) == 1 else None
        self._lock = threading.Lock()

    def __call__(self, calls: Sequence[Call]) -> None:
        if not any(call.request.parameters.get(FALLBACK_PARAMETER) is False for call in calls):
            self._hop(calls)
            return
        with self._lock:
            self._strict = self._strict or self._make_strict()
        strict = [call for call in calls if call.request.parameters.get(FALLBACK_PARAMETER) is False]
        self._strict(strict)
        if len(strict) < len(calls):
            own = set(map(id, strict))
            self._hop([call for call in calls if id(call) not in own])

    def demand(self) -> Demand:
        """What comes and waits, and what a row costs."""
        return self._hop.demand()

    def pending(self) -> int:
        return sum(hop.scheduler.queued_calls() for hop in self._hops())

    def close(self, successor: Infer) -> None:
        for hop in self._hops():
            hop.close(successor)

    def _hops(self) -> list[Hop]:
        return [self._hop] if self._strict in (None, self._hop) else [self._hop, self._strict]  # type: ignore[list-item]


class Segments:
    """The segments of one graph: each has a queue here, and is executed by its pools."""

    def __init__(self, control: Control, router: Router, timer: Timer) -> None:
        self._control = control
        self._router = router
        self._timer = timer
        self._made: dict[str, Hop] = {}

    def serve(self, step: graph.Step, segment: graph.Plan, pools: Any) -> Infer:
        """`pools` are the names of those it lives in."""
        name, statistics = step.model_name, ModelStatistics()
        queue = BatchQueue(BatchingPolicy(max(step.max_rows, MIN_HOP_ROWS)), DEFAULT_MAX_QUEUED_ROWS)
        scheduler = Scheduler(name, queue, statistics, self._timer, MAX_SPILL)
        most_rows = step.max_rows if step.is_merged else 1
        self._control.load_segment(name, segment, pools)
        placed, batch_rows = self._router.of(pools), max(1, step.max_rows)
        self._made[name] = hop = Hop(
            scheduler, name, name, self._router, placed, statistics, most_rows, batch_rows,
            queue.configured_rows,
        )  # fmt: skip
        return Arriving(hop, segment.is_batched)

    def are_ready(self) -> bool:
        return all(self._router.has_model(name, hop.pools) for name, hop in self._made.items())

    def close(self) -> None:
        for hop in self._made.values():
            hop.close()


def _instances(config: ModelConfig) -> int:
    """How many batches of a model one replica executes at a time."""
    return max(1, sum(group.count for group in config.instance_groups))


def hop_policy(config: ModelConfig) -> BatchingPolicy:
    """How calls wait for a hop: by the model's priorities and timeouts, but never for more calls to come."""
    rows = max(config.max_batch_size, MIN_HOP_ROWS)
    if config.batching is None:
        return BatchingPolicy(rows)
    return replace(config.batching, max_batch_size=rows, preferred_batch_sizes=(), max_queue_delay_ns=0)
