"""The threads around rate_limiting.py: an instance waits in its own for the resources that it shares with others."""

import threading
from collections.abc import Callable, Hashable

from tutti.repository.policies import RateLimit
from tutti.scheduling.rate_limiting import RateLimiter, Supply


class RateLimits:
    """The resources of one process, for `--rate-limit=execution_count`. Thread-safe."""

    def __init__(self, supply: Supply | None = None) -> None:
        """`supply` is what `--rate-limit-resource` gives; of another resource there is what the neediest needs."""
        self._lock = threading.Lock()
        self._limiter = RateLimiter(supply)
        self._turns: dict[Hashable, Turn] = {}
        self._made = 0

    def turn(self, limit: RateLimit, device: int) -> "Turn":
        """For one instance on a device. Raises ConfigError where its needs can never be met."""
        with self._lock:
            self._made += 1
            turn = Turn(self, self._made)
            self._turns[self._made] = turn
            try:
                begun = self._limiter.add(self._made, limit, device)
            except Exception:
                del self._turns[self._made]
                raise
            self._grant(begun)
            return turn

    def change(self, decide: Callable[[RateLimiter], list[Hashable]]) -> None:
        """Let the limiter decide, and wake those who may begin."""
        with self._lock:
            self._grant(decide(self._limiter))

    def forget(self, key: Hashable) -> None:
        """An instance is gone."""
        with self._lock:
            del self._turns[key]
            self._grant(self._limiter.remove(key))

    def _grant(self, begun: list[Hashable]) -> None:
        for key in begun:
            self._turns[key].granted.set()


class Turn:
    """One instance's: begin, execute, end. For one thread at a time."""

    def __init__(self, limits: RateLimits, key: Hashable) -> None:
        self._limits = limits
        self._key = key
        self._has_asked = False
        self.granted = threading.Event()

    def begin(self) -> None:
        """Wait until the instance may execute."""
        if not self._has_asked:
            self._limits.change(lambda limiter: limiter.ask(self._key))
        self.granted.wait()
        self.granted.clear()
        self._has_asked = False

    def end(self, goes_on: bool = False) -> None:
        """The instance has executed. One that `goes_on` begins again, and has asked for that with this."""
        self._has_asked = goes_on
        self._limits.change(lambda limiter: limiter.end(self._key, asks_again=goes_on))

    def close(self) -> None:
        """The instance executes no more."""
        self._limits.forget(self._key)
