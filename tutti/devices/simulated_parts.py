"""What a simulated device is made of: blocks of memory, events, streams, and units that do one thing at a time."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tutti.core.dtypes import Array


class HostBlock:
    """Pinned memory."""

    def __init__(self, size: int) -> None:
        self.array: Array = np.empty(size, np.uint8)


class DeviceBlock:
    """Memory of the device."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.memory: Array = np.empty(size, np.uint8)


@dataclass(slots=True, eq=False)
class Event:
    """`reached_ns` is of the latest recording; None until the device is there."""

    wake_ns: int = 0
    number: int = 0
    reached_ns: int | None = None
    waiting: list[Callable[[], None]] = field(default_factory=list)

    def record(self) -> None:
        self.number += 1
        self.reached_ns = None
        self.waiting = []

    def reach(self, now_ns: int, number: int) -> None:
        if number != self.number:  # recorded anew: this was an earlier time's
            return
        self.reached_ns = now_ns
        waiting, self.waiting = self.waiting, []
        for work in waiting:
            work()


class Unit:
    """What does one thing at a time: a copy engine, or the execution units."""

    def __init__(self) -> None:
        self.free_ns = 0
        self.busy_ns = 0

    def take(self, now_ns: int, takes_ns: int) -> int:
        """Do something as soon as it is free; returns when that ends."""
        self.free_ns = max(self.free_ns, now_ns) + takes_ns
        self.busy_ns += takes_ns
        return self.free_ns


Operation = Callable[[Callable[[], None]], None]
"""Begins something, and calls what it is given when that has ended."""


class Stream:
    """Operations in order: each begins when the one before has ended."""

    def __init__(self) -> None:
        self._operations: deque[Operation] = deque()
        self._is_busy = False

    def add(self, operation: Operation) -> None:
        self._operations.append(operation)
        if not self._is_busy:
            self._next()

    def _next(self) -> None:
        while self._operations and not self._is_busy:
            self._is_busy = True
            self._operations.popleft()(self._ended)

    def _ended(self) -> None:
        self._is_busy = False
        self._next()
