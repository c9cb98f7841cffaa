"""Threads that devices need beside their own: alarms, and waiting for what another thread does."""

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

_log = logging.getLogger(__name__)


class Alarms:
    """Runs work after delays, in one thread."""

    def __init__(self, name: str) -> None:
        self._order = itertools.count()
        self._due: list[tuple[int, int, Callable[[], None]]] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def set(self, delay_ns: int, work: Callable[[], None]) -> None:
        with self._changed:
            heapq.heappush(self._due, (time.monotonic_ns() + delay_ns, next(self._order), work))
            if self._due[0][2] is work:
                self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while (work := self._next()) is not None:
            try:
                work()
            except Exception:
                _log.exception("an alarm failed")

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            while not self._is_closed:
                wait_ns = self._due[0][0] - time.monotonic_ns() if self._due else None
                if wait_ns is not None and wait_ns <= 0:
                    return heapq.heappop(self._due)[2]
                self._changed.wait(None if wait_ns is None else wait_ns / 1e9)
        return None


def run_and_wait(post: Callable[[Callable[[], None]], None], work: Callable[[], None]) -> None:
    """Post `work` and wait until it has run; raises what it raises."""
    done = threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)
        finally:
            done.set()

    post(run)
    done.wait()
    if failures:
        raise failures[0]
