"""Whose execution is next, by the device time that each user has had: the pure parts."""

from typing import Any

import pytest

from tests.devices.driving import MS
from tutti.devices.executions import Executions
from tutti.devices.pipeline import Batch, Pipeline
from tutti.devices.sharing import Shares


def served(shares: Shares, rounds: int, costs_ns: dict[str, int]) -> list[str]:
    """Who is chosen, of users that all ask all the time."""
    chosen = []
    for _ in range(rounds):
        user = str(shares.choose(costs_ns))
        shares.charge(user, costs_ns[user])
        chosen.append(user)
    return chosen


def test_a_pause_is_not_made_up_for() -> None:
    shares = Shares()
    for user in "ab":
        shares.add(user)
    for _ in range(100):  # a second of a's alone
        shares.choose("a")
        shares.charge("a", 10 * MS)
    shares.asks("b")
    assert served(shares, 4, {"a": 10 * MS, "b": 10 * MS}).count("b") <= 3
    assert served(shares, 100, {"a": 10 * MS, "b": 10 * MS}).count("b") == 50


def test_who_comes_a_little_late_keeps_its_claim() -> None:
    shares = Shares()
    for user in "ab":
        shares.add(user)
        shares.asks(user)
    shares.choose("a")
    shares.charge("a", 10 * MS)
    shares.choose("a")  # b had nothing for a moment
    shares.charge("a", 10 * MS)
    shares.asks("b")
    assert served(shares, 2, {"a": 10 * MS, "b": 10 * MS}) == ["b", "b"]


def test_a_new_user_begins_where_the_others_are() -> None:
    shares = Shares()
    shares.add("a")
    for _ in range(100):
        shares.choose("a")
        shares.charge("a", 10 * MS)
    shares.add("b")
    shares.asks("b")
    assert served(shares, 100, {"a": 10 * MS, "b": 10 * MS}).count("b") <= 52


@pytest.mark.parametrize(("expected_ns", "took_ns"), [(1 * MS, 9 * MS), (9 * MS, 1 * MS)])
def test_what_an_execution_took_counts_not_what_was_expected(expected_ns: int, took_ns: int) -> None:
    owner: Any = None
    job: Any = None
    executions = Executions(lambda batch: True)
    first, second = (Pipeline(owner, name, 1.0, 0, 0) for name in ("first", "second"))
    for pipeline in (first, second):
        executions.add(pipeline)
    turns = []
    for _ in range(20):
        for pipeline in (first, second):
            if not pipeline.staged:
                batch = Batch(pipeline, job, 0)
                batch.expected_ns = expected_ns if pipeline is first else 3 * MS
                pipeline.staged.append(batch)
                executions.ask(pipeline)
        execution = executions.next(0, True)
        assert isinstance(execution, Batch)
        executions.grant(execution, 0, 0)
        executions.ended(execution, took_ns if execution.pipeline is first else 3 * MS, 0)
        turns.append(execution.pipeline)
    assert turns.count(first) == pytest.approx(20 * 3 * MS / (took_ns + 3 * MS), abs=1.1)


def waiting(executions: Executions, name: str) -> Batch:
    owner: Any = None
    job: Any = None
    pipeline = Pipeline(owner, name, 1.0, 0, 0)
    executions.add(pipeline)
    batch = Batch(pipeline, job, 0)
    batch.expected_ns = 2 * MS
    pipeline.staged.append(batch)
    executions.ask(pipeline)
    return batch


def test_what_is_still_being_copied_lets_others_go_first() -> None:
    there: list[Batch] = []
    executions = Executions(lambda batch: batch in there)
    coming, complete = waiting(executions, "coming"), waiting(executions, "complete")
    there.append(complete)
    assert executions.next(0, True) is complete
    executions.grant(complete, 0, 7 * MS)
    assert executions.end_ns == 2 * MS
    executions.ended(complete, 2 * MS, 2 * MS)
    assert executions.next(2 * MS, True) is coming
    executions.grant(coming, 2 * MS, 7 * MS)
    assert executions.end_ns == 9 * MS  # its copy ends at 7
