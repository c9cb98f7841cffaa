"""What a device begins next: grants turns, a little ahead, and has their batches launched.

Whatever changes what may be next says `grant`: a batch that was staged, an execution that has ended, work that was
alone. From any thread.
"""

from collections.abc import Set
from contextlib import AbstractContextManager
from typing import Protocol

from tutti.devices.exclusive import Exclusive
from tutti.devices.executions import Executions
from tutti.devices.hang_watch import HangWatch
from tutti.devices.interface import Device
from tutti.devices.loss import Loss
from tutti.devices.offers import Offers
from tutti.devices.pipeline import Batch, Execution, Turn
from tutti.devices.timing import Timing


class Launcher(Protocol):
    """The engine: it launches what is granted, and is told of errors."""

    def launch(self, batch: Batch) -> None: ...
    def report(self, error: BaseException) -> str: ...
    def lose(self, reason: str) -> None: ...
    def lose_by(self, error: Exception) -> None: ...


class Granting:
    """Of one device. `lock` is the engine's; `leaving` are batches whose outputs are being copied."""

    def __init__(
        self,
        device: Device,
        lock: AbstractContextManager[object],
        loss: Loss,
        executions: Executions,
        leaving: Set[Batch],
        timing: Timing,
        offers: Offers,
        launcher: Launcher,
    ) -> None:
        self.exclusive = Exclusive(device, lock, loss, self._is_clear, launcher.report, self.grant)
        self._watch = HangWatch(device, lock, loss, executions.granted, launcher.lose)
        self._device = device
        self._lock = lock
        self._loss = loss
        self._executions = executions
        self._leaving = leaving
        self._timing = timing
        self._offers = offers
        self._launcher = launcher
        # When an alarm is to look again; 0 for none.
        self._alarm_ns = 0

    def grant(self) -> None:
        """Launch what may be launched, and let pipelines take other batches."""
        self.grant_turns()
        self._offers.offer_all()

    def grant_turns(self) -> int:
        """Returns how many batches are launched next."""
        batches = 0
        try:
            with self._lock:
                while (execution := self._next()) is not None:
                    self._executions.grant(execution, self._device.now_ns(), self._timing.copies_end_ns)
                    if isinstance(execution, Turn):
                        execution.granted.set()
                    elif isinstance(execution, Batch):
                        batches += 1
                        self._device.post(lambda batch=execution: self._launcher.launch(batch))  # type: ignore[misc]
        except Exception as error:  # events of a device that is lost say so
            self._launcher.lose_by(error)
        self._watch.begin()
        return batches

    def _next(self) -> Execution | None:
        if self._loss.reason or self.exclusive.is_running or not self.exclusive.start():
            return None
        is_shared = self._executions.are_shared(self._offers.pipelines)
        decision = self._executions.next(self._device.now_ns(), is_shared)
        if not isinstance(decision, int):
            return decision
        if decision and (not self._alarm_ns or decision < self._alarm_ns):
            self._alarm_ns = decision
            self._device.alarm(decision - self._device.now_ns(), self._grant_at_last)
        return None

    def _grant_at_last(self) -> None:
        with self._lock:
            self._alarm_ns = 0
        self.grant()

    def _is_clear(self) -> bool:
        return not self._executions.granted and not self._leaving
