"""An engine whose models execute in this process. Used by the single process and by each replica on Ray."""

import asyncio
import ctypes
import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from tutti.backends import placement, registry
from tutti.backends.device_instance import DeviceInstance, PipelinedBackend
from tutti.core import dtypes
from tutti.core.daemon_threads import Pool
from tutti.core.errors import ConfigError, DeviceLost, InferError
from tutti.core.types import Call, Infer, Tensor, now_ns, settle
from tutti.devices import health
from tutti.devices.health import DeviceHealth
from tutti.observing.statistics import ModelStatistics
from tutti.repository.folders import ModelFolder
from tutti.repository.model_config import ModelConfig, SequenceState
from tutti.repository.policies import NO_LIMIT
from tutti.scheduling.batching import BatchQueue
from tutti.scheduling.cost import Costs
from tutti.scheduling.interface import Backend, Instance, Timer, Turn, undone
from tutti.scheduling.ordering import InOrder
from tutti.scheduling.rate_limit_threads import RateLimits
from tutti.scheduling.scheduler import Scheduler
from tutti.scheduling.sequences import SequenceBatcher, zeros
from tutti.scheduling.thread_instance import ThreadInstance
from tutti.serving import warmup
from tutti.serving.engine import CONTROL_TIMEOUT_S, Engine
from tutti.serving.model import Model, Served
from tutti.serving.response_cache import Cached, ResponseCache

_log = logging.getLogger(__name__)

ModelOf = Callable[[str, str], Model]
EnsembleFactory = Callable[[ModelFolder, int, ModelStatistics, ModelOf, Infer], tuple[ModelConfig, Infer]]
"""Turns an ensemble's configuration into an Infer: `ModelOf` describes its steps' models, the Infer serves them.

The configuration that comes with it says what follows from the steps.
"""

DEFAULT_CACHE_BYTES = 1 << 20
_PR_SET_TIMERSLACK = 29


def make_engine(
    root: Path,
    timer: Timer,
    ensemble: EnsembleFactory,
    is_controllable: bool = False,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    limits: RateLimits | None = None,
    devices: DeviceHealth | None = None,
    control_timeout_s: float = CONTROL_TIMEOUT_S,
    no_control_by_models: str = "",
    takes: Collection[str] = (),
) -> Engine:
    """An engine over `root` that has loaded nothing yet. `cache_bytes` bounds the response cache of all its models.

    Without `limits` a model that has some is refused. Models with an instance on a device that fails, as `devices`
    (the process's, by default) tells, are not ready from then on, and refuse requests. `no_control_by_models` is what
    python models are told that ask it to load or unload others. `takes` are those of our requests' parameters, beside
    tutti_explain, that are heeded before requests come here.
    """
    make_timers_precise()
    cache = ResponseCache(cache_bytes)
    watched = devices or health.health

    def load(folder: ModelFolder, version: int, statistics: ModelStatistics) -> Served:
        config = folder.config
        if config.is_ensemble:
            completed, infer = ensemble(folder, version, statistics, engine.model, engine)
            served = serve_ensemble(completed, infer, engine)
        elif config.sequences is not None:
            served = _serve_sequences(folder, version, statistics, timer, engine, limits, watched)
        else:
            served = _serve_batches(folder, version, statistics, timer, engine, limits, watched)
        if config.is_cached and cache_bytes:
            served = replace(served, infer=Cached(served.infer, cache, statistics, engine.changes))
        return replace(served, takes=takes) if takes else served

    engine = Engine(
        root,
        load,
        is_controllable,
        devices=watched,
        control_timeout_s=control_timeout_s,
        no_control_by_models=no_control_by_models,
    )
    return engine


def serve_ensemble(config: ModelConfig, infer: Infer, engine: Engine) -> Served:
    """An ensemble is ready when every model of its steps is."""

    def reason() -> str:
        for step in config.steps:
            try:
                model = engine.model(step.model_name, step.version)
            except InferError as error:
                return error.message
            if not model.is_ready():
                return model.reason() or f"model '{step.model_name}' is not ready"
        return ""

    return Served(infer, lambda: None, is_ready=lambda: not reason(), reason=reason, config=config)


def _serve_batches(
    folder: ModelFolder,
    version: int,
    statistics: ModelStatistics,
    timer: Timer,
    infer: Infer,
    limits: RateLimits | None,
    devices: DeviceHealth,
) -> Served:
    """A scheduler over the model's own instances, each in its thread."""
    config = folder.config
    loaded = _load(folder, version, infer, limits)
    scheduler = Scheduler(config.name, BatchQueue(config.batching, config.max_queued_rows), statistics, timer)
    costs: dict[str, Costs] = {}
    with undone([backend for backend, _ in loaded]):
        for index, (backend, turn) in enumerate(loaded):
            known = costs.setdefault(backend.kind, Costs(config.latency_ns))
            scheduler.add(_instance(f"{config.name}_{index}", backend, scheduler, statistics, known, turn))
    is_ordered = config.batching is not None and config.batching.preserves_ordering
    served = Served(
        InOrder(scheduler) if is_ordered else scheduler,
        scheduler.close,
        pending=scheduler.queued_calls,
        executing=lambda: _named(config.name, scheduler.executing(now_ns())),
        device=_device_of([backend for backend, _ in loaded]),
        instances=_instances(loaded),
        config=None if all(getattr(backend, "joins", True) for backend, _ in loaded) else _unmerged(config),
    )
    return _while_devices_work(config.name, served, loaded, statistics, devices, scheduler.refuse_waiting)


def _instances(loaded: Sequence[tuple[Backend, Turn | None]]) -> str:
    """How many are where, as "2 on cpu"."""
    counts = Counter(getattr(backend, "device", "cpu") for backend, _ in loaded)
    return ", ".join(f"{count} on {device}" for device, count in sorted(counts.items()))


def _named(name: str, batches: Sequence[tuple[float, bool]]) -> list[tuple[str, float, bool]]:
    """With the names of instances."""
    return [(f"{name}_{index}", *batch) for index, batch in enumerate(batches)]


def _unmerged(config: ModelConfig) -> ModelConfig:
    """The configuration of a model whose requests an ensemble must not make one of."""
    return replace(config, makes_rows=False)


def _device_of(loaded: Sequence[Backend]) -> str:
    """The device that all instances share tensors on; else "cpu"."""
    shared = {getattr(backend, "shares_device", "cpu") for backend in loaded}
    return shared.pop() if len(shared) == 1 else "cpu"


def _serve_sequences(
    folder: ModelFolder,
    version: int,
    statistics: ModelStatistics,
    timer: Timer,
    infer: Infer,
    limits: RateLimits | None,
    devices: DeviceHealth,
) -> Served:
    """A scheduler for each instance: a sequence stays with the instance it began on."""
    config = folder.config
    assert config.sequences is not None
    states = {state.input_name: _initial(folder, state) for state in config.sequences.states}
    batcher = SequenceBatcher(config, states, timer, statistics)
    loaded = _load(folder, version, infer, limits)
    with undone([backend for backend, _ in loaded]):
        for index, (backend, turn) in enumerate(loaded):
            name = f"{config.name}_{index}"
            scheduler = batcher.add(lambda waiting: Scheduler(config.name, waiting, statistics, timer))
            scheduler.add(_instance(name, backend, scheduler, statistics, None, turn))
    served = Served(
        batcher,
        batcher.close,
        pending=batcher.queued_calls,
        executing=lambda: _named(config.name, batcher.executing(now_ns())),
        instances=_instances(loaded),
    )
    return _while_devices_work(config.name, served, loaded, statistics, devices, batcher.refuse_waiting)


def _while_devices_work(
    name: str,
    served: Served,
    loaded: Sequence[tuple[Backend, Turn | None]],
    statistics: ModelStatistics,
    devices: DeviceHealth,
    refuse_waiting: Callable[[InferError], None],
) -> Served:
    """Serve a model until a device of its instances fails: then it is not ready, and refuses what waits and what comes.

    What its instances hold is theirs to answer. A model on the processor is served as it is.
    """
    gpus = sorted({device for backend, _ in loaded if (device := getattr(backend, "device", "cpu")) != "cpu"})
    if not gpus:
        return served

    def reason() -> str:
        why = next((f"device {device} has failed: {why}" for device in gpus if (why := devices.reason(device))), "")
        return f"model '{name}': {why}; its process is replaced" if why else ""

    def infer(calls: Sequence[Call]) -> None:
        if why := reason():
            for call in calls:
                call.answer = DeviceLost(why)
            statistics.record_failures(calls, now_ns())
            settle(calls)
            return
        served.infer(calls)
        if why := reason():  # it has failed meanwhile, maybe after the queue was emptied
            refuse_waiting(DeviceLost(why))

    def failed(device: str, _: str) -> None:
        if device in gpus:
            refuse_waiting(DeviceLost(reason()))

    end = devices.listen(failed)

    def close() -> None:
        end()
        served.close()

    return replace(served, infer=infer, close=close, is_ready=lambda: not reason(), reason=reason)


def _instance(
    name: str,
    backend: Backend,
    scheduler: Scheduler,
    statistics: ModelStatistics,
    costs: Costs | None,
    turn: Turn | None,
) -> Instance:
    """In a thread of its own, or through the engine of the device that it is on.

    One that shares resources with others executes a batch at a time, when it is its turn.
    """
    if turn is None and hasattr(backend, "pipeline"):
        return DeviceInstance(name, cast(PipelinedBackend, backend), scheduler, statistics, costs)
    return ThreadInstance(name, backend, scheduler, statistics, costs, turn)


def _load(
    folder: ModelFolder, version: int, infer: Infer, limits: RateLimits | None
) -> list[tuple[Backend, Turn | None]]:
    """The instances, warmed up, and the turns they take where they have limits."""
    if limits is None:
        _check_unlimited(folder.config)
    loaded = registry.load(folder, version, infer)
    with undone(loaded):
        warmup.run(folder, loaded)
        turns = [None] * len(loaded) if limits is None else _turns(folder.config, loaded, limits)
    return list(zip(loaded, turns, strict=True))


def _check_unlimited(config: ModelConfig) -> None:
    for index, group in enumerate(config.instance_groups):
        if group.rate_limit != NO_LIMIT:
            need = "needs a server with --rate-limit=execution_count, in one process"
            raise ConfigError(f"model '{config.name}': instance_group[{index}].rate_limiter: {need}")


def _turns(config: ModelConfig, loaded: Sequence[Backend], limits: RateLimits) -> list[Turn | None]:
    """One for each instance; those without limits take none."""
    placed = placement.instances(config, any(backend.kind not in ("cpu", "auto", "model") for backend in loaded))
    turns: list[Turn | None] = []
    try:
        for (group, device), _ in zip(placed, loaded, strict=True):
            turns.append(None if group.rate_limit == NO_LIMIT else limits.turn(group.rate_limit, device))
    except ConfigError as error:
        for turn in turns:
            if turn is not None:
                turn.close()
        raise ConfigError(f"model '{config.name}': instance_group.rate_limiter: {error}") from None
    return turns


def _initial(folder: ModelFolder, state: SequenceState) -> Tensor:
    tensor = zeros(state, folder.config.is_batched)
    if state.initial_file:
        tensor.data = folder.read("initial_state", state.initial_file)
        size = math.prod(tensor.shape) * dtypes.NUMPY[state.datatype].itemsize
        if state.datatype != "BYTES" and len(tensor.data) != size:
            raise ConfigError(
                f"model '{folder.config.name}': sequence_batching.state '{state.input_name}': expected {size} bytes in "
                f"'{state.initial_file}', got {len(tensor.data)}"
            )
    return tensor


async def poll_forever(engine: Engine, interval_s: float) -> None:
    """Follow the repository, for --model-control-mode poll."""
    thread = Pool(1, "poll")
    while True:
        await asyncio.sleep(interval_s)
        try:
            await asyncio.get_running_loop().run_in_executor(thread, engine.poll)
        except Exception:
            _log.exception("the repository could not be polled")


def make_timers_precise() -> None:
    """Have Linux end waits when they are over, for this thread and those it starts.

    By default it adds up to 50 us to save power: to queue delays, and to each wait of a model's own.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


def loop_timer(loop: asyncio.AbstractEventLoop) -> Timer:
    """A Timer on an event loop; the callback runs in the loop's thread."""

    def timer(delay_s: float, callback: Callable[[], None]) -> None:
        loop.call_soon_threadsafe(loop.call_later, delay_s, callback)

    return timer
