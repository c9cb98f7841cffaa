"""How a server's process ends: within a time, whatever hangs in it. Knows nothing of what it serves."""

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterable
from typing import NoReturn

_log = logging.getLogger("tutti")

# How long the last line of the log may take: its file may be on a disk that hangs, too.
_LAST_LINE_S = 1.0


class Ending:
    """The end of this process: it has so many seconds from when it begins."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._has_begun = False

    def ask(self, stop: asyncio.Event) -> None:
        """Stop, within the time; asked again, at once."""
        if stop.is_set():
            now(1, "asked to stop again: this process ends at once")
        stop.set()
        self.begin()

    def begin(self) -> None:
        """Start the clock, if nobody has. In a thread, since the event loop, too, may be held up."""
        if not self._has_begun:
            self._has_begun = True
            threading.Thread(target=self._run, name="exit", daemon=True).start()

    def _run(self) -> None:
        time.sleep(self._timeout_s)
        now(1, f"not all has ended within {self._timeout_s:g} s (--exit-timeout-secs): this process ends")


def now(status: int, why: str = "") -> NoReturn:
    """End without waiting for threads, which may never end, nor for the log."""
    with contextlib.suppress(RuntimeError):  # too late for threads
        threading.Thread(target=_insist, args=(status,), name="insist", daemon=True).start()
    if why:
        _log.error("%s", why)
    logging.shutdown()
    os._exit(status)


def _insist(status: int) -> None:
    time.sleep(_LAST_LINE_S)
    os._exit(status)


def held_by(before: Iterable[threading.Thread]) -> list[str]:
    """The names of threads, but those from before, that the interpreter would wait for."""
    known = set(before)
    return [thread.name for thread in threading.enumerate() if not thread.daemon and thread not in known]
