"""Turns on a device that several models share: the one that has had the least time of it goes next."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Device:
    """One device. Models that find it free lose nothing; of those that wait, none can be kept from it by another.

    A model that comes back after a pause is not owed the time it did not ask for.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._used_ns: dict[str, int] = {}
        self._waiting: list[str] = []
        self._is_busy = False
        self._least_ns = 0

    @contextmanager
    def turn(self, model: str) -> Iterator[None]:
        """Have the device alone within the block."""
        with self._condition:
            self._used_ns[model] = max(self._used_ns.get(model, 0), self._least_ns)
            self._waiting.append(model)
            self._condition.wait_for(lambda: not self._is_busy and self.next() == model)
            self._waiting.remove(model)
            self._is_busy = True
            self._least_ns = self._used_ns[model]
        started_ns = time.monotonic_ns()
        try:
            yield
        finally:
            with self._condition:
                self._is_busy = False
                self._used_ns[model] += time.monotonic_ns() - started_ns
                self._condition.notify_all()

    def next(self) -> str:
        """Who goes next of those that wait."""
        return min(self._waiting, key=lambda model: self._used_ns[model])


_devices: dict[str, Device] = {}
_lock = threading.Lock()


def device(name: str) -> Device:
    """The device of that name, as "cuda:0", shared by all of this process."""
    with _lock:
        return _devices.setdefault(name, Device())
