"""Where the bytes of clients' shared memory are: POSIX segments, and other processes' memory on a device.

Segments are read and written with pread and pwrite, never mapped: a client that truncates its segment while the server
reads it gets an error, not a crash of the server. Knows nothing of who may use a region, or when.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tutti.core.errors import InferError, InvalidArgument
from tutti.core.types import Raw
from tutti.devices.ipc import ForeignMemory, Ipc


class Storage(Protocol):
    """Where a region's bytes are. Offsets are the region's, checked by the caller. `memory` is None on the host."""

    @property
    def memory(self) -> ForeignMemory | None: ...

    def read(self, offset: int, size: int) -> bytes | bytearray: ...

    def write(self, offset: int, data: Raw) -> None: ...

    def close(self) -> None: ...


class Segment:
    """A POSIX segment from an offset on."""

    memory: None = None

    def __init__(self, name: str, key: str, offset: int) -> None:
        """Raises InvalidArgument with the reason."""
        self._name = name
        self._offset = offset
        try:
            import _posixshmem

            self._descriptor: int = _posixshmem.shm_open("/" + key.removeprefix("/"), os.O_RDWR, mode=0o600)
        except (ImportError, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InvalidArgument(f"Unable to open shared memory region: '{key}' for '{name}': {reason}") from None
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            self.close()
            raise InvalidArgument(f"shared memory region '{name}': '{key}' is no shared memory segment")

    def size(self) -> int:
        """Bytes of the whole segment, as it is now."""
        return os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        parts = []
        position = self._offset + offset
        end = position + size
        while position < end:
            part = os.pread(self._descriptor, end - position, position)
            if not part:
                raise self._too_short()
            parts.append(part)
            position += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, offset: int, data: Raw) -> None:
        position = self._offset + offset
        if position + len(data) > self.size():
            raise self._too_short()
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view, position)
            view = view[written:]
            position += written

    def close(self) -> None:
        os.close(self._descriptor)

    def _too_short(self) -> InvalidArgument:
        return InvalidArgument(f"shared memory region '{self._name}': its segment has become too short")


class Allocation:
    """An allocation of another process on a device."""

    def __init__(self, name: str, devices: Ipc, memory: ForeignMemory) -> None:
        self.memory = memory
        self._name = name
        self._devices = devices

    def read(self, offset: int, size: int) -> bytearray:
        with self._named():
            return self._devices.read(self.memory, offset, size)

    def write(self, offset: int, data: Raw) -> None:
        with self._named():
            self._devices.write(self.memory, offset, data)

    def close(self) -> None:
        with self._named():
            self._devices.close(self.memory)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except InferError as error:
            raise type(error)(f"shared memory region '{self._name}': {error.message}") from None
