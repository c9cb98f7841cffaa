"""Which instance takes the next batch: what is free, what is busy and until when, and who is preferred.

An instance of a higher rank helps out only where the preferred ones would keep what waits for much longer. Whoever
calls holds the scheduler's lock.
"""

import random
from collections.abc import Hashable, Sequence

from tutti.core.types import Call, now_ns
from tutti.scheduling.forecast import Forecast
from tutti.scheduling.interface import HANG_S, Instance, Waiting

# Of very many free instances so many, at random, are compared.
_MOST_COMPARED = 16
# A lower-ranked instance takes a batch only if preferred ones would need so many times as long.
_PATIENCE = 3


class Instances:
    """Those of one scheduler, over the queue that they are for."""

    def __init__(self, waiting: Waiting, spill: float) -> None:
        """`spill` is which share of the instances that are not preferred may help out while preferred ones are busy."""
        self._queue = waiting
        self._spill = spill
        self.all: list[Instance] = []
        self.free: list[Instance] = []
        # What each busy instance executes: (since when, of which key, how many rows).
        self.busy: dict[int, tuple[int, Hashable, int]] = {}
        # Whether they differ in what they cost.
        self.is_mixed = False
        self._best_rank = 0
        # Instances that were removed while they executed.
        self._removed: set[int] = set()

    def add(self, instance: Instance) -> None:
        """It is busy until `set_free`."""
        self.all.append(instance)
        self._rank()

    def remove(self, instance: Instance) -> bool:
        """Give it no more batches; one that it executes goes on. False where it was closed with all others."""
        if instance not in self.all:
            return False
        self.all.remove(instance)
        if instance in self.free:
            self.free.remove(instance)
        else:
            self._removed.add(id(instance))
        self._rank()
        return True

    def clear(self) -> None:
        """Forget all of them."""
        self.all.clear()
        self.free.clear()

    def _rank(self) -> None:
        self.is_mixed = len({id(instance.costs) for instance in self.all}) > 1
        self._best_rank = min((instance.rank for instance in self.all), default=0)

    def set_busy(self, instance: Instance, since_ns: int, batch: Sequence[Call]) -> None:
        """It executes a batch from then on."""
        self.busy[id(instance)] = since_ns, batch[0].key, sum([call.rows for call in batch])

    def set_free(self, instance: Instance) -> None:
        """It executes nothing."""
        self.busy.pop(id(instance), None)
        if id(instance) in self._removed:
            self._removed.remove(id(instance))
        else:
            self.free.append(instance)

    def executing(self, at_ns: int) -> list[tuple[float, bool]]:
        """For how long each has executed its batch, 0 where it has none; and whether it is stuck with it."""
        taken = [(instance, max(0, at_ns - self.busy.get(id(instance), (at_ns,))[0]) / 1e9) for instance in self.all]
        return [(seconds, seconds > (getattr(instance, "hang_s", None) or HANG_S)) for instance, seconds in taken]

    def choose(self) -> Instance | None:
        """The free instance that takes the next batch; None where none is, or a busy one would be done earlier."""
        if not self.free:
            return None
        if not self.is_mixed or not self._queue.rows:
            return self.free[-1]
        rows = min(self._queue.rows, self._queue.batch_rows())
        now = now_ns()
        free = self.free if len(self.free) <= _MOST_COMPARED else random.sample(self.free, _MOST_COMPARED)
        quickest = min(
            free, key=lambda instance: (instance.rank, instance.ahead_ns(now) + instance.costs.of(None).mean_ns(rows))
        )
        if quickest.rank > self._best_rank and not self._may_spill(quickest, rows):
            return None
        return None if self.better_waits(quickest) else quickest

    def _may_spill(self, instance: Instance, rows: int) -> bool:
        """Whether one that is not preferred may help out: within its share, and of those not known one at a time."""
        others = [other for other in self.all if other.rank > self._best_rank]
        busy = sum(id(other) in self.busy for other in others)
        if not instance.costs.of(None).mean_ns(rows):
            return bool(self._spill) and not busy and self._queue.rows > self._queue.batch_rows()
        return busy < self._spill * len(others)

    def better_waits(self, instance: Instance) -> bool:
        """Whether another instance, though busy, will have served all that waits before this one served a batch."""
        most = self._queue.batch_rows()
        rows = min(self._queue.rows, most)
        mean_ns = instance.costs.of(None).mean_ns(rows)
        if not mean_ns:
            return False  # it is tried
        patience = 1 if instance.rank == self._best_rank else _PATIENCE
        done_ns = now_ns() + patience * mean_ns
        rounds = -(-self._queue.rows // most)
        return any(
            until_ns + rounds * others_ns < done_ns
            for other in self.all
            if other is not instance
            and (others_ns := other.costs.of(None).mean_ns(rows))
            and (until_ns := self._until_ns(other))
        )

    def soonest_ns(self) -> int:
        """When the first of the busy ones ought to be done; 0 where none is."""
        return min((until_ns for instance in self.all if (until_ns := self._until_ns(instance))), default=0)

    def forecast(self) -> Forecast:
        """Of the preferred ones."""
        now = now_ns()
        preferred = [instance for instance in self.all if instance.rank == self._best_rank]
        begins = [(self._begins_ns(instance, now), instance.costs) for instance in preferred]
        return Forecast(now, begins, self._queue.batch_rows())

    def _until_ns(self, instance: Instance) -> int:
        """When a busy instance is expected to be free; 0 where it is."""
        busy = self.busy.get(id(instance))
        if busy is None:
            return 0
        start_ns, key, rows = busy
        mean_ns = instance.costs.of(key).mean_ns(rows)
        late_ns = now_ns() - start_ns - mean_ns if mean_ns else 0
        # What is late already may be late for as long again: it may be stuck.
        return start_ns + mean_ns + 2 * max(0, late_ns)

    def _begins_ns(self, instance: Instance, at_ns: int) -> int:
        """When an instance is expected to begin with another batch; 0 where it begins at once.

        One that takes a batch before the last one has ended is free, but not idle.
        """
        until_ns = self._until_ns(instance)
        ahead_ns = 0 if until_ns else instance.ahead_ns(at_ns)
        return until_ns or (at_ns + ahead_ns if ahead_ns else 0)
