"""What the cluster should serve, as changes that every replica applies in order, and how they get there.

A replica that starts or comes back later has applied none of them: it is told what it has missed.
"""

import asyncio
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tutti.core.errors import Internal
from tutti.ensembles.graph import Plan
from tutti.serving.interface import Override

# Unless --control-timeout-secs says otherwise.
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Change:
    """One load (with an override), unload (without), or with the name "" a change of the log settings.

    A `segment` is loaded under its name, too. What is loaded is loaded in `pools` only (None: in all), and is unloaded
    in the others.
    """

    generation: int
    model: str
    override: Override | None = None
    logs: Mapping[str, Any] | None = None
    segment: Plan | None = None
    pools: tuple[str, ...] | None = None

    def is_load(self, pool: str) -> bool:
        """Whether a replica of `pool` has something to load."""
        return (self.override is not None or self.segment is not None) and (self.pools is None or pool in self.pools)


class Desired:
    """The changes since the start. Only the last one of each model counts."""

    def __init__(self) -> None:
        self.generation = 0
        self._changes: dict[str, Change] = {}

    def add(self, change: Change) -> None:
        """Add the next change, which replaces an earlier one of its model."""
        self._changes[change.model] = change
        self.generation = change.generation  # set last: whoever sees the new generation finds its change

    def last(self, model: str) -> Change | None:
        return self._changes.get(model)

    def since(self, generation: int) -> list[Change]:
        """What a replica at `generation` has not applied yet, in order."""
        return sorted((c for c in self._changes.values() if c.generation > generation), key=lambda c: c.generation)


class Records(Protocol):
    """What keeps changes, those of other gateways among them."""

    desired: Desired

    def record(self, model: str, override: Override | None = None, **more: Any) -> Change: ...


class Carrier(Protocol):
    """Reaches the replicas."""

    def places(self, model: str) -> Sequence[Any]: ...

    async def control(self, change: Change) -> list[str]: ...


class Control:
    """Carries loads, unloads and settings to every replica. Blocks; not to be called on the router's loop."""

    def __init__(
        self, router: Carrier, records: Records, loop: asyncio.AbstractEventLoop, timeout_s: float = TIMEOUT_S
    ) -> None:
        """The router waits for each replica for `timeout_s` at most."""
        self._router = router
        self._timeout_s = timeout_s
        self._records = records
        self._loop = loop
        self._lock = threading.Lock()

    def models(self, name: str, override: Override | None, pools: tuple[str, ...]) -> None:
        """Load a model in its pools, or unload it. Raises Internal, all as it was, when a replica cannot."""
        record = self._records.record
        before = self._records.desired.last(name)
        had_it = bool(self._router.places(name))
        failures = self._carry(record(name, override, pools=pools))
        if not failures:
            return
        if before is not None:
            self._carry(record(name, before.override, pools=before.pools))
        else:
            self._carry(record(name, Override() if had_it else None, pools=pools))
        raise Internal("; ".join(failures))

    def load_segment(self, name: str, segment: Plan, pools: tuple[str, ...]) -> None:
        """Graphs that were cut alike share their segments, in all gateways.

        They stay: another gateway may still go by the graph they are of, and a plan costs next to nothing.
        """
        with self._lock:
            last = self._records.desired.last(name)
            if last is None or last.pools != pools:
                self._carry(self._records.record(name, segment=segment, pools=pools))

    def logs(self, changes: Mapping[str, Any]) -> None:
        last = self._records.desired.last("")
        self._carry(self._records.record("", logs={**(last.logs or {} if last else {}), **changes}))

    def _carry(self, change: Change) -> list[str]:
        carried = asyncio.run_coroutine_threadsafe(self._router.control(change), self._loop)
        return carried.result(self._timeout_s + 10)
