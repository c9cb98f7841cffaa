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


class _Lane:
    """Calls of one level and key, in order of arrival. `is_late`: their timeout has passed, and they were delayed."""

    __slots__ = ("calls", "is_late", "key", "level", "rows")

    def __init__(self, level: int, is_late: bool, key: Hashable) -> None:
        self.level = level
        self.is_late = is_late
        self.key = key
        self.calls: deque[Call] = deque()
        self.rows = 0

    def order(self) -> tuple[bool, int, int]:
        """Sorted by this, lanes are in the order of service."""
        return self.is_late, self.level, self.calls[0].arrived_ns


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
        self._lanes: dict[Hashable, _Lane] = {}
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
        self._append(call, is_late=False)
        self.rows += call.rows
        self.calls += 1
        return call.expires_ns

    def take(self, now_ns: int) -> Decision:
        """The next batch: from the first lane in order of service that need not wait."""
        expired = [] if self._is_plain else self.expire(now_ns)
        dropped = self._drop_cancelled_heads()
        wake_ns: int | None = None
        lanes = list(self._lanes.values())
        for lane in sorted(lanes, key=_Lane.order) if len(lanes) > 1 else lanes:
            if not lane.calls:  # it went with another of its key
                continue
            batch, lane_wake_ns = self._take_lane(lane, now_ns, dropped)
            if batch:
                return Decision(batch, dropped, None, expired)
            if lane_wake_ns is not None:
                wake_ns = lane_wake_ns if wake_ns is None else min(wake_ns, lane_wake_ns)
        return Decision([], dropped, wake_ns, expired)

    def expire(self, now_ns: int) -> list[Call]:
        """Remove and return what has waited too long; what its policy delays goes behind all that is on time."""
        assert self.policy is not None
        expired: list[Call] = []
        for lane in [lane for lane in self._lanes.values() if not lane.is_late]:
            late = [call for call in lane.calls if call.expires_ns and call.expires_ns <= now_ns]
            if not late:
                continue
            gone = set(map(id, late))
            lane.calls = deque(call for call in lane.calls if id(call) not in gone)
            lane.rows -= sum(call.rows for call in late)
            self._forget_if_empty(lane)
            if self.policy.queue_of(lane.level).delays:
                for call in late:
                    self._append(call, is_late=True)
            else:
                for call in late:
                    self._left(call)
                expired += late
        return expired

    def drain(self) -> list[Call]:
        """Remove and return everything that waits."""
        calls = [call for lane in self._lanes.values() for call in lane.calls]
        self._lanes.clear()
        self._level_rows.clear()
        self.rows = self.calls = 0
        return calls

    def _append(self, call: Call, is_late: bool) -> None:
        name = self._name(call.level, is_late, call.key)
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = _Lane(call.level, is_late, call.key)
        lane.calls.append(call)
        lane.rows += call.rows

    def _name(self, level: int, is_late: bool, key: Hashable) -> Hashable:
        return key if self._is_plain else (level, is_late, key)

    def _drop_cancelled_heads(self) -> list[Call]:
        dropped = []
        for lane in list(self._lanes.values()):
            while lane.calls and lane.calls[0].is_cancelled:
                dropped.append(self._pop(lane))
            self._forget_if_empty(lane)
        return dropped

    def _take_lane(self, lane: _Lane, now_ns: int, dropped: list[Call]) -> tuple[list[Call], int | None]:
        if self.policy is None:
            batch = [self._pop(lane)]
            self._forget_if_empty(lane)
            return batch, None
        # Calls of one key share a batch across priority levels, the more urgent ones first.
        lanes = [lane] if self._is_plain else self._lanes_of(lane.key)
        head_ns = min(one.calls[0].arrived_ns for one in lanes)
        limit = self.policy.rows_to_take(sum(one.rows for one in lanes), now_ns - head_ns)
        if limit == 0:
            return [], head_ns + self.policy.max_queue_delay_ns
        batch = []
        for one in lanes:
            is_full = self._pop_rows(one, limit, batch, dropped)
            self._forget_if_empty(one)
            if is_full:
                break
        return batch, None

    def _lanes_of(self, key: Hashable) -> list[_Lane]:
        return sorted((lane for lane in self._lanes.values() if lane.key == key), key=_Lane.order)

    def _pop_rows(self, lane: _Lane, limit: int, batch: list[Call], dropped: list[Call]) -> bool:
        """Move whole calls into `batch` up to `limit` rows, at least one: a call is never split between batches.

        Returns whether calls were left behind.
        """
        calls = lane.calls
        rows = sum(call.rows for call in batch)
        while calls and (not batch or rows + calls[0].rows <= limit):
            call = self._pop(lane)
            if call.is_cancelled:
                dropped.append(call)
            else:
                batch.append(call)
                rows += call.rows
        return bool(calls)

    def _pop(self, lane: _Lane) -> Call:
        call = lane.calls.popleft()
        lane.rows -= call.rows
        self._left(call)
        return call

    def _left(self, call: Call) -> None:
        self.rows -= call.rows
        self.calls -= 1
        if not self._is_plain:
            self._level_rows[call.level] -= call.rows

    def _forget_if_empty(self, lane: _Lane) -> None:
        if not lane.calls:
            self._lanes.pop(self._name(lane.level, lane.is_late, lane.key), None)
