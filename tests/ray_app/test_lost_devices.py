"""A replica whose device has failed is lost with what it held: that goes elsewhere, and the culprit not for ever."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.serving import Gather
from tutti.core import wire
from tutti.core.errors import Cancelled, DeviceLost, Internal, Unavailable
from tutti.core.types import Answer, Call, InferRequest, InferResponse, Tensor
from tutti.ray_app import membership
from tutti.ray_app.members import Member, PoolStatus
from tutti.ray_app.pools import Pool
from tutti.ray_app.retry import MAX_SENDS
from tutti.ray_app.router import Router

POISON = 13.0


class Replicas:
    """Replicas by id, each with a device that a request of 13 ends; what it holds then is lost, what comes is refused.

    Those of `broken` have lost theirs already, and nobody knows.
    """

    def __init__(self, count: int, broken: Sequence[str] = ()) -> None:
        self.ids = [f"r{number}" for number in range(count)]
        self.failed = set(broken)
        self.executed: Counter[float] = Counter()
        self.messages: list[tuple[str, int]] = []

    async def remote(self, message: wire.BatchMessage, generation: int, to: str) -> wire.AnswerMessage | str:
        if to in self.failed:
            return wire.GONE
        calls = wire.unpack_calls(message, Gather(1), 0)
        self.messages.append((to, len(calls)))
        return wire.pack_answers([self._answer(to, call) for call in calls])

    def _answer(self, replica: str, call: Call) -> Answer:
        value = float(call.request.inputs["x"].array()[0, 0])
        if value == POISON:
            self.failed.add(replica)
        if replica in self.failed:
            return DeviceLost("device cuda:0 has failed: device-side assert")
        self.executed[value] += 1
        return InferResponse("m", "1", [Tensor.of("y", np.full((1, 1), -value, np.float32))])


def call(value: float) -> Call:
    made = Call(InferRequest("m", {"x": Tensor.of("x", np.full((1, 1), value, np.float32))}), Gather(1))
    made.rows = 1
    return made


def answers(replicas: Replicas, calls: Sequence[Call], first: str = "r0", patience_s: float = 10) -> list[Any]:
    async def run() -> list[Any]:
        pool = Pool(PoolStatus("gpu"), replicas, patience_s=patience_s)
        for member in pool.status.present(replicas.ids):
            member.saw(member.id, ["m/1"], 0)
        router = Router([pool], asyncio.get_running_loop())
        found, by = await router.infer(calls, "m/1", [pool], pool.status.members[first])
        assert by is None or isinstance(by, Member)
        assert all(not pool.status.members[one].is_up for one in replicas.failed & {to for to, _ in replicas.messages})
        return found

    return asyncio.run(run())


def values(found: Sequence[Any]) -> list[float | type]:
    return [float(one.tensor("y").array()[0, 0]) if isinstance(one, InferResponse) else type(one) for one in found]


def test_the_culprit_ends_three_replicas_and_its_mates_are_answered_once() -> None:
    replicas = Replicas(6)
    found = answers(replicas, [call(1), call(POISON), call(3), call(4)])
    assert values(found) == [-1, Internal, -3, -4]
    assert "device cuda:0 has failed" in found[1].message
    assert len(replicas.failed) == MAX_SENDS, "it is not sent to replica after replica"
    assert replicas.executed == {1: 1, 3: 1, 4: 1}
    assert [count for _, count in replicas.messages[:2]] == [4, 3], "what was answered is not asked again"


def test_what_was_answered_stays_where_no_replica_is_left_for_the_rest() -> None:
    replicas = Replicas(1)
    found = answers(replicas, [call(1), call(POISON)], patience_s=0.05)
    assert values(found) == [-1, Unavailable]


class Silent:
    """A replica that once does not answer, as one on a machine that is too busy, and is heard of again."""

    def __init__(self, member: Member) -> None:
        self.asked = 0
        self._member = member

    async def remote(self, message: wire.BatchMessage, generation: int, to: str) -> wire.AnswerMessage:
        self.asked += 1
        if self.asked == 1:
            self._member.missed()
            self._member.missed()
            asyncio.get_running_loop().call_later(0, self._heard, to)
            raise asyncio.CancelledError
        (sent,) = wire.unpack_calls(message, Gather(1), 0)
        return wire.pack_answers([InferResponse("m", "1", [sent.request.inputs["x"]])])

    def _heard(self, to: str) -> None:
        self._member.saw(to, ["m/1"], 0)


def test_one_that_is_heard_of_again_gets_what_it_has_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "FORGIVEN_AFTER_S", 0.01)

    async def run() -> tuple[list[Answer], int]:
        status = PoolStatus("cpu")
        (member,) = status.present(["r0"])
        member.saw("r0", ["m/1"], 0)
        silent = Silent(member)
        pool = Pool(status, silent)
        router = Router([pool], asyncio.get_running_loop())
        found, _ = await router.infer([call(7)], "m/1", [pool], member)
        return found, silent.asked

    (answer,), asked = asyncio.run(run())
    assert isinstance(answer, InferResponse)
    assert asked == 2


def test_nobody_is_asked_for_one_who_has_gone() -> None:
    replicas = Replicas(3)
    gone = call(POISON)
    gone.is_cancelled = True
    assert values(answers(replicas, [gone])) == [Cancelled]
    assert len(replicas.messages) == 1


def test_a_sequence_hears_that_its_replica_is_lost() -> None:
    replicas = Replicas(2)

    async def run() -> None:
        pool = Pool(PoolStatus("gpu"), replicas)
        for member in pool.status.present(replicas.ids):
            member.saw(member.id, ["m/1"], 0)
        router = Router([pool], asyncio.get_running_loop())
        with pytest.raises(Unavailable, match="cuda:0"):
            await router.send_to(pool, pool.status.members["r0"], [call(1), call(POISON)])
        assert not pool.status.members["r0"].is_up

    asyncio.run(run())


class Source:
    """The messages of one stream, as Serve hands them over."""

    def __init__(self, messages: Sequence[Any]) -> None:
        self._messages = iter(messages)

    def __aiter__(self) -> "Source":
        return self

    async def __anext__(self) -> Any:
        try:
            return next(self._messages)
        except StopIteration:
            raise StopAsyncIteration from None

    def cancel(self) -> None:
        """Nothing goes on."""


class Streaming:
    """Replicas that answer twice; the device of r0 fails after `before` answers."""

    def __init__(self, before: int) -> None:
        self._before = before
        self.asked: list[str] = []

    def remote(self, message: wire.BatchMessage, generation: int, to: str) -> Source:
        self.asked.append(to)
        response = InferResponse("m", "1", [Tensor.of("y", np.zeros((1, 1), np.float32))])
        good = [(wire.pack_answers([response]), False), (wire.pack_answers([response]), True)]
        lost = (wire.pack_answers([DeviceLost("device cuda:0 has failed: hang")]), True)
        return Source([*good[: self._before], lost] if to == "r0" else good)


def streamed(replicas: Streaming) -> Answer:
    """The last answer."""

    async def run() -> Answer:
        pool = Pool(PoolStatus("gpu"), None, stream=replicas)
        for member in pool.status.present(["r0", "r1"]):
            member.saw(member.id, ["m/1"], 0)
        pool.status.members["r1"].begins(0, 1)  # so that r0 is asked first
        router = Router([pool], asyncio.get_running_loop())
        try:
            return await router.stream(call(1), "m/1", [pool])
        finally:
            assert not pool.status.members["r0"].is_up

    return asyncio.run(run())


def test_a_stream_that_lost_its_device_before_it_began_begins_elsewhere() -> None:
    replicas = Streaming(before=0)
    assert isinstance(streamed(replicas), InferResponse)
    assert replicas.asked == ["r0", "r1"]


def test_a_stream_that_lost_its_device_midway_ends() -> None:
    replicas = Streaming(before=1)
    with pytest.raises(Unavailable, match="the replica was lost while it answered"):
        streamed(replicas)
    assert replicas.asked == ["r0"]
