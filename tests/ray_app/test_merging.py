"""Requests that travel to a replica as one: what may, what comes back to whom, and a culprit among them."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.serving import Gather
from tutti.core import wire
from tutti.core.errors import Cancelled, DeadlineExceeded, InferError, Internal, InvalidArgument, Unavailable
from tutti.core.types import POOL_PARAMETER, Call, InferRequest, InferResponse, Tensor
from tutti.ray_app import merging
from tutti.ray_app.members import PoolStatus
from tutti.ray_app.pools import Pool
from tutti.ray_app.router import Router
from tutti.repository import config

TEXT = """
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: 2 } output { name: "y" data_type: TYPE_FP32 dims: 2 }
"""


def call(value: float, rows: int = 1, signature: object = "s", width: int = 2, **parameters: Any) -> Call:
    x = Tensor.of("x", np.full((rows, width), value, np.float32))
    x.data = bytes(x.raw())
    made = Call(InferRequest("m", {"x": x}, "", f"id{value}", (), parameters, signature=signature), Gather(1))  # type: ignore[arg-type]
    made.rows = rows
    return made


@pytest.mark.parametrize(
    ("more", "rows"),
    [
        ('backend: "onnxruntime" dynamic_batching {}', 8),
        ('backend: "onnxruntime"', 1),
        ('backend: "python" dynamic_batching {}', 1),
        (
            'backend: "onnxruntime" dynamic_batching {} '
            'batch_input { kind: BATCH_ELEMENT_COUNT target_name: "n" data_type: TYPE_FP32 source_input: "x" }',
            1,
        ),
    ],
)
def test_only_models_that_join_a_batch_get_it_as_one(more: str, rows: int) -> None:
    assert merging.rows_at_most(config.parse(TEXT + more, "m")) == rows


def test_equal_requests_travel_together_up_to_the_models_batch() -> None:
    calls = [call(1, rows=3), call(2, rows=3), call(3, signature="other"), call(4, rows=3), call(5, rows=2)]
    assert merging.groups(calls, 8) == [calls[:2], [calls[2]], calls[3:]]
    assert merging.groups(calls, 1) == [[one] for one in calls]


@pytest.mark.parametrize("alone", [call(1, signature=None), call(1, priority=2), call(1, width=100_000)])
def test_others_travel_alone(alone: Call) -> None:
    calls = [call(2), alone, call(3)]
    assert merging.groups(calls, 8) == [[calls[0], calls[2]], [alone]]


def test_the_merged_wait_as_long_as_the_most_patient() -> None:
    calls = [call(1), call(2)]
    calls[0].deadline_ns = 5
    assert merging.merge(calls).deadline_ns == 0
    calls[1].deadline_ns = 9
    assert merging.merge(calls).deadline_ns == 9


class Replica:
    """Negates its input; refuses a request with a 13 in it, or every one with `error`."""

    def __init__(self, error: InferError | None = None) -> None:
        self.rows: list[list[int]] = []
        self._error = error

    async def remote(self, message: wire.BatchMessage, generation: int, to: str) -> wire.AnswerMessage:
        calls = wire.unpack_calls(message, Gather(1), 0)
        self.rows.append([one.request.inputs["x"].shape[0] for one in calls])
        return wire.pack_answers([self._answer(one.request.inputs["x"].array()) for one in calls])

    def _answer(self, x: Any) -> InferResponse | InferError:
        if self._error is not None or (x == 13).any():
            return self._error or InvalidArgument("thirteen")
        return InferResponse("m", "1", [Tensor.of("y", -x)])


def infer(replica: Replica, calls: Sequence[Call]) -> tuple[list[Any], Pool]:
    async def run() -> tuple[list[Any], Pool]:
        pool = Pool(PoolStatus("gpu"), replica)
        (member,) = pool.status.present(["r"])
        member.saw("r", ["m/1"], 0)
        router = Router([pool], asyncio.get_running_loop())
        answers, _ = await router.infer(calls, "m/1", [pool], member, 8)
        return answers, pool

    return asyncio.run(run())


def test_each_gets_its_share_and_hears_from_whom() -> None:
    calls = [call(1, rows=3), call(2, signature="other"), call(3, rows=2)]
    replica = Replica()
    answers, pool = infer(replica, calls)
    assert replica.rows == [[5, 1]]
    for own, answer in zip(calls, answers, strict=True):
        np.testing.assert_array_equal(answer.tensor("y").array(), -own.request.inputs["x"].array())
        assert answer.parameters == {POOL_PARAMETER: "gpu"}
    assert pool.status.requests == 3


def test_a_culprit_fails_alone() -> None:
    replica = Replica()
    answers, _ = infer(replica, [call(1), call(13), call(3)])
    assert replica.rows == [[3], [1, 1, 1]]
    assert [isinstance(answer, InvalidArgument) for answer in answers] == [False, True, False]
    assert answers[2].tensor("y").array().tolist() == [[-3, -3]]


def test_what_is_refused_for_lack_of_room_is_not_asked_again() -> None:
    replica = Replica(Unavailable("full"))
    answers, _ = infer(replica, [call(1), call(2)])
    assert replica.rows == [[2]]
    assert [answer.message for answer in answers] == ["full", "full"]


class Dying:
    """Five replicas: one that gets a 13 is lost."""

    def __init__(self) -> None:
        self.lost: list[str] = []

    async def remote(self, message: wire.BatchMessage, generation: int, to: str) -> wire.AnswerMessage | str:
        calls = wire.unpack_calls(message, Gather(1), 0)
        arrays = [one.request.inputs["x"].array() for one in calls]
        if any((x == 13).any() for x in arrays):
            self.lost.append(to)
            raise ConnectionError("it died")
        return wire.pack_answers([InferResponse("m", "1", [Tensor.of("y", -x)]) for x in arrays])


def ask_dying(calls: Sequence[Call]) -> tuple[list[Any], Dying]:
    async def run() -> tuple[list[Any], Dying]:
        replica = Dying()
        pool = Pool(PoolStatus("gpu"), replica)
        for member in pool.status.present(list("abcde")):
            member.saw(member.id, ["m/1"], 0)
        router = Router([pool], asyncio.get_running_loop())
        answers, _ = await router.infer(calls, "m/1", [pool], pool.status.members["a"])
        return answers, replica

    return asyncio.run(run())


def test_a_request_that_ends_replicas_fails_alone_and_ends_three() -> None:
    answers, replica = ask_dying([call(1), call(13), call(3)])
    assert [isinstance(answer, Internal) for answer in answers] == [False, True, False]
    assert "3 replicas were lost while they held the request" in answers[1].message
    assert answers[2].tensor("y").array().tolist() == [[-3, -3]]
    assert len(replica.lost) == 3


def test_what_nobody_waits_for_is_not_sent_again() -> None:
    calls = [call(13), call(13)]
    calls[0].is_cancelled = True
    calls[1].deadline_ns = 1
    answers, replica = ask_dying(calls)
    assert [type(answer) for answer in answers] == [Cancelled, DeadlineExceeded]
    assert len(replica.lost) == 1
