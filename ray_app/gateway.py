"""The gateway: owns the HTTP, gRPC and metrics ports, queues and batches, and sends whole batches to the pools."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from ray_app.pools import Pool, PoolStatus, Router, attach
from tutti import collector, local
from tutti.batching import BatchingPolicy, BatchQueue
from tutti.engine import Engine
from tutti.errors import ConfigError
from tutti.frontends.api import Limits
from tutti.frontends.server import Addresses, Server
from tutti.model import Served
from tutti.repository import ModelFolder
from tutti.scheduler import Scheduler
from tutti.statistics import ModelStatistics
from tutti.types import Call

# A hop may carry more than the model's batch: the replica's own scheduler cuts it to size.
MIN_HOP_ROWS = 64


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """What a gateway needs to know. `slots` is how many batches of each model may be on their way at a time."""

    model_repository: str
    addresses: Addresses
    limits: Limits
    slots: int


class Gateway:
    """The gateway's deployment. It listens from its constructor on, and is ready when a pool is."""

    async def __init__(self, options: GatewayOptions, **handles: Any) -> None:  # type: ignore[misc]
        loop = asyncio.get_running_loop()
        pools = [Pool(PoolStatus(name), handle, _sender(handle)) for name, handle in handles.items()]
        self._router = Router(pools, loop)
        self._router.start()
        self._engine = make_engine(Path(options.model_repository), self._router, options.slots, local.loop_timer(loop))
        self._engine.load_all()
        if self._engine.failures():
            raise ConfigError("; ".join(self._engine.failures()))
        self._server = Server(self._engine, options.addresses, options.limits, lambda: pool_metrics(pools))
        self._taken = await self._server.start()
        collector.settle()

    def addresses(self) -> Addresses:
        """Where it listens."""
        return self._taken

    def is_ready(self) -> bool:
        return self._engine.is_ready()

    async def __del__(self) -> None:
        await self._server.stop()
        self._router.stop()


def _sender(handle: Any) -> Any:
    """`handle.options` builds a new object at each call: made once."""
    return handle.options(method_name="infer", request_serialization="pickle", response_serialization="pickle")


def make_engine(root: Path, router: Router, slots: int, timer: Any) -> Engine:
    """An engine that reads configurations only: every model executes in the pools."""

    def load(folder: ModelFolder, version: int, statistics: ModelStatistics) -> Served:
        config = folder.config
        rows = max(config.max_batch_size, MIN_HOP_ROWS)
        scheduler = Scheduler(config.name, BatchQueue(BatchingPolicy(rows), config.max_queued_rows), statistics, timer)
        attach(scheduler, config.name, router, statistics, slots)

        def infer(calls: Sequence[Call]) -> None:
            for call in calls:
                call.key = None  # a hop mixes shapes
            scheduler(calls)

        key = f"{config.name}/{version}"
        return Served(infer, scheduler.close, is_ready=lambda: router.has_model(key))

    return Engine(root, load)


def pool_metrics(pools: Sequence[Pool]) -> Iterator[Metric]:
    """Replicas up, requests and fallbacks per pool."""
    replicas = GaugeMetricFamily("tutti_pool_replicas", "Replicas that answered the last probe", labels=["pool"])
    requests = CounterMetricFamily("tutti_pool_requests", "Requests answered by the pool", labels=["pool"])
    fallbacks = CounterMetricFamily(
        "tutti_fallback_requests", "Requests answered by a pool other than the preferred one", labels=["pool"]
    )
    for pool in pools:
        status = pool.status
        replicas.add_metric([status.name], len(status.replicas) if status.is_up else 0)
        requests.add_metric([status.name], status.requests)
        fallbacks.add_metric([status.name], status.fallbacks)
    yield from (replicas, requests, fallbacks)
