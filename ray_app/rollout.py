"""Brings a replica up to date with what the cluster should serve: every change that it has not applied, in order.

Owns how long a replica may take. Knows nothing of requests, nor of when a replica is asked.
"""

import asyncio
import logging

from tutti.ray_app.control import Desired
from tutti.ray_app.members import Member
from tutti.ray_app.pools import Pool

_log = logging.getLogger(__name__)

# A replica that did not take a change is asked again after this.
REFUSED_PAUSE_S = 0.25
# A message waits this long where its replica is being told already.
CATCHING_UP_PAUSE_S = 0.05


class Rollout:
    """Lives on one loop."""

    def __init__(self, desired: Desired, timeout_s: float) -> None:
        """Replicas get `timeout_s` to apply what they have missed of `desired`."""
        self.desired = desired
        self._timeout_s = timeout_s
        self._catching_up: set[str] = set()

    def is_behind(self, member: Member) -> bool:
        return member.generation < self.desired.generation

    async def apply(self, pool: Pool, member: Member) -> str:
        """Have a replica apply what it has missed; returns why some of it failed, "" where a replica did not answer.

        One that does not answer now is told when it does.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                failure: str = await pool.apply.remote(self.desired.since(0), to=member.id)
        except Exception as error:
            _log.warning("replica %s did not take a change: %s", member.name, error)
            await asyncio.sleep(REFUSED_PAUSE_S)
            return ""
        return failure

    async def catch_up(self, pool: Pool, member: Member) -> None:
        """Tell a replica what it has missed, unless somebody does so already."""
        if member.id in self._catching_up:
            await asyncio.sleep(CATCHING_UP_PAUSE_S)
            return
        self._catching_up.add(member.id)
        try:
            await self.apply(pool, member)
        finally:
            self._catching_up.discard(member.id)
