"""Bytes to HTTP requests: llhttp's callbacks, heads that were read before, bodies and their limits.

Knows neither answers nor the order that they are written in: connection.py does.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

import httptools

from tutti.frontends.held_bytes import COUNTED_BYTES, Holding
from tutti.frontends.http.exchange import Client, Exchange, Head
from tutti.frontends.http.large_body import LargeBody
from tutti.frontends.size_limits import Limits

_log = logging.getLogger(__name__)

MAX_HEADER_BYTES = 64 * 1024
_HEADER_OVERHEAD = 4  # ": " and the line's end
MAX_KNOWN_HEADS = 1024
MAX_KNOWN_HEAD_BYTES = 4096
_NOT_REPEATABLE = frozenset({b"transfer-encoding", b"expect", b"upgrade"})
# A larger body is received into the one buffer that it stays in.
LARGE_BODY_BYTES = 64 * 1024


class Receiving(Protocol):
    """What reading needs of the front that a connection belongs to.

    `heads` are the heads that its connections have read, by their bytes.
    """

    limits: Limits
    holding: Holding
    heads: dict[bytes, Head]

    def memory(self, size: int) -> memoryview:
        """Where a large body is received. Raises MemoryError."""

    def make_room(self, size: int) -> None:
        """Break with clients that do not read, for `size` bytes more."""


class RequestReader(asyncio.Protocol, Client):
    """The reading half of a connection: bytes in, exchanges out. `Connection` answers them."""

    def __init__(self, front: Receiving) -> None:
        self._front: Receiving = front
        self.holding = front.holding
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self.last_read = 0.0
        # When the request that is being read has begun.
        self._begun_at = 0.0
        # The length of the body being read, where it is a large one of known length.
        self._large_length = 0
        self._is_reading = False
        # Whether the connection is to end: what still comes is not read.
        self._is_closing = False
        self._is_read_paused = False
        self._new_head = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._counting: Exchange | None = None
        self._start_message()

    def _accept(self, exchange: Exchange) -> None:
        """A whole request is there."""
        raise NotImplementedError

    def _refuse(self, status: int, message: str) -> None:
        """Answer with an error after what is pending, then close."""
        raise NotImplementedError

    def _continue(self) -> None:
        """The client waits for leave to send the body."""
        raise NotImplementedError

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
        start = 0
        while start < len(data) and not self._is_closing:
            end = data.find(b"\r\n\r\n", start, start + MAX_KNOWN_HEAD_BYTES) + 4
            if end == 3:
                break
            raw = data[start:end]
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
            start = end + head.length
            self._accept(exchange)
        if self._is_closing:
            return b""
        return data[start:] if start else data

    def _remember(self, exchange: Exchange) -> None:
        """Keep the head of the request that llhttp has just read, if it means the same whenever it comes."""
        raw, self._new_head = self._new_head, b""
        if not raw:
            return
        lengths = [value for name, value in exchange.headers if name == b"content-length"]
        names = {name for name, _ in exchange.headers}
        # If each of its lines is a header that llhttp has told of, the head ends where the body began.
        is_plain = raw.count(b"\n") == raw.count(b"\r\n") == len(exchange.headers) + 2
        if not is_plain or exchange.is_http_1_0 or len(lengths) > 1 or names & _NOT_REPEATABLE:
            return
        length = int(lengths[0]) if lengths else 0
        if length != len(exchange.body):
            return
        if len(self._front.heads) >= MAX_KNOWN_HEADS:
            self._front.heads.clear()
        exchange.head = self._front.heads[raw] = Head(exchange, length)

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
            elif name == b"expect" and value.lower() == b"100-continue":
                self._continue()
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

    # bodies and limits

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
            self._switch(LargeBody(self, exchange, self._front.memory(length), begun))
        except MemoryError:
            exchange.release()
            self._refuse(503, f"no memory for a body of {length} bytes")

    def end_large_body(self, exchange: Exchange) -> None:
        """The whole body is there."""
        self._is_reading = False
        self._parser = httptools.HttpRequestParser(self)  # the old parser still waits for the body that went past it
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
        if not self._is_read_paused:  # makes the transport read as the new protocol wants
            transport.pause_reading()
            transport.resume_reading()

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
