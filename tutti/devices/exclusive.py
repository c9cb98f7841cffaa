"""Work that is to have a device for itself: it begins once nothing is under way, and nothing is launched meanwhile.

It runs in the submitting thread, one at a time. On a device that is lost it runs at once, and meets what every call
meets: somebody may wait for it.
"""

import logging
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager

from tutti.devices.interface import Device
from tutti.devices.loss import Loss

_log = logging.getLogger(__name__)

Work = Callable[[], None]


class Exclusive:
    """The work of one device that waits to be alone. `lock` is the engine's."""

    def __init__(
        self,
        device: Device,
        lock: AbstractContextManager[object],
        loss: Loss,
        is_clear: Callable[[], bool],
        report: Callable[[BaseException], str],
        go_on: Callable[[], None],
    ) -> None:
        """`is_clear` says that nothing is under way; `report` takes errors; `go_on` is called when work has ended."""
        self.is_running = False
        self._waiting: deque[Work] = deque()
        self._device = device
        self._lock = lock
        self._loss = loss
        self._is_clear = is_clear
        self._report = report
        self._go_on = go_on

    def add(self, work: Work) -> None:
        with self._lock:
            self._waiting.append(work)
            if self._loss.reason:
                self.start()

    def start(self) -> bool:
        """Begin the next, once nothing is under way; returns whether others may go on. With the lock held."""
        if not self._waiting:
            return True
        if self._is_clear() and not self.is_running:
            work = self._waiting.popleft()
            self.is_running = True
            self._device.post(lambda: self._run(work))
        return False

    def _run(self, work: Work) -> None:
        try:
            if not self._loss.reason:
                self._try(self._device.synchronize)
            self._try(work)  # in any case: somebody may wait for it
        finally:
            with self._lock:
                self.is_running = False
                if self._loss.reason:
                    self.start()
        self._go_on()

    def _try(self, work: Work) -> None:
        try:
            work()
        except Exception as error:
            if not self._report(error):
                _log.exception("device %s: what was to run alone failed", self._device.name)
