"""NVML: which GPUs this process sees, with CUDA's numbers.

NVML knows every GPU of the machine, in the order of the PCI bus; CUDA shows a process those that CUDA_VISIBLE_DEVICES
names, in its order. Without nvidia-ml-py, or without a driver, there are none, and that is no error.
"""

import ctypes
import importlib
import logging
import os
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tutti.devices.simulated import simulated_gpus

_log = logging.getLogger(__name__)

_NUMBER = re.compile(r"[+-]?\d+")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU by CUDA's number. `handle` is NVML's."""

    number: int
    uuid: str
    name: str
    memory_bytes: int
    handle: Any = field(repr=False, compare=False)

    @property
    def device(self) -> str:
        """As the rest of the server calls it: "cuda:0"."""
        return f"cuda:{self.number}"


def selected(visible: str | None, uuids: Sequence[str]) -> list[str]:
    """The UUIDs of the GPUs that CUDA shows, in its order, for a value of CUDA_VISIBLE_DEVICES; None where it is unset.

    `uuids` are the machine's GPUs in the order of the PCI bus. By CUDA's rules an entry is an index, the beginning of a
    UUID that is only one GPU's, or a MIG device's UUID. What follows an entry that is none of these is ignored, and
    where an entry repeats another there are no GPUs.
    """
    if visible is None:
        return list(uuids)
    shown: list[str] = []
    for entry in visible.split(","):
        uuid = _uuid(entry.strip(), uuids)
        if not uuid:
            break
        if uuid in shown:
            return []
        shown.append(uuid)
    return shown


def _uuid(entry: str, uuids: Sequence[str]) -> str:
    """The UUID that an entry means; "" for an entry that means none."""
    if entry.startswith("MIG-"):
        return entry
    if entry.startswith("GPU-"):
        alike = [uuid for uuid in uuids if uuid.startswith(entry)]
        return alike[0] if len(alike) == 1 else ""
    digits = _NUMBER.match(entry)  # CUDA reads it as C does: what follows the digits is ignored
    index = int(digits[0]) if digits else -1
    return uuids[index] if 0 <= index < len(uuids) else ""


class Nvml:
    """NVML in one process, initialized when it is first needed. Thread-safe."""

    def __init__(
        self, library: Any = None, environment: Mapping[str, str] = os.environ, driver: str = "libcuda.so.1"
    ) -> None:
        """`library` stands in for the module pynvml; `driver` is the library without which there is no CUDA."""
        self._library = library
        self._environment = environment
        self._driver = driver
        self._lock = threading.Lock()
        self._is_asked = False
        self._is_open = False
        self._has_warned = False

    def is_open(self) -> bool:
        """Whether there is a library and a driver to ask. The first call may take a second."""
        with self._lock:
            if not self._is_asked:
                self._is_asked = True
                self._is_open = self._opens()
            return self._is_open

    @property
    def library(self) -> Any:
        """The module pynvml, where it is open."""
        return self._library

    def read(self, function: str, *arguments: Any) -> Any:
        """What a function of pynvml gives; None where NVML answers with an error: not every card knows every value."""
        try:
            return getattr(self._library, function)(*arguments)
        except self._library.NVMLError:
            return None

    def gpus(self) -> tuple[Gpu, ...]:
        """The GPUs of this process, in CUDA's order.

        That is the order of the PCI bus with CUDA_DEVICE_ORDER=PCI_BUS_ID, and for equal cards. CUDA's default puts the
        fastest first, which NVML cannot tell of unequal cards: a warning says so, once.
        """
        if not self.is_open():
            return ()
        handles = self._handles()
        visible = self._environment.get("CUDA_VISIBLE_DEVICES")
        self._check_order(visible, handles.values())
        shown = [(uuid, handles.get(uuid) or self._mig_device(uuid)) for uuid in selected(visible, list(handles))]
        known = [(uuid, handle) for uuid, handle in shown if handle is not None]
        return tuple(self._gpu(number, uuid, handle) for number, (uuid, handle) in enumerate(known))

    def may_have_gpus(self) -> bool:
        """False where it is certain that this process sees no GPU."""
        if self.is_open():
            return bool(self.gpus())
        visible = self._environment.get("CUDA_VISIBLE_DEVICES")
        if visible is not None and (not visible.strip() or visible.strip().startswith("-")):
            return False
        try:
            ctypes.CDLL(self._driver)
        except OSError:
            return False
        return True

    def _opens(self) -> bool:
        try:
            if self._library is None:
                import pynvml

                self._library = pynvml
            self._library.nvmlInit()
        except Exception as error:  # no library, no driver, another version of it: there is nothing to read
            _log.debug("no GPUs are read through NVML: %s: %s", type(error).__name__, error)
            return False
        return True

    def _handles(self) -> dict[str, Any]:
        """Every GPU of the machine by its UUID, in the order of the PCI bus. A GPU that does not answer is left out."""
        count = self.read("nvmlDeviceGetCount") or 0
        handles = [self.read("nvmlDeviceGetHandleByIndex", index) for index in range(count)]
        answering = [handle for handle in handles if handle is not None]
        return {uuid: handle for handle in answering if (uuid := self.read("nvmlDeviceGetUUID", handle))}

    def _mig_device(self, uuid: str) -> Any:
        """A part of a GPU, which has a UUID and no index; None where the driver does not know it."""
        return self.read("nvmlDeviceGetHandleByUUID", uuid)

    def _gpu(self, number: int, uuid: str, handle: Any) -> Gpu:
        memory = self.read("nvmlDeviceGetMemoryInfo", handle)
        name = self.read("nvmlDeviceGetName", handle) or ""
        return Gpu(number, uuid, name, memory.total if memory is not None else 0, handle)

    def _check_order(self, visible: str | None, handles: Any) -> None:
        by_uuid = visible is not None and all(entry.strip()[:4] in ("GPU-", "MIG-") for entry in visible.split(","))
        if self._has_warned or by_uuid or self._environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
            return
        if len({self.read("nvmlDeviceGetName", handle) for handle in handles}) > 1:
            self._has_warned = True
            _log.warning("the GPUs are not alike: set CUDA_DEVICE_ORDER=PCI_BUS_ID, or their numbers may be others'")


# The driver is opened once for the process, and so is this.
nvml = Nvml()


def visible_gpus() -> tuple[Gpu, ...]:
    """The GPUs of this process, in CUDA's order."""
    return nvml.gpus()


def gpu_count(source: Nvml = nvml) -> int:
    """How many GPUs this process sees: as NVML says, or without it PyTorch, where that is imported; else 0.

    Simulated ones take their place.
    """
    if simulated_gpus():
        return simulated_gpus()
    if source.is_open():
        return len(source.gpus())
    if "torch" not in sys.modules:
        return 0
    count: int = importlib.import_module("torch").cuda.device_count()  # waits for an import that is under way
    return count
