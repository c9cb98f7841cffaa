"""What the engine expects of a client of any protocol: it sends when it is told, and tells when each is answered.

Nobody waits in a client for anybody: a slow answer must not hold up the request after it.
"""

from collections.abc import Callable
from typing import Protocol

Done = Callable[[int, float, str, str], None]
"""(number of the request, time.perf_counter() when its answer came, what was wrong or "", the server's reason)."""

TIMED_OUT = "no answer in time"
UNREACHABLE = "the server cannot be reached"


class Client(Protocol):
    """What the engine drives. `sent(number)` is called when a request goes out."""

    sent: Callable[[int], None]
    # Requests for which no connection was free, and none could be opened.
    waited: int

    async def start(self) -> None:
        """Open what connections are needed at first. Raises OSError when no server is there."""

    def prepare(self, number: int, payload: int) -> None:
        """Do ahead what can be done for the request that is sent next."""

    def send(self, number: int, payload: int) -> None:
        """Without waiting."""

    def expire(self, now_s: float) -> None:
        """End what has had no answer for too long."""

    async def close(self) -> None: ...
