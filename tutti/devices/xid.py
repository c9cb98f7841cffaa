"""Xids: what the driver reports of a GPU's critical errors, seen from outside of CUDA.

A GPU that fails may never answer the calls that wait for it; NVML tells of it all the same.
"""

import ctypes
import logging
import threading
from collections.abc import Callable
from typing import Any

from tutti.devices.nvml import Gpu, Nvml, nvml

_log = logging.getLogger(__name__)

# What they report was executed by some process, maybe another one: a faulty kernel, a page fault, a hang, a clean-up.
# The process that is to blame hears of it from its own calls of CUDA. (Of NVIDIA's catalogue of Xids.)
APPLICATION_XIDS = frozenset({13, 31, 43, 45, 68, 109})
# "GPU has fallen off the bus".
LOST_XID = 79
_WAIT_MS = 500

Listener = Callable[[str, int], None]
"""`listener(device, xid)`, the device as "cuda:0", from the watcher's thread. Must not raise."""


def is_of_device(xid: int) -> bool:
    """Whether the GPU itself has failed, and not only what some process executed on it."""
    return xid not in APPLICATION_XIDS


def watch_xid(listener: Listener, source: Nvml = nvml) -> Callable[[], None]:
    """Tell `listener` of each critical Xid of this process's GPUs, in a thread; returns what ends that.

    Where no GPU can be watched nothing is started. When one is lost, which NVML cannot watch any longer, all that are
    lost are reported with LOST_XID, and the watch ends.
    """
    watch = _Watch(listener, source)
    watch.start()
    return watch.close


class _Watch:
    def __init__(self, listener: Listener, source: Nvml) -> None:
        self._listener = listener
        self._source = source
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="xid", daemon=True)
        self._events: Any = None
        self._gpus: list[Gpu] = []

    def start(self) -> None:
        gpus = self._source.gpus()
        self._events = self._source.read("nvmlEventSetCreate") if gpus else None
        if self._events is None:
            return
        self._gpus = [gpu for gpu in gpus if self._register(gpu)]
        if self._gpus:
            self._thread.start()
        else:
            self._source.read("nvmlEventSetFree", self._events)

    def close(self) -> None:
        self._is_closing.set()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _register(self, gpu: Gpu) -> bool:
        library = self._source.library
        try:
            library.nvmlDeviceRegisterEvents(gpu.handle, library.nvmlEventTypeXidCriticalError, self._events)
        except library.NVMLError as error:
            _log.debug("%s: its Xids are not watched: %s", gpu.device, error)
            return False
        return True

    def _run(self) -> None:
        while not self._is_closing.is_set() and self._wait():
            pass
        self._source.read("nvmlEventSetFree", self._events)

    def _wait(self) -> bool:
        """Report the next Xid, if one comes in time; False when no more can come."""
        library = self._source.library
        try:
            event = library.nvmlEventSetWait_v2(self._events, _WAIT_MS)
        except library.NVMLError as error:
            if error.value == library.NVML_ERROR_TIMEOUT:
                return True
            _log.warning("Xids are watched no longer: %s", error)
            self._report_lost()
            return False
        address = _address(event.device)
        for gpu in self._gpus:
            if _address(gpu.handle) == address:
                self._listener(gpu.device, int(event.eventData))
        return True

    def _report_lost(self) -> None:
        library = self._source.library
        for gpu in self._gpus:
            try:
                library.nvmlDeviceGetMemoryInfo(gpu.handle)
            except library.NVMLError as error:
                if error.value == library.NVML_ERROR_GPU_IS_LOST:
                    self._listener(gpu.device, LOST_XID)


def _address(handle: Any) -> int | None:
    """Handles are pointers, which ctypes compares by the Python objects around them."""
    return ctypes.cast(handle, ctypes.c_void_p).value
