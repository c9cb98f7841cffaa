"""TCP connections that tell when the kernel got what they read.

A process that was asleep when an answer came learns of it tens of microseconds later, and one that was busy later
still. That is the reader's time, not the server's: Linux stamps what arrives (SO_TIMESTAMPNS), and those stamps are
used where they are to be had.
"""

import asyncio
import contextlib
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

# Python has no name for it. Linux 5.1; two 64-bit integers on every architecture.
_SO_TIMESTAMPNS_NEW = 64
_STAMP = struct.Struct("qq")
_ANCILLARY = 64
# A stamp that is older than this is ignored: the clock was set meanwhile.
_MOST_AGE_S = 10.0
# One buffer for all wires of a process: they read one after the other.
_buffer = memoryview(bytearray(1 << 18))


# The address of each host that answered last. It is kept since a lookup runs in another thread, which takes time.
_known: dict[tuple[str, int], Any] = {}


async def connect(host: str, port: int) -> socket.socket:
    """To the first of the host's addresses that answers. Raises OSError."""
    loop = asyncio.get_running_loop()
    known = _known.pop((host, port), None)
    addresses = [known] if known is not None else await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    failed = OSError(f"{host} has no address")
    for family, kind, proto, name, address in addresses:
        connection = socket.socket(family, kind, proto)
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(connection, address)
        except OSError as error:
            connection.close()
            failed = error
        else:
            _known[host, port] = (family, kind, proto, name, address)
            return connection
    raise failed


class Wire:
    """Reads and writes a connected socket in the running loop.

    `on_data(data, at)` gets what was read and when its last byte arrived, as time.perf_counter(); `on_lost(why)` is
    called once, when the other side closed ("" for why) or the connection broke, and not after close().
    """

    def __init__(
        self, connected: socket.socket, on_data: Callable[[bytes, float], None], on_lost: Callable[[str], None]
    ) -> None:
        self._socket = connected
        self._on_data, self._on_lost = on_data, on_lost
        self._loop = asyncio.get_running_loop()
        self._unsent = bytearray()
        self.is_open = True
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # an older kernel has no stamps: the time of reading is taken
                connected.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS_NEW, 1)
        self._loop.add_reader(connected, self._read)

    def write(self, data: bytes) -> None:
        """All of it, as soon as the kernel takes it. What breaks is told by on_lost."""
        if not self.is_open:
            return
        if self._unsent:
            self._unsent += data
            return
        sent = self._send(data)
        if sent < len(data):
            self._unsent += memoryview(data)[sent:]
            self._loop.add_writer(self._socket, self._write_rest)

    def _write_rest(self) -> None:
        del self._unsent[: self._send(self._unsent)]
        if not self._unsent:
            self._loop.remove_writer(self._socket)

    def _send(self, data: bytes | bytearray) -> int:
        try:
            return self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            return len(data)  # the read that follows tells what broke

    def _read(self) -> None:
        try:
            size, ancillary, _, _ = self._socket.recvmsg_into([_buffer], _ANCILLARY)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(str(error))
            return
        if size:
            self._on_data(bytes(_buffer[:size]), _arrived(ancillary))
        else:
            self._lose("")

    def _lose(self, why: str) -> None:
        self.close()
        self._on_lost(why)

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self._loop.remove_reader(self._socket)
            if self._unsent:
                self._loop.remove_writer(self._socket)
            self._socket.close()


def _arrived(ancillary: Sequence[tuple[int, int, Any]]) -> float:
    """The stamp in what came beside data, as time.perf_counter(); now, if there is none."""
    now = time.perf_counter()
    for _, kind, data in ancillary:
        if kind == _SO_TIMESTAMPNS_NEW and len(data) == _STAMP.size:
            seconds, nanoseconds = _STAMP.unpack(data)
            age: float = time.time() - (seconds + nanoseconds / 1e9)
            if 0 <= age < _MOST_AGE_S:
                return now - age
    return now
