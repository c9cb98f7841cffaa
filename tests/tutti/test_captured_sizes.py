"""Where batches are cut that are executed in some sizes only."""

import random
from itertools import accumulate

import pytest

from tutti.scheduling.captured_sizes import CapturedSizes

SIZES = (8, 16, 32, 64, 128, 256)


def sizes(fixed_ns: int, row_ns: int) -> CapturedSizes:
    return CapturedSizes(SIZES, {size: fixed_ns + size * row_ns for size in SIZES})


@pytest.mark.parametrize(
    ("calls", "limit", "taken"),
    [
        ([8] * 19, 256, 128),  # 152 would be executed as 256
        ([8] * 16, 256, 256),  # nothing is filled up
        ([8] * 31, 256, 256),  # 248 of 256 are hardly fewer a second than 128 of 128
        ([8] * 64, 256, 256),  # more wait than fit
        ([8] * 64, 152, 128),
        ([5] * 30, 256, 125),  # calls stay whole
        ([150], 256, 256),  # and so does the first
        ([150, 8], 256, 256),
        ([300], 256, 256),  # more than there is a size for
        ([], 256, 256),
    ],
)
def test_with_work_enough_the_most_rows_a_second_are_taken(calls: list[int], limit: int, taken: int) -> None:
    cut = sizes(500_000, 100_000).cut(calls, limit, is_busy=True)
    assert cut == (limit if taken == 256 else taken)


def test_where_an_execution_costs_much_whatever_its_size_all_go_together() -> None:
    assert sizes(100_000_000, 1000).cut([8] * 19, 256, is_busy=True) == 256


def test_on_an_idle_device_a_batch_is_cut_only_where_all_of_it_ends_earlier() -> None:
    calls = [8] * 19  # 128 and 24, which are 32: 17.1 ms at 0.5 and 0.1 ms a row; 26.1 ms as 256
    assert sizes(500_000, 100_000).cut(calls, 256, is_busy=False) == 128
    # 4 ms and 0.1 ms a row: 24.0 and 29.6 ms. Then 4 and 0.01: 9.6 and 6.6 ms, though 128 alone are as many a second.
    assert sizes(4_000_000, 100_000).cut(calls, 256, is_busy=False) == 128
    assert sizes(4_000_000, 10_000).cut(calls, 256, is_busy=False) == 256


def test_what_is_not_known_is_not_chosen_and_what_is_served_teaches() -> None:
    learning = CapturedSizes(SIZES)
    assert learning.cut([8] * 19, 256, is_busy=True) == 256
    learning.record(152, 26_000_000)
    assert learning.cut([8] * 19, 256, is_busy=True) == 256
    learning.record(128, 13_000_000)
    assert learning.cut([8] * 19, 256, is_busy=True) == 128
    learning.record(1000, 1)  # of none of the sizes
    for _ in range(100):
        learning.record(250, 14_000_000)
    assert learning.cut([8] * 19, 256, is_busy=True) == 256


@pytest.mark.parametrize("seed", range(200))
def test_random_queues_agree_with_trying_each_cut(seed: int) -> None:
    rng = random.Random(seed)
    own = sorted(rng.sample(range(1, 65), rng.randint(1, 8)))
    times = {size: rng.randint(1, 50) + size * rng.randint(1, 5) for size in own}
    calls = [rng.randint(1, 12) for _ in range(rng.randint(1, 20))]
    limit = rng.randint(1, 64)
    fits = [rows for rows in accumulate(calls) if rows <= limit]
    known = [(rows, next(times[size] for size in own if size >= rows)) for rows in fits if rows <= own[-1]]
    cut = CapturedSizes(own, times).cut(calls, limit, is_busy=True)
    best = max((rows / ns for rows, ns in known), default=0.0)
    if not fits or fits[-1] > own[-1] or fits[-1] in own:
        assert cut == limit
    elif cut == limit:
        assert known[-1][0] / known[-1][1] * 1.02 >= best
    else:
        assert cut / dict(known)[cut] == best
