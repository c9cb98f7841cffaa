"""Which instance may execute next where they share resources: `rate_limiter` of instance groups. Pure, without threads.

A resource is a name and how many of it there are, on each device or once for all. An instance executes when all that it
needs is free, and holds it until it ends. Where several wait, each has had its executions counted, times its priority;
the one with the least goes first. What it needs is kept from those behind it, or a large need would never be met; those
that share nothing with it go on.
"""

import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field

from tutti.core.errors import ConfigError, sayable
from tutti.repository.policies import GLOBAL, Place, RateLimit

Supply = Mapping[tuple[str, int | None], int]
"""How many there are of a resource, by name and device; with None on every device, and of a global one."""


def parse_supply(texts: Iterable[str]) -> dict[tuple[str, int | None], int]:
    """From "NAME:COUNT" or "NAME:COUNT:DEVICE", as `--rate-limit-resource` has them. Raises ConfigError.

    Of what is said twice the most counts.
    """
    supply: dict[tuple[str, int | None], int] = {}
    for text in texts:
        name, *numbers = text.split(":")
        if not name or len(numbers) not in (1, 2) or not all(re.fullmatch("[0-9]{1,9}", n) for n in numbers):
            expected = "expected NAME:COUNT or NAME:COUNT:DEVICE"
            raise ConfigError(f"--rate-limit-resource: {expected}, got '{sayable(text)[:200]}'")
        key = (name, int(numbers[1]) if len(numbers) == 2 else None)
        supply[key] = max(supply.get(key, 0), int(numbers[0]))
    return supply


@dataclass(slots=True)
class _Clock:
    """How far those that may meet have come: what the last of them that began had on its count then.

    Who comes back after a pause starts here, and is not owed what it did not ask for.
    """

    now: int = 0


@dataclass(slots=True)
class _Instance:
    needs: dict[Place, int]
    priority: int
    clock: _Clock = field(default_factory=_Clock)
    # Its executions, times its priority, and where it stands among those that wait.
    used: int = 0
    order: tuple[int, int] | None = None
    is_executing: bool = False


class RateLimiter:
    """The instances of one process, by keys of the caller's. Not thread-safe.

    An instance asks, is told that it may begin, by the answer to its own or to another's call, and ends.
    """

    def __init__(self, supply: Supply | None = None) -> None:
        """`supply` is what was given; of another resource there is as much as the neediest instance needs."""
        self._given = dict(supply or {})
        self._instances: dict[Hashable, _Instance] = {}
        self._supply: dict[Place, int] = {}
        self._in_use: dict[Place, int] = {}
        self._asked = 0

    def add(self, key: Hashable, limit: RateLimit, device: int = 0) -> list[Hashable]:
        """Let an instance ask from now on; returns who may begin.

        Raises ConfigError for a need that can never be met, and for a resource that is global elsewhere.
        """
        instance = _Instance(limit.needs(device), max(1, limit.priority))
        self._check(instance)
        self._instances[key] = instance
        self._changed()
        return self._begin()

    def remove(self, key: Hashable) -> list[Hashable]:
        """Forget an instance, whether it waits, executes or neither; returns who may begin."""
        instance = self._instances.pop(key)
        if instance.is_executing:
            self._hold(instance, -1)
        self._changed()
        return self._begin()

    def ask(self, key: Hashable) -> list[Hashable]:
        """The instance has something to execute; returns who may begin: it, or nobody yet."""
        self._queue(key)
        return self._begin()

    def withdraw(self, key: Hashable) -> list[Hashable]:
        """The instance has nothing to execute any more, and did not begin; returns who may begin in its place."""
        self._instances[key].order = None
        return self._begin()

    def end(self, key: Hashable, asks_again: bool = False) -> list[Hashable]:
        """The instance has executed; returns who may begin.

        One that has more to execute says so here: a later question would find its place taken by who waits, whatever
        the priorities.
        """
        instance = self._instances[key]
        assert instance.is_executing, f"{key} does not execute"
        instance.is_executing = False
        self._hold(instance, -1)
        if asks_again:
            self._queue(key)
        return self._begin()

    def supply(self) -> dict[Place, int]:
        """How many there are of each resource that an instance needs."""
        return dict(self._supply)

    def in_use(self) -> dict[Place, int]:
        """How many of each resource are held."""
        return {place: count for place, count in self._in_use.items() if count}

    def _queue(self, key: Hashable) -> None:
        instance = self._instances[key]
        assert not instance.is_executing and instance.order is None, f"{key} has asked already"
        self._asked += 1
        instance.order = (max(instance.used, instance.clock.now), self._asked)

    def _begin(self) -> list[Hashable]:
        begun: list[Hashable] = []
        kept: set[Place] = set()
        for _, key in sorted((each.order, key) for key, each in self._instances.items() if each.order is not None):
            instance = self._instances[key]
            if kept.isdisjoint(instance.needs) and self._fits(instance):
                self._start(instance)
                begun.append(key)
            else:
                kept.update(instance.needs)
        return begun

    def _start(self, instance: _Instance) -> None:
        assert instance.order is not None
        count = instance.order[0]
        instance.clock.now = max(instance.clock.now, count)
        instance.used = count + instance.priority
        instance.order = None
        instance.is_executing = True
        self._hold(instance, 1)

    def _fits(self, instance: _Instance) -> bool:
        return all(self._in_use.get(place, 0) + count <= self._supply[place] for place, count in instance.needs.items())

    def _hold(self, instance: _Instance, sign: int) -> None:
        for place, count in instance.needs.items():
            self._in_use[place] = self._in_use.get(place, 0) + sign * count

    def _check(self, instance: _Instance) -> None:
        places = {place for each in self._instances.values() for place in each.needs} | set(instance.needs)
        for (name, device), count in instance.needs.items():
            if any(other == name and (where == GLOBAL) != (device == GLOBAL) for other, where in places):
                raise ConfigError(f"resource '{name}' is global for one instance and a device's for another")
            supply = self._given_of((name, device))
            if supply is not None and supply < count:
                where = "" if device == GLOBAL else f" on device {device}"
                problem = f"an execution needs {count}{where}, and --rate-limit-resource gives {supply}"
                raise ConfigError(f"resource '{name}': {problem}")

    def _given_of(self, place: Place) -> int | None:
        """What was said of a resource: of a global one whatever device was named, as in Triton."""
        name, device = place
        counts = [
            count
            for (other, where), count in self._given.items()
            if other == name and (device == GLOBAL or where is None or where == device)
        ]
        return max(counts, default=None)

    def _changed(self) -> None:
        """Instances have come or gone: what there is by default, and who may meet whom."""
        needed: dict[Place, int] = {}
        for instance in self._instances.values():
            for place, count in instance.needs.items():
                needed[place] = max(needed.get(place, 0), count)
        self._supply = {}
        for place, count in needed.items():
            supply = self._given_of(place)
            self._supply[place] = count if supply is None else supply
        for together in self._meeting():
            clock = _Clock(max(instance.clock.now for instance in together))
            for instance in together:
                instance.clock = clock

    def _meeting(self) -> list[list[_Instance]]:
        """The instances in groups: those that share a resource are in the same, as are those that share with these."""
        groups: list[tuple[set[Place], list[_Instance]]] = []
        for instance in self._instances.values():
            places, members = set(instance.needs), [instance]
            apart = []
            for group in groups:
                if group[0].isdisjoint(places):
                    apart.append(group)
                else:
                    places |= group[0]
                    members += group[1]
            groups = [*apart, (places, members)]
        return [members for _, members in groups]
