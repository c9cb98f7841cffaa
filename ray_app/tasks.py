"""The tasks of one event loop that nobody waits for, until all of them are stopped. Knows nothing of what they do."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

Work = Coroutine[Any, Any, Any]


class Tasks:
    """Keeps a reference to each task: the loop itself keeps none. Made on the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._thread = threading.get_ident()
        self._running: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Work) -> None:
        """Run a coroutine on the loop, from any thread."""
        if threading.get_ident() == self._thread:
            self.keep(work)
        else:
            self.loop.call_soon_threadsafe(self.keep, work)

    def keep(self, work: Work) -> None:
        """Run a coroutine, from the loop's own thread."""
        task = self.loop.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def stop(self) -> None:
        for task in self._running:
            task.cancel()
