"""What callers hear when replicas are lost, hang or are missing, by every way to one. No cluster: see replicas.py."""

import asyncio
from collections.abc import Sequence

import pytest

from tests.ray_app.replicas import (
    ANSWER,
    DIE,
    HANG,
    REFUSE,
    SILENCE,
    WAYS,
    Gateway,
    Replicas,
    Sink,
    answers_to,
    served,
    values,
)
from tutti.core import wire
from tutti.core.errors import Cancelled, DeadlineExceeded, Internal, InvalidArgument, Unavailable
from tutti.core.types import Answer, Call, now_ns
from tutti.ray_app.members import Member
from tutti.ray_app.probes import PROBE_INTERVAL_S

every_way = pytest.mark.parametrize("way", WAYS)
every_loss = pytest.mark.parametrize("loss", [REFUSE, DIE, HANG, SILENCE])


@every_way
@every_loss
def test_what_was_lost_before_an_answer_is_answered_by_another_replica(way: str, loss: str) -> None:
    replicas = Replicas(2, [loss])

    async def test(gateway: Gateway) -> None:
        assert values(await gateway.serve(gateway.calls(5))) == [-5]
        first, second = replicas.asked[:2]
        assert first != second, "it is the other one that is asked again"
        assert gateway.statistics.counts.success.count == 1
        assert gateway.statistics.counts.fail.count == 0, "a call that is sent twice is counted once"

    served(replicas, test, way)


@every_loss
def test_a_stream_that_is_lost_after_an_answer_ends(loss: str) -> None:
    replicas = Replicas(2, [ANSWER, loss])

    async def test(gateway: Gateway) -> None:
        (answer,) = await gateway.serve(gateway.calls(5))
        assert isinstance(answer, Unavailable) and "the replica was lost while it answered" in answer.message
        assert len(set(replicas.asked)) == 1, "its caller has the first half already"

    served(replicas, test, "stream")


@every_loss
def test_a_sequence_whose_replica_is_lost_starts_again(loss: str) -> None:
    replicas = Replicas(2, [ANSWER, loss])

    async def test(gateway: Gateway) -> None:
        assert values(await gateway.serve(gateway.calls(1))) == [-1]
        (answer,) = await gateway.serve(gateway.calls(2, starts=False))
        assert isinstance(answer, Unavailable) and "start the sequence again" in answer.message
        assert len(set(replicas.asked)) == 1, "what it knew is nowhere else"
        assert values(await gateway.serve(gateway.calls(3, starts=False))) == [InvalidArgument]
        assert values(await gateway.serve(gateway.calls(4))) == [-4]

    served(replicas, test, "sequence")


@every_way
def test_an_answer_stands_when_its_replica_is_lost_after_it(way: str) -> None:
    replicas = Replicas(2)

    async def test(gateway: Gateway) -> None:
        assert values(await gateway.serve(gateway.calls(5))) == [-5]
        first = set(replicas.asked)
        replicas.end(replicas.asked[0])
        await asyncio.sleep(1.0)  # of simulated time
        assert set(replicas.asked) == first, "nothing was sent again"
        assert gateway.statistics.counts.success.count == 1
        if way != "sequence":
            assert values(await gateway.serve(gateway.calls(6))) == [-6]
            assert set(replicas.asked) != first

    served(replicas, test, way)


class Poisoned(Replicas):
    """A batch with a 13 in it ends its replica; notes how many suspects are under way, at most."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.batches: list[list[float]] = []
        self.most_alone = 0
        self._alone = 0

    async def _infer(self, message: object, generation: int, to: str) -> object:  # type: ignore[override]
        numbers = [float(call.request.inputs["x"].array()[0, 0]) for call in _calls(message)]
        self.batches.append(numbers)
        self._alone += len(numbers) == 1
        self.most_alone = max(self.most_alone, self._alone)
        await asyncio.sleep(0.1)  # of simulated time: others could be sent meanwhile
        self._alone -= len(numbers) == 1
        if 13 in numbers:
            self.end(to)
            raise ConnectionError("the actor died")
        return await super()._infer(message, generation, to)  # type: ignore[arg-type]


def _calls(message: object) -> Sequence[Call]:
    return wire.unpack_calls(message, Sink(0), 0)  # type: ignore[arg-type]


def test_poison_is_found_alone_and_its_mates_are_answered() -> None:
    replicas = Poisoned(8)

    async def infer(gateway: Gateway, first: Member, *numbers: float) -> list[Answer]:
        answers, _ = await gateway.router.infer(gateway.calls(*numbers), "m/1", [gateway.pool], first)
        return answers

    async def test(gateway: Gateway) -> None:
        r0, r1 = list(gateway.pool.status.members.values())[:2]
        batches = await asyncio.gather(infer(gateway, r0, 1, 13, 3), infer(gateway, r1, 4, 13))
        assert [values(answers) for answers in batches] == [[-1, Internal, -3], [-4, Internal]]
        assert "3 replicas were lost while they held the request" in batches[0][1].message  # type: ignore[union-attr]
        sends = [numbers for numbers in replicas.batches if 13 in numbers]
        assert len(sends) == 6, "each culprit is sent to three replicas"
        assert replicas.most_alone == 1, "suspects go one at a time in the whole gateway"
        assert sends.count([13]) == 2, "the last time it is alone"

    served(replicas, test)


@every_way
def test_what_its_caller_has_left_is_not_sent_again(way: str) -> None:
    replicas = Replicas(2, [HANG])

    async def test(gateway: Gateway) -> None:
        calls = gateway.calls(5)
        gateway.infer(calls)
        await asyncio.sleep(0.5)  # of simulated time: the replica has it
        calls[0].is_cancelled = True
        answers = await answers_to(calls)
        assert len(replicas.asked) == (2 if way == "sequence" else 1), "a sequence's state goes on without its caller"
        assert values(answers) == ([-5] if way == "sequence" else [Cancelled])

    served(replicas, test, way)


def test_a_stream_whose_caller_has_gone_is_stopped_at_its_replica() -> None:
    replicas = Replicas(1, [ANSWER, HANG])

    async def test(gateway: Gateway) -> None:
        calls = gateway.calls(5)
        gateway.infer(calls)
        await asyncio.sleep(0.3)  # of simulated time
        calls[0].is_cancelled = True
        assert values(await answers_to(calls)) == [Cancelled]
        assert replicas.stopped == 1

    served(replicas, test, "stream")


@every_way
def test_a_gateway_that_stops_answers_what_is_under_way(way: str) -> None:
    replicas = Replicas(1, [HANG])

    async def test(gateway: Gateway) -> None:
        calls = gateway.calls(5)
        gateway.infer(calls)
        await asyncio.sleep(0.3)  # of simulated time
        gateway.router.stop()
        (answer,) = await answers_to(calls)
        assert isinstance(answer, Unavailable) and "the gateway is stopping" in answer.message

    served(replicas, test, way)


def test_a_call_whose_time_was_up_while_it_waited_is_not_sent_again() -> None:
    replicas = Replicas(2, [HANG])

    async def test(gateway: Gateway) -> None:
        calls = gateway.calls(5, 6, deadline_ns=now_ns() + 500_000_000)
        calls[1].deadline_ns = now_ns() + 5_000_000_000
        first = gateway.pool.status.members["r0"]
        answers, replica = await gateway.router.infer(calls[:1], "m/1", [gateway.pool], first)
        assert (values(answers), replica) == ([DeadlineExceeded], None)
        assert replicas.asked == ["r0"]
        replicas.script.append(DIE)
        answers, _ = await gateway.router.infer(calls[1:], "m/1", [gateway.pool], gateway.pool.status.members["r1"])
        assert values(answers) == [Unavailable], "it had time, but no replica"

    served(replicas, test)


@every_way
def test_what_waits_where_no_replica_is_hears_so(way: str) -> None:
    replicas = Replicas(0, patience_s=3.0)

    async def test(gateway: Gateway) -> None:
        start_ns = now_ns()
        (answer,) = await gateway.serve(gateway.calls(5))
        assert isinstance(answer, Unavailable) and "no replica is up" in answer.message
        waited_s = (now_ns() - start_ns) / 1e9
        assert waited_s == (0 if way == "sequence" else pytest.approx(3.0, abs=0.5))

    served(replicas, test, way)


@pytest.mark.parametrize("way", ["hop", "stream"])
def test_what_waits_goes_to_the_replica_that_comes(way: str) -> None:
    replicas = Replicas(0)

    async def test(gateway: Gateway) -> None:
        calls = gateway.calls(5)
        gateway.infer(calls)
        await asyncio.sleep(2.0)  # of simulated time
        assert calls[0].answer is None
        replicas.begin("new")
        assert values(await answers_to(calls)) == [-5]
        assert set(replicas.asked) == {"new"}

    served(replicas, test, way)


def test_a_silent_replica_is_not_held_against_a_suspect() -> None:
    replicas = Replicas(5, [DIE, DIE, SILENCE])

    async def test(gateway: Gateway) -> None:
        assert values(await gateway.serve(gateway.calls(5))) == [-5]
        assert len(set(replicas.asked)) == 4

    served(replicas, test)


def test_the_only_replica_is_asked_again_once_it_is_heard_of() -> None:
    replicas = Replicas(1, [SILENCE])

    async def test(gateway: Gateway) -> None:
        calls = gateway.calls(5)
        gateway.infer(calls)
        await asyncio.sleep(4.0)  # of simulated time: two probes have been missed
        assert not gateway.pool.status.is_up
        replicas.silent.clear()
        assert values(await answers_to(calls)) == [-5]
        assert replicas.asked == ["r0", "r0"]

    served(replicas, test)


def test_a_lost_replica_is_probed_at_once() -> None:
    replicas = Replicas(1, [REFUSE])

    async def test(gateway: Gateway) -> None:
        calls = gateway.calls(5)
        gateway.infer(calls)
        await asyncio.sleep(0)
        member = gateway.pool.status.members["r0"]
        while not replicas.asked or member.is_up:
            await asyncio.sleep(0)  # until the message is refused
        await asyncio.sleep(PROBE_INTERVAL_S / 5)  # of simulated time
        assert member.is_up, "the next probe would have come later by itself"
        await answers_to(calls)

    served(replicas, test)
