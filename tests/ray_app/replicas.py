"""Replicas that do as a test tells them, behind a real router, in simulated time: no cluster, no waiting."""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from tutti.core import wire
from tutti.core.types import Answer, Call, Infer, InferRequest, InferResponse, Tensor
from tutti.observing.statistics import ModelStatistics
from tutti.ray_app import virtual_time
from tutti.ray_app.fallback import of_model
from tutti.ray_app.members import PoolStatus
from tutti.ray_app.pools import Pool
from tutti.ray_app.replica import Description
from tutti.ray_app.router import Router
from tutti.ray_app.sequences import Sequences
from tutti.ray_app.streams import Streams
from tutti.repository import config
from tutti.serving import local

TEXT = """
backend: "python" max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: 1 } output { name: "y" data_type: TYPE_FP32 dims: 1 }
"""
# What a replica is told to do with a message: see `Replicas`.
ANSWER, REFUSE, DIE, HANG, SILENCE = "answer", "refuse", "die", "hang", "silence"
WAYS = ("hop", "sequence", "stream")


class Sink:
    """Counts how often each call is settled; `all_settled` ends once each of so many is."""

    def __init__(self, count: int) -> None:
        self.settled: list[Call] = []
        self._count = count
        self._done = asyncio.Event()

    def settle(self, calls: Sequence[Call]) -> None:
        self.settled += calls
        if len(self.settled) >= self._count:
            self._done.set()

    async def all_settled(self) -> None:
        await self._done.wait()
        assert len(set(self.settled)) == len(self.settled), "a call was settled more than once"


class Replicas:
    """The replicas of one pool, which do with the first messages as `script` says, and answer those after it.

    They `refuse` (another has taken their place), `die` with an error, `hang` until Serve says that they are dead a
    second later, or fall into `silence`: neither the message nor a probe is answered.
    """

    def __init__(self, count: int, script: Sequence[str] = (), patience_s: float = 10.0) -> None:
        self.ids = [f"r{number}" for number in range(count)]
        self.script = deque(script)
        self.asked: list[str] = []
        self.stopped = 0
        self.silent: set[str] = set()
        self.pool = Pool(
            PoolStatus("gpu"),
            send=SimpleNamespace(remote=self._infer),
            stream=SimpleNamespace(remote=lambda message, generation, to: _Stream(self, message, to)),
            describe=SimpleNamespace(remote=self._describe),
            broadcast=lambda _: SimpleNamespace(results_async=self._nothing),
            patience_s=patience_s,
        )
        self.changed: Callable[[list[str], str], None] = lambda *_: None

    def watch(self, _name: str, changed: Callable[[list[str], str], None]) -> None:
        self.changed = changed
        changed(list(self.ids), "")

    def end(self, replica: str) -> None:
        """Serve finds that a replica is dead."""
        self.ids = [name for name in self.ids if name != replica]
        self.changed(list(self.ids), replica)

    def begin(self, replica: str) -> None:
        """Serve has started a replica."""
        self.ids.append(replica)
        self.changed(list(self.ids), "")

    async def refusal(self, replica: str, is_stream: bool = False) -> str:
        """Do as the script says; "" where the message is to be answered.

        Ray ends the streams of a dead replica by itself; Serve keeps other messages for the next that comes.
        """
        self.asked.append(replica)
        action = self.script.popleft() if self.script else ANSWER
        if action == DIE:
            self.end(replica)
            raise ConnectionError("the actor died")
        if action == HANG:
            await asyncio.sleep(1.0)
            self.end(replica)
        if action == HANG and is_stream:
            raise ConnectionError("the actor died")
        if action == SILENCE:
            self.silent.add(replica)
        if action in (HANG, SILENCE):
            await asyncio.Event().wait()
        return wire.GONE if action == REFUSE else ""

    def answer(self, request: InferRequest) -> Answer:
        return InferResponse("m", "1", [Tensor.of("y", -request.inputs["x"].array())])

    async def _infer(self, message: wire.BatchMessage, generation: int, to: str) -> wire.AnswerMessage | str:
        if refusal := await self.refusal(to):
            return refusal
        return wire.pack_answers([self.answer(call.request) for call in wire.unpack_calls(message, Sink(0), 0)])

    async def _describe(self, to: str = "", wanted: float = 0.0, by: str = "") -> Description:
        if to in self.silent or not to:
            await asyncio.Event().wait()
        return Description(to if to in self.ids else "", to, ("m/1",), 0)

    async def _nothing(self) -> None:
        return


class _Stream:
    """A reply of two answers."""

    def __init__(self, replicas: Replicas, message: wire.BatchMessage, to: str) -> None:
        self._replicas = replicas
        self._message = message
        self._to = to

    async def __aiter__(self) -> Any:
        if refusal := await self._replicas.refusal(self._to, is_stream=True):
            yield refusal
            return
        (call,) = wire.unpack_calls(self._message, Sink(0), 0)
        yield wire.pack_answers([self._replicas.answer(call.request)]), False
        if refusal := await self._replicas.refusal(self._to, is_stream=True):
            yield refusal
            return
        yield wire.pack_answers([self._replicas.answer(call.request)]), True

    def cancel(self) -> None:
        self._replicas.stopped += 1


class Gateway:
    """A router over scripted replicas, and one of the ways to them: "hop", "sequence" or "stream"."""

    def __init__(self, replicas: Replicas, way: str = "hop") -> None:
        loop = asyncio.get_running_loop()
        self.replicas = replicas
        self.pool = replicas.pool
        self.router = Router([self.pool], loop)
        self.statistics = ModelStatistics()
        self.way = way
        self.infer = self._infer(loop)

    def _infer(self, loop: asyncio.AbstractEventLoop) -> Infer:
        if self.way == "sequence":
            return Sequences("m", self.router, self.statistics, 10**9, 100)
        if self.way == "stream":
            return Streams(self.router, "m/1", [self.pool], self.statistics, 8)
        timer = local.loop_timer(loop)
        return of_model(config.parse(TEXT, "m"), "m/1", self.router, [self.pool], self.statistics, timer)

    def calls(self, *values: float, starts: bool = True, **more: Any) -> list[Call]:
        """Calls with a row each, of one sequence where the way is for sequences; `more` are attributes of the calls."""
        sink = Sink(len(values))
        calls = []
        for number, value in enumerate(values):
            parameters: Any = {}
            if self.way == "sequence":
                parameters = {"sequence_id": 7, "sequence_start": starts and number == 0}
            tensor = Tensor.of("x", np.full((1, 1), value, np.float32))
            call = Call(InferRequest("m", {"x": tensor}, parameters=parameters), sink)
            call.emit = _nobody if self.way == "stream" else None
            for name, setting in more.items():
                setattr(call, name, setting)
            calls.append(call)
        return calls

    async def serve(self, calls: Sequence[Call]) -> list[Answer]:
        """The answers, once all have come."""
        self.infer(calls)
        return await answers_to(calls)


def _nobody(_response: InferResponse) -> None:
    """A caller who does not look at the answers before the last."""


async def answers_to(calls: Sequence[Call]) -> list[Answer]:
    sink = calls[0].sink
    assert isinstance(sink, Sink)
    await sink.all_settled()
    return [call.answer for call in calls if call.answer is not None]


def served(replicas: Replicas, test: Callable[[Gateway], Coroutine[Any, Any, None]], way: str = "hop") -> None:
    """Run a test on a gateway whose replicas are known, in simulated time."""

    async def run() -> None:
        await asyncio.sleep(0.1)  # of simulated time: 0 is no time to a hop
        gateway = Gateway(replicas, way)
        gateway.router.start(replicas.watch)
        await asyncio.sleep(0.1)  # of simulated time: until probes have come back
        try:
            async with asyncio.timeout(1000):  # of simulated time: what never comes must not be waited for
                await test(gateway)
        finally:
            gateway.router.stop()

    virtual_time.run(run)


def values(answers: Sequence[Answer]) -> list[float | type]:
    """The value in each answer, or the class of its error."""
    return [
        float(answer.tensor("y").array()[0, 0]) if isinstance(answer, InferResponse) else type(answer)
        for answer in answers
    ]
