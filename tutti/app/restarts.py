"""Whether, and when, an engine's process that has ended is started anew. Pure.

A start that fails for the first time is a mistake of the one who started the server: it ends, as a single process does.
Whatever ends a server that has served is replaced, and so is, at any time, a process whose device has failed.
"""

import signal
from dataclasses import dataclass

# The status of a server that cannot begin: a flag, a file or a port is not as it must be.
UNUSABLE = 2
# The status of a process that ends since its device has failed (sysexits' EX_TEMPFAIL).
DEVICE_FAILED = 75
FIRST_DELAY_S = 1.0
MAX_DELAY_S = 30.0
# One that has served for so long is started anew at once.
STEADY_S = 60.0


@dataclass(frozen=True, slots=True)
class Ended:
    """One process of the engine: its exit status, -N for signal N; what it reported; for how long it was ready."""

    status: int
    failure: str = ""
    ready_s: float | None = None


@dataclass(frozen=True, slots=True)
class End:
    """The server ends, with this status."""

    status: int


@dataclass(frozen=True, slots=True)
class Again:
    """The engine is started anew, for the `count`th time."""

    reason: str
    delay_s: float
    count: int


class Restarts:
    """The starts of one server's engine."""

    def __init__(self) -> None:
        self._count = 0
        self._delay_s = 0.0
        self._has_served = False

    def after(self, ended: Ended) -> End | Again:
        """What to do now."""
        self._has_served = self._has_served or ended.ready_s is not None
        if ended.status == 0:
            return End(0)
        is_lost = bool(ended.failure) or ended.status == DEVICE_FAILED
        if not self._has_served and not is_lost:
            return End(ended.status if ended.status > 0 else 128 - ended.status)
        if ended.ready_s is not None and ended.ready_s >= STEADY_S:
            self._delay_s = 0.0
            delay_s = 0.0
        else:
            delay_s = self._delay_s = min(MAX_DELAY_S, 2 * self._delay_s or FIRST_DELAY_S)
        self._count += 1
        return Again(ended.failure or _cause(ended.status), delay_s, self._count)


def _cause(status: int) -> str:
    if status == DEVICE_FAILED:
        return "a device has failed"
    if status >= 0:
        return f"it ended with status {status}"
    try:
        return f"it was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"it was killed by signal {-status}"
