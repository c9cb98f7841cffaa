"""A pool's deployment in simulated time: what its Serve handle would be, over replicas that take the scenario's time.

Replicas start and stop as the simulated controller says. Knows nothing of the gateway beyond a handle's methods.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from tutti.core import wire
from tutti.core.types import InferResponse, Tensor
from tutti.ray_app.autoscaling import SERVE_SETTINGS
from tutti.ray_app.members import PoolStatus
from tutti.ray_app.placement import PATIENCE_S
from tutti.ray_app.pools import Pool
from tutti.ray_app.replica import Description
from tutti.ray_app.scenario import Scenario, SimulatedPool
from tutti.ray_app.simulated_controller import Controller

MODEL = "model"
KEY = f"{MODEL}/1"


class _Message:
    """A hop's batch inside a replica."""

    __slots__ = ("done", "left")

    def __init__(self, left: int, done: "asyncio.Future[None]") -> None:
        self.left = left
        self.done = done


class _Replica:
    """Executes requests in their order, as many rows at a time as the model takes."""

    def __init__(self, name: str, pool: SimulatedPool, most_rows: int, loop: asyncio.AbstractEventLoop) -> None:
        self.name = name
        # (when, how many replicas are wanted), as gateways have told it.
        self.told: deque[tuple[float, float]] = deque()
        self._pool = pool
        self._most_rows = most_rows
        self._loop = loop
        self._waiting: deque[tuple[int, _Message]] = deque()
        self._is_busy = False

    def mean_told(self, now_s: float) -> float | None:
        """The mean of what it was told of late, as Serve takes it; None where that is nothing."""
        while self.told and now_s - self.told[0][0] > SERVE_SETTINGS["look_back_period_s"]:
            self.told.popleft()
        return sum(replicas for _, replicas in self.told) / len(self.told) if self.told else None

    async def execute(self, rows: Sequence[int]) -> None:
        message = _Message(len(rows), self._loop.create_future())
        self._waiting.extend((count, message) for count in rows)
        if not self._is_busy:
            self._next()
        await message.done

    def _next(self) -> None:
        batch: list[_Message] = []
        rows = 0
        while self._waiting and rows + self._waiting[0][0] <= self._most_rows:
            count, message = self._waiting.popleft()
            rows += count
            batch.append(message)
        self._is_busy = bool(batch)
        if batch:
            self._loop.call_later(self._pool.batch_s(rows), self._done, batch)

    def _done(self, batch: Sequence[_Message]) -> None:
        for message in batch:
            message.left -= 1
            if not message.left and not message.done.done():
                message.done.set_result(None)
        self._next()


class Deployment:
    """What a Serve handle of a pool would be, over simulated replicas."""

    def __init__(self, spec: SimulatedPool, scenario: Scenario, loop: asyncio.AbstractEventLoop) -> None:
        self.spec = spec
        self.replicas: dict[str, _Replica] = {}
        self.controller = Controller(spec)
        self.pool = Pool(
            PoolStatus(spec.name),
            SimpleNamespace(remote=self._infer),
            describe=SimpleNamespace(remote=self._describe),
            apply=SimpleNamespace(remote=self._apply),
            broadcast=lambda _: SimpleNamespace(results_async=self._nothing),
            may_be_empty=bool(spec.max_replicas) and not spec.min_replicas,
            patience_s=120.0 if spec.max_replicas and not spec.min_replicas else PATIENCE_S,
        )
        self.changed: Callable[[list[str], str], None] = lambda *_: None
        self._most_rows = scenario.max_batch_size
        self._loop = loop
        self._starting = 0
        self._count = 0
        self._is_called = False
        self._answers: dict[tuple[int, ...], wire.AnswerMessage] = {}
        for _ in range(self.controller.target):
            self._started(is_first=True)

    def _started(self, is_first: bool = False) -> None:
        if not is_first:
            self._starting -= 1
            if len(self.replicas) >= self.controller.target:
                return  # the target has fallen meanwhile
        self._count += 1
        name = f"{self.spec.name}-{self._count}"
        self.replicas[name] = _Replica(name, self.spec, self._most_rows, self._loop)
        self.changed(list(self.replicas), "")

    def control(self) -> None:
        """What Serve's controller does each time it looks."""
        now_s = self._loop.time()
        means = {name: replica.mean_told(now_s) for name, replica in self.replicas.items()}
        told = {name: mean for name, mean in means.items() if mean is not None}
        target = self.controller.decide(now_s, told, len(self.replicas), self._is_called)
        self._is_called = False
        for _ in range(target - len(self.replicas) - self._starting):
            self._starting += 1
            self._loop.call_later(self.spec.start_s, self._started)
        if len(self.replicas) > target:
            for name in list(self.replicas)[target:]:
                del self.replicas[name]
            self.changed(list(self.replicas), "")

    async def _infer(self, message: wire.BatchMessage, generation: int, to: str = "") -> wire.AnswerMessage | str:
        await asyncio.sleep(self.spec.hop_ms / 2e3)
        replica = self.replicas.get(to)
        if replica is None:
            return wire.GONE
        rows = tuple(head[3][0][2][0] for head in message[2])
        await replica.execute(rows)
        await asyncio.sleep(self.spec.hop_ms / 2e3)
        return self._answer(rows)

    def _answer(self, rows: tuple[int, ...]) -> wire.AnswerMessage:
        known = self._answers.get(rows)
        if known is None:
            zeros = [Tensor.of("y", np.zeros((count, 1), np.float32)) for count in rows]
            known = wire.pack_answers([InferResponse(MODEL, "1", [tensor]) for tensor in zeros])
            if len(self._answers) < 1000:
                self._answers[rows] = known
        heads: list[Any] = [(name, version, {}, tensors, is_null) for name, version, _, tensors, is_null in known[0]]
        return heads, known[1]

    async def _describe(self, to: str = "", wanted: float = 0.0, by: str = "") -> Description:
        if not to:
            self._is_called = True
            await asyncio.sleep(self.pool.patience_s)
        replica = self.replicas.get(to)
        if replica is None:
            return Description("", "", (), 0)
        replica.told.append((self._loop.time(), wanted))
        return Description(to, to, (KEY,), 0)

    async def _apply(self, *_: object, **__: object) -> str:
        return ""

    async def _nothing(self) -> None:
        return
