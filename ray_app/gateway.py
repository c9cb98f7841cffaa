"""The gateway: owns the HTTP, gRPC and metrics ports, queues and batches, and sends whole batches to the pools."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from ray_app.options import Options
from ray_app.pools import CONTROL_TIMEOUT_S, Pool, PoolStatus, Router, attach
from ray_app.sticky import Sequences, Streams
from tutti import collector, local
from tutti.batching import BatchingPolicy, BatchQueue
from tutti.cache import Cached, ResponseCache
from tutti.config import ModelConfig
from tutti.engine import Engine, Override
from tutti.errors import ConfigError, Internal
from tutti.frontends import setup
from tutti.frontends.server import Addresses, Server
from tutti.logs import Logs, Settings
from tutti.model import Served
from tutti.repository import ModelFolder
from tutti.scheduler import InOrder, Scheduler
from tutti.statistics import ModelStatistics
from tutti.types import Call, Infer

# A hop may carry more than the model's batch: the replica's own scheduler cuts it to size.
MIN_HOP_ROWS = 128
MAX_STREAMS = 1000


class ClusterLogs(Logs):
    """Log settings of the gateway and of every replica."""

    def __init__(self, options: Options, control: "Control") -> None:
        super().__init__(options.log_verbose, options.log_file, options.log_format)
        self._control = control

    def update(self, changes: Mapping[str, Any]) -> Settings:
        settings = super().update(changes)
        self._control.logs(changes)
        return settings


class Control:
    """Carries loads, unloads and settings to every replica. Blocks; not to be called on the router's loop."""

    def __init__(self, router: Router, loop: asyncio.AbstractEventLoop) -> None:
        self._router = router
        self._loop = loop

    def models(self, name: str, override: Override | None) -> None:
        """Load a model everywhere, or unload it. Raises Internal, all as it was, when a replica cannot."""
        desired = self._router.desired
        before = desired.last(name)
        had_it = bool(self._router.places(name))
        failures = self._carry(desired.record(name, override))
        if not failures:
            return
        if before is not None:
            self._carry(desired.record(name, before.override))
        else:
            self._carry(desired.record(name, Override() if had_it else None))
        raise Internal("; ".join(failures))

    def logs(self, changes: Mapping[str, Any]) -> None:
        last = self._router.desired.last("")
        self._carry(self._router.desired.record("", logs={**(last.logs or {} if last else {}), **changes}))

    def _carry(self, change: Any) -> list[str]:
        work = asyncio.run_coroutine_threadsafe(self._router.control(change), self._loop)
        return work.result(CONTROL_TIMEOUT_S + 10)


class Gateway:
    """The gateway's deployment. It listens from its constructor on, and is ready when a pool is."""

    async def __init__(self, options: Options, slots: int, **handles: Any) -> None:  # type: ignore[misc]
        """`slots` is how many batches of each model may be on their way at a time."""
        loop = asyncio.get_running_loop()
        pools = [Pool(PoolStatus(name), handle, *_senders(handle)) for name, handle in handles.items()]
        self._router = Router(pools, loop)
        self._router.start()
        control = Control(self._router, loop)
        logs = ClusterLogs(options, control)
        logs.install()
        self._engine = make_engine(options, self._router, slots, local.loop_timer(loop), control)
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
            pool.status.is_up for pool in self._router.pools
        )

    async def __del__(self) -> None:
        await self._server.stop()
        self._router.stop()


def _senders(handle: Any) -> tuple[Any, Any]:
    """For batches and for streams. `handle.options` builds a new object at each call: made once."""
    pickled = {"request_serialization": "pickle", "response_serialization": "pickle"}
    return (
        handle.options(method_name="infer", **pickled),
        handle.options(method_name="stream", stream=True, **pickled),
    )


def make_engine(options: Options, router: Router, slots: int, timer: Any, control: Control) -> Engine:
    """An engine that reads configurations only: every model executes in the pools."""
    cache_bytes = setup.cache_size(options.cache_config)
    cache = ResponseCache(cache_bytes)

    def load(folder: ModelFolder, version: int, statistics: ModelStatistics) -> Served:
        config = folder.config
        key = f"{config.name}/{version}"
        if config.is_decoupled and config.sequences is not None:
            raise ConfigError(f"model '{config.name}': a decoupled model with sequences is not supported on Ray")
        infer: Infer
        if config.is_decoupled:
            streams = Streams(router, statistics, MAX_STREAMS)
            infer, close, pending = streams, lambda: None, streams.pending
        elif config.sequences is not None:
            idle_ns = config.sequences.idle_ns
            sequences = Sequences(config.name, router, statistics, idle_ns, config.max_queued_rows)
            infer, close, pending = sequences, lambda: None, sequences.pending
        else:
            queue = BatchQueue(hop_policy(config), config.max_queued_rows)
            scheduler = Scheduler(config.name, queue, statistics, timer)
            attach(scheduler, config, router, statistics, slots)
            infer, close, pending = _mixed(scheduler), scheduler.close, scheduler.queued_calls
            if config.batching is not None and config.batching.preserves_ordering:
                infer = InOrder(infer)
        if config.is_cached and cache_bytes:
            infer = Cached(infer, cache, version, statistics)
        return Served(infer, close, lambda: router.has_model(key), pending, lambda: router.reason(key))

    is_explicit = options.model_control_mode == "explicit"
    return Engine(Path(options.model_repository), load, is_explicit, control.models)


def hop_policy(config: ModelConfig) -> BatchingPolicy:
    """How calls wait for a hop: by the model's priorities and timeouts, but never for more calls to come."""
    rows = max(config.max_batch_size, MIN_HOP_ROWS)
    if config.batching is None:
        return BatchingPolicy(rows)
    return replace(config.batching, max_batch_size=rows, preferred_batch_sizes=(), max_queue_delay_ns=0)


def _mixed(scheduler: Scheduler) -> Infer:
    """A hop mixes shapes."""

    def infer(calls: Sequence[Call]) -> None:
        for call in calls:
            call.key = None
        scheduler(calls)

    return infer


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
