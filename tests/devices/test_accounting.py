"""Busy time against a slow, obvious count of it."""

import random

import pytest

from tutti.devices.accounting import Accounting


def test_turns_that_overlap_share_their_time() -> None:
    accounting = Accounting()
    accounting.begin("a", 100)
    accounting.begin("b", 110)
    assert accounting.end("a", 130) == 10 + 20 / 2
    assert accounting.end("b", 150) == 20 / 2 + 20
    accounting.begin("a", 200)
    assert accounting.end("a", 205) == 5
    assert accounting.busy_ns == 50 + 5


def test_a_batch_beside_a_turn_counts_where_the_turn_does_not() -> None:
    accounting = Accounting()
    accounting.begin("a", 100)
    accounting.executed(20, 110)  # from 90
    accounting.end("a", 120)
    accounting.executed(15, 130)  # from 115
    assert accounting.busy_ns == 40


@pytest.mark.parametrize("seed", range(50))
def test_it_is_the_union_of_all_spans(seed: int) -> None:
    """Turns of several users, which overlap, and batches, which do not overlap each other."""
    rng = random.Random(seed)
    events: list[tuple[int, int, str, int]] = []
    for user in range(3):
        at = 1
        for number in range(8):
            begin = at + rng.randrange(30)
            at = begin + 1 + rng.randrange(20)
            events += [(begin, 1, "begin", user * 100 + number), (at, 0, "end", user * 100 + number)]
    at, busy, owned = 1, set[int](), 0
    for _ in range(20):
        begin = at + rng.randrange(10)
        at = begin + 1 + rng.randrange(10)
        events.append((at, 2, "executed", at - begin))
        busy |= set(range(begin, at))
    accounting, began = Accounting(), dict[int, int]()
    turns = set[int]()
    for now, _, what, value in sorted(events):
        if what == "begin":
            began[value] = now
            accounting.begin(value, now)
        elif what == "end":
            turns |= set(range(began[value], now))
            owned += accounting.end(value, now)
        else:
            accounting.executed(value, now)
    assert accounting.busy_ns == len(busy | turns)
    assert owned == pytest.approx(len(turns), abs=12)  # each of 24 is rounded
