"""Parameters of ours on their way through a gateway: what is asked of a replica, and what its answer says of that."""

import asyncio
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.models import Repository
from tests.serving import Gather
from tutti.core import wire
from tutti.core.errors import Internal, InvalidArgument
from tutti.core.types import Answer, Call, InferRequest, InferResponse, Tensor
from tutti.observing.explanations import PARAMETER, Explained
from tutti.observing.statistics import ModelStatistics
from tutti.observing.trace_records import Record, numbers
from tutti.ray_app.engine import make_engine
from tutti.ray_app.fallback import of_model
from tutti.ray_app.members import PoolStatus
from tutti.ray_app.placement import PoolSpec
from tutti.ray_app.pools import Pool
from tutti.ray_app.router import Router
from tutti.repository import config
from tutti.serving.local import loop_timer

TEXT = """
backend: "python" max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: 1 } output { name: "y" data_type: TYPE_FP32 dims: 1 }
"""
X = Tensor.of("x", np.zeros((1, 1), np.float32))
Y = Tensor.of("y", np.zeros((1, 1), np.float32))


class Replica:
    """Answers requests as `answer` says, with explanations for those that ask for one."""

    def __init__(self, answer: Callable[[], Answer]) -> None:
        self.parameters: list[dict[str, Any]] = []
        self._answer = answer

    async def remote(self, message: wire.BatchMessage, generation: int, to: str) -> wire.AnswerMessage:
        calls = wire.unpack_calls(message, Gather(1), 0)
        self.parameters += [dict(call.request.parameters) for call in calls]
        for call in calls:
            if PARAMETER in call.request.parameters:
                Explained(call, 1, False)
            call.finish(self._answer())
        return wire.pack_answers([call.answer for call in calls if call.answer is not None])


def infer(replica: Replica, *calls: Call) -> list[Any]:
    """Their answers, by way of a gateway's hop to the replica."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        pool = Pool(PoolStatus("gpu"), replica)
        (member,) = pool.status.present(["r"])
        member.saw("r", ["m/1"], 0)
        router = Router([pool], loop)
        way = of_model(config.parse(TEXT, "m"), "m/1", router, [pool], ModelStatistics(), loop_timer(loop))
        way(calls)
        await asyncio.gather(*(asyncio.to_thread(call.token.wait) for call in calls))
        way.close()
        router.stop()

    asyncio.run(run())
    return [call.answer for call in calls]


def traced_and_not() -> tuple[Sequence[Call], Record]:
    """A traced call that does not ask to be explained, and one that does."""
    calls = []
    for parameters in ({}, {PARAMETER: True}):
        gather = Gather(1)
        calls.append(Call(InferRequest("m", {"x": X}, parameters=dict(parameters)), gather, gather))
    calls[0].trace = record = Record(numbers(), calls[0], False)
    return calls, record


def test_who_has_not_asked_is_told_nothing_of_a_failure() -> None:
    """A traced request is explained to its trace only, also where it fails."""
    calls, _ = traced_and_not()
    replica = Replica(lambda: Internal("the model [v2: x] fails"))
    traced, asked = infer(replica, *calls)
    assert [PARAMETER in parameters for parameters in replica.parameters] == [True, True]
    assert (type(traced), traced.message) == (Internal, "the model [v2: x] fails")
    assert asked.message.startswith("the model [v2: x] fails [tutti_explain: ")


def test_errors_that_are_not_explained_are_as_they_are() -> None:
    calls, _ = traced_and_not()
    assert [one.message for one in infer(Replica(lambda: InvalidArgument("no [x]")), *calls)] == ["no [x]", "no [x]"]


def test_who_has_not_asked_is_told_nothing_of_an_answer() -> None:
    calls, record = traced_and_not()
    traced, asked = infer(Replica(lambda: InferResponse("m", "1", [Y])), *calls)
    assert PARAMETER not in traced.parameters and PARAMETER in asked.parameters
    assert record.notes["replica"]


class Stream:
    """A decoupled model's answers to each request: one."""

    def __init__(self) -> None:
        self.parameters: list[dict[str, Any]] = []

    def remote(self, message: wire.BatchMessage, generation: int, to: str) -> "Stream":
        calls = wire.unpack_calls(message, Gather(1), 0)
        self.parameters += [dict(call.request.parameters) for call in calls]
        return self

    async def __aiter__(self) -> Any:
        yield wire.pack_answers([InferResponse("m", "1", [Y])]), True


DECOUPLED = "model_transaction_policy { decoupled: true }"


@pytest.mark.parametrize("value", [False, "true"])
def test_what_is_asked_of_a_graph_is_asked_of_steps_that_heed_it(repository: Repository, value: object) -> None:
    """A decoupled step has no word on other pools: its graph takes one, for the others."""
    repository.add("many", TEXT + DECOUPLED, {"model.py": "# replicas have it"})
    repository.add("one", TEXT, {"model.py": "# replicas have it"})
    steps = "".join(
        f'step {{ model_name: "{model}" model_version: -1 input_map {{ key: "x" value: "{read}" }} '
        f'output_map {{ key: "y" value: "{made}" }} }} '
        for model, read, made in (("many", "x", "s"), ("one", "s", "y"))
    )
    graph = TEXT.replace('backend: "python"', 'platform: "ensemble"')
    repository.add("graph", f"{graph} ensemble_scheduling {{ {steps} }}", {".keep": ""})
    specs = [PoolSpec("gpu", 1, 1, 1, ("many",)), PoolSpec("cpu", 1, 1, 0, ("one",))]
    replica, stream = Replica(lambda: InferResponse("m", "1", [Y])), Stream()

    async def run() -> tuple[Call, Call]:
        loop = asyncio.get_running_loop()
        pools = [Pool(PoolStatus(spec.name), replica, stream=stream) for spec in specs]
        for pool in pools:
            (member,) = pool.status.present(["r"])
            member.saw("r", ["many/1", "one/1"], 0)
        router = Router(pools, loop)
        control = SimpleNamespace(models=lambda *_: None)
        engine = make_engine(repository.root, False, 0, specs, router, loop_timer(loop), control)  # type: ignore[arg-type]
        await asyncio.to_thread(engine.load_all)
        assert not engine.failures(), engine.failures()
        calls = []
        for model in ("graph", "many"):
            gather = Gather(1)
            request = InferRequest(model, {"x": X}, parameters={"tutti_fallback": value})  # type: ignore[dict-item]
            calls.append(Call(request, gather, gather, lambda _: None))
            engine(calls[-1:])
            await asyncio.to_thread(gather.wait)
        await asyncio.to_thread(engine.close)
        router.stop()
        return calls[0], calls[1]

    graph_call, alone = asyncio.run(run())
    assert isinstance(graph_call.answer, InferResponse), graph_call.answer
    assert replica.parameters == [{"tutti_fallback": value}] and stream.parameters == [{}]
    assert isinstance(alone.answer, InvalidArgument) and "would be ignored" in alone.answer.message
