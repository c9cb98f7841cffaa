"""A stand-in for the module pynvml: cards that are described by the test, and errors where it says so."""

import ctypes
import queue
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

NOT_SUPPORTED, NOT_FOUND, LIBRARY_NOT_FOUND, TIMEOUT, GPU_IS_LOST = 3, 6, 12, 10, 15


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


@dataclass
class Card:
    """One GPU. Functions named in `lacks` answer with an error, of `lost` all that ask the card."""

    uuid: str
    name: str = "NVIDIA H100 80GB HBM3"
    total: int = 80 << 30
    used: int = 3 << 30
    busy_percent: int = 40
    power_mw: int = 350_500
    limit_mw: int = 700_000
    energy_mj: int = 5_000_000
    lacks: set[str] = field(default_factory=set)
    is_lost: bool = False
    reads: int = 0


class FakeNvml:
    NVMLError = NVMLError
    NVML_ERROR_TIMEOUT = TIMEOUT
    NVML_ERROR_GPU_IS_LOST = GPU_IS_LOST
    nvmlEventTypeXidCriticalError = 8  # noqa: N815

    def __init__(self, *cards: Card, mig: dict[str, Card] | None = None, has_driver: bool = True) -> None:
        self.cards = list(cards)
        self.mig = mig or {}
        self.has_driver = has_driver
        self.initialized = 0
        self.watched: list[int] = []
        self.events: queue.Queue[Any] = queue.Queue()
        self.freed = 0

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.has_driver:
            raise NVMLError(LIBRARY_NOT_FOUND)
        self.initialized += 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:  # noqa: N802
        self._card(_handle(index), "nvmlDeviceGetHandleByIndex")
        return _handle(index)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:  # noqa: N802
        if uuid not in self.mig:
            raise NVMLError(NOT_FOUND)
        return _handle(100 + list(self.mig).index(uuid))

    def nvmlDeviceGetUUID(self, handle: Any) -> str:  # noqa: N802
        return self._card(handle, "nvmlDeviceGetUUID").uuid

    def nvmlDeviceGetName(self, handle: Any) -> str:  # noqa: N802
        return self._card(handle, "nvmlDeviceGetName").name

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:  # noqa: N802
        card = self._card(handle, "nvmlDeviceGetMemoryInfo")
        return SimpleNamespace(total=card.total, used=card.used, free=card.total - card.used)

    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any:  # noqa: N802
        card = self._card(handle, "nvmlDeviceGetUtilizationRates")
        card.reads += 1
        return SimpleNamespace(gpu=card.busy_percent, memory=1)

    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int:  # noqa: N802
        return self._card(handle, "nvmlDeviceGetPowerUsage").power_mw

    def nvmlDeviceGetPowerManagementLimit(self, handle: Any) -> int:  # noqa: N802
        return self._card(handle, "nvmlDeviceGetPowerManagementLimit").limit_mw

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:  # noqa: N802
        return self._card(handle, "nvmlDeviceGetTotalEnergyConsumption").energy_mj

    def nvmlEventSetCreate(self) -> Any:  # noqa: N802
        return object()

    def nvmlDeviceRegisterEvents(self, handle: Any, types: int, events: Any) -> None:  # noqa: N802
        self._card(handle, "nvmlDeviceRegisterEvents")
        assert types == self.nvmlEventTypeXidCriticalError
        self.watched.append(_index(handle))

    def nvmlEventSetWait_v2(self, events: Any, timeout_ms: int) -> Any:  # noqa: N802
        try:
            event = self.events.get(timeout=timeout_ms / 1000)
        except queue.Empty:
            raise NVMLError(TIMEOUT) from None
        if isinstance(event, NVMLError):
            raise event
        return event

    def nvmlEventSetFree(self, events: Any) -> None:  # noqa: N802
        self.freed += 1

    def report(self, index: int, xid: int) -> None:
        """As the driver does, with a handle of its own for the same GPU."""
        self.events.put(SimpleNamespace(device=_handle(index), eventType=8, eventData=xid))

    def _card(self, handle: Any, function: str) -> Card:
        index = _index(handle)
        card = self.cards[index] if index < 100 else list(self.mig.values())[index - 100]
        if card.is_lost:
            raise NVMLError(GPU_IS_LOST)
        if function in card.lacks:
            raise NVMLError(NOT_SUPPORTED)
        return card


def _handle(index: int) -> Any:
    """A pointer, as NVML's handles are: two of the same GPU are not equal for Python."""
    return ctypes.c_void_p(0x1000 + index)


def _index(handle: Any) -> int:
    return int(handle.value) - 0x1000
