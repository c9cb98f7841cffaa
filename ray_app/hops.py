"""A model's way to its replicas: each is an instance of the model's scheduler, like a thread is on one machine."""

import asyncio
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from tutti.core.errors import Unavailable
from tutti.core.types import Call, Infer, InferResponse, now_ns
from tutti.observing.explanations import AT_REPLICA, PARAMETER, told_in, untold
from tutti.observing.statistics import ModelStatistics
from tutti.ray_app.autoscaling import Demand, Meter, Misses, row_s
from tutti.ray_app.members import Member
from tutti.ray_app.pools import Pool
from tutti.ray_app.router import Router
from tutti.ray_app.settling import settle_batch
from tutti.scheduling.cost import Costs
from tutti.scheduling.scheduler import Scheduler

# How often a hop looks whether requests wait for replicas that do not come.
_LOOK_EVERY_S = 0.25
# Several batches of a model go to a replica together if they take no longer than this.
_TOGETHER_NS = 10_000_000
# After this long without a batch, earlier times say nothing about a replica any more.
_FORGET_NS = 5_000_000_000


class ReplicaInstance:
    """One batch at a time on its way to a replica."""

    def __init__(self, hop: "Hop", member: Member, rank: int, costs: Costs) -> None:
        self.costs = costs
        self.rank = rank
        self.learned_ns = now_ns()
        self._hop = hop
        self._member = member

    def ahead_ns(self, at_ns: int) -> int:
        """How long what the replica has will keep it."""
        return self._member.ahead_ns(at_ns)

    def start(self, batch: list[Call]) -> None:
        self._hop.router.spawn(self._execute(batch))

    def close(self) -> None:
        """Nothing of its own to close."""

    async def _execute(self, batch: list[Call]) -> None:
        """Send a batch, starting with this instance's replica, and settle it."""
        hop, member = self._hop, self._member
        key, rows = batch[0].key, sum([call.rows for call in batch])
        explained = _have_explained(batch)
        start_ns = now_ns()
        member.begins(start_ns, self.costs.of(key).mean_ns(rows))

        def finished(replica: Member | None, end_ns: int) -> None:
            took_ns = member.ends(start_ns, end_ns)
            if replica is member:
                self._learn(key, rows, took_ns, end_ns)
            for call in explained:
                _note_told(call)

        delivery = hop.router.infer(batch, hop.key, hop.pools, member, hop.most_rows)
        try:
            await settle_batch(hop.name, batch, start_ns, hop.statistics, delivery, finished, hop.has_steps)
        finally:
            hop.scheduler.release(self)

    def _learn(self, key: Hashable, rows: int, took_ns: int, end_ns: int) -> None:
        self.learned_ns = end_ns
        self.costs.record(key, rows, took_ns)
        self._hop.learned(self.costs)


def _have_explained(batch: Sequence[Call]) -> list[Call]:
    """Ask the replica to tell what it does with traced calls; returns those whose callers have not asked for that."""
    explained = [call for call in batch if call.trace is not None and PARAMETER not in call.request.parameters]
    for call in explained:
        call.request.parameters = {**call.request.parameters, PARAMETER: True}
    return explained


def _note_told(call: Call) -> None:
    """Give a trace what the replica has told; the caller has not asked for it, and gets nothing of it."""
    if isinstance(call.answer, InferResponse):
        told = told_in(call.answer)
        call.answer.parameters.pop(PARAMETER, None)
        if told is not None and call.trace is not None:
            call.trace.note(AT_REPLICA, told)
    elif call.answer is not None:
        call.answer = untold(call.answer)


class Hop:
    """Keeps a scheduler's instances in step with the replicas that have its model."""

    def __init__(
        self,
        scheduler: Scheduler,
        name: str,
        key: str,
        router: Router,
        pools: Sequence[Pool],
        statistics: ModelStatistics,
        most_rows: int,
        batch_rows: int,
        least_rows: int,
        has_steps: bool = False,
    ) -> None:
        """Up to `most_rows` rows travel as one request; the model takes `batch_rows` at once.

        Of a model that takes its time no more than `least_rows` go to a replica together: another may be free for them.
        What `has_steps` is a graph, or a part of one, whose answers may tell of them.
        """
        self.scheduler = scheduler
        self.name = name
        self.key = key
        self.router = router
        self.pools = pools
        self.statistics = statistics
        self.most_rows = most_rows
        self.batch_rows = batch_rows
        self.has_steps = has_steps
        self.meter = Meter()
        self.misses = Misses()
        self._least_rows = least_rows
        scheduler.limit_batches(least_rows)
        self._row_s = 0.0
        self._instances: dict[Member, list[ReplicaInstance]] = {}
        self._empty_since_ns = now_ns()
        self._is_closed = False
        self._end: Callable[[], Any] = router.listen(self._refresh)
        pools[0].hops.append(self)
        router.spawn(self._look_forever())

    def __call__(self, calls: Sequence[Call]) -> None:
        """Queue calls of any shapes: a hop mixes them."""
        for call in calls:
            call.key = None
        self.meter.arrived(now_ns(), sum([call.rows for call in calls]))
        self.scheduler(calls)

    def learned(self, costs: Costs) -> None:
        """A replica has executed a batch."""
        batch_ns = costs.of(None).mean_ns(self._least_rows)
        self.scheduler.limit_batches(self._least_rows * max(1, _TOGETHER_NS // max(1, batch_ns)))

    def demand(self) -> Demand:
        """What its first pool has to serve."""
        first = [instances[0] for instances in self._instances.values() if instances and instances[0].rank == 0]
        costs = [cost for instance in first if (cost := row_s(instance.costs.of(None), self.batch_rows))]
        at_ns, counts, pool = now_ns(), self.statistics.counts, self.pools[0]
        has_enough = len(pool.status.up) >= pool.wanted
        self.misses.count(at_ns, counts.late, counts.success.count + counts.fail.count, has_enough)
        rows_per_s, waiting = self.meter.rows_per_s(at_ns), self.scheduler.queued_rows()
        return Demand(rows_per_s, waiting, min(costs, default=self._row_s), self.misses.share)

    def close(self, successor: Infer | None = None) -> None:
        """Take no more. What waits is executed, or goes to `successor`: replicas may have the next version only."""
        waiting = self.scheduler.take_waiting() if successor is not None else []
        if waiting and successor is not None:
            successor(waiting)
        self.scheduler.close()
        self._is_closed = True
        self.pools[0].hops.remove(self)
        self._end()

    def _refresh(self) -> None:
        """Add and remove instances as replicas come and go. Called on the router's loop."""
        if self._is_closed:
            return
        present = {
            member: (rank, pool.slots)
            for rank, pool in enumerate(self.pools)
            for member in pool.status.having(self.key)
        }
        for member in [member for member in self._instances if member not in present]:
            for instance in self._instances.pop(member):
                self.scheduler.remove(instance)
        for member, (rank, slots) in present.items():
            if member not in self._instances:
                costs = Costs()
                instances = [ReplicaInstance(self, member, rank, costs) for _ in range(slots)]
                self._instances[member] = instances
                for instance in instances:
                    self.scheduler.add(instance)
        if present or not self._empty_since_ns:
            self._empty_since_ns = 0 if present else now_ns()

    def _try_again(self) -> None:
        """Forget the costs of replicas that have had no batch for long, so that they are tried again.

        A replica that was slow gets nothing while others are quicker, and would never show that it has recovered.
        """
        at_ns = now_ns()
        for instances in self._instances.values():
            if instances and at_ns - max(instance.learned_ns for instance in instances) > _FORGET_NS:
                costs = Costs()
                for instance in instances:
                    instance.costs, instance.learned_ns = costs, at_ns

    async def _look_forever(self) -> None:
        """Refuse calls that have waited too long for a replica, and have Serve start one."""
        while not self._is_closed:
            await asyncio.sleep(_LOOK_EVERY_S)
            self._try_again()
            self._row_s = self.demand().row_s  # kept for the time without a replica
            if not self._instances and self.scheduler.queued_rows():
                self.router.call_for(self.pools)
            patience_s = max(pool.patience_s for pool in self.pools)
            if self._empty_since_ns and now_ns() - self._empty_since_ns > patience_s * 1e9:
                problem = f"model '{self.name}': no replica is up, waited {patience_s:g} s"
                self.scheduler.refuse_waiting(Unavailable(problem))
