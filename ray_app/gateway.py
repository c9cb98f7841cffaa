"""The gateway: owns the HTTP, gRPC and metrics ports, queues and batches, and sends whole batches to the pools."""

import asyncio
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from ray import serve

from tutti.app import front_end_setup
from tutti.app.front_end_server import Addresses, Server
from tutti.app.overview import example
from tutti.core import garbage
from tutti.core.errors import ConfigError
from tutti.observing.logs import Logs, Settings
from tutti.ray_app import routing, watch
from tutti.ray_app.checks import METRICS_PORTS
from tutti.ray_app.control import Change, Control
from tutti.ray_app.engine import make_engine
from tutti.ray_app.journal import Journal, RayStore, gateway_name, owner_key
from tutti.ray_app.members import PoolStatus
from tutti.ray_app.news import News, Writer
from tutti.ray_app.options import Options
from tutti.ray_app.overview import Loads, Overview, table
from tutti.ray_app.placement import PoolSpec, home
from tutti.ray_app.pools import Pool
from tutti.ray_app.router import Router
from tutti.ray_app.watch import BEAT_S, MISSED, Watch
from tutti.repository import unserved
from tutti.repository.model_config import ModelConfig
from tutti.serving import local

_log = logging.getLogger(__name__)


FOLLOW_INTERVAL_S = 0.25
# A replica that is there may take this long to answer a probe, and a segment to reach it.
_SETTLE_S = 3.0
# How long replicas may take to say what they have loaded.
_LOADS_TIMEOUT_S = 10.0
# Clients get this long to go to another gateway when one ends.
DRAIN_S = 2.0


class ClusterLogs(Logs):
    """Log settings of all gateways and every replica."""

    def __init__(self, options: Options, control: Control) -> None:
        super().__init__(options.log_verbose, options.log_file, options.log_format, options.log_kinds)
        self._control = control

    def update(self, changes: Mapping[str, Any]) -> Settings:
        settings = super().update(changes)
        self._control.logs(changes)
        return settings

    def follow(self, changes: Mapping[str, Any]) -> None:
        """Apply a change that another gateway was asked for. It has told the replicas itself."""
        super().update(changes)


class Gateway:
    """The gateways' deployment. One listens from its constructor on, and is ready when a pool is."""

    async def __init__(  # type: ignore[misc]
        self, options: Options, specs: Sequence[PoolSpec], **handles: Any
    ) -> None:
        """`handles` are the pools' deployments, by their names."""
        context = serve.get_replica_context()
        self._has_ended = False
        self._full_s = 0.0
        async with Writer(News(RayStore(), context.app_name), context.replica_id.unique_id, "gateway"):
            await self._start(options, specs, handles, context)
        self._router.spawn(self._tell_when_begun())

    async def _start(
        self, options: Options, specs: Sequence[PoolSpec], handles: Mapping[str, Any], context: Any
    ) -> None:
        loop = asyncio.get_running_loop()
        self._options = options
        self._specs = specs
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
            front_end_setup.cache_size(options.cache_config), specs, self._router, local.loop_timer(loop), carrier,
            limit_s,
        )  # fmt: skip
        if options.model_control_mode == "poll":
            await asyncio.to_thread(self._engine.remember)
        await asyncio.to_thread(self._engine.load_all, options.start_models())
        if self._engine.failures() and options.exit_on_error:
            raise ConfigError("; ".join(self._engine.failures()))
        await asyncio.to_thread(self._follow, changes)
        self._router.spawn(self._follow_forever())
        await self._listen(context)
        if options.model_control_mode == "poll":
            self._router.spawn(self._poll_forever(options.repository_poll_secs))
        garbage.settle()

    async def _listen(self, context: Any) -> None:
        """Open the ports, shared with other gateways of this machine, and begin to watch those."""
        options = self._options
        api = front_end_setup.make_api(self._engine, options, self._logs)
        shared = replace(front_end_setup.addresses(options), shares_ports=True, metrics_ports=METRICS_PORTS)
        if not _others(context):  # a gateway shares its ports with other gateways only
            shared.check_free()
        self._engine.is_strict = options.strict_readiness
        self._server = Server(
            api, shared, lambda: pool_metrics(self._router.pools), shows_host=options.allow_cpu_metrics
        )
        self._taken = await self._server.start()
        self._url = replace(self._taken, http_tls=shared.http_tls).url
        self._router.spawn(_watch_forever(watch.group(self._taken, shared.grpc_host)))

    def addresses(self) -> Addresses:
        """Where it listens."""
        return self._taken

    def is_ready(self) -> bool:
        """Whether it serves what there is to serve: with explicit control that may be nothing yet."""
        return all(model.is_ready() for model in self._engine.models()) and any(
            pool.status.is_up or pool.may_be_empty for pool in self._router.pools
        )

    def has_begun(self) -> bool:
        """Whether it is ready, or will not become so: every replica is up and serves what could be loaded."""
        is_full = self._is_full()
        self._full_s = (self._full_s or time.monotonic()) if is_full else 0.0
        gives_up = is_full and not self._options.exit_on_error and time.monotonic() - self._full_s > _SETTLE_S
        return self.is_ready() or gives_up

    def _is_full(self) -> bool:
        pools = zip(self._router.pools, self._specs, strict=True)
        return all(len(pool.status.up) >= spec.replicas for pool, spec in pools)

    def replicas(self) -> dict[str, list[str]]:
        """The names of those that each pool has, as gpu-4711 of process 4711, by the pool's name."""
        return {pool.status.name: sorted(member.name for member in pool.status.up) for pool in self._router.pools}

    def unready(self) -> str:
        """Why it is not ready."""
        missing = [f"pool '{pool.status.name}' has no replica" for pool in self._router.pools if not pool.status.is_up]
        models = [model for model in self._engine.models() if not model.is_ready()]
        return "; ".join([*missing, *(f"model '{model.config.name}': {model.reason()}" for model in models)])

    async def overview(self) -> Overview:
        """What is served and where, and what is not and why, for people."""
        until_s = time.monotonic() + _SETTLE_S
        while not self._is_full() and time.monotonic() < until_s:  # Serve knows of replicas before this gateway does
            await asyncio.sleep(FOLLOW_INTERVAL_S)
        models = self._engine.models()
        reports = await asyncio.gather(*(self._loads(pool) for pool in self._router.pools))
        loads = [report for pool in reports for report in pool]
        pools = {m.config.name: home(m.config, self._specs, self._config_of).pools for m in models}
        statuses = {pool.status.name: pool.status for pool in self._router.pools}
        failures = [*self._engine.failures(), *(failure for load in loads for failure in load.failures)]
        ready = [model for model in models if model.is_ready()]
        return Overview(
            self._options.model_repository,
            len(ready),
            tuple(table(models, pools, self._specs, statuses, loads)),
            tuple(dict.fromkeys(failures)),
            tuple(await asyncio.to_thread(self._hints)),
            example(ready, self._url),
        )

    def _config_of(self, name: str, version: str) -> ModelConfig:
        return self._engine.model(name, version).config

    def _hints(self) -> list[str]:
        is_all = self._options.model_control_mode != "explicit"
        return unserved.unserved(Path(self._options.model_repository)) if is_all else []

    async def _tell_when_begun(self) -> None:
        while not self.has_begun():
            await asyncio.sleep(FOLLOW_INTERVAL_S)
        log, taken = _to_driver(), self._taken
        ports = taken.http_port, taken.grpc_port, taken.metrics_port
        log.info("listening on %s: http %s, grpc %s, metrics %s", taken.host, *ports)
        (await self.overview()).tell(log)

    async def _loads(self, pool: Pool) -> list[Loads]:
        """What each of the pool's replicas has loaded; nothing where they do not say so in time."""
        if not pool.status.is_up:  # Serve would wait for a replica to start
            return []
        try:
            async with asyncio.timeout(_LOADS_TIMEOUT_S):
                loads: list[Loads] = await pool.broadcast("loads").results_async()
                return loads
        except Exception as error:
            _log.debug("pool '%s' does not tell of its models: %s", pool.status.name, error)
            return []

    async def finish(self) -> None:
        """Stop listening, and let open requests end. The whole application ends: there is no other gateway to go to."""
        self._has_ended = True
        await self._server.stop()

    async def __del__(self) -> None:
        if not self._has_ended:
            await self._server.stop(DRAIN_S)
        self._router.stop()

    def _follow(self, changes: Sequence[Change]) -> None:
        """Do here what other gateways have done. Blocks."""
        for change in changes:
            if change is not self._journal.desired.last(change.model):
                continue  # a later change has replaced it
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
            except Exception as error:  # the journal is in the cluster's head, which may be gone for a while
                _log.debug("the journal cannot be read: %s", error)
                continue
            for change in changes:
                if change.override is not None:  # until then replicas serve what this gateway serves
                    await self._router.wait_for(change.generation, self._control_timeout_s)
                await asyncio.to_thread(self._follow, [change])

    async def _poll_forever(self, interval_s: float) -> None:
        """Look at the repository in turns: of all gateways, the first to claim an interval does it."""
        while True:
            await asyncio.sleep(interval_s)
            turn = int(time.time() / interval_s)
            try:
                if await asyncio.to_thread(self._store.add, f"poll/{self._journal.name}/{turn}", b""):
                    await asyncio.to_thread(self._engine.poll)
                    await asyncio.to_thread(self._store.clear, f"poll/{self._journal.name}/{turn - 2}")
            except Exception:
                _log.exception("the repository could not be polled")


def _to_driver() -> logging.Logger:
    """A log that `serve run` shows: what a replica writes to sys.stderr Serve keeps in a file of its own."""
    log = _log.getChild("start")
    if sys.__stderr__ is not None and not log.handlers:
        log.addHandler(logging.StreamHandler(sys.__stderr__))
    return log


async def _watch_forever(group: str) -> None:
    """Beat, and kill the gateways of this machine that have stopped beating."""
    if not watch.is_possible():
        return
    try:
        with closing(Watch(group)) as watcher:
            while True:
                watcher.beat()
                for process in watcher.look():
                    message = "the gateway of process %d hangs, for %g s, and has been killed: Serve starts another"
                    _log.error(message, process, BEAT_S * MISSED)
                await asyncio.sleep(BEAT_S)
    except OSError as error:
        _log.warning("gateways of this machine cannot watch each other: %s", error)


def _others(context: Any) -> bool:
    """Whether the application has other gateways now."""
    replica = context.replica_id.unique_id
    actors = ray.util.list_named_actors(all_namespaces=True)
    return any(gateway_name(context.app_name) in actor["name"] and replica not in actor["name"] for actor in actors)


def _pool(spec: PoolSpec, handle: Any) -> Pool:
    """A pool over its deployment's handle, whose `options` are called here only: each call builds a new object."""
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
