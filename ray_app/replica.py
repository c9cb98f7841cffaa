"""A replica: every model of the repository in one process, answering whole batches."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from ray_app import wire
from ray_app.placement import PoolName
from tutti.errors import ConfigError
from tutti.types import Call


class _Gather:
    """A sink that completes a future when the last of its calls is settled."""

    def __init__(self, count: int, loop: asyncio.AbstractEventLoop) -> None:
        self._left = count
        self._loop = loop
        self.done: asyncio.Future[None] = loop.create_future()

    def settle(self, calls: Sequence[Call]) -> None:
        self._loop.call_soon_threadsafe(self._settled, len(calls))

    def _settled(self, count: int) -> None:
        self._left -= count
        if not self._left and not self.done.done():
            self.done.set_result(None)


class Replica:
    """The class of both pools' deployments. Raises ConfigError from its constructor if a model cannot be loaded."""

    async def __init__(self, model_repository: str, pool: PoolName) -> None:  # type: ignore[misc]
        if pool == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before any backend looks for a GPU
        import ensembles
        from tutti import collector, local

        self._loop = asyncio.get_running_loop()
        self._name = f"{pool}-{os.getpid()}"
        self._engine = local.make_engine(Path(model_repository), local.loop_timer(self._loop), ensembles.load)
        await asyncio.to_thread(self._engine.load_all)
        if self._engine.failures():
            raise ConfigError("; ".join(self._engine.failures()))
        collector.settle()

    async def infer(self, message: wire.BatchMessage) -> wire.AnswerMessage:
        """Answers to a batch, in order; a request's error is its answer, never an exception."""
        requests = wire.unpack_requests(message)
        gather = _Gather(len(requests), self._loop)
        calls = [Call(request, gather) for request in requests]
        self._engine(calls)
        await gather.done
        return wire.pack_answers([call.answer for call in calls if call.answer is not None])

    def describe(self) -> tuple[str, list[str]]:
        """This replica's name, and the models it has ready as "name/version"."""
        ready = [f"{m.config.name}/{m.version}" for m in self._engine.models() if m.is_ready()]
        return self._name, ready

    def check_health(self) -> None:
        """Asked by Serve: raises when models are not ready, and the replica is replaced."""
        if not self._engine.is_ready():
            raise RuntimeError(f"replica {self._name}: models are not ready")
