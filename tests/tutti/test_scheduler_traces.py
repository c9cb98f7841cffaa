"""The scheduler in simulated time: ten thousand seeded traces of arrivals, cancels, deadlines and failures.

What must hold in all of them is checked as they run; where nothing is in a hurry, every batch is compared with that of
a slow, obvious oracle, which keeps one list and looks through all of it each time.
"""

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from tutti.core.errors import Cancelled, DeadlineExceeded, InferError, Internal, Unavailable
from tutti.core.types import Call, InferRequest, InferResponse, settle
from tutti.observing.statistics import ModelStatistics
from tutti.repository.policies import BatchingPolicy, QueuePolicy
from tutti.scheduling import instances
from tutti.scheduling import scheduler as scheduler_module
from tutti.scheduling.batching import BatchQueue
from tutti.scheduling.cost import Costs
from tutti.scheduling.scheduler import Scheduler

TRACES = 10_000
SHARDS = 20
MS = 1_000_000


class World:
    """A clock, and what is to happen when."""

    def __init__(self) -> None:
        self.now = 1
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, when: int, happen: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (max(when, self.now), self._count, happen))

    def timer(self, delay_s: float, happen: Callable[[], None]) -> None:
        self.at(self.now + round(delay_s * 1e9), happen)

    def run(self, before_each: Callable[[], None]) -> None:
        while self._events:
            self.now, _, happen = heapq.heappop(self._events)
            before_each()
            happen()


@dataclass
class Trace:
    """The draw of one seed."""

    rng: random.Random
    policy: BatchingPolicy | None
    max_rows: int
    has_deadlines: bool
    row_ns: int
    fixed_ns: int

    @classmethod
    def of(cls, seed: int) -> "Trace":
        rng = random.Random(seed)
        limit = rng.choice([1, 2, 4, 8])
        preferred = tuple(sorted(rng.sample(range(1, limit + 1), rng.randint(0, min(2, limit)))))
        levels = rng.choice([0, 0, 3])
        queue = QueuePolicy(rng.choice([0, 0, 3 * MS]), rng.random() < 0.5, allows_override=rng.random() < 0.2)
        policy = BatchingPolicy(
            limit,
            preferred,
            rng.choice([0, 0, MS]),
            levels,
            min(levels, 2),
            queue if rng.random() < 0.3 else QueuePolicy(),
        )
        return cls(
            rng,
            None if rng.random() < 0.1 else policy,
            rng.choice([8, 20, 1000]),
            rng.random() < 0.5,
            rng.choice([0, MS // 10, MS]),
            rng.choice([0, MS // 2, 2 * MS]),
        )


class Instance:
    """Executes one batch at a time, and now and then fails one."""

    def __init__(self, run: "Run", number: int, factor: int, costs: Costs) -> None:
        self.run = run
        self.number = number
        self.rank = 0
        self.costs = costs
        self._factor = factor
        self._batch: list[Call] = []

    def ahead_ns(self, at_ns: int) -> int:
        return 0

    def start(self, batch: list[Call]) -> None:
        assert not self._batch, "one batch at a time"
        self._batch = batch
        self.run.started(self, batch)
        rows = sum(call.rows for call in batch)
        took = (self.run.trace.fixed_ns + rows * self.run.trace.row_ns) * self._factor
        self.run.world.at(self.run.world.now + took, lambda: self.finish(took))

    def finish(self, took: int) -> None:
        batch, self._batch = self._batch, []
        self.costs.record(batch[0].key, sum(call.rows for call in batch), took)
        fails = self.run.trace.rng.random() < 0.05
        for call in batch:
            call.answer = Internal("it fails") if fails else InferResponse("m", "1", [])
        settle(batch)
        self.run.scheduler.release(self)

    def close(self) -> None:
        pass


@dataclass
class Run:
    trace: Trace
    world: World
    scheduler: Scheduler
    waiting: BatchQueue
    calls: list[Call] = field(default_factory=list)
    ended: dict[int, Call] = field(default_factory=dict)
    executed: set[int] = field(default_factory=set)
    oracle: list[Call] | None = None
    # Ended since the last decision, which may have counted their rows.
    gone: list[Call] = field(default_factory=list)

    def forget_gone(self) -> None:
        if self.oracle is not None:
            self.oracle = [call for call in self.oracle if call not in self.gone]
        self.gone.clear()

    def settle(self, calls: Sequence[Call]) -> None:
        for call in calls:
            assert id(call) not in self.ended, "a call ends once"
            assert call.answer is not None
            self.ended[id(call)] = call
            self.check_end(call)
            self.gone.append(call)

    def check_end(self, call: Call) -> None:
        is_over = bool(call.deadline_ns) and call.deadline_ns <= self.world.now
        if isinstance(call.answer, Cancelled):
            assert call.is_cancelled and id(call) not in self.executed
        elif isinstance(call.answer, DeadlineExceeded):
            assert call.deadline_ns and id(call) not in self.executed
        elif isinstance(call.answer, Unavailable):
            assert id(call) not in self.executed
            assert call.expires_ns or call.deadline_ns or self.trace.max_rows < 1000, "nothing else refuses"
        else:
            assert id(call) in self.executed, "who gets an answer was executed"
        assert not is_over or isinstance(call.answer, InferError) or id(call) in self.executed

    def started(self, instance: Instance, batch: list[Call]) -> None:
        policy = self.trace.policy
        rows = sum(call.rows for call in batch)
        assert len({call.key for call in batch}) == 1, "only equal keys share a batch"
        assert rows <= (policy.max_batch_size if policy is not None else 1) or len(batch) == 1
        assert policy is not None or len(batch) == 1
        for call in batch:
            assert not call.is_cancelled
            assert not call.deadline_ns or call.deadline_ns > self.world.now, "nobody waits for it any more"
            assert id(call) not in self.executed
            self.executed.add(id(call))
        ages = [(call.level, call.arrived_ns) for call in batch if not call.expires_ns]
        assert ages == sorted(ages), "in order of level and arrival"
        if self.oracle is not None:
            assert batch in self.expected(), "as the oracle says"
            self.gone += batch
            self.forget_gone()

    def expected(self) -> list[list[Call]]:
        """The rule, said slowly: by the age of its oldest call, the first key whose batch need not wait.

        Where all would wait, and not all of one key, the first key. Several where keys are of one age.
        """
        assert self.oracle is not None
        keys = {call.key for call in self.oracle if not call.is_cancelled}
        return self._first(may_wait=True) or (self._first(may_wait=False) if len(keys) > 1 else [])

    def _first(self, may_wait: bool) -> list[list[Call]]:
        assert self.oracle is not None
        policy, alive = self.trace.policy, [call for call in self.oracle if not call.is_cancelled]
        keys = list(dict.fromkeys(call.key for call in sorted(alive, key=lambda call: call.arrived_ns)))
        found: list[list[Call]] = []
        for key in keys:
            mine = [call for call in self.oracle if call.key == key]
            while mine[0].is_cancelled:
                mine.pop(0)
            if found and mine[0].arrived_ns > found[0][0].arrived_ns:
                break
            if policy is None:
                found.append(mine[:1])
                continue
            limit = policy.rows_to_take(sum(call.rows for call in mine), self.world.now - mine[0].arrived_ns)
            if not may_wait:
                limit = policy.max_batch_size
            batch: list[Call] = []
            for call in mine if limit else ():
                if call.is_cancelled:
                    continue
                if batch and sum(one.rows for one in batch) + call.rows > limit:
                    break
                batch.append(call)
            if batch:
                found.append(batch)
        return found

    def arrive(self, count: int) -> None:
        made = []
        for _ in range(count):
            made.append(self.make_call())
        self.calls += made
        if self.oracle is not None:
            self.oracle += made
        self.scheduler(made)
        assert self.waiting.rows <= max(self.trace.max_rows, max(call.rows for call in made)), "bounds are never passed"

    def make_call(self) -> Call:
        rng, policy = self.trace.rng, self.trace.policy
        call = Call(InferRequest("m", {}), self)
        if policy is not None and policy.priority_levels:
            call.request.parameters["priority"] = rng.randint(0, 3)
        if rng.random() < 0.2:
            call.request.parameters["timeout"] = rng.choice([500, 5000])
        call.rows = rng.randint(1, policy.max_batch_size if policy is not None else 3)
        call.key = rng.choice("ab")
        call.arrived_ns = self.world.now
        if self.trace.has_deadlines and rng.random() < 0.7:
            call.deadline_ns = self.world.now + rng.choice([1, MS, 5 * MS, 50 * MS])
        return call

    def cancel_one(self) -> None:
        waiting = [call for call in self.calls if id(call) not in self.executed and id(call) not in self.ended]
        if waiting:
            self.trace.rng.choice(waiting).is_cancelled = True


def play(seed: int, monkeypatch: pytest.MonkeyPatch) -> Run:
    trace, world = Trace.of(seed), World()
    for module in (scheduler_module, instances):
        monkeypatch.setattr(module, "now_ns", lambda: world.now)
    waiting = BatchQueue(trace.policy, trace.max_rows)
    run = Run(trace, world, Scheduler("m", waiting, ModelStatistics(), world.timer), waiting)
    is_plain = trace.policy is None or trace.policy.is_plain
    if is_plain and not trace.has_deadlines and trace.max_rows == 1000:
        run.oracle = []
    rng = trace.rng
    is_mixed = run.oracle is None and rng.random() < 0.2
    costs = Costs()
    for number in range(rng.randint(1, 3)):
        quick_or_slow = Costs() if is_mixed and number else costs
        run.scheduler.add(Instance(run, number, 3 if quick_or_slow is not costs else 1, quick_or_slow))
    when = 1
    for _ in range(rng.randint(5, 25)):
        when += rng.choice([0, 1, MS // 10, MS, 4 * MS])
        count = rng.choice([1, 1, 1, 3, 6])
        world.at(when, lambda count=count: run.arrive(count))  # type: ignore[misc]
        if rng.random() < 0.3:
            world.at(when + rng.choice([0, MS]), run.cancel_one)
    world.run(run.forget_gone)
    run.forget_gone()
    return run


@pytest.mark.parametrize("shard", range(SHARDS))
def test_traces(shard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0
    for seed in range(shard * TRACES // SHARDS, (shard + 1) * TRACES // SHARDS):
        run = play(seed, monkeypatch)
        assert len(run.ended) == len(run.calls), f"seed {seed}: every call ends"
        assert (run.waiting.rows, run.waiting.calls) == (0, 0), f"seed {seed}: nothing is left"
        assert not run.oracle, f"seed {seed}: the oracle has executed all"
        compared += run.oracle is not None
    assert compared > TRACES / SHARDS / 20, "a good part is compared with the oracle"
