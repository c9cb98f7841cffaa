"""Decisions about calls whose replica was lost: pure, by the time that they are told."""

import random

import pytest

from tests.serving import Gather
from tutti.core.errors import Cancelled, DeadlineExceeded, DeviceLost, Internal, Unavailable
from tutti.core.types import Answer, Call, InferRequest, InferResponse
from tutti.ray_app.members import Member, ReplicaLost, ReplicaSilent
from tutti.ray_app.retry import MAX_SENDS, Attempts, Suspect, unwanted


def calls(count: int) -> list[Call]:
    return [Call(InferRequest("m", {}), Gather(1)) for _ in range(count)]


def replicas(count: int) -> list[Member]:
    return [Member(f"r{number}", "gpu", f"gpu-{number}") for number in range(count)]


def test_what_is_left_goes_together_until_two_replicas_are_lost() -> None:
    first, second = replicas(2)
    attempts = Attempts(calls(3))
    attempts.lost(first, ReplicaLost("it died"))
    assert attempts.go_together(0)
    attempts.lost(second, ReplicaLost("it died"))
    assert not attempts.go_together(0)
    assert len(attempts.unanswered) == 3 and attempts.tried == [first, second]


def test_the_time_decides_whether_somebody_still_waits() -> None:
    batch = calls(2)
    attempts = Attempts(batch)
    attempts.lost(replicas(1)[0], ReplicaLost("it died"))
    batch[0].deadline_ns, batch[1].is_cancelled = 1000, True
    assert attempts.go_together(999), "one call's time is not up"
    assert not attempts.go_together(1000)
    assert isinstance(unwanted(batch[0], 1000), DeadlineExceeded)
    assert isinstance(unwanted(batch[1], 0), Cancelled)
    assert unwanted(batch[0], 999) is None


@pytest.mark.parametrize("seed", range(20))
def test_every_call_gets_the_first_answer_that_is_none_of_a_lost_device(seed: int) -> None:
    rng = random.Random(seed)
    batch = calls(rng.randint(1, 6))
    attempts = Attempts(batch)
    expected: dict[Call, Answer] = {}
    while attempts.unanswered:
        replies: list[Answer] = [
            DeviceLost("gone") if rng.random() < 0.5 else InferResponse("m", "1", []) for _ in attempts.unanswered
        ]
        expected |= {
            call: reply
            for call, reply in zip(list(attempts.unanswered), replies, strict=True)
            if not isinstance(reply, DeviceLost)
        }
        attempts.lost(replicas(1)[0], ReplicaLost("device cuda:0 has failed", replies))
        assert attempts.unanswered == [call for call in batch if call not in expected]
    assert attempts.in_order() == [expected[call] for call in batch]
    assert not attempts.go_together(0), "nothing is left"


def test_what_cannot_be_sent_fails_and_what_was_answered_stays() -> None:
    batch = calls(2)
    attempts = Attempts(batch)
    response = InferResponse("m", "1", [])
    attempts.lost(replicas(1)[0], ReplicaLost("device cuda:0 has failed", [response, DeviceLost("gone")]))
    error = Unavailable("no replica is up")
    attempts.failed(error)
    assert attempts.in_order() == [response, error]


def test_a_suspect_is_to_blame_for_the_third_replica() -> None:
    first, second, third = replicas(3)
    suspect = Suspect(calls(1)[0], [first, second])
    verdict = suspect.lost(third, ReplicaLost("it died"), 0)
    assert isinstance(verdict, Internal)
    assert verdict.message == (
        f"model 'm': {MAX_SENDS} replicas were lost while they held the request, at last gpu-2: it died"
    )


def test_silence_is_not_held_against_a_suspect_so_soon() -> None:
    members = replicas(2 * MAX_SENDS + 1)
    suspect = Suspect(calls(1)[0], members[:2])
    for member in members[2:-1]:
        assert suspect.lost(member, ReplicaSilent("it does not answer"), 0) is None
    assert isinstance(suspect.lost(members[-1], ReplicaSilent("it does not answer"), 0), Internal)


def test_a_suspect_that_nobody_waits_for_is_not_sent_again() -> None:
    suspect = Suspect(calls(1)[0], replicas(2))
    suspect.call.deadline_ns = 1000
    assert suspect.lost(replicas(3)[2], ReplicaSilent("it does not answer"), 999) is None
    assert isinstance(suspect.lost(replicas(3)[2], ReplicaSilent("it does not answer"), 1000), DeadlineExceeded)
