"""The client's side of HTTP/2 (RFC 9113), as far as gRPC's calls need it, over one connection in the loop's thread.

Header compression is hpack's. Every call of a connection has the same headers, and most answers have, so that what they
are compressed to is worked out once.
"""

import asyncio
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import grpc
import hpack

from tutti.loadtest.wire import Wire

CODES = {str(code.value[0]).encode(): code.name for code in grpc.StatusCode}  # type: ignore[index]
# The server has not begun with it: it may be sent again, as gRPC's own clients do.
UNPROCESSED = "unprocessed"
OK, UNAVAILABLE = grpc.StatusCode.OK.name, grpc.StatusCode.UNAVAILABLE.name

Headers = Sequence[tuple[bytes, bytes]]

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PUSH_PROMISE, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = (
    0, 1, 3, 4, 5, 6, 7, 8, 9,
)  # fmt: skip
# Flags: END_STREAM of DATA and HEADERS is ACK of SETTINGS and PING.
_END_STREAM = _ACK = 0x1
_END_HEADERS, _PADDED, _PRIORITY = 0x4, 0x8, 0x20
_HEADER_TABLE_SIZE, _ENABLE_PUSH, _MAX_CALLS, _INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE = 1, 2, 3, 4, 5
_REFUSED, _CANCEL = 7, 8
_WINDOW = 2**31 - 1
_DEFAULT_WINDOW, _DEFAULT_FRAME, _TABLE = 65_535, 16_384, 4096
# What was read is given back to the windows so much at a time.
_GIVE_BACK = 1 << 26
# Length (16 bits and 8), type, flags, stream.
_HEAD = struct.Struct(">HBBBI")
_SETTING = struct.Struct(">HI")


class _ProtocolError(Exception):
    """The server does not keep to the protocol."""


@dataclass(slots=True)
class _Call:
    key: Any
    # What may still be sent.
    window: int
    unsent: deque[tuple[memoryview, bool]] = field(default_factory=deque)
    # Whether all was sent that will be.
    is_said: bool = False
    # Read since some was given back to the window.
    taken: int = 0
    has_data: bool = False
    status: str = ""
    message: str = ""


class Connection:
    """Calls over one connection.

    `on_data(key, data, at)` gets the bytes of an answer's messages as they come, `on_end(key, status, message, at)`
    the status' name ("OK") or UNPROCESSED, once for each call.
    """

    def __init__(
        self,
        connected: socket.socket,
        headers: Headers,
        on_data: Callable[[Any, bytes, float], None],
        on_end: Callable[[Any, str, str, float], None],
    ) -> None:
        self._headers = headers
        self._on_data, self._on_end = on_data, on_end
        self._calls: dict[int, _Call] = {}
        self._next = 1
        self._encoder, self._decoder = hpack.Encoder(), hpack.Decoder(max_header_list_size=1 << 20)
        self._block, self._is_same = b"", False
        self._known: dict[bytes, Headers] = {}
        self._window, self._initial_window, self._frame_size = _DEFAULT_WINDOW, _DEFAULT_WINDOW, _DEFAULT_FRAME
        self._most_calls = 0
        self._taken = 0
        self._tail = b""
        # The stream and flags of headers that go on in the next frame, and what is there of them.
        self._unfinished: tuple[int, int, bytes] | None = None
        # Once the server has told its limits, or is lost.
        self.greeted = asyncio.Event()
        # Of no more calls, after GOAWAY or a loss.
        self.is_open = True
        settings = _SETTING.pack(_ENABLE_PUSH, 0) + _SETTING.pack(_INITIAL_WINDOW_SIZE, _WINDOW)
        self._out = [_PREFACE, _frame(_SETTINGS, 0, 0, settings), _window_update(0, _WINDOW - _DEFAULT_WINDOW)]
        self._wire = Wire(connected, self._received, self._lost)
        self.write(self.take())

    @property
    def in_flight(self) -> int:
        return len(self._calls)

    @property
    def has_room(self) -> bool:
        """For another call, as far as the server's limit goes."""
        return self.is_open and len(self._calls) < self._most_calls

    def open_call(self, key: Any) -> int:
        """A new stream, whose headers are in what is taken next; `key` is what its callbacks get."""
        stream = self._next
        self._next += 2
        block = self._block if self._is_same else self._encoded()
        self._out.append(_frame(_HEADERS, _END_HEADERS, stream, block))
        self._calls[stream] = _Call(key, self._initial_window)
        return stream

    def _encoded(self) -> bytes:
        """Once it says the same twice, there is nothing in it but references to what the server knows."""
        block = self._encoder.encode(self._headers, huffman=False)
        self._block, self._is_same = block, block == self._block
        return block

    def fits(self, size: int, stream: int = 0) -> bool:
        """Whether so many bytes could be sent at once, on a stream or (0) a new one."""
        window = self._calls[stream].window if stream else self._initial_window
        return size <= min(self._window, window)

    def put(self, stream: int, data: bytes, ends: bool) -> None:
        """Send on a call, as far as the server's windows allow; the rest follows."""
        call = self._calls[stream]
        call.unsent.append((memoryview(data), ends))
        self._push(stream, call)

    def _push(self, stream: int, call: _Call) -> None:
        while call.unsent:
            data, ends = call.unsent[0]
            size = min(len(data), call.window, self._window, self._frame_size)
            if size <= 0 < len(data):
                return
            is_last = size == len(data)
            flags = _END_STREAM if ends and is_last else 0
            self._out.append(_frame(_DATA, flags, stream, bytes(data[:size])))
            call.window -= size
            self._window -= size
            if is_last:
                call.unsent.popleft()
                call.is_said = ends
            else:
                call.unsent[0] = (data[size:], ends)

    def take(self) -> bytes:
        """The bytes of what was opened and put, to be written later in the order of taking."""
        data = b"".join(self._out)
        self._out.clear()
        return data

    def write(self, data: bytes) -> None:
        """What was taken."""
        if data:
            self._wire.write(data)

    def cancel(self, stream: int) -> None:
        """Give up a call; nothing more is told of it."""
        if self._calls.pop(stream, None) is not None:
            self._out.append(_frame(_RST_STREAM, 0, stream, _CANCEL.to_bytes(4, "big")))
            self.write(self.take())

    def forget(self, stream: int) -> None:
        """A call that was never written, because the connection takes no more."""
        self._calls.pop(stream, None)

    def close(self) -> None:
        self.is_open = False
        self._wire.close()

    def _received(self, data: bytes, now_s: float) -> None:
        if self._tail:
            data = self._tail + data
        position, size = 0, len(data)
        try:
            while size - position >= _HEAD.size:
                high, low, kind, flags, stream = _HEAD.unpack_from(data, position)
                start = position + _HEAD.size
                length = high << 8 | low
                if length > _DEFAULT_FRAME:
                    raise _ProtocolError(f"a frame of {length} bytes")
                if start + length > size:
                    break
                position = start + length
                self._take_in(kind, flags, stream & _WINDOW, data[start:position], now_s)
        except (_ProtocolError, hpack.HPACKError, struct.error, IndexError) as error:
            self._wire.close()
            self._lost(f"it does not keep to HTTP/2: {error}")
            return
        self._tail = data[position:]
        self.write(self.take())
        if not self.is_open and not self._calls:
            self._wire.close()

    def _take_in(self, kind: int, flags: int, stream: int, data: bytes, now_s: float) -> None:
        if (kind == _CONTINUATION) != (self._unfinished is not None):
            raise _ProtocolError("headers that are not continued")
        if kind == _DATA:
            self._take_data(flags, stream, data, now_s)
        elif kind == _HEADERS:
            block = _unpadded(flags, data)[5 if flags & _PRIORITY else 0 :]
            self._take_headers(flags, stream, block, now_s)
        elif kind == _CONTINUATION:
            assert self._unfinished is not None
            stream, first, block = self._unfinished
            self._take_headers(first | flags & _END_HEADERS, stream, block + data, now_s)
        elif kind == _WINDOW_UPDATE:
            self._widen(stream, int.from_bytes(data, "big") & _WINDOW)
        elif kind == _SETTINGS and not flags & _ACK:
            self._take_settings(data)
        elif kind == _PING and not flags & _ACK:
            self._out.append(_frame(_PING, _ACK, 0, data))
        elif kind == _RST_STREAM:
            code = int.from_bytes(data, "big")
            call = self._calls.get(stream)
            if call is not None:
                call.is_said = True  # it is closed for us, too
            self._end(
                stream, UNPROCESSED if code == _REFUSED else UNAVAILABLE, f"the server reset it (code {code})", now_s
            )
        elif kind == _GOAWAY:
            self.is_open = False
            last = int.from_bytes(data[:4], "big") & _WINDOW
            for stream_id in [stream_id for stream_id in self._calls if stream_id > last]:
                self._end(stream_id, UNPROCESSED, "the server takes no more calls", now_s)
        elif kind == _PUSH_PROMISE:
            raise _ProtocolError("a push, which it was told not to make")

    def _take_data(self, flags: int, stream: int, data: bytes, now_s: float) -> None:
        self._taken += len(data)
        if self._taken >= _GIVE_BACK:
            self._out.append(_window_update(0, self._taken))
            self._taken = 0
        call = self._calls.get(stream)
        if call is None:
            return
        call.taken += len(data)
        if call.taken >= _GIVE_BACK and not flags & _END_STREAM:
            self._out.append(_window_update(stream, call.taken))
            call.taken = 0
        if data := _unpadded(flags, data):
            call.has_data = True
            self._on_data(call.key, data, now_s)
        if flags & _END_STREAM:
            self._end_by_status(stream, call, now_s)

    def _take_headers(self, flags: int, stream: int, block: bytes, now_s: float) -> None:
        self._unfinished = None
        if not flags & _END_HEADERS:
            self._unfinished = (stream, flags, block)
            return
        headers = self._decoded(block)
        call = self._calls.get(stream)
        if call is None:
            return
        for name, value in headers:
            if name == b"grpc-status":
                call.status = CODES.get(value, f"status {value!r}")
            elif name == b"grpc-message":
                call.message = unquote(value.decode("latin-1"))
            elif name == b":status" and value != b"200":
                call.status = f"HTTP {value.decode('latin-1')}"
        if flags & _END_STREAM:
            self._end_by_status(stream, call, now_s)

    def _decoded(self, block: bytes) -> Headers:
        """What is known, as long as blocks have nothing but references (bytes from 128 on), which change no table."""
        known = self._known.get(block)
        if known is not None:
            return known
        headers = list(self._decoder.decode(block, raw=True))
        if block and min(block) >= 0x80:
            self._known[block] = headers
        else:
            self._known.clear()
        return headers

    def _take_settings(self, data: bytes) -> None:
        settings = dict(_SETTING.iter_unpack(data))
        if not self.greeted.is_set():
            settings = {_MAX_CALLS: _WINDOW, **settings}
        for name, value in settings.items():
            if name == _MAX_CALLS:
                self._most_calls = value
            elif name == _MAX_FRAME_SIZE:
                self._frame_size = value
            elif name == _HEADER_TABLE_SIZE and value < _TABLE and self._encoder.header_table_size:
                # None at all, once and for all: hpack tells of changes that follow each other in too many steps.
                self._encoder.header_table_size = 0
                self._block, self._is_same = b"", False
            elif name == _INITIAL_WINDOW_SIZE:
                for call in self._calls.values():
                    call.window += value - self._initial_window
                self._initial_window = value
        self._out.append(_frame(_SETTINGS, _ACK, 0, b""))
        self.greeted.set()
        self._widen(0, 0)

    def _widen(self, stream: int, by: int) -> None:
        """More may be sent: on a stream, or (0) on all together."""
        if not stream:
            self._window += by
            for number, call in list(self._calls.items()):
                if call.unsent:
                    self._push(number, call)
        elif (stream_call := self._calls.get(stream)) is not None:
            stream_call.window += by
            self._push(stream, stream_call)

    def _end_by_status(self, stream: int, call: _Call, now_s: float) -> None:
        if call.status == OK and not call.has_data:
            self._end(stream, "INTERNAL", "the server said OK and sent no message", now_s)
        else:
            self._end(stream, call.status or "UNKNOWN", call.message, now_s)

    def _end(self, stream: int, status: str, message: str, now_s: float) -> None:
        call = self._calls.pop(stream, None)
        if call is None:
            return
        if not call.is_said:
            self._out.append(_frame(_RST_STREAM, 0, stream, _CANCEL.to_bytes(4, "big")))
        self._on_end(call.key, status, message, now_s)

    def _lost(self, why: str) -> None:
        self.is_open = False
        self.greeted.set()
        now = time.perf_counter()
        for stream in list(self._calls):
            self._end(stream, UNAVAILABLE, f"the connection broke: {why or 'it was closed'}", now)


def _frame(kind: int, flags: int, stream: int, data: bytes) -> bytes:
    return _HEAD.pack(len(data) >> 8, len(data) & 0xFF, kind, flags, stream) + data


def _window_update(stream: int, by: int) -> bytes:
    return _frame(_WINDOW_UPDATE, 0, stream, by.to_bytes(4, "big"))


def _unpadded(flags: int, data: bytes) -> bytes:
    return data[1 : len(data) - data[0]] if flags & _PADDED else data
