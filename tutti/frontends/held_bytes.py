"""How many bytes of requests and answers the front-ends of a process hold, all together. Knows nothing of protocols."""

import threading

# Smaller requests and answers are not counted: accounting for them would cost more than they hold.
COUNTED_BYTES = 64 * 1024
# A client that has read nothing for so long is given up; where room is needed, after STALLED_S.
WRITE_TIMEOUT_S = 30.0
STALLED_S = 1.0


class Holding:
    """Counts what is received, executed, or not yet read by its client. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        # Bytes of messages that have come on streams. Which connections they came on nobody knows.
        self.streamed = 0
        self._held = 0
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        return self._held

    @property
    def refusal(self) -> str:
        return f"the server holds {self._held} bytes of requests and answers, at most {self.limit}: try again later"

    def take(self, size: int) -> bool:
        """Hold `size` bytes more; False, and nothing is held, where that is too much."""
        with self._lock:
            if self._held + size > self.limit:
                return False
            self._held += size
            return True

    def change(self, size: int) -> None:
        """Count `size` bytes more, or less if negative, that are held already: they cannot be refused."""
        with self._lock:
            self._held += size

    def give(self, size: int) -> None:
        if size:
            self.change(-size)
