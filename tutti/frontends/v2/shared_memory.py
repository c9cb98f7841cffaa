"""Client-registered shared memory: POSIX segments of this machine, and CUDA memory of other processes on it.

Both kinds are off unless allowed: whoever may register a region can read and write that memory through the server.
Names are one space over both kinds, and requests refer to a region by its name, whatever its kind. What is copied stays
open until the copy is done, also when it is unregistered meanwhile; unregistering waits for that, so that a client may
free its memory afterwards.
"""

import logging
import re
import threading
from dataclasses import dataclass
from typing import TypeVar

from tutti.core.errors import AlreadyExists, InferError, Internal, InvalidArgument, NotFound, Unavailable, Unsupported
from tutti.core.types import Raw, SharedRegion
from tutti.devices.ipc import HANDLE_BYTES, ForeignMemory, Ipc
from tutti.frontends.v2.shared_segments import Allocation, Segment, Storage

_log = logging.getLogger(__name__)

_KEY = re.compile(r"/?[A-Za-z0-9_][A-Za-z0-9_.-]{0,250}")
_NAME = re.compile(r"[^\x00-\x1f\x7f]{1,255}")
# Segments that servers and runtimes keep for themselves.
_RESERVED = ("triton_python_backend_shm", "psm_", "sem.", "plasma", "ray_", "torch_", "nccl")
# Each region holds a file descriptor, or a mapping on a device.
_MAX_REGIONS = 256
UNREGISTER_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class SystemRegion:
    """A registered POSIX segment, or a part of it; offset and size in bytes."""

    name: str
    key: str
    offset: int
    byte_size: int


@dataclass(frozen=True, slots=True)
class CudaRegion:
    """A registered CUDA allocation, from its base; bytes. `device_id` is numbered as the server sees its devices."""

    name: str
    device_id: int
    byte_size: int


Region = TypeVar("Region", SystemRegion, CudaRegion)
_KINDS = {SystemRegion: "system", CudaRegion: "CUDA"}


class _Entry:
    """A registered region with those who use it now. Forgotten ones are closed by their last user."""

    __slots__ = ("failure", "is_closed", "is_forgotten", "region", "storage", "users")

    def __init__(self, region: SystemRegion | CudaRegion, storage: Storage) -> None:
        self.region = region
        self.storage = storage
        self.users = 0
        self.is_forgotten = self.is_closed = False
        self.failure = ""


class Lease:
    """A stretch of a region, inside of it and open until `give_back`, which the end of a `with` calls too."""

    __slots__ = ("_entry", "_owner", "stretch")

    def __init__(self, owner: "SharedMemory", entry: _Entry, stretch: SharedRegion) -> None:
        self._owner = owner
        self._entry: _Entry | None = entry
        self.stretch = stretch

    @property
    def memory(self) -> ForeignMemory | None:
        """The device memory that the region is, from its base; None for a region in host memory."""
        assert self._entry is not None, "given back"
        return self._entry.storage.memory

    def give_back(self) -> None:
        """Let the region go. A second time is no error."""
        entry, self._entry = self._entry, None
        if entry is not None:
            self._owner._release(entry)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()


class SharedMemory:
    """The regions that clients have registered. Thread-safe."""

    def __init__(self, is_allowed: bool = False, devices: Ipc | None = None) -> None:
        """`is_allowed` is for system memory; CUDA's is allowed where there is something to open it with."""
        self.is_allowed = is_allowed
        self._devices = devices
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._regions: dict[str, _Entry] = {}

    @property
    def is_cuda_allowed(self) -> bool:
        return self._devices is not None

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Open a POSIX segment. Raises InvalidArgument with the reason, Unsupported where clients may not."""
        if not self.is_allowed:
            raise Unsupported("system shared memory is off: start the server with --allow-client-shm")
        bare = key.removeprefix("/")
        if not _KEY.fullmatch(key) or bare.startswith(_RESERVED):
            raise InvalidArgument(f"shared memory region '{name[:255]}': key {key[:100]!r} is not allowed")
        if offset < 0 or byte_size < 1:
            raise InvalidArgument(
                f"shared memory region '{name}': expected an offset of 0 or more and a byte_size of 1 or more, "
                f"got {offset} and {byte_size}"
            )
        self._check_new(name)
        storage = Segment(name, key, offset)
        size = storage.size()
        if offset + byte_size > size:
            storage.close()
            raise InvalidArgument(
                f"failed to register shared memory region '{name}': invalid args: bytes {offset} to "
                f"{offset + byte_size} are outside of '{key}', which has {size}"
            )
        self._add(_Entry(SystemRegion(name, key, offset, byte_size), storage))

    def register_cuda(self, name: str, raw_handle: bytes, device_id: int, byte_size: int) -> None:
        """Open an allocation of another process by its IPC handle; blocks while the device's context is made.

        Raises InvalidArgument with the reason, Unsupported where clients may not, or where something is missing here.
        """
        if self._devices is None:
            raise Unsupported(
                "CUDA shared memory is off: start the server with --allow-client-cuda-shm (not offered on Ray)"
            )
        if len(raw_handle) != HANDLE_BYTES:
            raise InvalidArgument(
                f"shared memory region '{name[:255]}': 'raw_handle' must be a valid base64 encoded cudaIpcMemHandle_t: "
                f"expected {HANDLE_BYTES} bytes, got {len(raw_handle)}"
            )
        if byte_size < 1:
            raise InvalidArgument(
                f"shared memory region '{name[:255]}': expected a byte_size of 1 or more, got {byte_size}"
            )
        self._check_new(name)
        try:
            storage = Allocation(name, self._devices, self._devices.open(raw_handle, device_id))
        except InferError as error:
            raise type(error)(f"failed to register shared memory region '{name}': {error.message}") from None
        if byte_size > storage.memory.size:
            storage.close()
            raise InvalidArgument(
                f"failed to register shared memory region '{name}': invalid args: byte_size {byte_size} is more than "
                f"its allocation has, which is {storage.memory.size}"
            )
        self._add(_Entry(CudaRegion(name, device_id, byte_size), storage))

    def unregister(self, name: str = "") -> None:
        """Forget one system region, or all. One that is not there is no error. Waits for copies to and from it."""
        self._forget(SystemRegion, name)

    def unregister_cuda(self, name: str = "") -> None:
        """As `unregister`, for CUDA's. Raises Unavailable when the server still uses it after UNREGISTER_TIMEOUT_S."""
        self._forget(CudaRegion, name)

    def status(self, name: str = "") -> list[SystemRegion]:
        """One system region, or all by name. Raises NotFound for one that is not there, or is CUDA's."""
        return self._status(SystemRegion, name)

    def cuda_status(self, name: str = "") -> list[CudaRegion]:
        """As `status`, for CUDA's."""
        return self._status(CudaRegion, name)

    def read(self, region: SharedRegion) -> bytes | bytearray:
        """A copy of the bytes. Raises NotFound, or InvalidArgument when they are not all inside the region."""
        entry = self._take(region)
        try:
            return entry.storage.read(region.offset, region.byte_size)
        finally:
            self._release(entry)

    def check(self, region: SharedRegion) -> None:
        """Raises NotFound, or InvalidArgument when it is not all inside the registered region."""
        with self._lock:
            self._inside(region)

    def write(self, region: SharedRegion, data: Raw) -> None:
        """Put `data` at the region's start. Raises as `check`, and InvalidArgument when it is too long."""
        entry = self._take(region)
        try:
            if len(data) > region.byte_size:
                place = f"the {region.byte_size} at {region.offset}"
                raise InvalidArgument(
                    f"shared memory region '{region.name}': {len(data)} bytes do not fit into {place}"
                )
            entry.storage.write(region.offset, data)
        finally:
            self._release(entry)

    def borrow(self, region: SharedRegion) -> Lease:
        """Keep a stretch open for whoever works in it, as on a device. Raises as `check`."""
        return Lease(self, self._take(region), region)

    def close(self) -> None:
        """Forget all. What cannot be closed is logged: the process ends."""
        for kind in _KINDS:
            try:
                self._forget(kind, "")
            except InferError as error:
                _log.warning("%s", error.message)

    def _take(self, stretch: SharedRegion) -> _Entry:
        """A region that stays open until `_release`."""
        with self._lock:
            entry = self._inside(stretch)
            entry.users += 1
        return entry

    def _inside(self, stretch: SharedRegion) -> _Entry:
        entry = self._regions.get(stretch.name)
        if entry is None and not self.is_allowed and not self.is_cuda_allowed:
            raise Unsupported("shared memory is off: start the server with --allow-client-shm")
        if entry is None:
            raise NotFound(f"Unable to find shared memory region: '{stretch.name}'")
        byte_size, end = entry.region.byte_size, stretch.offset + stretch.byte_size
        if stretch.offset < 0 or stretch.byte_size < 0 or end > byte_size:
            raise InvalidArgument(
                f"Invalid offset + byte size for shared memory region: '{stretch.name}': bytes {stretch.offset} to "
                f"{end} of {byte_size}"
            )
        return entry

    def _check_new(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise InvalidArgument(f"shared memory region {name[:100]!r}: expected a name of 1 to 255 characters")
        with self._lock:
            self._check_room(name)

    def _check_room(self, name: str) -> None:
        if name in self._regions:
            raise AlreadyExists(f"shared memory region '{name}' already in manager")
        if len(self._regions) >= _MAX_REGIONS:
            raise InvalidArgument(f"at most {_MAX_REGIONS} shared memory regions can be registered")

    def _add(self, entry: _Entry) -> None:
        """Keep an open region, or close it."""
        try:
            with self._lock:
                self._check_room(entry.region.name)  # another one may have come meanwhile
                self._regions[entry.region.name] = entry
        except InferError:
            entry.storage.close()
            raise

    def _status(self, kind: type[Region], name: str) -> list[Region]:
        with self._lock:
            known = {key: entry.region for key, entry in self._regions.items()}
        if not name:
            return [region for _, region in sorted(known.items()) if isinstance(region, kind)]
        region = known.get(name)
        if isinstance(region, kind):
            return [region]
        if region is None:
            raise NotFound(f"Unable to find {_KINDS[kind].lower()} shared memory region: '{name}'")
        raise NotFound(
            f"The region named '{name}' is registered as {_KINDS[type(region)]} shared memory, "
            f"not {_KINDS[kind]} shared memory"
        )

    def _forget(self, kind: type, name: str) -> None:
        with self._changed:
            chosen = [self._regions.get(name)] if name else list(self._regions.values())
            entries = [entry for entry in chosen if entry is not None and isinstance(entry.region, kind)]
            for entry in entries:
                del self._regions[entry.region.name]
                entry.is_forgotten = True
            unused = [entry for entry in entries if not entry.users]
        for entry in unused:
            self._close(entry)
        with self._changed:
            self._changed.wait_for(lambda: all(entry.is_closed for entry in entries), UNREGISTER_TIMEOUT_S)
            used = [entry.region.name for entry in entries if not entry.is_closed]
        if used:
            raise Unavailable(f"shared memory region '{used[0]}' is unregistered, but still in use: do not free it yet")
        failures = [entry.failure for entry in entries if entry.failure]
        if failures:
            raise Internal("; ".join(failures))

    def _release(self, entry: _Entry) -> None:
        with self._lock:
            entry.users -= 1
            is_last = entry.is_forgotten and not entry.users
        if is_last:
            self._close(entry)

    def _close(self, entry: _Entry) -> None:
        """Close a region that nobody can use any more."""
        try:
            entry.storage.close()
        except InferError as error:
            entry.failure = error.message
            _log.error("%s", error.message)
        finally:
            with self._changed:
                entry.is_closed = True
                self._changed.notify_all()
