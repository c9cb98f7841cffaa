"""What a gateway knows of replicas, and which of them it takes. Pure: told of probes, batches and losses."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tutti.core.types import Answer

_log = logging.getLogger(__name__)

# A replica is down after two missed probes in a row: one may be chance.
MISSED_PROBES = 2


class ReplicaLost(Exception):
    """The replica is gone, and what it held with it: all, or what `answers`, one for each call, say DeviceLost of."""

    def __init__(self, reason: str, answers: Sequence[Answer] = ()) -> None:
        super().__init__(reason)
        self.answers = answers


class ReplicaSilent(ReplicaLost):
    """The replica does not answer any more. It need not be gone."""


@dataclass(slots=True, eq=False)
class Member:
    """One replica. `models` are "name/version" of those ready, and names of segments."""

    id: str
    pool: str
    name: str = ""
    models: frozenset[str] = frozenset()
    generation: int = 0
    is_up: bool = False
    failed_probes: int = 0
    # It has missed so many probes that what waits for it may wait for ever.
    is_hung: bool = False
    in_flight: int = 0
    # When its batches are expected to be done, and when one last was.
    busy_until_ns: int = 0
    done_ns: int = 0

    def saw(self, name: str, models: Iterable[str], generation: int) -> bool:
        """It has answered a probe. Returns whether it has come up, or has other models."""
        before = (self.is_up, self.models)
        self.name, self.models, self.generation = name, frozenset(models), generation
        self.failed_probes = 0
        self.is_hung = False
        self.is_up = True
        return before != (self.is_up, self.models)

    def missed(self) -> bool:
        """A probe did not come back. Returns whether the replica went down by that."""
        self.failed_probes += 1
        self.is_hung = self.failed_probes >= MISSED_PROBES
        return self.lost() if self.is_hung else False

    def lost(self) -> bool:
        """A batch was lost: down until a probe says otherwise. Returns whether it was up."""
        was_up, self.is_up = self.is_up, False
        return was_up

    def ahead_ns(self, now_ns: int) -> int:
        """How long its batches will keep it, as far as is known."""
        return max(0, self.busy_until_ns - now_ns) if self.in_flight else 0

    def begins(self, now_ns: int, expected_ns: int) -> None:
        """It is given a batch."""
        self.busy_until_ns = now_ns + self.ahead_ns(now_ns) + expected_ns
        self.in_flight += 1

    def ends(self, start_ns: int, now_ns: int) -> int:
        """A batch given at `start_ns` is back; returns how long the replica was at it, without those before it."""
        self.in_flight -= 1
        took_ns = now_ns - max(start_ns, self.done_ns)
        self.done_ns = now_ns
        return max(1, took_ns)


@dataclass(slots=True)
class PoolStatus:
    """The replicas of one pool, by id, and what they have answered."""

    name: str
    members: dict[str, Member] = field(default_factory=dict)
    requests: int = 0
    fallbacks: int = 0
    _was_up: bool = False

    @property
    def up(self) -> list[Member]:
        return [member for member in self.members.values() if member.is_up]

    @property
    def is_up(self) -> bool:
        return any(member.is_up for member in self.members.values())

    def having(self, key: str) -> list[Member]:
        """The replicas that are up and have a model ready."""
        return [member for member in self.members.values() if member.is_up and key in member.models]

    def present(self, ids: Sequence[str]) -> list[Member]:
        """The pool has these replicas now; returns those that are new."""
        for gone in set(self.members) - set(ids):
            self.members.pop(gone).is_up = False
        new = [Member(replica, self.name) for replica in ids if replica not in self.members]
        self.members.update((member.id, member) for member in new)
        return new

    def count(self, requests: int, is_fallback: bool) -> None:
        """Requests were answered, in place of a preferred pool's where that `is_fallback`."""
        self.requests += requests
        if is_fallback:
            self.fallbacks += requests

    def tell(self) -> None:
        """Log a change of state."""
        if self.is_up != self._was_up:
            self._was_up = self.is_up
            _log.warning("pool '%s' is %s, %d replicas", self.name, "up" if self.is_up else "down", len(self.up))


def another(pools: Sequence[PoolStatus], key: str, tried: Sequence[Member]) -> Member | None:
    """The replica for what was lost by those `tried`: of the first pool that has one, the one with the least to do.

    None where only those tried are left.
    """
    for pool in pools:
        members = [member for member in pool.having(key) if member not in tried]
        if members:
            return min(members, key=lambda member: member.in_flight)
    return None
