"""What models in this process do at a time, for tests: they enter the probe, and leave it when they may."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Probe:
    """`inside` are the names that have entered, `most` how many at a time there have been, `entered` all in order."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        self.inside: list[str] = []
        self.entered: list[str] = []
        self.most = 0
        self.may_leave = threading.Event()
        self.may_leave.set()

    @contextmanager
    def enter(self, name: str) -> Iterator[None]:
        """Waits within until it may leave."""
        with self.lock:
            self.inside.append(name)
            self.entered.append(name)
            self.most = max(self.most, len(self.inside))
        assert self.may_leave.wait(30)
        try:
            yield
        finally:
            with self.lock:
                self.inside.remove(name)


probe = Probe()
