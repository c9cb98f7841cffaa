"""One HTTP/1.1 connection on llhttp: bytes in, exchanges out, responses in the order of the requests.

Owns the duties of an HTTP/1.1 server: ordered answers on pipelined connections, keep-alive, 100-continue, limits on
headers and bodies, timeouts, back-pressure, and refusal of what llhttp calls malformed. Knows nothing of inference.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Protocol, cast

import httptools
import orjson

from tutti.core.errors import shown
from tutti.core.types import Call, Raw
from tutti.frontends.held_bytes import COUNTED_BYTES, Holding
from tutti.frontends.http import answer_headers
from tutti.frontends.http.codec import JSON_REPLY, ReplyFormat
from tutti.frontends.size_limits import Limits

_log = logging.getLogger(__name__)

MAX_HEADER_BYTES = 64 * 1024
_HEADER_OVERHEAD = 4  # ": " and the line's end
MAX_PIPELINED = 128
MAX_KNOWN_HEADS = 1024
MAX_KNOWN_HEAD_BYTES = 4096
_NOT_REPEATABLE = frozenset({b"transfer-encoding", b"expect", b"upgrade"})
# A client that still sends what has been refused would not read the answer if the connection broke under it.
LINGER_S = 2.0
# How long answers are awaited for a client that sends no more; an app's may be endless streams.
HALF_CLOSED_S = 30.0
HALF_CLOSED_APP_S = 0.5
# A body from here on is received into the one buffer it stays in.
LARGE_BODY_BYTES = 64 * 1024
# A response from here on is written in the pieces it is made of, rather than joined.
LARGE_RESPONSE_BYTES = 64 * 1024
IDLE_TIMEOUT_S = 75.0
READ_TIMEOUT_S = 60.0
# A body may take so long, and longer by its size.
LEAST_RATE_BYTES_S = 16 * 1024


class Head:
    """A request's head, read before. `infer` is what an infer front has made of its headers."""

    __slots__ = ("headers", "infer", "keep_alive", "length", "method", "url")

    def __init__(self, exchange: "Exchange", length: int) -> None:
        self.method = exchange.method
        self.url = exchange.url
        self.headers = exchange.headers
        self.keep_alive = exchange.keep_alive
        self.length = length
        self.infer: object = None


class Front(Protocol):
    """What a connection belongs to. `heads` are the heads its connections have read, by their bytes."""

    limits: Limits
    holding: Holding
    connections: set["Connection"]
    stalled: set["Connection"]
    heads: dict[bytes, Head]
    is_draining: bool

    def memory(self, size: int) -> memoryview:
        """Where a large body is received. Raises MemoryError."""

    def make_room(self, size: int) -> None:
        """Break with clients that do not read, for `size` bytes more."""

    def handle(self, exchange: "Exchange") -> None:
        """A complete request; `exchange.connection.deliver` answers it, now or later."""

    def refused(self, exchange: "Exchange", status: int, message: str) -> None:
        """An exchange has been answered with an error, before anybody was asked for its answer."""


def response_head(status: int, headers: Sequence[tuple[bytes, bytes]], length: int | None, keep_alive: bool) -> bytes:
    """The bytes before a body of `length` bytes, or None for a chunked one."""
    phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Error"
    lines = [b"HTTP/1.1 %d %s" % (status, phrase.encode())]
    lines += [b"%s: %s" % header for header in headers]
    lines.append(b"transfer-encoding: chunked" if length is None else b"content-length: %d" % length)
    if not keep_alive:
        lines.append(b"connection: close")
    return b"\r\n".join(lines) + b"\r\n\r\n"


def error_response(
    status: int, message: str, keep_alive: bool, about: Sequence[tuple[bytes, bytes]] | None = None
) -> bytes:
    """With the headers that tell of its request; where none are given, with an id for it."""
    body = orjson.dumps({"error": shown(message)})
    headers = [
        (b"content-type", b"application/json"),
        *(about or ((answer_headers.ID_HEADER, answer_headers.new_id()),)),
    ]
    if status == 503:
        headers.append((b"retry-after", b"1"))
    return response_head(status, headers, len(body), keep_alive) + body


# In one piece, or in several that are written one after the other.
Response = bytes | list[Raw]


class Exchange:
    """One request on a connection, and its response once there is one. The sink's token of an infer call."""

    __slots__ = (
        "body",
        "call",
        "connection",
        "encoding",
        "head",
        "headers",
        "held",
        "is_http_1_0",
        "keep_alive",
        "method",
        "parts",
        "reply",
        "request_id",
        "response",
        "task",
        "timeout_ns",
        "url",
    )

    def __init__(self, connection: "Connection", method: bytes, url: bytes, keep_alive: bool) -> None:
        self.connection = connection
        self.method = method
        self.url = url
        self.keep_alive = keep_alive
        self.is_http_1_0 = False
        self.head: Head | None = None
        self.headers: list[tuple[bytes, bytes]] = []
        self.body: Raw = b""
        self.call: Call | None = None
        self.task: asyncio.Task[None] | None = None
        self.parts: list[bytes] | None = None
        self.reply: ReplyFormat = JSON_REPLY
        self.encoding = ""
        # As the client sent it, where that may come back.
        self.request_id = b""
        self.timeout_ns = 0
        # What was delivered, which may be a refusal in the place of what should have been.
        self.response: Response | None = None
        # Of its body, then of its answer until that is written.
        self.held = 0

    def known_as(self, own: str = "") -> tuple[bytes, bytes]:
        """The header that has the request's id: the client's header, else the `own` one of its body, else a new one."""
        if not self.request_id:
            sent = next((value for name, value in self.headers if name == answer_headers.ID_HEADER), b"")
            self.request_id = answer_headers.id_of(sent) or answer_headers.request_id(own)
        return answer_headers.ID_HEADER, self.request_id

    def about(self) -> list[tuple[bytes, bytes]]:
        """The headers of an answer that no model has given: how long it took since its request came, and its id."""
        return [(answer_headers.TIMING_HEADER, answer_headers.total(self.connection.passed_ns())), self.known_as()]

    def release(self) -> None:
        held, self.held = self.held, 0
        self.connection.holding.give(held)


class _NoConnection:
    """Of no exchange at all."""

    holding = Holding(0)


_NO_EXCHANGE = Exchange(cast("Connection", _NoConnection()), b"", b"", False)


class _LargeBody(asyncio.BufferedProtocol):
    """Stands in for a connection while a large body comes, so that the system writes it where it stays."""

    def __init__(
        self, connection: "Connection", exchange: Exchange, memory: memoryview, begun: Sequence[bytes]
    ) -> None:
        self._connection = connection
        self._exchange = exchange
        self._body = memory
        self._size = 0
        for piece in begun:
            self._body[self._size : self._size + len(piece)] = piece
            self._size += len(piece)

    def connection_lost(self, exc: Exception | None) -> None:
        self._exchange.release()
        self._body = memoryview(b"")
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._body[self._size :]

    def buffer_updated(self, nbytes: int) -> None:
        self._size += nbytes
        if not self._connection.hold(self._exchange, nbytes):
            self._body = memoryview(bytearray(COUNTED_BYTES))  # what is still sent is taken and forgotten
            self._size = 0
            return
        self._connection.last_read = asyncio.get_running_loop().time()
        if self._size == len(self._body):
            exchange, self._exchange = self._exchange, _NO_EXCHANGE
            exchange.body = self._body
            self._body = memoryview(b"")  # a transport keeps the protocols that it has had
            self._connection.end_large_body(exchange)


class Connection(asyncio.Protocol):
    """One client connection: bytes in, exchanges out, responses in the order of the requests."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self.holding = front.holding
        # What its client has not read, and since when it reads nothing.
        self._unread = 0
        self.read_at = 0.0
        self._begun_at = 0.0
        # The client's address, as the system says it.
        self.peer: Any = None
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self.pending: deque[Exchange] = deque()
        self.last_read = 0.0
        # The length of the body being read, where it is a large one of known length.
        self._large_length = 0
        self._is_reading = False
        self._is_closing = False
        self._is_write_paused = False
        self._can_write = asyncio.Event()
        self._can_write.set()
        self._is_read_paused = False
        self._new_head = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._counting: Exchange | None = None
        self._start_message()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports do not inherit from it
        self.peer = transport.get_extra_info("peername")
        self.last_read = self._loop.time()
        self._front.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._front.connections.discard(self)
        self._end_stall()
        for exchange in self.pending:
            if exchange.call is not None:
                exchange.call.is_cancelled = True
            if exchange.task is not None:
                exchange.task.cancel()
            if exchange.call is None and exchange.task is None and exchange.response is not None:
                exchange.release()  # the others are released with their answers
        self.pending.clear()
        self._can_write.set()
        if self._counting is not None:
            self._counting.release()

    def eof_received(self) -> bool:
        """The client sends no more. Most have gone, some wait for their answers: what is being executed is answered.

        What only waits in a queue is cancelled.
        """
        if not self.pending or self._is_reading:
            return False
        self._is_closing = True
        self.pending[-1].keep_alive = False
        is_app = False
        for exchange in self.pending:
            is_app = is_app or exchange.task is not None
            if exchange.call is not None:
                exchange.call.is_cancelled = True
        self._loop.call_later(HALF_CLOSED_APP_S if is_app else HALF_CLOSED_S, self._close)
        return True

    def data_received(self, data: bytes) -> None:
        if self._is_closing:
            return
        self.last_read = self._loop.time()
        if not self._is_reading:
            data = self._take_known(data)
            if not data:
                return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:  # refused in on_message_complete
            return
        except httptools.HttpParserCallbackError:
            _log.exception("a connection's callback failed")
            self._refuse(500, "internal error while reading the request")
        except httptools.HttpParserError as error:
            if not self._is_closing:
                self._refuse(400, f"malformed HTTP request: {error}")
        else:
            if self._large_length and not self._is_closing:
                length, self._large_length = self._large_length, 0
                begun, self._body = self._body, []
                self._begin_large_body(self._read_exchange(), length, begun)

    def _take_known(self, data: bytes) -> bytes:
        """Take the whole requests at the start of `data` whose heads were read before; returns what is left.

        Clients repeat a head byte for byte, and equal bytes at the start of a message mean the same: llhttp need not
        read them again.
        """
        self._new_head = b""
        at = 0
        while at < len(data) and not self._is_closing:
            end = data.find(b"\r\n\r\n", at, at + MAX_KNOWN_HEAD_BYTES) + 4
            if end == 3:
                break
            raw = data[at:end]
            head = self._front.heads.get(raw)
            if head is None:
                self._new_head = raw
                break
            is_whole = end + head.length <= len(data)
            if not is_whole and head.length < LARGE_BODY_BYTES:
                self._new_head = raw
                break
            exchange = Exchange(self, head.method, head.url, head.keep_alive)
            exchange.head = head
            exchange.headers = head.headers
            if not is_whole:
                self._begin_large_body(exchange, head.length, [data[end:]])
                return b""
            exchange.body = data[end : end + head.length]
            at = end + head.length
            self._accept(exchange)
        if self._is_closing:
            return b""
        return data[at:] if at else data

    def _remember(self, exchange: Exchange) -> None:
        """Keep the head of the request that llhttp has just read, if all of it is about this one message."""
        raw, self._new_head = self._new_head, b""
        if not raw:
            return
        lengths = [value for name, value in exchange.headers if name == b"content-length"]
        names = {name for name, _ in exchange.headers}
        # Each line of it must be one that llhttp has told of: then it ends where the body began.
        is_plain = raw.count(b"\n") == raw.count(b"\r\n") == len(exchange.headers) + 2
        if not is_plain or exchange.is_http_1_0 or len(lengths) > 1 or names & _NOT_REPEATABLE:
            return
        length = int(lengths[0]) if lengths else 0
        if length != len(exchange.body):
            return
        if len(self._front.heads) >= MAX_KNOWN_HEADS:
            self._front.heads.clear()
        exchange.head = self._front.heads[raw] = Head(exchange, length)

    @property
    def has_gone(self) -> bool:
        """Its client is told nothing any more. From any thread."""
        return self._transport is None

    def pause_writing(self) -> None:
        self._is_write_paused = True
        self._can_write.clear()
        self._front.stalled.add(self)
        self.read_at = self._loop.time()
        self._count_unread()
        self._update_reading()

    def resume_writing(self) -> None:
        self._is_write_paused = False
        self._can_write.set()
        self._end_stall()
        self._update_reading()

    def _count_unread(self) -> None:
        if self._transport is not None:
            size = self._transport.get_write_buffer_size()
            self.holding.change(size - self._unread)
            self._unread = size

    def _end_stall(self) -> None:
        self._front.stalled.discard(self)
        self.holding.give(self._unread)
        self._unread = 0

    def close_if_unread(self, now: float, after_s: float) -> None:
        """Break with a client that has read nothing for so long: its answers are held for nobody."""
        before = self._unread
        self._count_unread()
        if self._unread < before:
            self.read_at = now
        elif now - self.read_at > after_s:
            self._is_closing = True
            self.abort()
            self._end_stall()

    def hold(self, exchange: Exchange, size: int) -> bool:
        """Count what has come of a body; where it is too much the request is refused, and what it has is let go."""
        if not self._is_closing and not self.holding.take(size):
            self._front.make_room(size)
            if not self.holding.take(size):
                exchange.release()
                self._refuse(503, self.holding.refusal)
        if self._is_closing:
            return False
        exchange.held += size
        return True

    # llhttp's callbacks

    def on_message_begin(self) -> None:
        self._start_message()
        self._is_reading = True
        self._begun_at = self._loop.time()

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count_header(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))
        self._count_header(len(name) + len(value) + _HEADER_OVERHEAD)

    def on_headers_complete(self) -> None:
        length, is_plain = 0, True
        for name, value in self._headers:
            if name == b"content-length":
                length = int(value)
                if length > self._front.limits.max_input_size:
                    self._refuse(413, self._too_large(length))
            elif name == b"transfer-encoding" or name == b"upgrade":
                is_plain = False
            elif name == b"expect" and value.lower() == b"100-continue" and not self.pending and not self._is_closing:
                self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if is_plain and length >= LARGE_BODY_BYTES and self._parser.get_method() != b"CONNECT":
            self._large_length = length

    def on_body(self, body: bytes) -> None:
        self._body_size += len(body)
        if self._body_size > self._front.limits.max_input_size:
            self._refuse(413, self._too_large(self._body_size))
        elif not self._is_closing and (self._is_uncounted() or self._hold_body(len(body))):
            self._body.append(body)

    def _is_uncounted(self) -> bool:
        """Whether a body is small so far, or will be counted as a large one."""
        return self._large_length > 0 or self._body_size < COUNTED_BYTES

    def _hold_body(self, size: int) -> bool:
        """Count a piece of a large body whose length was not known. The exchange that it is for is made later."""
        if self._counting is None:
            self._counting = Exchange(self, b"", b"", keep_alive=False)
        is_held = self.hold(self._counting, size)
        if not is_held:
            self._body = []
        return is_held

    def on_message_complete(self) -> None:
        if self._parser.should_upgrade():
            self._refuse(400, "protocol upgrades are not supported")
        self._is_reading = False
        self._large_length = 0
        if self._is_closing:
            return
        exchange = self._read_exchange()
        exchange.body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body = []
        if self._counting is not None:
            exchange.held, self._counting.held, self._counting = self._counting.held, 0, None
        self._remember(exchange)
        self._accept(exchange)

    def _read_exchange(self) -> Exchange:
        """The request whose head the parser has read."""
        exchange = Exchange(self, self._parser.get_method(), self._url, self._parser.should_keep_alive())
        exchange.headers = self._headers
        exchange.is_http_1_0 = self._parser.get_http_version() == "1.0"
        return exchange

    def _begin_large_body(self, exchange: Exchange, length: int, begun: Sequence[bytes]) -> None:
        """Receive what is missing of a body without a copy."""
        assert self._transport is not None
        self._is_reading = True
        self._url, self._headers = exchange.url, exchange.headers
        self._begun_at = self._loop.time()
        if length > self.holding.limit:
            self._refuse(413, f"the request body has {length} bytes, all in flight have at most {self.holding.limit}")
            return
        if not self.hold(exchange, sum(map(len, begun))):
            return
        try:
            self._switch(_LargeBody(self, exchange, self._front.memory(length), begun))
        except MemoryError:
            exchange.release()
            self._refuse(503, f"no memory for a body of {length} bytes")

    def end_large_body(self, exchange: Exchange) -> None:
        """The whole body is there."""
        self._is_reading = False
        self._parser = httptools.HttpRequestParser(self)  # the last one still waits for the body's rest
        self._start_message()
        self._switch(self)
        if self._is_closing:  # it has been refused meanwhile
            return
        if exchange.head is None:
            self._remember(exchange)
        self._accept(exchange)

    def _switch(self, protocol: asyncio.BaseProtocol) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        transport.set_protocol(protocol)
        if not self._is_read_paused:  # reading goes on in the way that the new protocol wants
            transport.pause_reading()
            transport.resume_reading()

    def _accept(self, exchange: Exchange) -> None:
        self.pending.append(exchange)
        if self._front.is_draining:
            exchange.keep_alive = False
        if not exchange.keep_alive:
            self._is_closing = True
        if self._is_write_paused or len(self.pending) >= MAX_PIPELINED:
            self._update_reading()
        self._front.handle(exchange)

    # responses

    def passed_ns(self) -> int:
        """Since something came last."""
        return int((self._loop.time() - self.last_read) * 1e9)

    def respond(self, exchange: Exchange, status: int, message: str) -> None:
        """Answer with an error."""
        headers = exchange.about()
        self._front.refused(exchange, status, message)
        self.deliver(exchange, error_response(status, message, exchange.keep_alive, headers))

    def deliver(self, exchange: Exchange, response: Response) -> None:
        """Write the response now, or when those before it have been written.

        A large one for which there is no room, since clients do not read theirs, is refused.
        """
        if exchange.held:
            exchange.release()
        if type(response) is list or len(response) >= COUNTED_BYTES:
            response = self._with_room(exchange, response)
        exchange.response = response
        exchange.call = None  # the two refer to each other: left to the garbage collector, they cost milliseconds
        self._flush()

    def _with_room(self, exchange: Exchange, response: Response) -> Response:
        if exchange.parts is not None or exchange not in self.pending:  # its head is out, or nobody waits
            return response
        size = sum(map(len, response)) if isinstance(response, list) else len(response)
        if not self.holding.take(size):
            self._front.make_room(size)
            if not self.holding.take(size):
                return error_response(503, self.holding.refusal, exchange.keep_alive, exchange.about())
        exchange.held = size
        return response

    async def send_part(self, exchange: Exchange, data: bytes) -> None:
        """Write a part of a response that `deliver` ends, when those before it have been written.

        Waits while the client does not read.
        """
        if exchange.parts is None:
            exchange.parts = []
        exchange.parts.append(data)
        self._flush()
        await self._can_write.wait()

    def _flush(self) -> None:
        while self.pending:
            done = self.pending[0]
            if done.parts:
                self._write(b"".join(done.parts))
                done.parts.clear()
            if done.response is None:
                break
            self.pending.popleft()
            self._write(done.response)
            if done.held:
                done.release()
            if not done.keep_alive:
                if done.method:
                    self._close()
                else:
                    self._linger()
                return
        if self._is_read_paused:
            self._update_reading()

    def refuse_open(self, status: int, message: str) -> None:
        """Answer what is not answered yet with an error, and close. A response that has begun can be none any more."""
        waiting = list(self.pending)
        for exchange in waiting:
            if exchange.parts is not None:
                return
            if exchange.response is None:
                exchange.keep_alive = exchange is not waiting[-1]
                self.respond(exchange, status, message)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def end(self) -> None:
        """Close now; at once where something is still under way."""
        if self.pending or self._is_reading:
            self.abort()
        else:
            self._close()

    def close_if_idle(self, now: float) -> None:
        """Close when nothing was sent for long: between requests silently, within one with a 408."""
        if self.pending or self._is_write_paused or self._is_closing:
            return
        if self._is_reading and now - self.last_read > READ_TIMEOUT_S:
            self._refuse(408, f"no data for {READ_TIMEOUT_S:.0f} s within a request")
        elif self._is_reading and now - self._begun_at > self._longest_s():
            self._refuse(408, f"a request comes with at least {LEAST_RATE_BYTES_S} bytes a second")
        elif not self._is_reading and now - self.last_read > IDLE_TIMEOUT_S:
            self._close()

    def _longest_s(self) -> float:
        return 2 * READ_TIMEOUT_S + self._front.limits.max_input_size / LEAST_RATE_BYTES_S

    def _start_message(self) -> None:
        self._url = b""
        self._headers = []
        self._header_size = 0
        self._body = []
        self._body_size = 0

    def _count_header(self, size: int) -> None:
        self._header_size += size
        if self._header_size > MAX_HEADER_BYTES and not self._is_closing:
            self._refuse(431, f"headers are larger than {MAX_HEADER_BYTES} bytes")

    def _too_large(self, size: int) -> str:
        """As Triton says it; the size is what has come, or was announced."""
        most = self._front.limits.max_input_size
        return f"request body of {size} or more bytes exceeds the maximum allowed input size of {most} bytes"

    def _refuse(self, status: int, message: str) -> None:
        """Answer after what is pending, then close: what follows on this connection cannot be trusted."""
        if self._is_closing:
            return
        self._is_closing = True
        exchange = Exchange(self, b"", b"", keep_alive=False)
        if self._is_reading:  # what is known of the request so far
            exchange.url, exchange.headers = self._url, self._headers
        self.pending.append(exchange)
        self.respond(exchange, status, message)

    def _write(self, data: Response) -> None:
        if self._transport is not None and not self._transport.is_closing():
            if isinstance(data, list):
                self._transport.writelines(data)
            else:
                self._transport.write(data)
            if self._is_write_paused:
                self._count_unread()

    def _close(self) -> None:
        self._is_closing = True
        if self._transport is not None:
            self._transport.close()

    def _linger(self) -> None:
        """Close after a refusal, but take and forget for a while what the client still sends."""
        self._is_closing = True
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if transport.can_write_eof():
            transport.write_eof()
        self._loop.call_later(LINGER_S, transport.close)

    def _update_reading(self) -> None:
        """Read only while the client takes its answers and has not sent too far ahead."""
        should_pause = self._is_write_paused or len(self.pending) >= MAX_PIPELINED
        if self._transport is None or should_pause == self._is_read_paused or self._transport.is_closing():
            return
        self._is_read_paused = should_pause
        if should_pause:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()
