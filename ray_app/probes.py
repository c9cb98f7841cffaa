"""Asks every replica, over and over, who it is and what it has: one that does not answer twice in a row is down.

Owns how often replicas are asked. Knows nothing of requests: it only ends the sends that wait for a dead replica.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence

from tutti.ray_app.members import Member
from tutti.ray_app.membership import Membership
from tutti.ray_app.pools import Pool
from tutti.ray_app.replica import Description
from tutti.ray_app.rollout import Rollout
from tutti.ray_app.tasks import Tasks

_log = logging.getLogger(__name__)

PROBE_INTERVAL_S = 0.25
PROBE_TIMEOUT_S = 1.0
# Replicas are asked less often when there are many, so that probing costs no more than this.
MAX_PROBES_PER_S = 100

Watch = Callable[[str, Callable[[list[str], str], None]], None]
"""Has a callback called, on the loop, with the ids of a deployment's replicas, and that of one that died."""


class Probes:
    """One task for each replica. Lives on one loop."""

    def __init__(self, membership: Membership, rollout: Rollout, tasks: Tasks, gateway: str) -> None:
        """`gateway` is this gateway's name to replicas."""
        self._membership = membership
        self._rollout = rollout
        self._tasks = tasks
        self._gateway = gateway

    def start(self, watch: Watch) -> None:
        """Begin to follow the replicas, of which `watch` tells."""
        for pool in self._membership.pools:
            watch(pool.status.name, lambda ids, dead, pool=pool: self._present(pool, ids, dead))  # type: ignore[misc]
            self._tasks.spawn(self._find(pool))

    async def _find(self, pool: Pool) -> None:
        """Serve makes a handle's router when it is first used: use it until that tells of replicas."""
        while not pool.status.members:
            try:
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    await pool.broadcast("describe").results_async()
            except Exception as error:
                _log.debug("pool '%s' does not answer yet: %s", pool.status.name, error)
            await asyncio.sleep(PROBE_INTERVAL_S)

    def _present(self, pool: Pool, ids: Sequence[str], dead: str) -> None:
        """Serve says which replicas there are. It would keep what was sent to a dead one for the next that comes."""
        if dead:
            pool.give_up(dead)
        for member in self._membership.present(pool, ids):
            self._tasks.keep(self._follow(pool, member))

    async def _follow(self, pool: Pool, member: Member) -> None:
        """Probe a replica for as long as there is one of its id, and at once when it is lost."""
        while pool.status.members.get(member.id) is member:
            await self.probe(pool, member)
            interval_s = max(PROBE_INTERVAL_S, len(self._membership) / MAX_PROBES_PER_S)
            await self._membership.wait_for_loss(member, interval_s)

    async def probe(self, pool: Pool, member: Member) -> None:
        """Ask one replica now. One that is behind is told what it has missed."""
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                description: Description = await pool.describe.remote(
                    to=member.id, wanted=pool.wanted, by=self._gateway
                )
        except TimeoutError:
            self._missed(pool, member)
            return
        except Exception as error:
            _log.debug("replica %s did not answer a probe: %s", member.name, error)
            self._membership.lost(pool, member)
            return
        if description.id != member.id:  # another replica has answered in its place
            self._membership.lost(pool, member)
            return
        if member.saw(description.name, description.models, description.generation):
            self._membership.tell(pool)
        if self._rollout.is_behind(member):
            self._tasks.keep(self._rollout.catch_up(pool, member))

    def _missed(self, pool: Pool, member: Member) -> None:
        """A probe did not come back in time. What waits for a replica that hangs would wait for ever."""
        if member.missed():
            _log.warning("replica %s does not answer", member.name)
            self._membership.tell(pool)
        if member.is_hung:
            pool.give_up(member.id)
