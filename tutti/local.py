"""An engine whose models execute in this process. Used by the single process and by each replica on Ray."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from tutti import backends
from tutti.batching import BatchQueue
from tutti.engine import Engine
from tutti.model import Model, Served
from tutti.repository import ModelFolder
from tutti.scheduler import Scheduler, ThreadInstance, Timer
from tutti.statistics import ModelStatistics
from tutti.types import Infer

ModelOf = Callable[[str, str], Model]
EnsembleFactory = Callable[[ModelFolder, int, ModelStatistics, ModelOf, Infer], Infer]
"""Turns an ensemble's configuration into an Infer: `ModelOf` describes its steps' models, the Infer serves them."""


def make_engine(root: Path, timer: Timer, ensemble: EnsembleFactory, is_controllable: bool = False) -> Engine:
    """An engine over `root` that has loaded nothing yet."""

    def load(folder: ModelFolder, version: int, statistics: ModelStatistics) -> Served:
        if folder.config.is_ensemble:
            return Served(ensemble(folder, version, statistics, engine.model, engine), close=lambda: None)
        scheduler = make_scheduler(folder, version, statistics, timer)
        return Served(scheduler, scheduler.close)

    engine = Engine(root, load, is_controllable)
    return engine


def make_scheduler(folder: ModelFolder, version: int, statistics: ModelStatistics, timer: Timer) -> Scheduler:
    """A scheduler over the model's own instances, each in its thread."""
    config = folder.config
    loaded = backends.load(folder, version)
    scheduler = Scheduler(config.name, BatchQueue(config.batching, config.max_queued_rows), statistics, timer)
    for index, backend in enumerate(loaded):
        scheduler.add(ThreadInstance(f"{config.name}_{index}", backend, scheduler, statistics))
    return scheduler


def loop_timer(loop: asyncio.AbstractEventLoop) -> Timer:
    """A Timer on an event loop; the callback runs in the loop's thread."""

    def timer(delay_s: float, callback: Callable[[], None]) -> None:
        loop.call_soon_threadsafe(loop.call_later, delay_s, callback)

    return timer
