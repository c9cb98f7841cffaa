"""What a configuration says of queues, batches and shared resources: `dynamic_batching` and `rate_limiter`, as data.

Who keeps to them is tutti.scheduling.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from tutti.core.types import Call

GLOBAL = -1
"""The device of a resource that all devices share."""

Place = tuple[str, int]
"""A resource's name, and its device or GLOBAL."""


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
        asked_us = call.request.parameters.get("timeout", 0)
        own_ns = asked_us * 1000 if isinstance(asked_us, int) and asked_us > 0 else 0
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

    @property
    def has_timeout_override(self) -> bool:
        """Whether requests may have timeouts of their own in some queue."""
        return any(policy.allows_override for policy in (self.queue, *self.queue_by_level.values()))

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
class Resource:
    """What an execution needs: `count` of `name`, on its own device, or of the one that all devices share."""

    name: str
    count: int
    is_global: bool = False


@dataclass(frozen=True, slots=True)
class RateLimit:
    """What the instances of a group need to execute. With priority 2 they have half of the chances that 1 has."""

    resources: tuple[Resource, ...] = ()
    priority: int = 1

    def needs(self, device: int) -> dict[Place, int]:
        """How many of what an instance on the device holds while it executes."""
        needs: dict[Place, int] = {}
        for resource in self.resources:
            place = (resource.name, GLOBAL if resource.is_global else device)
            needs[place] = max(needs.get(place, 0), resource.count)
        return {place: count for place, count in needs.items() if count}


NO_LIMIT = RateLimit()
