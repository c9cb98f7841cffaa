"""Which queued calls make the next batch. Pure: takes `now`, returns decisions; no threads, no clocks, no I/O.

A queue is asked only when an instance is free to execute (execution-gated batching), so batches grow by themselves
while the instances are busy and nothing waits while one is idle, but for `max_queue_delay`.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from tutti.core.types import Call
from tutti.repository.policies import BatchingPolicy
from tutti.scheduling.cost import Costs


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now: execute `batch`, or look again at `wake_ns`. Neither when the queue is empty.

    `dropped` are calls that were cancelled while they waited, `expired` those whose time in the queue is up, and
    those that could not be executed by their deadline.
    """

    batch: list[Call]
    dropped: list[Call] = field(default_factory=list)
    wake_ns: int | None = None
    expired: list[Call] = field(default_factory=list)


Cut = Callable[[Iterable[Call], int], int]
"""How many rows of calls that could go together do so best, in their order: at most so many."""


class BatchLimit:
    """How many rows a batch may have on a device whose memory may be too small for the configured batch.

    Halves when an execution runs out of memory, and doubles again after every GROW_AFTER full batches.
    """

    GROW_AFTER = 64

    def __init__(self) -> None:
        self.rows: int | None = None
        self._full = 0

    def failed(self, rows: int) -> None:
        """A batch of `rows` rows ran out of memory."""
        if self.rows is None or rows <= self.rows:  # a larger one was made before the last halving
            self.rows = max(1, rows // 2)
        self._full = 0

    def succeeded(self, rows: int, configured: int) -> None:
        if self.rows is None or rows < self.rows:
            return
        self._full += 1
        if self._full >= self.GROW_AFTER:
            self._full = 0
            self.rows = None if self.rows * 2 >= configured else self.rows * 2


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
        self.limit = BatchLimit()
        self.configured_rows = policy.max_batch_size if policy is not None else 1
        self._is_plain = policy is None or policy.is_plain
        # Whether a call that finds nobody before it need not wait.
        self.is_eager = self._is_plain and (
            policy is None or not (policy.max_queue_delay_ns or policy.preferred_batch_sizes)
        )
        self._lanes: dict[Hashable, _Lane] = {}
        self._level_rows: dict[int, int] = {}
        # No call's time is up before this; 0 when no call that waits has a timeout or a deadline.
        self.soonest_ns = 0

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

    def rows_ahead(self, call: Call) -> int:
        """Rows that go before `call`, were it to come now."""
        if self._is_plain or self.policy is None:
            return self.rows
        level = self.policy.level_of(call)
        return sum(rows for other, rows in self._level_rows.items() if other <= level)

    def batch_rows(self) -> int:
        """The most rows that one batch takes."""
        return min(self.configured_rows, self.limit.rows or self.configured_rows)

    def push(self, call: Call) -> int:
        """Append; `call.arrived_ns`, `rows`, `key` and `deadline_ns` are set. The caller has asked has_room.

        Returns when the call's time in the queue is up, 0 for never.
        """
        if not self._is_plain and self.policy is not None:
            call.level = self.policy.level_of(call)
            timeout_ns = self.policy.queue_of(call.level).timeout_of(call)
            call.expires_ns = call.arrived_ns + timeout_ns if timeout_ns else 0
            self._level_rows[call.level] = self._level_rows.get(call.level, 0) + call.rows
        self._append(call, is_late=False)
        self.rows += call.rows
        self.calls += call.requests
        if not call.expires_ns and not call.deadline_ns:
            return 0
        return self._note_end(call)

    def take(self, now_ns: int, costs: Costs | None = None, cut: Cut | None = None) -> Decision:
        """The next batch: from the first lane in order of service that need not wait.

        As in Triton, calls wait for others to join them only while all that come can: where calls of several keys
        wait, the first lane goes with what it has.
        With `costs` no call is taken that would end after its deadline, and no batch is made larger than the
        deadlines in it allow. With `cut` a batch may be smaller than it could be, but for deadlines, priorities and
        preferred sizes.
        """
        decision = Decision([], [], None, self.expire(now_ns) if self.soonest_ns else [])
        self._drop_cancelled_heads(decision)
        wake_ns: int | None = None
        lanes = list(self._lanes.values())
        if len(lanes) > 1:
            lanes.sort(key=_Lane.order)
        for lane in lanes:
            if not lane.calls:  # it went with another of its key
                continue
            lane_wake_ns = self._take_lane(lane, now_ns, costs, cut, decision)
            if decision.batch:
                return decision
            if lane_wake_ns is not None:
                wake_ns = lane_wake_ns if wake_ns is None else min(wake_ns, lane_wake_ns)
        if len(self._lanes) > 1 and self._have_several_keys():
            first = next(lane for lane in lanes if lane.calls)
            self._take_lane(first, now_ns, costs, cut, decision, may_wait=False)
            if decision.batch:
                return decision
        return Decision([], decision.dropped, wake_ns, decision.expired)

    def may_grow(self) -> bool:
        """Whether a batch that has been taken may still take more, as far as the policy goes."""
        policy = self.policy
        return self._is_plain and policy is not None and not policy.preferred_batch_sizes and not self.soonest_ns

    def more(self, key: Hashable, rows: int) -> Decision:
        """Up to `rows` rows for a batch of `key` that has been taken but does not execute yet."""
        decision = Decision([])
        lane = self._lanes.get(key)
        while lane is not None and lane.calls and lane.calls[0].rows <= rows and self.may_grow():
            call = self._pop(lane)
            (decision.dropped if call.is_cancelled else decision.batch).append(call)
            rows -= 0 if call.is_cancelled else call.rows
        if lane is not None:
            self._forget_if_empty(lane)
        return decision

    def expire(self, now_ns: int) -> list[Call]:
        """Remove and return what has waited too long; what its policy delays goes behind all that is on time."""
        if not self.soonest_ns or now_ns < self.soonest_ns:
            return []
        self.soonest_ns = 0
        expired: list[Call] = []
        for lane in list(self._lanes.values()):
            late = [call for call in lane.calls if _is_up(call, now_ns, lane.is_late)]
            if late:
                gone = set(map(id, late))
                lane.calls = deque(call for call in lane.calls if id(call) not in gone)
                lane.rows -= sum(call.rows for call in late)
                self._forget_if_empty(lane)
            for call in lane.calls:
                self._note_end(call, lane.is_late)
            for call in late:
                is_over = bool(call.deadline_ns) and call.deadline_ns <= now_ns
                if not is_over and self.policy is not None and self.policy.queue_of(lane.level).delays:
                    self._append(call, is_late=True)
                    self._note_end(call, is_late=True)
                else:
                    self._left(call)
                    expired.append(call)
        return expired

    def drain(self) -> list[Call]:
        """Remove and return everything that waits."""
        calls = [call for lane in self._lanes.values() for call in lane.calls]
        self._lanes.clear()
        self._level_rows.clear()
        self.rows = self.calls = self.soonest_ns = 0
        return calls

    def _note_end(self, call: Call, is_late: bool = False) -> int:
        """Remember when the call's time is up; returns it, 0 for never."""
        ends = [end for end in (0 if is_late else call.expires_ns, call.deadline_ns) if end]
        end_ns = min(ends, default=0)
        if end_ns and (not self.soonest_ns or end_ns < self.soonest_ns):
            self.soonest_ns = end_ns
        return end_ns

    def _append(self, call: Call, is_late: bool) -> None:
        name = call.key if self._is_plain else (call.level, is_late, call.key)
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = _Lane(call.level, is_late, call.key)
        lane.calls.append(call)
        lane.rows += call.rows

    def _drop_cancelled_heads(self, decision: Decision) -> None:
        for lane in list(self._lanes.values()):
            while lane.calls and lane.calls[0].is_cancelled:
                decision.dropped.append(self._pop(lane))
            self._forget_if_empty(lane)

    def _have_several_keys(self) -> bool:
        return len({lane.key for lane in self._lanes.values()}) > 1

    def _take_lane(
        self,
        lane: _Lane,
        now_ns: int,
        costs: Costs | None,
        cut: Cut | None,
        decision: Decision,
        may_wait: bool = True,
    ) -> int | None:
        """Take a batch out of the lane, or return when to look again."""
        if self.policy is None:
            self._fill([lane], 1, now_ns, costs, decision)
            return None
        # Calls of one key share a batch across priority levels, the more urgent ones first.
        lanes = [lane] if self._is_plain else self._lanes_of(lane.key)
        head_ns = min(other.calls[0].arrived_ns for other in lanes)
        waiting = sum(other.rows for other in lanes)
        limit = self.policy.rows_to_take(waiting, now_ns - head_ns)
        if limit == 0 and may_wait:
            return head_ns + self.policy.max_queue_delay_ns
        limit = limit or min(waiting, self.policy.max_batch_size)
        if self.limit.rows is not None:
            limit = min(limit, self.limit.rows)
        if cut is not None and self._is_plain and not self.soonest_ns and not self.policy.preferred_batch_sizes:
            limit = cut(lane.calls, limit)
        if waiting <= limit and not self.soonest_ns:
            self._take_all(lanes, decision)
        else:
            self._fill(lanes, limit, now_ns, costs, decision)
        return None

    def _lanes_of(self, key: Hashable) -> list[_Lane]:
        return sorted((lane for lane in self._lanes.values() if lane.key == key), key=_Lane.order)

    def _take_all(self, lanes: Sequence[_Lane], decision: Decision) -> None:
        """Everything fits, and nothing is in a hurry."""
        for lane in lanes:
            for call in lane.calls:
                (decision.dropped if call.is_cancelled else decision.batch).append(call)
                if not self._is_plain:
                    self._level_rows[call.level] -= call.rows
            self.rows -= lane.rows
            self.calls -= sum([call.requests for call in lane.calls])
            lane.calls.clear()
            self._forget_if_empty(lane)

    def _fill(self, lanes: Sequence[_Lane], limit: int, now_ns: int, costs: Costs | None, decision: Decision) -> None:
        """Move whole calls into the batch up to `limit` rows, at least one: a call is never split between batches.

        A batch is cut short for a deadline only while that keeps half of it: under more load than can be served, ever
        smaller batches would serve ever less, and it is better to give up the one call that came too late.
        """
        model = costs.of(lanes[0].key) if costs is not None and self.soonest_ns else None
        waiting = min(limit, sum(lane.rows for lane in lanes))
        batch, rows, tightest_ns = decision.batch, 0, 0
        if model is None:
            self._fill_fast(lanes, limit, decision)
            return
        for lane in lanes:
            calls = lane.calls
            while calls:
                head = calls[0]
                if head.is_cancelled:
                    decision.dropped.append(self._pop(lane))
                    continue
                if batch and rows + head.rows > limit:
                    break
                if head.deadline_ns and (not tightest_ns or head.deadline_ns < tightest_ns):
                    most = max(limit, head.rows)
                    fits = model.rows_within(head.deadline_ns - now_ns, most)
                    if fits < head.rows or (not batch and fits < waiting // 2):
                        decision.expired.append(self._pop(lane))
                        continue
                    if fits < rows + head.rows:
                        break  # not among these
                    tightest_ns = head.deadline_ns
                    limit = min(most, fits)
                batch.append(self._pop(lane))
                rows += head.rows
            self._forget_if_empty(lane)
            if calls:
                return

    def _fill_fast(self, lanes: Sequence[_Lane], limit: int, decision: Decision) -> None:
        """As `_fill`, where no call is in a hurry."""
        batch, rows = decision.batch, 0
        for lane in lanes:
            calls, taken, before = lane.calls, 0, rows
            while calls:
                call = calls[0]
                if call.is_cancelled:
                    decision.dropped.append(self._pop(lane))
                    continue
                if batch and rows + call.rows > limit:
                    break
                batch.append(calls.popleft())
                rows += call.rows
                taken += call.requests
            lane.rows -= rows - before
            self.rows -= rows - before
            self.calls -= taken
            if not self._is_plain:
                self._level_rows[lane.level] -= rows - before
            self._forget_if_empty(lane)
            if calls:
                return

    def _pop(self, lane: _Lane) -> Call:
        call = lane.calls.popleft()
        lane.rows -= call.rows
        self._left(call)
        return call

    def _left(self, call: Call) -> None:
        self.rows -= call.rows
        self.calls -= call.requests
        if not self._is_plain:
            self._level_rows[call.level] -= call.rows

    def _forget_if_empty(self, lane: _Lane) -> None:
        if lane.calls:
            return
        name = lane.key if self._is_plain else (lane.level, lane.is_late, lane.key)
        self._lanes.pop(name, None)
        if not self._lanes:
            self.soonest_ns = 0


def _is_up(call: Call, now_ns: int, is_late: bool) -> bool:
    """Whether the call's deadline has passed, or its timeout in the queue, which counts only once."""
    if call.deadline_ns and call.deadline_ns <= now_ns:
        return True
    return not is_late and bool(call.expires_ns) and call.expires_ns <= now_ns
