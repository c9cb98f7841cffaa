"""A pool as a gateway holds it: its status, the methods of its Serve handle, and what is waited for from it.

Answers what a model's pools are able to serve. Knows nothing of how replicas are found, asked or lost.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tutti.ray_app.autoscaling import Steady, wanted
from tutti.ray_app.members import Member, PoolStatus


@dataclass(slots=True)
class Pool:
    """A pool's status and the methods of its Serve handle. `slots` are batches of a model at a time, per replica."""

    status: PoolStatus
    send: Any
    stream: Any = None
    describe: Any = None
    apply: Any = None
    slots: int = 2
    # How long requests wait for a first replica; a pool that may have none has to start one for them.
    patience_s: float = 10.0
    may_be_empty: bool = False
    broadcast: Any = None
    # How many replicas the pool's work needs, as its replicas are told.
    wanted: float = 0.0
    steady: Steady = field(default_factory=Steady)
    hops: list[Any] = field(default_factory=list)
    # The sends that wait for each replica, by its id.
    sends: dict[str, set[asyncio.Task[Any]]] = field(default_factory=dict)

    def measure(self, now_ns: int) -> None:
        """Work out anew how many replicas are wanted, from what its hops tell."""
        self.wanted = self.steady.follow(now_ns, wanted([hop.demand() for hop in self.hops]))

    def give_up(self, replica: str) -> None:
        """End the sends that wait for a replica, given by its id."""
        for send in list(self.sends.get(replica, ())):
            send.cancel()


def has_model(key: str, pools: Sequence[Pool]) -> bool:
    """Whether requests are answered, be it by a replica that has to be started for them."""
    return any(pool.status.having(key) or (pool.may_be_empty and not pool.status.members) for pool in pools)


def reason(key: str, pools: Sequence[Pool]) -> str:
    """Why a model is not everywhere in its pools; "" when it is."""
    members = [member for pool in pools for member in pool.status.up]
    have = sum(key in member.models for member in members)
    if not members:
        return "no replica is up"
    return "" if have == len(members) else f"ready on {have} of {len(members)} replicas"


def places(model: str, pools: Sequence[Pool]) -> list[tuple[Pool, Member]]:
    """The replicas of the first pool that has the model, whichever version."""
    for pool in pools:
        members = [m for m in pool.status.up if any(key.split("/")[0] == model for key in m.models)]
        if members:
            return [(pool, member) for member in members]
    return []


def is_behind(generation: int, pools: Sequence[Pool]) -> bool:
    """Whether a replica that is up has not applied the change of that generation yet."""
    return any(member.generation < generation for pool in pools for member in pool.status.up)
