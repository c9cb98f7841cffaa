"""Which replicas there are now: Serve names them, losses take them down, and those who wait for one are woken.

Owns who listens and who waits. Knows nothing of how replicas are probed, nor of what is sent to them.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

from tutti.core.errors import Unavailable
from tutti.ray_app.members import Member, another
from tutti.ray_app.pools import Pool
from tutti.ray_app.tasks import Tasks

_log = logging.getLogger(__name__)

# A replica that lost a batch may be given it again after this: it is not about to be found dead then.
FORGIVEN_AFTER_S = 1.0


class Membership:
    """The replicas of all pools. Lives on one loop."""

    def __init__(self, pools: Sequence[Pool], tasks: Tasks) -> None:
        self.pools = tuple(pools)
        self._by_name = {pool.status.name: pool for pool in pools}
        self._tasks = tasks
        self._loop = tasks.loop
        self._changed = asyncio.Condition()
        self._listeners: list[Callable[[], None]] = []
        # Set when the replica is lost, where somebody waits for that.
        self._losses: dict[Member, asyncio.Event] = {}
        # Pools that Serve has been asked for a replica of.
        self._called: set[str] = set()

    def __len__(self) -> int:
        return sum(len(pool.status.members) for pool in self.pools)

    def pool(self, name: str) -> Pool:
        return self._by_name[name]

    def named(self, names: Sequence[str]) -> tuple[Pool, ...]:
        """The pools of these names, in order of preference."""
        return tuple(pool for pool in self.pools if pool.status.name in names)

    def up(self) -> list[tuple[Pool, Member]]:
        return [(pool, member) for pool in self.pools for member in pool.status.up]

    def present(self, pool: Pool, ids: Sequence[str]) -> list[Member]:
        """A pool has these replicas now, says Serve; returns those that are new."""
        new = pool.status.present(ids)
        self.tell(pool)
        return new

    def lost(self, pool: Pool, member: Member) -> None:
        """A replica has failed. What was sent to it fails by itself."""
        if member.lost():
            self.tell(pool)
            if member in self._losses:
                self._losses[member].set()

    async def wait_for_loss(self, member: Member, timeout_s: float) -> None:
        """Until the replica is lost, or for that long. Only one may wait for each."""
        loss = self._losses[member] = asyncio.Event()
        try:
            async with asyncio.timeout(timeout_s):
                await loss.wait()
        except TimeoutError:
            return
        finally:
            del self._losses[member]

    def listen(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call `changed`, on the loop, now and whenever replicas are others; returns what ends that. Thread-safe."""
        self._loop.call_soon_threadsafe(self._listeners.append, changed)
        self._loop.call_soon_threadsafe(changed)

        def end() -> None:
            self._loop.call_soon_threadsafe(self._forget, changed)

        return end

    def _forget(self, changed: Callable[[], None]) -> None:
        if changed in self._listeners:
            self._listeners.remove(changed)

    def tell(self, pool: Pool) -> None:
        """Those who listen and those who wait hear that replicas are others."""
        pool.status.tell()
        for changed in list(self._listeners):
            changed()
        self._tasks.keep(self._notify())

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def another(self, key: str, pools: Sequence[Pool], tried: Sequence[Member]) -> Member:
        """A replica for what was lost by those `tried`, who are asked again where they are up and no other is.

        One that has answered nothing for a while need not be dead: on a busy machine it may be the only one there is.
        Raises Unavailable when none comes up in time.
        """
        statuses = [pool.status for pool in pools]
        patience_s = max(pool.patience_s for pool in pools)
        start_s = self._loop.time()
        forgiven_s, end_s = start_s + FORGIVEN_AFTER_S, start_s + patience_s
        async with self._changed:
            while (now_s := self._loop.time()) < end_s:
                member = another(statuses, key, tried if now_s < forgiven_s else ())
                if member is not None:
                    return member
                self.call_for(pools)
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(forgiven_s if now_s < forgiven_s < end_s else end_s):
                        await self._changed.wait()
        raise Unavailable(f"no replica is up, waited {patience_s:g} s")

    def call_for(self, pools: Sequence[Pool]) -> None:
        """Requests wait, and there is no replica: let Serve know, which then starts one."""
        for pool in pools:
            if not pool.status.members and pool.status.name not in self._called:
                self._called.add(pool.status.name)
                self._tasks.keep(self._call_for(pool))

    async def _call_for(self, pool: Pool) -> None:
        try:
            async with asyncio.timeout(pool.patience_s):
                await pool.describe.remote()
        except Exception as error:
            _log.debug("pool '%s' has not started a replica: %s", pool.status.name, error)
        finally:
            self._called.discard(pool.status.name)
