"""An event loop whose time is simulated: it passes only while there is nothing to do, and then at once.

Whatever runs on it takes no longer than its computing. Knows nothing of what is simulated.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from tutti.core import types

T = TypeVar("T")


class _NoWait(selectors.DefaultSelector):
    """Has a loop's time pass at once."""

    loop: "VirtualLoop"

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("the simulation waits for something that never comes")
        self.loop.now_s += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only while it has nothing to do."""

    def __init__(self) -> None:
        selector = _NoWait()
        super().__init__(selector)
        selector.loop = self
        self.now_s = 0.0

    def time(self) -> float:
        return self.now_s

    def _write_to_self(self) -> None:
        """Nobody has to be woken: there is one thread."""


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """What `main` returns, in simulated time, by which `now_ns` goes meanwhile. Raises what it raises."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        types.set_clock(lambda: int(loop.time() * 1e9))
        try:
            return runner.run(main())
        finally:
            types.set_clock()
