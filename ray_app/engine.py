"""An engine whose models execute in pools of replicas: what waits, is batched and is sent where."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tutti.core.errors import ConfigError
from tutti.core.types import FALLBACK_PARAMETER, Infer
from tutti.ensembles import graph
from tutti.ensembles.placed import PlacedExecutor
from tutti.observing.statistics import ModelStatistics
from tutti.ray_app import fallback
from tutti.ray_app.control import Control
from tutti.ray_app.placement import PoolSpec, home
from tutti.ray_app.pools import Pool, has_model, reason
from tutti.ray_app.router import Router
from tutti.ray_app.sequences import Sequences
from tutti.ray_app.streams import Streams
from tutti.repository.config import ModelConfig, as_decoupled
from tutti.repository.folders import ModelFolder
from tutti.scheduling.scheduler import InOrder, Timer
from tutti.serving import local
from tutti.serving.engine import CONTROL_TIMEOUT_S, Engine, Override
from tutti.serving.model import Served
from tutti.serving.response_cache import Cached, ResponseCache

_log = logging.getLogger(__name__)

MAX_STREAMS = 1000


def make_engine(
    root: Path,
    is_controllable: bool,
    cache_bytes: int,
    specs: Sequence[PoolSpec],
    router: Router,
    timer: Timer,
    control: Control,
    control_timeout_s: float = CONTROL_TIMEOUT_S,
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
            served = replace(served, infer=Cached(served.infer, cache, statistics, engine.changes))
        return served

    def _serve_cut(config: ModelConfig, checked: graph.Plan, version: int, statistics: ModelStatistics) -> Served:
        if any(step.max_inflight for step in checked.steps):
            problem = "max_inflight_requests: is not supported on Ray for a graph whose models live in several pools"
            raise ConfigError(f"ensemble '{config.name}': {problem}")
        segments = fallback.Segments(config, control, router, timer)
        infer = PlacedExecutor(
            checked,
            str(version),
            fallback.ToSteps(engine),
            statistics,
            lambda step: home(config_of(step.model_name, step.version), specs, config_of).pools or None,
            segments.serve,
        )
        served = local.serve_ensemble(config, infer, engine)
        return replace(
            served,
            close=segments.close,
            takes=(FALLBACK_PARAMETER,),
            is_ready=lambda: served.is_ready() and segments.are_ready(),
            reason=lambda: served.reason() or ("" if segments.are_ready() else "a segment is not loaded yet"),
        )

    def propagate(name: str, override: Override | None, config: ModelConfig | None) -> None:
        control.models(name, override, home(config, specs, config_of).pools if config is not None else ())

    engine = Engine(root, load, is_controllable, propagate, control_timeout_s=control_timeout_s)
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
        way = fallback.of_model(config, key, router, pools, statistics, timer)
        infer, close, pending = way, lambda: way.close(successor), way.pending
        if config.batching is not None and config.batching.preserves_ordering:
            infer = InOrder(infer)
    return Served(
        infer,
        close,
        lambda: has_model(key, pools),
        pending,
        lambda: reason(key, pools),
        config,
        takes=() if config.is_decoupled or config.sequences is not None else (FALLBACK_PARAMETER,),
    )
