"""Whatever becomes of a batch's delivery, each call is answered, counted and settled once."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from tutti.core.errors import DeadlineExceeded, InferError, Internal, Unavailable
from tutti.core.types import Call, InferRequest, InferResponse
from tutti.observing.statistics import ModelStatistics
from tutti.ray_app.members import Member
from tutti.ray_app.settling import STEPS_PARAMETER, Delivery, settle_batch


class Sink:
    def __init__(self, error: Exception | None = None) -> None:
        self.settled: list[Call] = []
        self._error = error

    def settle(self, calls: Sequence[Call]) -> None:
        self.settled += calls
        if self._error is not None:
            raise self._error


def settled(delivery: Awaitable[Delivery], sink: Sink, finished: Any = lambda *_: None) -> tuple[list[Any], int, int]:
    """The answers of two calls, and how many were counted as successes and failures."""
    calls = [Call(InferRequest("m", {}), sink) for _ in range(2)]
    statistics = ModelStatistics()
    asyncio.run(settle_batch("m", calls, 1, statistics, delivery, finished))  # type: ignore[arg-type]
    assert sink.settled == calls
    return [call.answer for call in calls], statistics.counts.success.count, statistics.counts.fail.count


async def delivers(count: int = 2) -> Delivery:
    return [InferResponse("m", "1", []) for _ in range(count)], Member("r0", "gpu")


async def fails(error: BaseException) -> Delivery:
    raise error


@pytest.mark.parametrize(
    ("delivery", "expected", "says"),
    [
        (lambda: fails(DeadlineExceeded("late")), DeadlineExceeded, "late"),
        (lambda: fails(asyncio.CancelledError()), Unavailable, "model 'm': the gateway is stopping"),
        (lambda: fails(RuntimeError("broken")), Internal, "model 'm' failed: RuntimeError: broken"),
        (lambda: delivers(1), Internal, "model 'm': expected 2 answers from the replica, got 1"),
    ],
)
def test_a_delivery_that_fails_is_the_answer_to_every_call(
    delivery: Callable[[], Awaitable[Delivery]], expected: type[InferError], says: str
) -> None:
    replicas: list[Member | None] = []
    answers, successes, failures = settled(delivery(), Sink(), lambda replica, _: replicas.append(replica))
    assert [(type(answer), answer.message) for answer in answers] == [(expected, says)] * 2
    assert (successes, failures) == (0, 2)
    assert replicas == [None], "no replica is known to have answered"


def test_the_sender_hears_of_the_replica_before_callers_do() -> None:
    sink = Sink()
    heard: list[Any] = []
    _, successes, failures = settled(
        delivers(), sink, lambda replica, end_ns: heard.append((replica.id, end_ns > 1, list(sink.settled)))
    )
    assert heard == [("r0", True, [])]
    assert (successes, failures) == (2, 0)


def test_a_slow_answer_tells_the_log_of_its_steps_and_its_caller_nothing() -> None:
    steps = [["tokenizer", 10, 20, 1], ["encoder", 30, 4000, 8]]

    async def tells() -> Delivery:
        told = InferResponse("m", "1", [])
        told.parameters = {STEPS_PARAMETER: json.dumps(steps), "tutti_pool": "gpu"}
        return [told, InferResponse("m", "1", [])], Member("r0", "gpu", name="gpu-4711")

    calls = [Call(InferRequest("m", {}), Sink()) for _ in range(2)]
    asyncio.run(settle_batch("m", calls, 1, ModelStatistics(), tells(), lambda *_: None, has_steps=True))
    slow, quick = [call.times.spent(0) for call in calls if call.times is not None]
    assert slow.steps == tuple(map(tuple, steps))
    assert (slow.replica, quick.replica, quick.steps) == ("gpu-4711", "gpu-4711", ())
    assert slow.compute_ns == quick.compute_ns > 0
    assert isinstance(calls[0].answer, InferResponse)
    assert calls[0].answer.parameters == {"tutti_pool": "gpu"}


def test_callers_hear_of_answers_though_the_sender_fails() -> None:
    answers, _, _ = settled(delivers(), Sink(), lambda *_: 1 / 0)
    assert all(isinstance(answer, InferResponse) for answer in answers)


def test_a_broken_sink_does_not_end_the_sender() -> None:
    answers, successes, _ = settled(delivers(), Sink(RuntimeError("the connection is gone")))
    assert all(isinstance(answer, InferResponse) for answer in answers)
    assert successes == 2
