"""Looks now and then whether the execution whose turn it is ends: one that does not has lost the device."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from tutti.devices.interface import Device
from tutti.devices.loss import Loss
from tutti.devices.pipeline import Execution

_INTERVAL_NS = 1_000_000_000


class HangWatch:
    """Of one device. `granted` are its executions, in the order of their turns; `lock` is the engine's."""

    def __init__(
        self,
        device: Device,
        lock: AbstractContextManager[object],
        loss: Loss,
        granted: Sequence[Execution],
        lose: Callable[[str], None],
    ) -> None:
        self._device = device
        self._lock = lock
        self._loss = loss
        self._granted = granted
        self._lose = lose
        self._is_watching = False

    def begin(self) -> None:
        """Look in a while, unless that is to be done already."""
        with self._lock:
            hang_ns = self._granted[0].pipeline.hang_ns if self._granted else 0
            if self._is_watching or not hang_ns or self._loss.reason:
                return
            self._is_watching = True
        self._device.alarm(min(_INTERVAL_NS, hang_ns), self._look)

    def _look(self) -> None:
        with self._lock:
            self._is_watching = False
            first = self._granted[0] if self._granted else None
            lasts_ns = self._device.now_ns() - first.turn_ns if first is not None else 0
        if first is not None and first.pipeline.hang_ns and lasts_ns >= first.pipeline.hang_ns:
            self._lose(f"an execution of '{first.pipeline.name}' has not ended after {lasts_ns / 1e9:.0f} s")
        self.begin()
