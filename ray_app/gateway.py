"""The gateway: owns the HTTP, gRPC and metrics ports, queues and batches, and sends whole batches to the pools."""

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from ray import serve

from ray_app import routing, watch
from ray_app.control import Change, Control
from ray_app.engine import make_engine
from ray_app.journal import Journal, RayStore, gateway_name, owner_key
from ray_app.members import PoolStatus
from ray_app.options import Options
from ray_app.placement import PoolSpec
from ray_app.pools import Pool, Router
from ray_app.watch import BEAT_S, MISSED, Watch
from tutti import collector, local
from tutti.errors import ConfigError
from tutti.frontends import setup
from tutti.frontends.server import Addresses, Server
from tutti.logs import Logs, Settings

_log = logging.getLogger(__name__)


FOLLOW_INTERVAL_S = 0.25
# When a gateway ends, clients get so long to go elsewhere.
DRAIN_S = 2.0
# Gateways of one machine, those of an update among them, take the first free port from the metrics port on.
_METRICS_PORTS = 16


class ClusterLogs(Logs):
    """Log settings of all gateways and every replica."""

    def __init__(self, options: Options, control: Control) -> None:
        kinds = options.log_info, options.log_warning, options.log_error
        super().__init__(options.log_verbose, options.log_file, options.log_format, kinds)
        self._control = control

    def update(self, changes: Mapping[str, Any]) -> Settings:
        settings = super().update(changes)
        self._control.logs(changes)
        return settings

    def follow(self, changes: Mapping[str, Any]) -> None:
        """What another gateway has been told, and has told the replicas."""
        super().update(changes)


class Gateway:
    """The gateways' deployment. One listens from its constructor on, and is ready when a pool is."""

    async def __init__(  # type: ignore[misc]
        self, options: Options, specs: Sequence[PoolSpec], **handles: Any
    ) -> None:
        """`handles` are the pools' deployments, by their names."""
        loop = asyncio.get_running_loop()
        context = serve.get_replica_context()
        pools = [_pool(spec, handles[spec.name]) for spec in specs]
        self._store = RayStore()
        self._store.replace(owner_key(options.journal), context.app_name.encode())
        self._journal = Journal(self._store, options.journal)
        changes = await asyncio.to_thread(self._journal.news)
        self._control_timeout_s = limit_s = options.control_timeout_secs
        self._router = Router(pools, loop, self._journal.desired, context.replica_id.unique_id, limit_s)
        self._router.start(routing.watch)
        carrier = Control(self._router, self._journal, loop, limit_s)
        self._logs = logs = ClusterLogs(options, carrier)
        logs.install()
        self._engine = make_engine(
            Path(options.model_repository), options.model_control_mode == "explicit",
            setup.cache_size(options.cache_config), specs, self._router, local.loop_timer(loop), carrier,
            limit_s,
        )  # fmt: skip
        if options.model_control_mode == "poll":
            await asyncio.to_thread(self._engine.remember)
        await asyncio.to_thread(self._engine.load_all, options.start_models())
        if self._engine.failures() and options.exit_on_error:
            raise ConfigError("; ".join(self._engine.failures()))
        await asyncio.to_thread(self._follow, changes)
        self._router.spawn(self._follow_forever())
        api = setup.make_api(self._engine, options, logs)
        shared = replace(setup.addresses(options), shares_ports=True, metrics_ports=_METRICS_PORTS)
        if not _others(context):  # with which to share
            shared.check_free()
        self._engine.is_strict = options.strict_readiness
        self._server = Server(api, shared, lambda: pool_metrics(pools), shows_host=options.allow_cpu_metrics)
        self._taken = await self._server.start()
        if options.model_control_mode == "poll":
            self._router.spawn(self._poll_forever(options.repository_poll_secs))
        self._router.spawn(_watch_forever(f"{self._taken.host}-{self._taken.http_port}"))
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
        await self._server.stop(DRAIN_S)
        self._router.stop()

    def _follow(self, changes: Sequence[Change]) -> None:
        """Do here what other gateways have done. Blocks."""
        for change in changes:
            if change is not self._journal.desired.last(change.model):
                continue  # it has changed again since
            try:
                if change.logs is not None:
                    self._logs.follow(change.logs)
                elif change.segment is None:
                    self._engine.follow(change.model, change.override)
            except Exception:
                _log.exception("a change of '%s' that another gateway has made could not be done here", change.model)

    async def _follow_forever(self) -> None:
        while True:
            await asyncio.sleep(FOLLOW_INTERVAL_S)
            try:
                changes = await asyncio.to_thread(self._journal.news)
            except Exception as error:  # it is in the cluster's head, which may be gone for a while
                _log.debug("the journal cannot be read: %s", error)
                continue
            for change in changes:
                if change.override is not None:  # until then the replicas have what this gateway has
                    await self._router.wait_for(change.generation, self._control_timeout_s)
                await asyncio.to_thread(self._follow, [change])

    async def _poll_forever(self, interval_s: float) -> None:
        """One of the gateways looks at the repository, each time whoever comes first."""
        while True:
            await asyncio.sleep(interval_s)
            turn = int(time.time() / interval_s)
            try:
                if await asyncio.to_thread(self._store.add, f"poll/{self._journal.name}/{turn}", b""):
                    await asyncio.to_thread(self._engine.poll)
                    await asyncio.to_thread(self._store.clear, f"poll/{self._journal.name}/{turn - 2}")
            except Exception:
                _log.exception("the repository could not be polled")


async def _watch_forever(group: str) -> None:
    """Beat, and kill those of this machine's gateways that do not any more."""
    if not watch.is_possible():
        return
    try:
        with closing(Watch(group)) as own:
            while True:
                own.beat()
                for process in own.look():
                    what = "the gateway of process %d hangs, for %g s, and has been killed: Serve starts another"
                    _log.error(what, process, BEAT_S * MISSED)
                await asyncio.sleep(BEAT_S)
    except OSError as error:
        _log.warning("gateways of this machine cannot watch each other: %s", error)


def _others(context: Any) -> bool:
    """Whether the application has other gateways now."""
    own = context.replica_id.unique_id
    actors = ray.util.list_named_actors(all_namespaces=True)
    return any(gateway_name(context.app_name) in one["name"] and own not in one["name"] for one in actors)


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
