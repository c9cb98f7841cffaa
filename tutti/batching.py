"""Which queued calls make the next batch. Pure: takes `now`, returns decisions; no threads, no clocks, no I/O.

A queue is asked only when an instance is free to execute (execution-gated batching), so batches grow by themselves
while the instances are busy and nothing waits while one is idle, but for `max_queue_delay`.
"""

from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from tutti.types import Call


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """`ModelQueuePolicy` of one priority level. Nanoseconds and rows; 0 means none.

    A call that has waited for its timeout is refused, or, with `delays`, waits on behind all that have not.
    """

    timeout_ns: int = 0
    delays: bool = False
    allows_override: bool = False
    max_rows: int = 0

    def timeout_of(self, call: Call) -> int:
        """The call's timeout; its own `timeout` parameter (microseconds) can only shorten the policy's."""
        if not self.allows_override:
            return self.timeout_ns
        own = call.request.parameters.get("timeout", 0)
        own_ns = own * 1000 if isinstance(own, int) and own > 0 else 0
        return min(own_ns, self.timeout_ns) if own_ns and self.timeout_ns else own_ns or self.timeout_ns


@dataclass(frozen=True, slots=True)
class BatchingPolicy:
    """`dynamic_batching` of one model. Sizes are rows; preferred sizes ascend; the delay is in nanoseconds.

    With `priority_levels`, level 1 goes first; a request without a level, or with one out of range, has the default.
    """

    max_batch_size: int
    preferred_batch_sizes: tuple[int, ...] = ()
    max_queue_delay_ns: int = 0
    priority_levels: int = 0
    default_priority_level: int = 0
    queue: QueuePolicy = QueuePolicy()
    queue_by_level: Mapping[int, QueuePolicy] = field(default_factory=lambda: MappingProxyType({}))
    preserves_ordering: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether all calls are equal: no priorities, no timeouts."""
        policies = (self.queue, *self.queue_by_level.values())
        return not self.priority_levels and not any(p.timeout_ns or p.allows_override for p in policies)

    def level_of(self, call: Call) -> int:
        if not self.priority_levels:
            return 0
        level = call.request.parameters.get("priority", 0)
        return level if isinstance(level, int) and 1 <= level <= self.priority_levels else self.default_priority_level

    def queue_of(self, level: int) -> QueuePolicy:
        return self.queue_by_level.get(level, self.queue)

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

    `dropped` are calls that were cancelled while they waited, `expired` those whose time in the queue is up.
    """

    batch: list[Call]
    dropped: list[Call]
    wake_ns: int | None = None
    expired: list[Call] = field(default_factory=list)


_LaneKey = tuple[int, bool, Hashable]


class BatchQueue:
    """Calls that wait for an instance: by priority level, then in order of arrival. Only equal keys share a batch.

    Without a policy each call is a batch of its own.
    """

    def __init__(self, policy: BatchingPolicy | None, max_rows: int) -> None:
        self.policy = policy
        self.max_rows = max_rows
        self.rows = 0
        self.calls = 0
        self._is_plain = policy is None or policy.is_plain
        # (level, whether its timeout has passed, key); sorted, that is the order of service.
        self._lanes: dict[_LaneKey, deque[Call]] = {}
        self._lane_rows: dict[_LaneKey, int] = {}
        self._level_rows: dict[int, int] = {}

    def has_room(self, call: Call) -> bool:
        """Whether `call` fits. An empty queue takes any call, however many rows it has."""
        if not self.rows:
            return True
        if self.rows + call.rows > self.max_rows:
            return False
        if self._is_plain or self.policy is None:
            return True
        level = self.policy.level_of(call)
        limit = self.policy.queue_of(level).max_rows
        waiting = self._level_rows.get(level, 0)
        return not limit or not waiting or waiting + call.rows <= limit

    def push(self, call: Call) -> int:
        """Append; `call.arrived_ns`, `rows` and `key` are set. The caller has asked has_room.

        Returns when the call's time in the queue is up, 0 for never.
        """
        if not self._is_plain and self.policy is not None:
            call.level = self.policy.level_of(call)
            timeout_ns = self.policy.queue_of(call.level).timeout_of(call)
            call.expires_ns = call.arrived_ns + timeout_ns if timeout_ns else 0
            self._level_rows[call.level] = self._level_rows.get(call.level, 0) + call.rows
        self._append((call.level, False, call.key), call)
        self.rows += call.rows
        self.calls += 1
        return call.expires_ns

    def take(self, now_ns: int) -> Decision:
        """The next batch: from the first lane in order of service that need not wait."""
        expired = [] if self._is_plain else self.expire(now_ns)
        dropped = self._drop_cancelled_heads()
        wake_ns: int | None = None
        for lane_key in sorted(self._lanes, key=self._order) if len(self._lanes) > 1 else list(self._lanes):
            if lane_key not in self._lanes:
                continue
            batch, lane_wake_ns = self._take_lane(lane_key, now_ns, dropped)
            if batch:
                return Decision(batch, dropped, None, expired)
            if lane_wake_ns is not None:
                wake_ns = lane_wake_ns if wake_ns is None else min(wake_ns, lane_wake_ns)
        return Decision([], dropped, wake_ns, expired)

    def expire(self, now_ns: int) -> list[Call]:
        """Remove and return what has waited too long; what its policy delays goes behind all that is on time."""
        assert self.policy is not None
        expired: list[Call] = []
        for lane_key in [key for key in self._lanes if not key[1]]:
            late = [call for call in self._lanes[lane_key] if call.expires_ns and call.expires_ns <= now_ns]
            if not late:
                continue
            gone = set(map(id, late))
            self._lanes[lane_key] = deque(call for call in self._lanes[lane_key] if id(call) not in gone)
            self._lane_rows[lane_key] -= sum(call.rows for call in late)
            self._forget_if_empty(lane_key)
            if self.policy.queue_of(lane_key[0]).delays:
                for call in late:
                    self._append((lane_key[0], True, lane_key[2]), call)
            else:
                for call in late:
                    self._left(call)
                expired += late
        return expired

    def drain(self) -> list[Call]:
        """Remove and return everything that waits."""
        calls = [call for lane in self._lanes.values() for call in lane]
        self._lanes.clear()
        self._lane_rows.clear()
        self._level_rows.clear()
        self.rows = self.calls = 0
        return calls

    def _append(self, lane_key: _LaneKey, call: Call) -> None:
        lane = self._lanes.get(lane_key)
        if lane is None:
            lane = self._lanes[lane_key] = deque()
            self._lane_rows[lane_key] = 0
        lane.append(call)
        self._lane_rows[lane_key] += call.rows

    def _order(self, lane_key: _LaneKey) -> tuple[bool, int, int]:
        level, is_late, _ = lane_key
        return is_late, level, self._lanes[lane_key][0].arrived_ns

    def _drop_cancelled_heads(self) -> list[Call]:
        dropped = []
        for lane_key in list(self._lanes):
            lane = self._lanes[lane_key]
            while lane and lane[0].is_cancelled:
                dropped.append(self._pop(lane_key))
            self._forget_if_empty(lane_key)
        return dropped

    def _take_lane(self, lane_key: _LaneKey, now_ns: int, dropped: list[Call]) -> tuple[list[Call], int | None]:
        if self.policy is None:
            batch = [self._pop(lane_key)]
            self._forget_if_empty(lane_key)
            return batch, None
        # Calls of one key share a batch across priority levels, the more urgent ones first.
        lanes = [lane_key] if self._is_plain else self._lanes_of(lane_key[2])
        head_ns = min(self._lanes[key][0].arrived_ns for key in lanes)
        limit = self.policy.rows_to_take(sum(self._lane_rows[key] for key in lanes), now_ns - head_ns)
        if limit == 0:
            return [], head_ns + self.policy.max_queue_delay_ns
        batch = []
        for key in lanes:
            is_full = self._pop_rows(key, limit, batch, dropped)
            self._forget_if_empty(key)
            if is_full:
                break
        return batch, None

    def _lanes_of(self, key: Hashable) -> list[_LaneKey]:
        return sorted((lane_key for lane_key in self._lanes if lane_key[2] == key), key=self._order)

    def _pop_rows(self, lane_key: _LaneKey, limit: int, batch: list[Call], dropped: list[Call]) -> bool:
        """Move whole calls into `batch` up to `limit` rows, at least one: a call is never split between batches.

        Returns whether calls were left behind.
        """
        lane = self._lanes[lane_key]
        rows = sum(call.rows for call in batch)
        while lane and (not batch or rows + lane[0].rows <= limit):
            call = self._pop(lane_key)
            if call.is_cancelled:
                dropped.append(call)
            else:
                batch.append(call)
                rows += call.rows
        return bool(lane)

    def _pop(self, lane_key: _LaneKey) -> Call:
        call = self._lanes[lane_key].popleft()
        self._lane_rows[lane_key] -= call.rows
        self._left(call)
        return call

    def _left(self, call: Call) -> None:
        self.rows -= call.rows
        self.calls -= 1
        if not self._is_plain:
            self._level_rows[call.level] -= call.rows

    def _forget_if_empty(self, lane_key: _LaneKey) -> None:
        if not self._lanes[lane_key]:
            del self._lanes[lane_key]
            del self._lane_rows[lane_key]
