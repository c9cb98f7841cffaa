"""Which of a model's pools answer: the first, and as its configuration and each request allow, the others.

`tutti.fallback` in the configuration: "late", the default, has others help out when all of the first are busy and they
would be done earlier; "missing" only when the first has no replica; "never" not at all. A request whose parameter
`tutti_fallback` is false waits for the first. Whether one that may help out does so now, by what executions take, is
decided in scheduling/instances.py, where pools are ranks.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tutti.core.errors import ConfigError, InferError
from tutti.core.types import FALLBACK_PARAMETER, Call, Infer, InferRequest
from tutti.ensembles import graph
from tutti.ensembles.placed import Arriving
from tutti.observing.statistics import ModelStatistics
from tutti.ray_app import merging
from tutti.ray_app.autoscaling import Demand
from tutti.ray_app.control import Control
from tutti.ray_app.hops import Hop
from tutti.ray_app.pools import Pool, has_model
from tutti.ray_app.router import Router
from tutti.repository.config_fields import DEFAULT_MAX_QUEUED_ROWS
from tutti.repository.model_config import ModelConfig
from tutti.repository.policies import BatchingPolicy
from tutti.scheduling.batching import BatchQueue
from tutti.scheduling.interface import Timer
from tutti.scheduling.scheduler import Scheduler
from tutti.serving.engine import Engine

FALLBACK = "tutti.fallback"
# A busy preferred pool may take this share of a lower pool's slots for a model.
MAX_SPILL = 0.5
# A hop may carry more than the model's batch: the replica's own scheduler cuts it to size.
MIN_HOP_ROWS = 128

MakeHop = Callable[[Sequence[Pool], float], Hop]
"""(pools in order of preference, the share of the lower ones that may help out) -> a way to them."""


class Fallback:
    """An `Infer` over pools: one way to all that may answer, and one to the first for requests that wait for it."""

    def __init__(self, config: ModelConfig, pools: Sequence[Pool], make_hop: MakeHop) -> None:
        """Raises ConfigError for a `tutti.fallback` that is none."""
        when = config.parameters.get(FALLBACK, "late")
        if when not in ("late", "missing", "never"):
            problem = f"expected late, missing or never, got '{when}'"
            raise ConfigError(f"model '{config.name}': parameters.{FALLBACK}: {problem}")
        spill = MAX_SPILL if when == "late" else 0.0
        self._make_strict: Callable[[], Hop] = lambda: make_hop(pools[:1], spill)
        self._hop = make_hop(pools[:1] if when == "never" else pools, spill)
        self._strict = self._hop if len(self._hop.pools) == 1 else None
        self._lock = threading.Lock()

    def __call__(self, calls: Sequence[Call]) -> None:
        strict = [call for call in calls if call.request.parameters.get(FALLBACK_PARAMETER) in (False, "false")]
        if not strict:
            self._hop(calls)
            return
        with self._lock:
            self._strict = self._strict or self._make_strict()
        self._strict(strict)
        if len(strict) < len(calls):
            strict_ids = set(map(id, strict))
            self._hop([call for call in calls if id(call) not in strict_ids])

    @property
    def pools(self) -> Sequence[Pool]:
        """The pools that may answer, in order of preference."""
        return self._hop.pools

    def demand(self) -> Demand:
        """How many rows come and wait, and what a row costs."""
        return self._hop.demand()

    def pending(self) -> int:
        return sum(hop.scheduler.queued_calls() for hop in self._hops())

    def close(self, successor: Infer | None = None) -> None:
        for hop in self._hops():
            hop.close(successor)

    def _hops(self) -> list[Hop]:
        return [self._hop] if self._strict in (None, self._hop) else [self._hop, self._strict]  # type: ignore[list-item]


def of_model(
    config: ModelConfig,
    key: str,
    router: Router,
    pools: Sequence[Pool],
    statistics: ModelStatistics,
    timer: Timer,
) -> Fallback:
    """The way to a model, or a whole ensemble, that its pools execute."""

    def hop(among: Sequence[Pool], spill: float) -> Hop:
        queue = BatchQueue(hop_policy(config), config.max_queued_rows)
        scheduler = Scheduler(config.name, queue, statistics, timer, spill)
        most_rows = merging.rows_at_most(config)
        batch_rows = max(1, config.max_batch_size)
        # A replica executes many requests of a graph at once: the batch size is no limit.
        least_rows = queue.configured_rows if config.is_ensemble else batch_rows * _instances(config)
        return Hop(
            scheduler, config.name, key, router, among, statistics, most_rows, batch_rows, least_rows,
            has_steps=config.is_ensemble,
        )  # fmt: skip

    return Fallback(config, pools, hop)


class ToSteps:
    """A graph's way to its models. A parameter that a model would not heed is not passed on to it, as in pools."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(self, calls: Sequence[Call]) -> None:
        for call in calls:
            request = call.request
            if FALLBACK_PARAMETER in request.parameters and not self._heeds(request):
                kept = {name: value for name, value in request.parameters.items() if name != FALLBACK_PARAMETER}
                request.parameters = kept
        self._engine(calls)

    def _heeds(self, request: InferRequest) -> bool:
        try:
            return FALLBACK_PARAMETER in self._engine.model(request.model_name, request.model_version).takes
        except InferError:  # the engine refuses it itself
            return True


class Segments:
    """The segments of one graph, whose `tutti.fallback` holds. Each has a queue here, and pools that execute it."""

    def __init__(self, config: ModelConfig, control: Control, router: Router, timer: Timer) -> None:
        self._config = config
        self._control = control
        self._router = router
        self._timer = timer
        self._ways: dict[str, Fallback] = {}

    def serve(self, step: graph.Step, segment: graph.Plan, pools: Any) -> Infer:
        """A way to the segment of a step; `pools` are the names of those that execute it."""
        name, statistics = step.model_name, ModelStatistics()
        most_rows = step.max_rows if step.is_merged else 1
        batch_rows = max(1, step.max_rows)

        def hop(among: Sequence[Pool], spill: float) -> Hop:
            queue = BatchQueue(BatchingPolicy(max(step.max_rows, MIN_HOP_ROWS)), DEFAULT_MAX_QUEUED_ROWS)
            scheduler = Scheduler(name, queue, statistics, self._timer, spill)
            least_rows = queue.configured_rows
            return Hop(
                scheduler, name, name, self._router, among, statistics, most_rows, batch_rows, least_rows,
                has_steps=True,
            )  # fmt: skip

        self._control.load_segment(name, segment, pools)
        self._ways[name] = way = Fallback(self._config, self._router.of(pools), hop)
        return Arriving(way, segment.is_batched)

    def are_ready(self) -> bool:
        return all(has_model(name, way.pools) for name, way in self._ways.items())

    def close(self) -> None:
        for way in self._ways.values():
            way.close()


def _instances(config: ModelConfig) -> int:
    """How many batches of a model one replica executes at a time."""
    return max(1, sum(group.count for group in config.instance_groups))


def hop_policy(config: ModelConfig) -> BatchingPolicy:
    """How calls wait for a hop: by the model's priorities and timeouts. A hop never waits for more calls to come."""
    rows = max(config.max_batch_size, MIN_HOP_ROWS)
    if config.batching is None:
        return BatchingPolicy(rows)
    return replace(config.batching, max_batch_size=rows, preferred_batch_sizes=(), max_queue_delay_ns=0)
