"""Client-registered system shared memory (POSIX), and the refusal of CUDA's.

Off unless allowed: whoever may register a region can read and write that region of this machine through the server.
Regions are read and written with pread and pwrite, never mapped: a client that truncates its segment while the server
reads it gets an error, not a crash of the server.
"""

import os
import re
import stat
import threading
from dataclasses import dataclass

from tutti.errors import AlreadyExists, InvalidArgument, NotFound, Unsupported
from tutti.types import Raw, SharedRegion

_KEY = re.compile(r"/?[A-Za-z0-9_][A-Za-z0-9_.-]{0,250}")
_NAME = re.compile(r"[^\x00-\x1f\x7f]{1,255}")
# Segments that servers and runtimes keep for themselves.
_RESERVED = ("triton_python_backend_shm", "psm_", "sem.", "plasma", "ray_", "torch_", "nccl")
# Each holds a file descriptor.
_MAX_REGIONS = 256


@dataclass(frozen=True, slots=True)
class Registered:
    """A registered region; offsets and sizes in bytes."""

    name: str
    key: str
    offset: int
    byte_size: int
    descriptor: int


class SharedMemory:
    """The regions that clients have registered. Thread-safe."""

    def __init__(self, is_allowed: bool = False) -> None:
        self.is_allowed = is_allowed
        self._lock = threading.Lock()
        self._regions: dict[str, Registered] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Open a POSIX segment. Raises InvalidArgument with the reason, Unsupported where clients may not."""
        if not self.is_allowed:
            raise Unsupported("system shared memory is off: start the server with --allow-client-shm")
        if not _NAME.fullmatch(name):
            raise InvalidArgument(f"shared memory region {name[:100]!r}: expected a name of 1 to 255 characters")
        bare = key.removeprefix("/")
        if not _KEY.fullmatch(key) or bare.startswith(_RESERVED):
            raise InvalidArgument(f"shared memory region '{name}': key {key[:100]!r} is not allowed")
        if offset < 0 or byte_size < 1:
            raise InvalidArgument(
                f"shared memory region '{name}': expected an offset of 0 or more and a byte_size of 1 or more, "
                f"got {offset} and {byte_size}"
            )
        descriptor = self._open(name, key)
        try:
            size = os.fstat(descriptor).st_size
            if offset + byte_size > size:
                raise InvalidArgument(
                    f"failed to register shared memory region '{name}': invalid args: bytes {offset} to "
                    f"{offset + byte_size} are outside of '{key}', which has {size}"
                )
            with self._lock:
                if name in self._regions:
                    raise AlreadyExists(f"shared memory region '{name}' already in manager")
                if len(self._regions) >= _MAX_REGIONS:
                    raise InvalidArgument(f"at most {_MAX_REGIONS} shared memory regions can be registered")
                self._regions[name] = Registered(name, key, offset, byte_size, descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def unregister(self, name: str = "") -> None:
        """Forget one region, or all. One that is not there is no error."""
        with self._lock:
            names = [name] if name else list(self._regions)
            for one in names:
                region = self._regions.pop(one, None)
                if region is not None:
                    os.close(region.descriptor)

    def status(self, name: str = "") -> list[Registered]:
        """One region, or all. Raises NotFound for one that is not there."""
        with self._lock:
            if not name:
                return [self._regions[one] for one in sorted(self._regions)]
            return [self._get(name)]

    def read(self, region: SharedRegion) -> bytes:
        """A copy of the bytes. Raises NotFound, or InvalidArgument when they are not all inside the region."""
        with self._lock:  # a descriptor must not be closed, and its number reused, meanwhile
            registered = self._inside(region)
            parts = []
            at, end = registered.offset + region.offset, registered.offset + region.offset + region.byte_size
            while at < end:
                part = os.pread(registered.descriptor, end - at, at)
                if not part:
                    raise InvalidArgument(f"shared memory region '{region.name}': its segment has become too short")
                parts.append(part)
                at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def check(self, region: SharedRegion) -> None:
        """Raises NotFound, or InvalidArgument when it is not all inside the registered region."""
        with self._lock:
            self._inside(region)

    def write(self, region: SharedRegion, data: Raw) -> None:
        """Put `data` at the region's start; it has `byte_size` bytes at most."""
        with self._lock:
            registered = self._inside(region)
            at = registered.offset + region.offset
            if at + len(data) > os.fstat(registered.descriptor).st_size:
                raise InvalidArgument(f"shared memory region '{region.name}': its segment has become too short")
            view = memoryview(data)
            while view:
                written = os.pwrite(registered.descriptor, view, at)
                view = view[written:]
                at += written

    def close(self) -> None:
        self.unregister()

    def _open(self, name: str, key: str) -> int:
        try:
            import _posixshmem

            descriptor: int = _posixshmem.shm_open("/" + key.removeprefix("/"), os.O_RDWR, mode=0o600)
        except (ImportError, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InvalidArgument(f"Unable to open shared memory region: '{key}' for '{name}': {reason}") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise InvalidArgument(f"shared memory region '{name}': '{key}' is no shared memory segment")
        return descriptor

    def _get(self, name: str) -> Registered:
        region = self._regions.get(name)
        if region is None:
            raise NotFound(f"Unable to find system shared memory region: '{name}'")
        return region

    def _inside(self, region: SharedRegion) -> Registered:
        if not self.is_allowed:
            raise Unsupported("system shared memory is off: start the server with --allow-client-shm")
        registered = self._regions.get(region.name)
        if registered is None:
            raise NotFound(f"Unable to find shared memory region: '{region.name}'")
        if region.offset < 0 or region.byte_size < 0 or region.offset + region.byte_size > registered.byte_size:
            raise InvalidArgument(
                f"Invalid offset + byte size for shared memory region: '{region.name}': bytes {region.offset} to "
                f"{region.offset + region.byte_size} of {registered.byte_size}"
            )
        return registered


def refuse_cuda() -> None:
    """Raises Unsupported: no CUDA memory of a client's can be opened here."""
    raise Unsupported("CUDA shared memory is not supported: this server keeps its tensors in host memory")
