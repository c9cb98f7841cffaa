"""Time of simulated devices: virtual, in the thread that lets it pass, or real, in a thread of its own."""

import heapq
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable

_log = logging.getLogger(__name__)


class Timeline:
    """Virtual time: what is to happen when. Ties go in the order in which they were added."""

    def __init__(self) -> None:
        self._now_ns = 0
        self._order = itertools.count()
        self._due: list[tuple[int, int, Callable[[], None]]] = []

    @property
    def now_ns(self) -> int:
        return self._now_ns

    def schedule(self, when_ns: int, work: Callable[[], None]) -> None:
        heapq.heappush(self._due, (max(when_ns, self.now_ns), next(self._order), work))

    def after(self, delay_ns: int, work: Callable[[], None]) -> None:
        self.schedule(self.now_ns + delay_ns, work)

    def run(self, until_ns: float = math.inf) -> None:
        """Let time pass until nothing is due, or until then."""
        while self._due and self._due[0][0] <= until_ns:
            self._now_ns, _, work = heapq.heappop(self._due)
            work()
        if until_ns != math.inf:
            self._now_ns = max(self._now_ns, int(until_ns))


class LiveTimeline(Timeline):
    """The same in real time: a thread does what is due. `schedule` and `call` may be used from any thread."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()
        self._is_ended = False
        self._thread = threading.Thread(target=self.run, name="simulated device", daemon=True)
        self._thread.start()

    @property
    def now_ns(self) -> int:
        """The host's clock, as tutti.core.types.now_ns."""
        return time.monotonic_ns()

    def schedule(self, when_ns: int, work: Callable[[], None]) -> None:
        with self._changed:
            super().schedule(when_ns, work)
            self._changed.notify()

    def end(self) -> None:
        """End the thread; what is due later is never done."""
        with self._changed:
            self._is_ended = True
            self._changed.notify()

    def run(self, until_ns: float = math.inf) -> None:
        while (work := self._next()) is not None:
            try:
                work()
            except Exception:
                _log.exception("work of a simulated device failed")

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            while not self._is_ended:
                if not self._due:
                    self._changed.wait()
                    continue
                wait_ns = self._due[0][0] - time.monotonic_ns()
                if wait_ns <= 0:
                    return heapq.heappop(self._due)[2]
                self._changed.wait(wait_ns / 1e9)
        return None
