"""Memory that another process of this machine has on a device: opened by its IPC handle, read, written and closed.

A handle stands for a whole allocation, from its base. The process that made it cannot open it. Opening it twice gives
the same address and counts: each opening is closed once. Knows nothing of names, requests and protocols.
"""

import ctypes
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tutti.core import extras
from tutti.core.errors import Internal, InvalidArgument, Unavailable, Unsupported
from tutti.core.types import Raw

_log = logging.getLogger(__name__)

HANDLE_BYTES = 64


@dataclass(frozen=True, slots=True)
class ForeignMemory:
    """Another process's allocation in this one: `size` bytes at `address`, as the context of `device` sees them."""

    device: int
    address: int
    size: int


class Ipc(Protocol):
    """What opens other processes' memory. Thread-safe.

    Methods raise InferErrors that name the device and what failed; they do not check what the caller has to check.
    """

    def open(self, handle: bytes, device: int) -> ForeignMemory:
        """Map the allocation of a handle of HANDLE_BYTES bytes; `device` is numbered as this process sees them.

        Raises InvalidArgument for a device or a handle that is not there, Unsupported where there are no devices.
        """

    def read(self, memory: ForeignMemory, offset: int, size: int) -> bytearray:
        """A copy in host memory of bytes that are inside the allocation; complete on return."""

    def write(self, memory: ForeignMemory, offset: int, data: Raw) -> None:
        """Put the data where they fit inside the allocation; other processes see them on return."""

    def close(self, memory: ForeignMemory) -> None:
        """Undo one opening. Its owner may free the memory after the last one."""


# Codes of cuIpcOpenMemHandle that speak of the handle: no such one or freed, made by this process, of a device that
# this one does not reach, not mappable, or a kind of memory that has no handle. Any other code speaks of the device.
_OF_THE_HANDLE = {1, 101, 201, 205, 208, 217, 400, 711, 801}
_OUT_OF_MEMORY = 2


class _Failure(Exception):
    """A call of the driver's that did not succeed."""

    def __init__(self, call: str, code: Any) -> None:
        super().__init__(f"{call}: {code.name} ({int(code)})")
        self.code = int(code)


@dataclass(frozen=True, slots=True)
class _Device:
    """The primary context, which PyTorch and ONNX Runtime use too, and a stream that waits for nobody else's."""

    context: Any
    stream: Any


class CudaIpc:
    """CUDA's, over the driver's API. The bindings are imported, and contexts made, when the first handle is opened.

    A call leaves its thread's current device as it was, and does not spoil a graph that another thread captures.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._driver: Any = None
        self._devices: dict[int, _Device] = {}

    def open(self, handle: bytes, device: int) -> ForeignMemory:
        name = f"cuda:{device}"
        with _named(name), self._current(self._device(device)):
            try:
                address = int(
                    self._call("cuIpcOpenMemHandle", self._handle(handle), 1)
                )  # lazy peer access, the one flag
            except _Failure as failure:
                if failure.code not in _OF_THE_HANDLE:
                    raise
                raise InvalidArgument(
                    f"the handle cannot be opened on {name}: {failure}; expected one that another process of this "
                    "machine made, of memory that cudaMalloc gave it on that device and that is not freed"
                ) from None
            try:
                base, extent = self._call("cuMemGetAddressRange", address)
            except BaseException:
                self._call("cuIpcCloseMemHandle", address)
                raise
            return ForeignMemory(device, address, int(base) + int(extent) - address)

    def read(self, memory: ForeignMemory, offset: int, size: int) -> bytearray:
        assert 0 <= offset <= offset + size <= memory.size
        data = bytearray(size)
        if data:
            with self._stream(memory) as stream:
                self._call("cuMemcpyDtoHAsync", _address(data), memory.address + offset, size, stream)
                self._call("cuStreamSynchronize", stream)
        return data

    def write(self, memory: ForeignMemory, offset: int, data: Raw) -> None:
        assert 0 <= offset <= offset + len(data) <= memory.size
        if data:
            with self._stream(memory) as stream:
                self._call("cuMemcpyHtoDAsync", memory.address + offset, _address(data), len(data), stream)
                self._call("cuStreamSynchronize", stream)

    def close(self, memory: ForeignMemory) -> None:
        with self._stream(memory):
            self._call("cuIpcCloseMemHandle", memory.address)

    def _handle(self, handle: bytes) -> Any:
        struct = self._driver.CUipcMemHandle()  # its bytes are no attribute in every version
        ctypes.memmove(struct.getPtr(), handle, HANDLE_BYTES)
        return struct

    def _device(self, number: int) -> _Device:
        with self._lock:
            if self._driver is None:
                self._driver = _load()
            if number not in self._devices:
                count = self._call("cuDeviceGetCount")
                if not 0 <= number < count:
                    devices = f"{count} device{'s' if count > 1 else ''}"
                    expected = f"expected 0 to {count - 1}, this server sees {devices}"
                    raise InvalidArgument(f"device_id {number}: {expected}")
                self._devices[number] = self._begin(number)
            return self._devices[number]

    def _begin(self, number: int) -> _Device:
        device = self._call("cuDeviceGet", number)
        context = self._call("cuDevicePrimaryCtxRetain", device)
        try:
            with self._current(_Device(context, None)):
                stream = self._call("cuStreamCreate", int(self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        except BaseException:
            self._call("cuDevicePrimaryCtxRelease", device)
            raise
        return _Device(context, stream)

    @contextmanager
    def _stream(self, memory: ForeignMemory) -> Iterator[Any]:
        with _named(f"cuda:{memory.device}"):
            device = self._device(memory.device)
            with self._current(device):
                yield device.stream

    @contextmanager
    def _current(self, device: _Device) -> Iterator[None]:
        """Make the device's context this thread's, and other threads' captures none of its business."""
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuCtxPushCurrent", device.context)
        try:
            before = self._call("cuThreadExchangeStreamCaptureMode", mode)
            try:
                yield
            finally:
                self._call("cuThreadExchangeStreamCaptureMode", before)
        finally:
            self._call("cuCtxPopCurrent")

    def _call(self, function: str, *arguments: Any) -> Any:
        """What the driver's function returns besides its code. Raises _Failure for any code but success."""
        code, *results = getattr(self._driver, function)(*arguments)
        if int(code):
            raise _Failure(function, code)
        return results[0] if len(results) == 1 else results


@contextmanager
def _named(device: str) -> Iterator[None]:
    """Turn a failure that is no mistake of the caller's into an InferError that names the device."""
    try:
        yield
    except _Failure as failure:
        kind = Unavailable if failure.code == _OUT_OF_MEMORY else Internal
        raise kind(f"{device}: {failure}") from None


def _load() -> Any:
    """The driver's bindings, begun. Raises Unsupported with what is missing."""
    try:
        from cuda.bindings import driver
    except ImportError:
        raise Unsupported(f"the package cuda-bindings is missing: {extras.install('gpu')}") from None
    try:
        (code,) = driver.cuInit(0)
    except RuntimeError as error:  # the bindings look for the library at their first call
        _log.debug("no CUDA driver: %s", error)
        raise Unsupported("no NVIDIA driver (libcuda.so.1) is on this machine") from None
    if int(code):
        raise Unsupported(f"no CUDA device can be used: cuInit: {code.name} ({int(code)})")
    return driver


def _address(data: Raw) -> int:
    """Where the bytes are, for as long as the caller holds them; there must be some."""
    return int(np.frombuffer(data, np.uint8).ctypes.data)
