"""The parts of a gateway that know its replicas and send to them, under one roof: membership, sending, control.

Puts them together, and does nothing that one of them can do alone.
"""

import asyncio
from collections.abc import Sequence

from tutti.core.types import now_ns
from tutti.ray_app import control
from tutti.ray_app.control import Change, Desired
from tutti.ray_app.dispatch import Dispatcher
from tutti.ray_app.members import Member
from tutti.ray_app.membership import Membership
from tutti.ray_app.pools import Pool, is_behind, places
from tutti.ray_app.probes import PROBE_INTERVAL_S, Probes, Watch
from tutti.ray_app.rollout import Rollout
from tutti.ray_app.tasks import Tasks
from tutti.ray_app.transport import Transport


class Router:
    """Knows the pools' replicas and sends to them. Lives on one loop."""

    def __init__(
        self,
        pools: Sequence[Pool],
        loop: asyncio.AbstractEventLoop,
        desired: Desired | None = None,
        name: str = "",
        control_timeout_s: float = control.TIMEOUT_S,
    ) -> None:
        """`desired` is what replicas should have applied; `name` is this gateway's, to them.

        They get `control_timeout_s` to apply a change.
        """
        self.pools = tuple(pools)
        self._loop = loop
        self._tasks = Tasks(loop)
        self._rollout = Rollout(desired or Desired(), control_timeout_s)
        self._membership = Membership(pools, self._tasks)
        self._probes = Probes(self._membership, self._rollout, self._tasks, name)
        dispatcher = Dispatcher(self._membership, Transport(self._membership, self._rollout, loop))
        # Bound methods of the parts: a call through the router costs no more than one to the part.
        self.infer, self.stream, self.send_to = dispatcher.infer, dispatcher.stream, dispatcher.send_to
        self.spawn = self._tasks.spawn
        self.listen, self.call_for = self._membership.listen, self._membership.call_for
        self.of = self._membership.named

    def start(self, watch: Watch) -> None:
        """Begin to follow the replicas, of which `watch` tells."""
        self.spawn(self._measure_forever())
        self._probes.start(watch)

    def stop(self) -> None:
        self._tasks.stop()

    def places(self, model: str) -> list[tuple[Pool, Member]]:
        """The replicas of the first pool that has the model, whichever version."""
        return places(model, self.pools)

    async def control(self, change: Change) -> list[str]:
        """Have every replica apply a change of what is desired; returns why some could not.

        A replica that does not answer now is told when it does.
        """
        members = self._membership.up()
        failures = await asyncio.gather(*(self._rollout.apply(pool, member) for pool, member in members))
        for pool, member in members:  # a load has changed which models they have
            await self._probes.probe(pool, member)
        return [failure for failure in failures if failure]

    async def wait_for(self, generation: int, timeout_s: float) -> bool:
        """Until every replica that is up has applied a change; returns whether they have."""
        until_s = self._loop.time() + timeout_s
        while is_behind(generation, self.pools):
            if self._loop.time() > until_s:
                return False
            await asyncio.sleep(PROBE_INTERVAL_S / 2)
        return True

    async def _measure_forever(self) -> None:
        """How many replicas each pool's work needs; probes tell them, and they tell Serve.

        A pool that has none is called for, though a lower one may answer meanwhile.
        """
        while True:
            for pool in self.pools:
                pool.measure(now_ns())
                if pool.wanted and pool.may_be_empty:
                    self.call_for([pool])
            await asyncio.sleep(PROBE_INTERVAL_S)
