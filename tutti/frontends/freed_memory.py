"""What the process has freed goes back to the system.

By itself the allocator keeps large blocks between those in use, several times what may be held. Linux with glibc only:
elsewhere nothing is done.
"""

import ctypes
import os
from collections.abc import Callable

# So much freed memory may stay with the process; more goes back to the system, at most once in INTERVAL_S.
_KEPT_BYTES = 96 * 1024 * 1024
INTERVAL_S = 0.25


class Freed:
    """Gives memory back. A process has one, and one thread at a time uses it."""

    _memory = -1

    def __init__(self) -> None:
        """Raises OSError where the system does not tell what a process has."""
        self._memory = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        self._trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._trimmed_at = 0.0
        # What the process needs besides what is held: the least that it had after giving back all it could.
        self._kept = self.resident_bytes()

    def resident_bytes(self) -> int:
        return int(os.pread(self._memory, 256, 0).split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def give_back(self, held: int, now: float) -> int:
        """Give free memory back, if it is much. `held` bytes are known to be in use. Returns the resident bytes."""
        resident = self.resident_bytes()
        self._kept = min(self._kept, resident - held)
        is_much = resident - held > self._kept + _KEPT_BYTES
        if self._trim is None or not is_much or now - self._trimmed_at < INTERVAL_S:
            return resident
        self._trimmed_at = now
        self._trim(0)
        resident = self.resident_bytes()
        self._kept = resident - held
        return resident

    def __del__(self) -> None:
        if self._memory >= 0:
            os.close(self._memory)
