"""Learned latencies: lines between what was seen, tails above means, and nothing held slow that was never tried."""

import pytest

from tutti.scheduling.cost import Alternatives, Costs, LatencyModel

MS = 1_000_000


def device_ns(rows: int) -> int:
    return 2 * MS + rows * MS // 50


def learned(*sizes: int) -> LatencyModel:
    model = LatencyModel()
    for size in sizes:
        for _ in range(10):
            model.record(size, device_ns(size))
    return model


@pytest.mark.parametrize("rows", [1, 3, 10, 33, 64, 100])
def test_an_affine_device_is_predicted_from_two_sizes(rows: int) -> None:
    model = learned(1, 40)
    assert model.mean_ns(rows) == pytest.approx(device_ns(rows), rel=0.01)
    assert model.tail_ns(rows) == pytest.approx(device_ns(rows), rel=0.01)


def test_what_was_never_tried_is_not_held_to_be_slow() -> None:
    assert LatencyModel().mean_ns(64) == 0
    assert learned(4).mean_ns(64) == device_ns(4)


def test_the_tail_is_a_quantile_of_the_latest_and_forgets() -> None:
    model = LatencyModel()
    for number in range(640):
        model.record(8, MS if number % 10 else 10 * MS)
    assert model.mean_ns(8) < 4 * MS
    assert model.tail_ns(8) == 10 * MS
    for _ in range(80):
        model.record(8, MS)
    assert model.tail_ns(8) == pytest.approx(MS, rel=0.1)


@pytest.mark.parametrize("budget_ms", [0, 1, 2, 3, 4, 10])
def test_rows_within_a_budget_are_the_most_that_fit(budget_ms: int) -> None:
    model = learned(1, 64)
    fits = model.rows_within(budget_ms * MS, 64)
    assert fits == max((n for n in range(65) if n == 0 or model.tail_ns(n) <= budget_ms * MS), default=0)


def test_keys_have_costs_of_their_own_and_an_unknown_one_that_of_all() -> None:
    costs = Costs()
    costs.record("short", 1, MS)
    costs.record("long", 1, 9 * MS)
    assert costs.of("short").mean_ns(1) == MS
    assert costs.of("long").mean_ns(1) == 9 * MS
    assert costs.of("never seen").mean_ns(1) == 5 * MS


def test_keys_are_bounded() -> None:
    costs = Costs()
    for number in range(Costs.MAX_KEYS * 3):
        costs.record(number, 1, MS)
    assert costs.of(0).mean_ns(1) == MS
    assert len(costs._by_key) == Costs.MAX_KEYS


def test_of_two_ways_the_cheaper_is_taken_and_the_other_tried_now_and_then() -> None:
    ways = Alternatives()
    taken = []
    for _ in range(200):
        way = ways.choose()
        ways.record(way, (10, 4)[way] * MS, 2)
        taken.append(way)
    assert sorted(taken[:6]) == [0, 0, 0, 1, 1, 1]
    assert 0.9 < sum(taken[6:]) / len(taken[6:]) < 1, "the other one may have become cheaper"
    for _ in range(600):  # now it has
        way = ways.choose()
        ways.record(way, (1, 40)[way] * MS, 2)
        taken.append(way)
    assert sum(taken[-100:]) < 10
