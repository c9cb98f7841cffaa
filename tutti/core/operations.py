"""Loads, unloads and drains: each in a thread of its own, and waited for no longer than a limit.

What does not end holds up its own model only: a library may hang, and no thread of Python can be ended. Whoever
gives up is told what is waited for. Knows nothing of what is done.
"""

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

from tutti.core.errors import Unavailable, reason

_log = logging.getLogger(__name__)
T = TypeVar("T")

# Models that are loaded side by side, where nobody says how many.
LOADS_AT_ONCE = 4

# Of works side by side, one that has taken longer than this makes room for another.
PATIENCE_S = 10.0
_MOST_WAITING = 8


class Work(Generic[T]):
    """Something that is being done, in its thread."""

    def __init__(self, what: str, do: Callable[[], T]) -> None:
        self.what = what
        self.since_s = time.monotonic()
        self.error: BaseException | None = None
        self._result: list[T] = []
        self._do = do
        self._thread = threading.Thread(target=self._run, name=what, daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float | None) -> bool:
        """Whether it has ended, or does in time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def result(self) -> T:
        """Of a work that has ended. Raises what that has raised."""
        if self.error is not None:
            raise self.error
        return self._result[0]

    def __str__(self) -> str:
        return f"{self.what} for {time.monotonic() - self.since_s:.0f} s"

    def _run(self) -> None:
        try:
            self._result.append(self._do())
        except BaseException as error:  # it is for whoever waits
            self.error = error


class Operations:
    """What is being done to models, one thing at a time for each."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._condition = threading.Condition()
        self._running: dict[str, Work[Any]] = {}
        self._waiting: Counter[str] = Counter()

    def run(self, name: str, subject: str, do: Callable[[], T]) -> T:
        """Do something to a model, once what is being done to it has ended; raises what it raises.

        Raises Unavailable when it has not ended in time: it goes on then.
        """
        until_s = time.monotonic() + self._timeout_s
        with self._condition:
            self._wait_for(name, until_s)
            work = self._begin(name, subject, do)
        if not work.wait(max(0.0, until_s - time.monotonic())):
            raise Unavailable(f"{work}, and goes on: the repository index tells of its end{self._others(work)}")
        return work.result()

    def run_to_end(self, name: str, subject: str, do: Callable[[], T]) -> T:
        """The same, for whoever waits for as long as it takes."""
        with self._condition:
            self._condition.wait_for(lambda: name not in self._running)
            work = self._begin(name, subject, do)
        work.wait(None)
        return work.result()

    def _begin(self, name: str, subject: str, do: Callable[[], T]) -> Work[T]:
        work = self._running[name] = Work(f"model '{name}' has been {subject}", lambda: self._leave(name, do))
        return work

    def running(self) -> dict[str, str]:
        """Model -> what is being done to it, and for how long."""
        with self._condition:
            return {name: str(work) for name, work in self._running.items()}

    def _wait_for(self, name: str, until_s: float) -> None:
        """Until nothing is being done to a model; under the lock."""
        if self._waiting[name] >= _MOST_WAITING:
            raise Unavailable(f"{self._running.get(name)}: {_MOST_WAITING} others wait for that, try again later")
        self._waiting[name] += 1
        try:
            while name in self._running:
                if not self._condition.wait(max(0.0, until_s - time.monotonic())) and name in self._running:
                    raise Unavailable(f"{self._running[name]}: that was waited for, try again later")
        finally:
            self._waiting[name] -= 1
            if not self._waiting[name]:
                del self._waiting[name]

    def _leave(self, name: str, do: Callable[[], T]) -> T:
        try:
            return do()
        finally:
            with self._condition:
                self._running.pop(name, None)
                self._condition.notify_all()

    def _others(self, asked: Work[Any]) -> str:
        with self._condition:
            others = [str(work) for work in self._running.values() if work is not asked]
        return f" ({'; '.join(others[:8])})" if others else ""


def side_by_side(works: Sequence[tuple[str, Callable[[], object]]], at_once: int, timeout_s: float | None) -> list[str]:
    """Do works in threads, so many at once, those not counted that take long; returns which have not ended in time.

    Without a limit all are waited for. What they raise is logged. What has not begun in time begins when it can.
    """
    until_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
    begun: list[Work[None]] = []
    beginning = Work("works begin", lambda: _begin_all(works, at_once, begun))
    while not beginning.wait(_left_s(until_s)) and _left_s(until_s):
        pass
    count = len(begun)
    for work in begun[:count]:
        if not work.wait(_left_s(until_s)) and _left_s(until_s):
            _log.warning("%s, and is waited for", work)
        while not work.wait(_left_s(until_s)) and _left_s(until_s):
            pass
    unfinished = [str(work) for work in begun[:count] if not work.wait(0)]
    return unfinished + [f"{subject} for 0 s, since others are before it" for subject, _ in works[count:]]


def _begin_all(works: Sequence[tuple[str, Callable[[], object]]], at_once: int, begun: list[Work[None]]) -> None:
    for subject, do in works:
        while sum(_is_young(work) for work in begun) >= at_once:
            next((work for work in begun if _is_young(work)), begun[-1]).wait(0.05)
        while True:
            try:
                begun.append(Work(subject, partial(_logged, subject, do)))
                break
            except RuntimeError:  # there are no more threads: when others have ended
                time.sleep(0.05)


def _left_s(until_s: float) -> float:
    """How long to wait now: until then, though not long without a look."""
    return max(0.0, min(PATIENCE_S, until_s - time.monotonic()))


def _logged(subject: str, do: Callable[[], object]) -> None:
    try:
        do()
    except BaseException as error:
        _log.error("%s: %s: %s", subject, type(error).__name__, reason(error))


def _is_young(work: "Work[None]") -> bool:
    return not work.wait(0) and time.monotonic() - work.since_s < PATIENCE_S
