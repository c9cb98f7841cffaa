"""Frames in and out of one connection: a few pickled values, and bytes that are not copied into them.

Knows nothing of what frames mean.
"""

import asyncio
import logging
import pickle
import struct
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from tutti.core.types import Raw

_log = logging.getLogger(__name__)

# The length of the values and that of the bytes.
_HEAD = struct.Struct("<QQ")
_RECEIVED_BYTES = 256 * 1024
# Larger pieces are written from where they are; smaller ones are joined first.
_OWN_PIECE_BYTES = 16 * 1024


class Frames(asyncio.BufferedProtocol):
    """One end of a connection. Lives on one event loop; `send` may be called from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._transport: asyncio.Transport | None = None
        # What was received lies from `_start` to `_end`; a frame that does not fit gets memory of its own.
        self._received = memoryview(bytearray(_RECEIVED_BYTES))
        self._start = self._end = 0
        self._large: memoryview | None = None
        self._large_end = 0
        self._outbox: deque[list[Raw]] = deque()
        self._is_waking = False

    def handle(self, values: Any, data: memoryview) -> None:
        """A frame has come. The bytes are its own."""
        raise NotImplementedError

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._received[self._end :] if self._large is None else self._large[self._large_end :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._large is None:
            self._end += nbytes
            self._take_frames()
            return
        self._large_end += nbytes
        if self._large_end == len(self._large):
            frame, self._large = self._large, None
            values_size, _ = _HEAD.unpack_from(frame)
            end = _HEAD.size + values_size
            self.handle(pickle.loads(frame[_HEAD.size : end]), frame[end:])

    def send(self, values: Any, pieces: Sequence[Raw] = ()) -> None:
        """From any thread. The pieces, one after the other, are the frame's bytes; they must not change."""
        frame = _frame(values, pieces)
        if threading.get_ident() == self._thread:
            self._write(frame)
            return
        self._outbox.append(frame)
        self.wake()

    def unsent_bytes(self) -> int:
        """How much the peer has not taken yet. From any thread."""
        waiting = sum(len(part) for frame in list(self._outbox) for part in frame)
        return waiting + (self._transport.get_write_buffer_size() if self._transport is not None else 0)

    def wake(self) -> None:
        """Have the loop call `woken` soon, once. From any thread, even while another object is being freed."""
        if self._is_waking:
            return
        self._is_waking = True
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:
            _log.debug("the loop is closed: frames are dropped")

    def woken(self) -> None:
        """On the loop, after `wake`."""
        while self._outbox:
            self._write(self._outbox.popleft())

    def _wake(self) -> None:
        self._is_waking = False  # first: what comes from now on has to wake again
        self.woken()

    def _take_frames(self) -> None:
        start, end, received, head_size = self._start, self._end, self._received, _HEAD.size
        while end - start >= head_size:
            values_size, size = _HEAD.unpack_from(received, start)
            begin = start + head_size + values_size
            stop = begin + size
            if stop > end:
                self._await(start, stop - start)
                return
            self.handle(pickle.loads(received[start + head_size : begin]), memoryview(bytes(received[begin:stop])))
            start = stop
        if start == end:
            self._start = self._end = 0
        else:
            self._await(start, 0)

    def _await(self, start: int, size: int) -> None:
        """Make room for the rest of the frame that begins at `start`, of `size` bytes where that is known."""
        received, have = self._received, self._end - start
        if size > len(received) // 2:
            large: Any = np.empty(size, np.uint8)
            self._large = memoryview(large)
            self._large[:have] = received[start : self._end]
            self._large_end = have
            self._start = self._end = 0
            return
        if len(received) - start < max(size, len(received) // 2):
            received[:have] = bytes(received[start : self._end])
            start, self._end = 0, have
        self._start = start

    def _write(self, frame: list[Raw]) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.writelines(frame)


def _frame(values: Any, pieces: Sequence[Raw]) -> list[Raw]:
    """The buffers to write for a frame: small pieces joined, large ones as they are."""
    pickled = pickle.dumps(values, protocol=5)
    size = sum(map(len, pieces))
    small: list[Raw] = [_HEAD.pack(len(pickled), size), pickled]
    if size < _OWN_PIECE_BYTES:
        return [b"".join([*small, *pieces])]
    written: list[Raw] = []
    for piece in pieces:
        if len(piece) < _OWN_PIECE_BYTES:
            small.append(piece)
            continue
        written += [b"".join(small), piece]
        small = []
    written.append(b"".join(small))
    return [part for part in written if len(part)]
