"""Pinned host memory in blocks that are used again: allocating it stops the whole driver for milliseconds.

Blocks have sizes of powers of two. What a batch made leaves as a view of the block itself, which is given back when
the last view has gone; a client that reads slowly could hold all of it so, hence a bound, beyond which answers are
copied into ordinary memory.
"""

import threading
from collections import deque

import numpy as np

from tutti.core.dtypes import Array
from tutti.devices.interface import Device, HostBlock

_SMALLEST = 4096
# Below this a copy costs less than keeping account of a view.
COPIED_BYTES = 64 * 1024


class Arena:
    """The pinned memory of one device. `take` and `close` in its submitting thread; `give` and `owned` from any."""

    def __init__(self, device: Device, owned_bytes: int) -> None:
        """At most `owned_bytes` are with answers at a time, and as much is kept for later."""
        self._device = device
        self._bound = owned_bytes
        self._free: dict[int, list[HostBlock]] = {}
        self._free_bytes = 0
        self._lock = threading.Lock()
        self._owned_bytes = 0
        # Appending to a deque needs no lock: the last view may go in any thread, at any moment.
        self._returned: deque[HostBlock] = deque()
        self._ended: deque[HostBlock] = deque()
        # All blocks that exist, bytes.
        self.bytes = 0

    def take(self, size: int) -> HostBlock:
        """A block of `size` bytes or more. Raises what the device raises when there is no memory."""
        self._collect()
        size = max(_SMALLEST, 1 << (size - 1).bit_length())
        blocks = self._free.get(size)
        if blocks:
            self._free_bytes -= size
            return blocks.pop()
        block = self._device.host_block(size)
        self.bytes += block.array.nbytes
        return block

    def give(self, block: HostBlock) -> None:
        """Nobody uses the block any more."""
        self._returned.append(block)

    def owned(self, block: HostBlock, size: int) -> Array:
        """The first `size` bytes, [size] UINT8, which stay valid as long as the array or a view of it lives."""
        if size <= COPIED_BYTES or not self._lend(block):
            copied = block.array[:size].copy()
            self.give(block)
            return copied
        return np.asarray(_Lease(self._ended, block))[:size]

    def owned_bytes(self) -> int:
        """Bytes of blocks that answers are views of."""
        with self._lock:
            self._end_leases()
            return self._owned_bytes

    def free_bytes(self) -> int:
        """Bytes of blocks that nobody uses. In the submitting thread."""
        self._collect()
        return self._free_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of blocks that somebody uses, or used until lately. From any thread, without waiting for one."""
        return max(0, self.bytes - self._free_bytes)

    def close(self) -> None:
        """Free all that nobody uses."""
        self._collect()
        for blocks in self._free.values():
            while blocks:
                self._drop(blocks.pop())
        self._free_bytes = 0

    def _lend(self, block: HostBlock) -> bool:
        """Count the block as an answer's, unless there are too many."""
        with self._lock:
            self._end_leases()
            if self._owned_bytes + block.array.nbytes > self._bound:
                return False
            self._owned_bytes += block.array.nbytes
        return True

    def _end_leases(self) -> None:
        while self._ended:
            block = self._ended.popleft()
            self._owned_bytes -= block.array.nbytes
            self._returned.append(block)

    def _collect(self) -> None:
        with self._lock:
            self._end_leases()
        while self._returned:
            block = self._returned.popleft()
            size = block.array.nbytes
            if self._free_bytes + size > self._bound:
                self._drop(block)
                continue
            self._free.setdefault(size, []).append(block)
            self._free_bytes += size

    def _drop(self, block: HostBlock) -> None:
        self.bytes -= block.array.nbytes
        self._device.free_host(block)


class _Lease:
    """Owns a block: numpy keeps it as the base of every view."""

    def __init__(self, ended: deque[HostBlock], block: HostBlock) -> None:
        self._ended = ended
        self._block = block
        self.__array_interface__ = block.array.__array_interface__

    def __del__(self) -> None:
        self._ended.append(self._block)
