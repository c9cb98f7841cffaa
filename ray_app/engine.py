"""An engine whose models execute in pools of replicas: what waits, is batched and is sent where."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tutti.core.errors import ConfigError
from tutti.core.types import FALLBACK_PARAMETER, Infer
from tutti.ensembles import graph
from tutti.ensembles.folder_plans import planned
from tutti.ensembles.placed import PlacedExecutor
from tutti.observing.statistics import ModelStatistics
from tutti.ray_app import fallback
from tutti.ray_app.control import Control
from tutti.ray_app.placement import PoolSpec, home
from tutti.ray_app.pools import Pool, has_model, reason
from tutti.ray_app.router import Router
from tutti.ray_app.sequences import Sequences
from tutti.ray_app.streams import Streams
from tutti.repository.folders import ModelFolder
from tutti.repository.model_config import ModelConfig, as_decoupled
from tutti.scheduling.interface import Timer
from tutti.scheduling.ordering import InOrder
from tutti.serving import local
from tutti.serving.engine import CONTROL_TIMEOUT_S, Engine
from tutti.serving.interface import Override
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
    models = _PooledModels(specs, router, timer, control, cache_bytes)
    engine = Engine(root, models.load, is_controllable, models.propagate, control_timeout_s=control_timeout_s)
    models.engine = engine
    return engine


class _PooledModels:
    """Serves each model where its home is: whole in its pools, or cut into segments that several pools execute."""

    engine: Engine

    def __init__(
        self, specs: Sequence[PoolSpec], router: Router, timer: Timer, control: Control, cache_bytes: int
    ) -> None:
        self._specs = specs
        self._router = router
        self._timer = timer
        self._control = control
        self._cache = ResponseCache(cache_bytes)
        self._has_cache = bool(cache_bytes)

    def load(self, folder: ModelFolder, version: int, statistics: ModelStatistics) -> Served:
        """A version of a model, as the engine serves it. Raises ConfigError where no pool can."""
        config = folder.config
        place = home(config, self._specs, self._config_of)
        if config.is_ensemble:
            plan = planned(folder, self._config_of)
            config = as_decoupled(config) if plan.is_decoupled else config
        _log.info("model '%s': %s: %s", config.name, " and ".join(place.pools) or "in segments", place.why)
        if place.pools:
            pools = self._router.of(place.pools)
            served = _serve_in(config, version, statistics, self._router, pools, self._timer, self.engine)
        else:
            served = self._serve_cut(config, plan, version, statistics)
        if config.is_cached and self._has_cache:
            served = replace(served, infer=Cached(served.infer, self._cache, statistics, self.engine.changes))
        return served

    def propagate(self, name: str, override: Override | None, config: ModelConfig | None) -> None:
        """Have replicas load a model, or unload it. Raises Internal when one cannot."""
        self._control.models(name, override, self._home(config) if config is not None else ())

    def _serve_cut(self, config: ModelConfig, plan: graph.Plan, version: int, statistics: ModelStatistics) -> Served:
        """A graph whose models live in several pools."""
        if any(step.max_inflight for step in plan.steps):
            problem = "max_inflight_requests: is not supported on Ray for a graph whose models live in several pools"
            raise ConfigError(f"ensemble '{config.name}': {problem}")
        segments = fallback.Segments(config, self._control, self._router, self._timer)
        infer = PlacedExecutor(
            plan,
            str(version),
            fallback.ToSteps(self.engine),
            statistics,
            lambda step: self._home(self._config_of(step.model_name, step.version)) or None,
            segments.serve,
        )
        served = local.serve_ensemble(config, infer, self.engine)
        return replace(
            served,
            close=segments.close,
            takes=(FALLBACK_PARAMETER,),
            is_ready=lambda: served.is_ready() and segments.are_ready(),
            reason=lambda: served.reason() or ("" if segments.are_ready() else "a segment is not loaded yet"),
        )

    def _home(self, config: ModelConfig) -> tuple[str, ...]:
        """The names of the pools that a model executes in whole; none of a graph that is cut."""
        return home(config, self._specs, self._config_of).pools

    def _config_of(self, name: str, version: str) -> ModelConfig:
        return self.engine.model(name, version).config


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
