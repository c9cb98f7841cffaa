"""Which queued calls make the next batch. Pure: takes `now`, returns decisions; no threads, no clocks, no I/O.

A queue is asked only when an instance is free to execute (execution-gated batching), so batches grow by themselves
while the instances are busy and nothing waits while one is idle, but for `max_queue_delay`.
"""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

from tutti.types import Call


@dataclass(frozen=True, slots=True)
class BatchingPolicy:
    """`dynamic_batching` of one model. Sizes are rows; preferred sizes ascend; the delay is in nanoseconds."""

    max_batch_size: int
    preferred_batch_sizes: tuple[int, ...] = ()
    max_queue_delay_ns: int = 0

    def rows_to_take(self, waiting: int, age_ns: int) -> int:
        """Rows to batch now, of `waiting` ones whose oldest is `age_ns` old; 0 says wait for more.

        The largest preferred size that can be filled goes at once. Otherwise the delay must have passed, and
        everything that fits goes.
        """
        for size in reversed(self.preferred_batch_sizes):
            if size <= waiting:
                return size
        if waiting >= self.max_batch_size or age_ns >= self.max_queue_delay_ns:
            return min(waiting, self.max_batch_size)
        return 0


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now: execute `batch`, or look again at `wake_ns`. Neither when the queue is empty.

    `dropped` are calls that were cancelled while they waited.
    """

    batch: list[Call]
    dropped: list[Call]
    wake_ns: int | None = None


class BatchQueue:
    """Calls that wait for an instance, in order of arrival, apart by key: only equal keys share a batch.

    Without a policy each call is a batch of its own.
    """

    def __init__(self, policy: BatchingPolicy | None, max_rows: int) -> None:
        self.policy = policy
        self.max_rows = max_rows
        self.rows = 0
        self._lanes: dict[Hashable, deque[Call]] = {}
        self._lane_rows: dict[Hashable, int] = {}

    def has_room(self, call: Call) -> bool:
        """Whether `call` fits. An empty queue takes any call, however many rows it has."""
        return self.rows == 0 or self.rows + call.rows <= self.max_rows

    def push(self, call: Call) -> None:
        """Append; `call.arrived_ns`, `rows` and `key` are set. The caller has asked has_room."""
        lane = self._lanes.get(call.key)
        if lane is None:
            lane = self._lanes[call.key] = deque()
            self._lane_rows[call.key] = 0
        lane.append(call)
        self._lane_rows[call.key] += call.rows
        self.rows += call.rows

    def take(self, now_ns: int) -> Decision:
        """The next batch: from the lane whose oldest call waited longest, among those that need not wait."""
        dropped = self._drop_cancelled_heads()
        wake_ns: int | None = None
        for key in sorted(self._lanes, key=self._head_arrival) if len(self._lanes) > 1 else list(self._lanes):
            batch, lane_wake_ns = self._take_lane(key, now_ns, dropped)
            if batch:
                return Decision(batch, dropped)
            if lane_wake_ns is not None:
                wake_ns = lane_wake_ns if wake_ns is None else min(wake_ns, lane_wake_ns)
        return Decision([], dropped, wake_ns)

    def drain(self) -> list[Call]:
        """Remove and return everything that waits."""
        calls = [call for lane in self._lanes.values() for call in lane]
        self._lanes.clear()
        self._lane_rows.clear()
        self.rows = 0
        return calls

    def _head_arrival(self, key: Hashable) -> int:
        return self._lanes[key][0].arrived_ns

    def _drop_cancelled_heads(self) -> list[Call]:
        dropped = []
        for key in list(self._lanes):
            lane = self._lanes[key]
            while lane and lane[0].is_cancelled:
                dropped.append(self._pop(key))
            self._forget_if_empty(key)
        return dropped

    def _take_lane(self, key: Hashable, now_ns: int, dropped: list[Call]) -> tuple[list[Call], int | None]:
        if self.policy is None:
            batch = [self._pop(key)]
        else:
            head_ns = self._head_arrival(key)
            limit = self.policy.rows_to_take(self._lane_rows[key], now_ns - head_ns)
            if limit == 0:
                return [], head_ns + self.policy.max_queue_delay_ns
            batch = self._pop_rows(key, limit, dropped)
        self._forget_if_empty(key)
        return batch, None

    def _pop_rows(self, key: Hashable, limit: int, dropped: list[Call]) -> list[Call]:
        """Whole calls up to `limit` rows, at least one: a call is never split between batches."""
        lane = self._lanes[key]
        batch = [self._pop(key)]
        rows = batch[0].rows
        while lane and rows + lane[0].rows <= limit:
            call = self._pop(key)
            if call.is_cancelled:
                dropped.append(call)
            else:
                batch.append(call)
                rows += call.rows
        return batch

    def _pop(self, key: Hashable) -> Call:
        call = self._lanes[key].popleft()
        self._lane_rows[key] -= call.rows
        self.rows -= call.rows
        return call

    def _forget_if_empty(self, key: Hashable) -> None:
        if not self._lanes[key]:
            del self._lanes[key]
            del self._lane_rows[key]
