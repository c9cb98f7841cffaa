"""Whether a cluster's head still answers: what it is asked may hang, and is asked in a thread."""

import logging
import threading
import time
from collections.abc import Callable

_log = logging.getLogger(__name__)

ASK_INTERVAL_S = 2.0
# Ray ends a process that has not reached the head for a minute. The loss must be told before that.
SILENCE_S = 45.0
# After a pause this long of the process or its machine, missing answers say nothing about the head.
STANDSTILL_S = 10.0
CLOSE_TIMEOUT_S = 5.0


class Head:
    """Asks again and again from its making on, in a thread that ends with the process."""

    def __init__(
        self, ask: Callable[[], str], interval_s: float = ASK_INTERVAL_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`ask` returns what is wrong with the head, "" where nothing is; what it raises is taken for no answer."""
        self._ask = ask
        self._interval_s = interval_s
        self._clock = clock
        self._answered_s = self._looked_s = clock()
        self._wrong = ""
        self._is_closed = threading.Event()
        self._asking = threading.Lock()
        threading.Thread(target=self._ask_forever, name="head", daemon=True).start()

    def lost(self) -> str:
        """Why the cluster is no more; "" while it is. To be looked at every second or so."""
        now_s = self._clock()
        if now_s - self._looked_s > STANDSTILL_S:  # this process stood still, the asking thread included
            self._answered_s = now_s
        self._looked_s = now_s
        silent_s = now_s - self._answered_s
        return self._wrong or (f"its head has not answered for {silent_s:.0f} s" if silent_s > SILENCE_S else "")

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Ask no more, from now on; returns whether that is so, and not an answer still waited for."""
        self._is_closed.set()
        is_free = self._asking.acquire(timeout=timeout_s)
        if is_free:
            self._asking.release()
        return is_free

    def _ask_forever(self) -> None:
        while not self._wrong and not self._is_closed.wait(self._interval_s):
            with self._asking:
                if not self._is_closed.is_set():
                    self._ask_once()

    def _ask_once(self) -> None:
        try:
            self._wrong = self._ask()
            self._answered_s = self._clock()
        except Exception as error:
            _log.debug("the cluster's head does not answer: %s", error)
