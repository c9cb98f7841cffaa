"""The client's side of gRPC's wire format over one connection: HTTP/2 is h2's, in the loop's thread.

gRPC's own library answers through threads of its own: some hundred microseconds of waking up for each call.
"""

import asyncio
import contextlib
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import grpc
import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings

from loadtest.wire import Wire

CODES = {str(code.value[0]).encode(): code.name for code in grpc.StatusCode}  # type: ignore[index]
# The server has not begun with it: it may be sent again, as gRPC's own clients do.
UNPROCESSED = "unprocessed"
OK, UNAVAILABLE = grpc.StatusCode.OK.name, grpc.StatusCode.UNAVAILABLE.name

_WINDOW = 2**31 - 1
# What was read is given back to the windows so much at a time.
_GIVE_BACK = 1 << 26
_GOAWAY = 7
_FRAME_HEADER = 9

_CONFIG = h2.config.H2Configuration(
    client_side=True,
    header_encoding=None,
    validate_outbound_headers=False,
    normalize_outbound_headers=False,
    validate_inbound_headers=False,
)


@dataclass(slots=True)
class _Call:
    key: Any
    status: str = ""
    message: str = ""
    taken: int = 0
    has_data: bool = False
    # Whether all was sent that will be.
    is_said: bool = False
    unsent: deque[tuple[memoryview, bool]] = field(default_factory=deque)


class Connection:
    """Calls over one connection.

    `on_data(key, data, at)` gets the bytes of an answer's messages as they come, `on_end(key, status, message, at)`
    the status' name ("OK") or UNPROCESSED, once for each call.
    """

    def __init__(
        self,
        connected: socket.socket,
        headers: Sequence[tuple[bytes, bytes]],
        on_data: Callable[[Any, bytes, float], None],
        on_end: Callable[[Any, str, str, float], None],
    ) -> None:
        self._headers = list(headers)
        self._on_data, self._on_end = on_data, on_end
        self._calls: dict[int, _Call] = {}
        self._tail = b""
        self._taken = 0
        # Of no more calls, after GOAWAY or a loss.
        self.is_open = True
        self._h2 = h2.connection.H2Connection(_CONFIG)
        codes = h2.settings.SettingCodes
        self._h2.local_settings = h2.settings.Settings(
            client=True,
            initial_values={codes.INITIAL_WINDOW_SIZE: _WINDOW, codes.ENABLE_PUSH: 0},
        )
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(_WINDOW - 65_535)
        self._most_calls = 0
        # Once the server has told its limits, or is lost.
        self.greeted = asyncio.Event()
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
        stream = self._h2.get_next_available_stream_id()
        self._h2.send_headers(stream, self._headers)
        self._calls[stream] = _Call(key)
        return stream

    def fits(self, size: int, stream: int = 0) -> bool:
        """Whether so many bytes could be sent at once, on a stream or (0) a new one."""
        own = self._h2.local_flow_control_window(stream) if stream else self._h2.remote_settings.initial_window_size
        return size <= min(self._h2.outbound_flow_control_window, own)

    def put(self, stream: int, data: bytes, ends: bool) -> None:
        """Send on a call, as far as the server's windows allow; the rest follows."""
        call = self._calls[stream]
        call.unsent.append((memoryview(data), ends))
        self._push(stream, call)

    def _push(self, stream: int, call: _Call) -> None:
        while call.unsent:
            data, ends = call.unsent[0]
            size = min(len(data), self._h2.local_flow_control_window(stream), self._h2.max_outbound_frame_size)
            if size <= 0 < len(data):
                return
            is_last = size == len(data)
            self._h2.send_data(stream, bytes(data[:size]), end_stream=ends and is_last)
            if is_last:
                call.unsent.popleft()
                call.is_said = ends
            else:
                call.unsent[0] = (data[size:], ends)

    def take(self) -> bytes:
        """The bytes of what was opened and put, to be written later in the order of taking."""
        return self._h2.data_to_send()

    def write(self, data: bytes) -> None:
        """What was taken."""
        if data:
            self._wire.write(data)

    def cancel(self, stream: int) -> None:
        """Give up a call; nothing more is told of it."""
        if self._calls.pop(stream, None) is not None and self._wire.is_open:
            self._h2.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
            self.write(self.take())

    def forget(self, stream: int) -> None:
        """A call that was never written, because the connection takes no more."""
        self._calls.pop(stream, None)

    def close(self) -> None:
        self.is_open = False
        self._wire.close()

    def _received(self, data: bytes, at: float) -> None:
        try:
            for event in self._h2.receive_data(self._without_goaway(data, at)):
                self._take_in(event, at)
        except h2.exceptions.ProtocolError as error:
            self._wire.close()
            self._lost(f"it does not keep to HTTP/2: {error}")
            return
        self.write(self.take())
        if not self.is_open and not self._calls:
            self._wire.close()

    def _without_goaway(self, data: bytes, at: float) -> bytes:
        """Whole frames. To h2 nothing may follow a GOAWAY, but a server that takes its leave answers what it has."""
        if self._tail:
            data = self._tail + data
        start = position = 0
        parts = []
        while position + _FRAME_HEADER <= len(data):
            end = position + _FRAME_HEADER + int.from_bytes(data[position : position + 3], "big")
            if end > len(data):
                break
            if data[position + 3] == _GOAWAY:
                self._leave(int.from_bytes(data[position + 9 : position + 13], "big") & _WINDOW, at)
                parts.append(data[start:position])
                start = end
            position = end
        self._tail = data[position:]
        parts.append(data[start:position])
        return b"".join(parts)

    def _leave(self, last: int, at: float) -> None:
        self.is_open = False
        for stream in [one for one in self._calls if one > last]:
            self._end(stream, UNPROCESSED, "the server takes no more calls", at)

    def _take_in(self, event: h2.events.Event, at: float) -> None:
        if isinstance(event, h2.events.DataReceived):
            call = self._calls.get(event.stream_id)
            self._give_back(event.stream_id, call, event.flow_controlled_length or 0)
            if call is not None:
                call.has_data = True
                self._on_data(call.key, event.data or b"", at)
        elif isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
            self._read_headers(event.stream_id, event.headers or [])
        elif isinstance(event, h2.events.StreamEnded):
            call = self._calls.get(event.stream_id)
            if call is not None and call.status == OK and not call.has_data:
                self._end(event.stream_id, "INTERNAL", "the server said OK and sent no message", at)
            elif call is not None:
                self._end(event.stream_id, call.status or "UNKNOWN", call.message, at)
        elif isinstance(event, h2.events.StreamReset):
            name = getattr(event.error_code, "name", str(event.error_code))
            status = UNPROCESSED if event.error_code == h2.errors.ErrorCodes.REFUSED_STREAM else UNAVAILABLE
            self._end(event.stream_id, status, f"the server reset the stream: {name}", at)
        elif isinstance(event, h2.events.WindowUpdated | h2.events.RemoteSettingsChanged):
            self._most_calls = self._h2.remote_settings.max_concurrent_streams
            self.greeted.set()
            for stream, call in list(self._calls.items()):
                if call.unsent:
                    self._push(stream, call)

    def _read_headers(self, stream: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        call = self._calls.get(stream)
        if call is None:
            return
        for name, value in headers:
            if name == b"grpc-status":
                call.status = CODES.get(value, f"status {value!r}")
            elif name == b"grpc-message":
                call.message = unquote(value.decode("latin-1"))
            elif name == b":status" and value != b"200":
                call.status = f"HTTP {value.decode()}"

    def _give_back(self, stream: int, call: _Call | None, size: int) -> None:
        self._taken += size
        if self._taken >= _GIVE_BACK:
            self._h2.increment_flow_control_window(self._taken)
            self._taken = 0
        if call is not None:
            call.taken += size
            if call.taken >= _GIVE_BACK:
                self._h2.increment_flow_control_window(call.taken, stream)
                call.taken = 0

    def _end(self, stream: int, status: str, message: str, at: float) -> None:
        call = self._calls.pop(stream, None)
        if call is None:
            return
        if not call.is_said and self._wire.is_open:
            with contextlib.suppress(h2.exceptions.ProtocolError):  # the server may have closed both halves
                self._h2.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
        self._on_end(call.key, status, message, at)

    def _lost(self, why: str) -> None:
        self.is_open = False
        self.greeted.set()
        now = time.perf_counter()
        for stream in list(self._calls):
            self._end(stream, UNAVAILABLE, f"the connection broke: {why or 'it was closed'}", now)
