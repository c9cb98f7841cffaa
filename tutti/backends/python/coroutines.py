"""Where the coroutines of one python model's instance go on: an event loop that also runs between executions.

So connections that a model keeps, and tasks that it has begun, are there for its next batch.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any

_log = logging.getLogger(__name__)

# How long tasks that are left may take to end, once cancelled.
_END_TIMEOUT_S = 5.0


class Coroutines:
    """One loop, made when it is first needed, in a thread of its own."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._is_closing = False

    def go(self, work: Coroutine[Any, Any, Any]) -> "Future[tuple[Any, BaseException | None]]":
        """(what the coroutine returns, what it raises), once it has ended."""
        if self._thread is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._run, name=f"{self._name} coroutines", daemon=True)
            self._thread.start()
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(_outcome(work), self._loop)

    def result(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Wait for the coroutine; raises what it raises."""
        return _returned(self.go(work).result())

    def result_here(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The same in this thread, for work that belongs to it: the loop stands still between executions then."""
        assert self._thread is None
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        return _returned(self._loop.run_until_complete(_outcome(work)))

    def close(self) -> None:
        """Cancel the tasks that are left, and end the loop."""
        loop, thread = self._loop, self._thread
        if loop is None:
            return
        self._is_closing = True
        if thread is None:
            loop.run_until_complete(_cancel_others())
        else:
            ending = asyncio.run_coroutine_threadsafe(_cancel_others(), loop)
            ending.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))
            thread.join(_END_TIMEOUT_S)
            if thread.is_alive():
                _log.warning("model '%s': a task of its event loop does not end", self._name)
                return
        loop.close()

    def _run(self) -> None:
        assert self._loop is not None
        asyncio.set_event_loop(self._loop)
        while not self._is_closing:
            try:
                self._loop.run_forever()
            except BaseException:  # as SystemExit in a task: it ends the task, not the loop
                _log.exception("model '%s': a task on its event loop failed", self._name)


async def _outcome(work: Coroutine[Any, Any, Any]) -> tuple[Any, BaseException | None]:
    """The result, or what it raises: SystemExit would end the loop, and CancelledError leave its caller waiting."""
    try:
        return await work, None
    except BaseException as error:
        return None, error


def _returned(outcome: tuple[Any, BaseException | None]) -> Any:
    value, error = outcome
    if error is not None:
        raise error
    return value


async def _cancel_others() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    with contextlib.suppress(BaseException):
        await asyncio.wait_for(asyncio.gather(*others, return_exceptions=True), _END_TIMEOUT_S / 2)
