"""How many bytes of requests and answers the front-ends of a process hold, all together. Knows nothing of protocols."""

import threading

# What is smaller is not counted: keeping account of it would cost more than it holds.
COUNTED_BYTES = 64 * 1024
# A client that reads nothing of its answers for so long has gone; where room is needed, this is enough.
WRITE_TIMEOUT_S = 30.0
STALLED_S = 1.0


class Holding:
    """Counts what is received, executed, or not yet read by its client. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        # Bytes of messages that have come on streams, of which nobody knows the connections.
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
        """What is held has become so much more, or less, and cannot be refused any more."""
        with self._lock:
            self._held += size

    def give(self, size: int) -> None:
        if size:
            self.change(-size)
