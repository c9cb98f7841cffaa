"""Whether a cluster's head answers: one that says it is lost, one that raises, and one that hangs."""

import threading
from collections.abc import Callable

import pytest

from tests.serving import wait_until
from tutti.ray_app.head import SILENCE_S, Head


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def head(ask: Callable[[], str], clock: Clock) -> Head:
    return Head(ask, interval_s=0.001, clock=clock)


def test_a_head_that_answers_is_not_lost() -> None:
    clock, asked = Clock(), threading.Semaphore(0)
    answers = iter(["", "", "", "it takes this node for dead"])

    def ask() -> str:
        asked.acquire()
        return next(answers)

    one = head(ask, clock)
    for _ in range(3):
        clock.now_s += 2 * SILENCE_S
        asked.release()
        wait_until(lambda: one.lost() == "")
    asked.release()
    wait_until(lambda: one.lost() == "it takes this node for dead")


def test_a_head_is_asked_nothing_once_it_is_closed() -> None:
    entered, is_over, answers = threading.Event(), threading.Event(), []

    def ask() -> str:
        answers.append("")
        entered.set()
        is_over.wait()
        return ""

    one = head(ask, Clock())
    assert entered.wait(60)
    assert not one.close(timeout_s=0.01), "an answer is still waited for"
    is_over.set()
    assert one.close(timeout_s=60)
    assert answers == [""]


@pytest.mark.parametrize("hangs", [True, False])
def test_a_head_that_hangs_or_is_not_reached_is_lost_after_a_while(hangs: bool) -> None:
    clock, is_over = Clock(), threading.Event()

    def ask() -> str:
        if hangs:
            is_over.wait()
        if is_over.is_set():
            return "the test is over"
        raise RuntimeError("Failed to connect to GCS")

    one = head(ask, clock)
    for _ in range(int(SILENCE_S)):
        clock.now_s += 1
        assert one.lost() == ""
    clock.now_s += 1
    assert one.lost() == f"its head has not answered for {SILENCE_S + 1:.0f} s"
    is_over.set()


def test_a_pause_of_who_looks_is_no_silence() -> None:
    clock, is_over = Clock(), threading.Event()

    def ask() -> str:
        is_over.wait()
        return "the test is over"

    one = head(ask, clock)
    assert one.lost() == ""
    clock.now_s += 10 * SILENCE_S
    assert one.lost() == ""
    is_over.set()
