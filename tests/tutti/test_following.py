"""What front-end processes are told of the engine's settings, and for whom a change waits."""

import threading
from typing import Any

import pytest

from tutti.frontends.v2 import following
from tutti.frontends.v2.api import Api
from tutti.frontends.v2.following import Followed, Follower, Leader
from tutti.observing.tracing import TraceConfig, Tracer


class Kept(Follower):
    """Keeps what it is told."""

    def __init__(self, leader: "list[Leader]", answers: bool = True) -> None:
        self.told: list[Followed] = []
        self._leader = leader
        self._answers = answers

    def send(self, values: Any) -> None:
        _, number, state = values
        self.told.append(Followed(*state))
        if self._answers:
            self.followed = number

    def end(self) -> None:
        self.has_ended = True
        self._leader[0].look()


def led(tmp_path: Any, answers: bool = True) -> tuple[Api, Leader, list[Kept]]:
    tracer = Tracer(TraceConfig(file=str(tmp_path / "trace"), levels=("OFF",), rate=1))
    api = Api(None, tracer=tracer)  # type: ignore[arg-type]
    leaders: list[Leader] = []
    followers = [Kept(leaders), Kept(leaders, answers)]
    leaders.append(Leader(api, followers))
    return api, leaders[0], followers


def in_thread(do: Any, *given: Any) -> threading.Thread:
    thread = threading.Thread(target=do, args=given)
    thread.start()
    return thread


def test_each_change_is_told_to_all(tmp_path: Any) -> None:
    api, leader, followers = led(tmp_path)
    leader.tell(followers)
    in_thread(api.logs.update, {"log_verbose_level": 2}).join(20)
    in_thread(api.tracer.update, "", {"trace_level": ["TIMESTAMPS"]}).join(20)
    in_thread(api.tracer.update, "some", {"trace_level": ["OFF"]}).join(20)
    in_thread(api.tracer.update, "", {"trace_level": ["OFF"]}).join(20)
    for follower in followers:
        assert [(one.logs["log_verbose_level"], one.is_traced) for one in follower.told] == [
            (0, False), (2, False), (2, True), (2, True), (2, False),
        ]  # fmt: skip
        assert not any(one.has_contexts or "log_file" in one.logs for one in follower.told)


def test_a_change_waits_until_all_know_or_have_ended(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "PATIENCE_S", 60.0)
    api, _, (quick, late) = led(tmp_path, answers=False)
    changing = in_thread(api.logs.update, {"log_info": False})
    changing.join(0.2)
    assert changing.is_alive()
    late.end()
    changing.join(20)
    assert not changing.is_alive()
    assert quick.told == late.told


def test_a_change_does_not_wait_for_ever(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "PATIENCE_S", 0.05)
    api, _, _ = led(tmp_path, answers=False)
    changing = in_thread(api.logs.update, {"log_info": False})
    changing.join(20)
    assert not changing.is_alive()
    api.logs.update({"log_info": True})  # on the loop's own thread nobody could answer
