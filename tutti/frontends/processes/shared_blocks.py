"""Memory that one process fills and another reads: large tensors stay where they were received.

An arena belongs to one link and lives as long as it does, so what a lost peer may still read is never written again. A
block of it is used anew once its last view here has gone, and the peer has given it back as often as it was lent. Files
are sealed: nobody can truncate what another process has mapped. Knows nothing of messages.
"""

import fcntl
import mmap
import os
import socket
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from tutti.core.dtypes import Array
from tutti.core.types import Raw

# Larger tensors go through a block; copies of smaller ones cost less than accounting for a block.
LARGE_BYTES = 64 * 1024
# Touched memory stays with the arena, so this is what a link may take, each way.
ARENA_BYTES = 128 * 1024 * 1024
_SMALLEST = 64 * 1024
# The largest block: one must not keep out all others.
_SHARE = 4
_HELLO = struct.Struct("<Q")

# Where bytes lie in their arena: the block, by its offset, and where they begin, also from the arena's start.
Place = tuple[int, int]
EndLease = Callable[[int], None]
"""`end(block)`, when the last view has gone: in any thread, at any moment, so it must take no lock."""


class Buddies:
    """Which stretches of `size` bytes are free. Stretches are powers of two; neighbours join again. Pure."""

    def __init__(self, size: int, smallest: int = _SMALLEST) -> None:
        self._size = size
        self._smallest = smallest
        self._free: dict[int, set[int]] = {size: {0}}
        self._taken: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._taken)

    def take(self, size: int) -> int | None:
        """The offset of a stretch of `size` bytes or more; None when there is none. Low ones go first."""
        wanted = max(self._smallest, 1 << (size - 1).bit_length())
        have = wanted
        while not self._free.get(have):
            have *= 2
            if have > self._size:
                return None
        offset = min(self._free[have])
        self._free[have].remove(offset)
        while have > wanted:
            have //= 2
            self._free.setdefault(have, set()).add(offset + have)
        self._taken[offset] = wanted
        return offset

    def give(self, offset: int) -> None:
        """The stretch that began at `offset` is free again."""
        size = self._taken.pop(offset)
        while size < self._size and offset ^ size in self._free.get(size, ()):
            self._free[size].remove(offset ^ size)
            offset &= ~size
            size *= 2
        self._free.setdefault(size, set()).add(offset)


class Arena:
    """The blocks of this process. Thread-safe."""

    def __init__(self, size: int = ARENA_BYTES) -> None:
        """`size` is a power of two. Raises OSError where the system has no such memory."""
        self.size = size
        self.file = os.memfd_create("tutti-blocks", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.file, size)
            fcntl.fcntl(self.file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._memory: Any = np.frombuffer(mmap.mmap(self.file, size), np.uint8)
        except BaseException:
            os.close(self.file)
            raise
        self._address = _address(self._memory)
        self._buddies = Buddies(size)
        self._uses: dict[int, int] = {}
        self._ended: deque[int] = deque()
        self._lock = threading.Lock()

    def take(self, size: int) -> memoryview | None:
        """`size` bytes of any content, for as long as a view of them lives; None when there is no such block."""
        if not 0 < size <= self.size // _SHARE:
            return None
        with self._lock:
            self._collect()
            block = self._buddies.take(size)
            if block is None:
                return None
            self._uses[block] = 1
        return _leased(self, self._memory[block : block + size], block)

    def lend(self, raw: Raw) -> Place | None:
        """Let the peer read these bytes, copied if they are in no block yet, until it gives the block back.

        None when no block is free.
        """
        view = memoryview(raw)
        block = self._block_of(view)
        if block is None:
            copy = self.take(len(raw))
            if copy is None:
                return None
            # numpy lets go of the interpreter's lock while it copies.
            np.copyto(np.frombuffer(copy, np.uint8), np.frombuffer(raw, np.uint8))
            view = copy
            block = self._block_of(view)
            assert block is not None
        with self._lock:
            self._uses[block] += 1
        return block, _address(np.frombuffer(view, np.uint8)) - self._address

    def given_back(self, blocks: Iterable[int]) -> None:
        """The peer has given these blocks back."""
        self._ended.extend(blocks)

    def in_use(self) -> int:
        """How many blocks are not free."""
        with self._lock:
            self._collect()
            return len(self._buddies)

    def close_file(self) -> None:
        """Close the file once the peer has it: this process needs only the mapping."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def _block_of(self, view: memoryview) -> int | None:
        """The block that the view is of, if it is one of this arena's."""
        lease = view.obj.base if isinstance(view.obj, np.ndarray) else None
        return lease.block if isinstance(lease, _Lease) and lease.owner is self else None

    def end(self, block: int) -> None:
        """A view has gone: in any thread, at any moment, so this takes no lock."""
        self._ended.append(block)

    def _collect(self) -> None:
        while self._ended:
            block = self._ended.popleft()
            self._uses[block] -= 1
            if not self._uses[block]:
                del self._uses[block]
                self._buddies.give(block)


class Borrowed:
    """A peer's arena, to be read."""

    def __init__(self, file: int, size: int, give_back: EndLease) -> None:
        """`give_back(block)` is called when the last view of what was lent has gone."""
        self._memory: Any = np.frombuffer(mmap.mmap(file, size, prot=mmap.PROT_READ), np.uint8)
        self.end = give_back

    def view(self, place: Place, size: int) -> memoryview:
        """The bytes at a place, once for each time they were lent."""
        block, offset = place
        return _leased(self, self._memory[offset : offset + size], block)


class _Lease:
    """Owns a use of a block: numpy keeps it as the base of every view, and it keeps the mapping."""

    def __init__(self, owner: Arena | Borrowed, memory: Array, block: int) -> None:
        self.owner = owner
        self.block = block
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        self.owner.end(self.block)


def _leased(owner: Arena | Borrowed, memory: Array, block: int) -> memoryview:
    view: Any = np.asarray(_Lease(owner, memory, block))
    return memoryview(view)


def _address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


def new_arena() -> Arena | None:
    """An arena, where the system can have one: elsewhere everything goes in band."""
    if sys.platform != "linux":
        return None
    try:
        return Arena()
    except OSError:
        return None


def send_arena(connection: socket.socket, arena: Arena | None) -> None:
    """Greet the peer, before anything else, and give it the arena. Raises OSError."""
    if arena is None:
        connection.sendall(_HELLO.pack(0))
        return
    socket.send_fds(connection, [_HELLO.pack(arena.size)], [arena.file])
    arena.close_file()


def receive_arena(connection: socket.socket, give_back: EndLease) -> Borrowed | None:
    """The peer's arena, from its greeting, which is there; None if it has none. Raises OSError when it has gone."""
    hello, files, _, _ = socket.recv_fds(connection, _HELLO.size, 1)
    try:
        if len(hello) != _HELLO.size:
            raise ConnectionError("the peer has gone")
        (size,) = _HELLO.unpack(hello)
        return Borrowed(files[0], size, give_back) if size else None
    finally:
        for file in files:
            os.close(file)
