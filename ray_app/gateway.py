"""The gateway: owns the HTTP, gRPC and metrics ports, queues and batches, and sends whole batches to the pools."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from ray_app import routing
from ray_app.control import Control
from ray_app.engine import make_engine
from ray_app.members import PoolStatus
from ray_app.options import Options
from ray_app.placement import PoolSpec
from ray_app.pools import Pool, Router
from tutti import collector, local
from tutti.errors import ConfigError
from tutti.frontends import setup
from tutti.frontends.server import Addresses, Server
from tutti.logs import Logs, Settings


class ClusterLogs(Logs):
    """Log settings of the gateway and of every replica."""

    def __init__(self, options: Options, control: Control) -> None:
        super().__init__(options.log_verbose, options.log_file, options.log_format)
        self._control = control

    def update(self, changes: Mapping[str, Any]) -> Settings:
        settings = super().update(changes)
        self._control.logs(changes)
        return settings


class Gateway:
    """The gateway's deployment. It listens from its constructor on, and is ready when a pool is."""

    async def __init__(  # type: ignore[misc]
        self, options: Options, specs: Sequence[PoolSpec], **handles: Any
    ) -> None:
        """`handles` are the pools' deployments, by their names."""
        loop = asyncio.get_running_loop()
        pools = [_pool(spec, handles[spec.name]) for spec in specs]
        self._router = Router(pools, loop)
        self._router.start(routing.watch)
        control = Control(self._router, loop)
        logs = ClusterLogs(options, control)
        logs.install()
        self._engine = make_engine(
            Path(options.model_repository), options.model_control_mode == "explicit",
            setup.cache_size(options.cache_config), specs, self._router, local.loop_timer(loop), control,
        )  # fmt: skip
        if options.model_control_mode == "poll":
            self._engine.remember()
        await asyncio.to_thread(self._engine.load_all, options.start_models())
        if self._engine.failures() and options.exit_on_error:
            raise ConfigError("; ".join(self._engine.failures()))
        api = setup.make_api(self._engine, options, logs)
        self._server = Server(api, setup.addresses(options), lambda: pool_metrics(pools))
        self._taken = await self._server.start()
        if options.model_control_mode == "poll":
            self._router.spawn(local.poll_forever(self._engine, options.repository_poll_secs))
        collector.settle()

    def addresses(self) -> Addresses:
        """Where it listens."""
        return self._taken

    def is_ready(self) -> bool:
        """Whether it serves what there is to serve: with explicit control that may be nothing yet."""
        return all(model.is_ready() for model in self._engine.models()) and any(
            pool.status.is_up or pool.may_be_empty for pool in self._router.pools
        )

    async def __del__(self) -> None:
        await self._server.stop()
        self._router.stop()


def _pool(spec: PoolSpec, handle: Any) -> Pool:
    """`handle.options` builds a new object at each call: made once."""
    pickled = {"request_serialization": "pickle", "response_serialization": "pickle"}
    return Pool(
        PoolStatus(spec.name),
        send=handle.options(method_name="infer", **pickled),
        stream=handle.options(method_name="stream", stream=True, **pickled),
        describe=handle.options(method_name="describe"),
        apply=handle.options(method_name="apply"),
        broadcast=handle.broadcast,
        patience_s=spec.patience_s,
        may_be_empty=spec.may_be_empty,
    )


def pool_metrics(pools: Sequence[Pool]) -> Iterator[Metric]:
    """Replicas up, requests and fallbacks per pool."""
    replicas = GaugeMetricFamily("tutti_pool_replicas", "Replicas that answered the last probe", labels=["pool"])
    requests = CounterMetricFamily("tutti_pool_requests", "Requests answered by the pool", labels=["pool"])
    fallbacks = CounterMetricFamily(
        "tutti_fallback_requests", "Requests answered by a pool other than the preferred one", labels=["pool"]
    )
    wanted = GaugeMetricFamily("tutti_pool_wanted_replicas", "Replicas that the pool's work needs", labels=["pool"])
    for pool in pools:
        status = pool.status
        wanted.add_metric([status.name], pool.wanted)
        replicas.add_metric([status.name], len(status.up))
        requests.add_metric([status.name], status.requests)
        fallbacks.add_metric([status.name], status.fallbacks)
    yield from (replicas, wanted, requests, fallbacks)
