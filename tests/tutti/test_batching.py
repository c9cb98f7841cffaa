"""Which calls make a batch: tables for the rules, and seeded random runs against a slow, obvious oracle."""

import random
from collections.abc import Iterable

import pytest

from tutti.core.types import Call, InferRequest
from tutti.repository.policies import BatchingPolicy
from tutti.scheduling.batching import BatchLimit, BatchQueue, Decision
from tutti.scheduling.cost import Costs, LatencyModel
from tutti.scheduling.returns import Returns

MS = 1_000_000


def call(rows: int = 1, key: str = "a", at_ns: int = 0) -> Call:
    made = Call(InferRequest("m", {}), sink=None)  # type: ignore[arg-type]
    made.rows, made.key, made.arrived_ns = rows, key, at_ns
    return made


def queue(policy: BatchingPolicy | None, *calls: Call) -> BatchQueue:
    waiting = BatchQueue(policy, max_rows=1000)
    for one in calls:
        waiting.push(one)
    return waiting


@pytest.mark.parametrize(
    ("policy", "waiting", "age_ns", "taken"),
    [
        (BatchingPolicy(8), 3, 0, 3),
        (BatchingPolicy(8), 20, 0, 8),
        (BatchingPolicy(8, max_queue_delay_ns=MS), 3, 0, 0),
        (BatchingPolicy(8, max_queue_delay_ns=MS), 3, MS, 3),
        (BatchingPolicy(8, max_queue_delay_ns=MS), 8, 0, 8),
        (BatchingPolicy(8, (4,), MS), 5, 0, 4),
        (BatchingPolicy(8, (4,), MS), 3, 0, 0),
        (BatchingPolicy(8, (4,), MS), 3, MS, 3),
        (BatchingPolicy(8, (2, 6), MS), 7, 0, 6),
    ],
)
def test_rows_to_take(policy: BatchingPolicy, waiting: int, age_ns: int, taken: int) -> None:
    assert policy.rows_to_take(waiting, age_ns) == taken


def test_without_a_policy_each_call_is_a_batch_of_its_own() -> None:
    first, second = call(), call()
    waiting = queue(None, first, second)
    assert waiting.take(0).batch == [first]
    assert waiting.take(0).batch == [second]
    assert waiting.take(0) == Decision([], [])


def test_only_equal_keys_share_a_batch_and_the_oldest_head_goes_first() -> None:
    a1, b1, a2 = call(key="a", at_ns=1), call(key="b", at_ns=2), call(key="a", at_ns=3)
    waiting = queue(BatchingPolicy(8), a1, b1, a2)
    assert waiting.take(5).batch == [a1, a2]
    assert waiting.take(5).batch == [b1]


def test_a_call_is_never_split() -> None:
    small, large = call(rows=3), call(rows=6)
    waiting = queue(BatchingPolicy(8), small, large)
    assert waiting.take(0).batch == [small]
    assert waiting.take(0).batch == [large]


def test_a_batch_ends_where_its_instance_says() -> None:
    calls = [call(rows=2) for _ in range(5)]
    asked: list[tuple[int, int]] = []

    def cut(offered: Iterable[Call], limit: int) -> int:
        asked.append((len(list(offered)), limit))
        return 5

    waiting = queue(BatchingPolicy(8), *calls)
    assert [waiting.take(0, None, cut).batch for _ in range(3)] == [calls[:2], calls[2:4], calls[4:]]
    assert asked == [(5, 8), (3, 6), (1, 2)]


def test_a_batch_ends_elsewhere_for_preferred_sizes_and_deadlines() -> None:
    def cut(calls: Iterable[Call], limit: int) -> int:
        return 1

    calls = [call() for _ in range(4)]
    assert queue(BatchingPolicy(8, (4,)), *calls).take(0, None, cut).batch == calls
    calls[2].deadline_ns = MS
    assert queue(BatchingPolicy(8), *calls).take(0, None, cut).batch == calls


def test_a_full_lane_does_not_wait_behind_one_that_may() -> None:
    young, *full = call(key="a", at_ns=0), *(call(key="b", at_ns=1) for _ in range(4))
    waiting = queue(BatchingPolicy(4, max_queue_delay_ns=MS), young, *full)
    assert waiting.take(2).batch == full
    decision = waiting.take(3)
    assert decision.batch == []
    assert decision.wake_ns == MS


def test_no_call_waits_for_its_delay_before_one_that_cannot_join_it() -> None:
    """Calls of other shapes, or with other inputs: each arrival sends those before it; only the last one waits."""
    a1, b1, a2, b2 = call(key="a", at_ns=0), call(key="b", at_ns=1), call(key="a", at_ns=2), call(key="b", at_ns=3)
    waiting = queue(BatchingPolicy(4, (4,), max_queue_delay_ns=MS), a1)
    assert waiting.take(0).batch == []
    for sent, arriving in ((a1, b1), (b1, a2), (a2, b2)):
        waiting.push(arriving)
        assert waiting.take(arriving.arrived_ns).batch == [sent]
        assert waiting.take(arriving.arrived_ns).batch == []
    assert waiting.take(3).wake_ns == b2.arrived_ns + MS
    assert waiting.take(3 + MS).batch == [b2]


def test_calls_of_one_key_wait_together_whatever_their_priority() -> None:
    policy = BatchingPolicy(4, max_queue_delay_ns=MS, priority_levels=2, default_priority_level=2)
    low, high = call(key="a", at_ns=0), call(key="a", at_ns=1)
    high.request.parameters["priority"] = 1
    waiting = queue(policy, low, high)
    assert waiting.take(2).batch == []
    other = call(key="b", at_ns=2)
    waiting.push(other)
    assert waiting.take(2).batch == [high, low]
    assert waiting.take(2).batch == []


def test_cancelled_calls_are_dropped_and_their_batch_mates_run() -> None:
    calls = [call() for _ in range(5)]
    calls[0].is_cancelled = calls[3].is_cancelled = True
    decision = queue(BatchingPolicy(8), *calls).take(0)
    assert decision.batch == [calls[1], calls[2], calls[4]]
    assert decision.dropped == [calls[0], calls[3]]


def test_the_queue_is_bounded_in_rows_but_takes_any_call_when_empty() -> None:
    waiting = BatchQueue(BatchingPolicy(8), max_rows=10)
    assert waiting.has_room(call(rows=50))
    waiting.push(call(rows=8))
    assert waiting.has_room(call(rows=2))
    assert not waiting.has_room(call(rows=3))


def oracle(waiting: list[Call], policy: BatchingPolicy | None, now_ns: int) -> list[Call]:
    """The rule of batching.py, said slowly: over all keys by their oldest call, the first batch that need not wait.

    Where all would wait, and not all of one key, the oldest does not.
    """
    alive = [one for one in waiting if not one.is_cancelled]
    keys = sorted({one.key for one in alive}, key=lambda key: min(o.arrived_ns for o in alive if o.key == key))  # type: ignore[type-var,arg-type,return-value]
    for position, key in enumerate([*keys, *keys[:1]]):
        mine = [one for one in waiting if one.key == key]
        while mine[0].is_cancelled:
            mine.pop(0)
        if policy is None:
            return mine[:1]
        limit = policy.rows_to_take(sum(one.rows for one in mine), now_ns - mine[0].arrived_ns)
        if position == len(keys) > 1:
            limit = min(sum(one.rows for one in mine), policy.max_batch_size)
        if not limit:
            continue
        batch, rows = [mine[0]], mine[0].rows
        for one in mine[1:]:
            if one.is_cancelled:
                continue
            if rows + one.rows > limit:
                break
            batch.append(one)
            rows += one.rows
        return batch
    return []


@pytest.mark.parametrize("seed", range(300))
def test_random_traces_agree_with_the_oracle(seed: int) -> None:
    rng = random.Random(seed)
    limit = rng.choice([1, 4, 8])
    preferred = tuple(sorted(rng.sample(range(1, limit + 1), rng.randint(0, min(2, limit)))))
    policy = None if rng.random() < 0.1 else BatchingPolicy(limit, preferred, rng.choice([0, 5, 50]))
    queue = BatchQueue(policy, max_rows=10_000)
    waiting: list[Call] = []
    pushed, ended = 0, []
    for now in range(200):
        if rng.random() < 0.6:
            one = call(rng.randint(1, limit), rng.choice("abc"), now)
            queue.push(one)
            waiting.append(one)
            pushed += 1
        if waiting and rng.random() < 0.1:
            rng.choice(waiting).is_cancelled = True
        if rng.random() < 0.5:
            expected = oracle(waiting, policy, now)
            decision = queue.take(now)
            assert decision.batch == expected
            assert all(one.is_cancelled for one in decision.dropped)
            if decision.wake_ns is not None:
                assert decision.wake_ns > now
            gone = decision.batch + decision.dropped
            ended += gone
            waiting = [one for one in waiting if one not in gone]
            assert queue.rows == sum(one.rows for one in waiting)
    ended += queue.drain()
    assert len(ended) == len(set(map(id, ended))) == pushed


def affine(fixed_ms: int, row_us: int) -> LatencyModel:
    model = LatencyModel()
    for rows in (1, 64):
        model.record(rows, fixed_ms * MS + rows * row_us * 1000)
    return model


def rounds(returns: Returns, count: int, delay_ns: int, took_ns: int = 3 * MS) -> int:
    """Batches of 32 whose clients ask again after `delay_ns`; returns when the last was answered."""
    now = 0
    for _ in range(count):
        now += took_ns
        returns.answered(now, 32, took_ns)
        returns.arrived(now + delay_ns, 32)
    now += took_ns
    returns.answered(now, 32, took_ns)
    return now


def test_clients_that_have_returned_so_far_are_waited_for_where_it_pays() -> None:
    returns = Returns()
    now = rounds(returns, 20, MS)
    accelerator, processor = affine(2, 20), affine(0, 60)
    assert 0 < returns.wait_ns(now, 32, 64, accelerator) <= 1.5 * MS
    assert returns.wait_ns(now, 32, 64, processor) == 0, "twice the rows take twice the time"
    assert returns.wait_ns(now, 64, 64, accelerator) == 0, "the batch is full"
    assert returns.wait_ns(now + 2 * MS, 32, 64, accelerator) == 0, "they are late: no longer"
    returns.arrived(now + MS, 32)
    assert returns.wait_ns(now + MS, 32, 64, accelerator) == 0, "all are back"


def test_who_has_not_returned_in_time_before_is_not_waited_for() -> None:
    for delay_ns in (10 * MS, 10_000 * MS):
        returns = Returns()
        assert returns.wait_ns(rounds(returns, 20, delay_ns), 32, 64, affine(2, 20)) == 0
    returns = Returns()
    rounds(returns, 20, MS)
    now = rounds(returns, 3, 10_000 * MS)
    assert returns.wait_ns(now, 32, 64, affine(2, 20)) == 0, "a pause ends it"


def test_a_batch_limit_halves_and_recovers() -> None:
    limit = BatchLimit()
    limit.failed(64)
    limit.failed(64)  # one that was on its way
    assert limit.rows == 32
    limit.failed(20)
    assert limit.rows == 10
    for _ in range(BatchLimit.GROW_AFTER):
        limit.succeeded(9, 64)
    assert limit.rows == 10, "smaller batches prove nothing"
    for expected in (20, 40, None):
        for _ in range(BatchLimit.GROW_AFTER):
            limit.succeeded(64, 64)
        assert limit.rows == expected


def costing(ms_by_rows: dict[int, int]) -> Costs:
    costs = Costs()
    for rows, ms in ms_by_rows.items():
        costs.record("a", rows, ms * MS)
    return costs


def with_deadline(at_ms: int, rows: int = 1) -> Call:
    made = call(rows)
    made.deadline_ns = at_ms * MS
    return made


def test_a_batch_is_no_larger_than_its_deadlines_allow() -> None:
    costs = costing({1: 10, 8: 80})
    calls = [with_deadline(1000), *(with_deadline(55) for _ in range(7))]
    decision = queue(BatchingPolicy(8), *calls).take(MS, costs)
    assert decision.batch == calls[:5], "five rows take 50 ms"
    assert decision.expired == []


def test_a_call_that_would_make_its_batch_small_is_given_up_under_load() -> None:
    costs = costing({1: 10, 8: 80})
    tight, *others = with_deadline(25), *(with_deadline(1000) for _ in range(7))
    decision = queue(BatchingPolicy(8), tight, *others).take(MS, costs)
    assert (decision.expired, decision.batch) == ([tight], others)


def test_alone_it_is_served() -> None:
    tight = with_deadline(25)
    assert queue(BatchingPolicy(8), tight).take(MS, costing({1: 10, 8: 80})).batch == [tight]


def test_what_cannot_end_in_time_is_not_begun() -> None:
    late = with_deadline(25, rows=4)
    decision = queue(BatchingPolicy(8), late).take(MS, costing({1: 10, 8: 80}))
    assert (decision.batch, decision.expired) == ([], [late])


@pytest.mark.parametrize("limit", [8, 3])
def test_a_call_for_several_requests_is_as_many_that_wait(limit: int) -> None:
    calls = [call(rows=3), call(rows=1), call(rows=2)]
    calls[0].requests, calls[2].requests = 3, 2
    waiting = queue(BatchingPolicy(limit), *calls)
    assert waiting.calls == 6
    left = 6
    while batch := waiting.take(0).batch:
        left -= sum(one.requests for one in batch)
        assert waiting.calls == left
    assert not left
