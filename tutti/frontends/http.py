"""HTTP/1.1 over asyncio and llhttp: infer requests that arrive in one turn of the loop are decoded, submitted and
answered together; nothing is awaited per request. Every other route goes to an ASGI app.

Owns the duties of an HTTP/1.1 server: ordered answers on pipelined connections, keep-alive, 100-continue, limits on
headers and bodies, timeouts, back-pressure, and refusal of what llhttp calls malformed.
"""

import asyncio
import logging
import re
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import unquote_to_bytes

import httptools
import orjson

from tutti.engine import Engine
from tutti.errors import InferError, InvalidArgument, Unsupported
from tutti.frontends import http_codec
from tutti.frontends.api import Limits, submit
from tutti.frontends.http_codec import ReplyFormat
from tutti.frontends.http_status import status_of
from tutti.types import Call, InferRequest, InferResponse

_log = logging.getLogger(__name__)

MAX_HEADER_BYTES = 64 * 1024
MAX_PIPELINED = 128
IDLE_TIMEOUT_S = 75.0
READ_TIMEOUT_S = 60.0
_SWEEP_S = 5.0
_INFER = re.compile(rb"/v2/models/([^/?]+)(?:/versions/([^/?]+))?/infer")
_MAX_ROUTES = 1024

AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]


def response_head(status: int, headers: Sequence[tuple[bytes, bytes]], length: int, keep_alive: bool) -> bytes:
    """The bytes before a body of `length` bytes."""
    phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Error"
    lines = [b"HTTP/1.1 %d %s" % (status, phrase.encode())]
    lines += [b"%s: %s" % header for header in headers]
    lines.append(b"content-length: %d" % length)
    if not keep_alive:
        lines.append(b"connection: close")
    return b"\r\n".join(lines) + b"\r\n\r\n"


def error_response(status: int, message: str, keep_alive: bool) -> bytes:
    body = orjson.dumps({"error": message})
    headers = [(b"content-type", b"application/json")]
    if status == 503:
        headers.append((b"retry-after", b"1"))
    return response_head(status, headers, len(body), keep_alive) + body


class Exchange:
    """One request on a connection, and its response once there is one. The sink's token of an infer call."""

    __slots__ = ("body", "call", "connection", "headers", "keep_alive", "method", "reply", "response", "url")

    def __init__(self, connection: "Connection", method: bytes, url: bytes, keep_alive: bool) -> None:
        self.connection = connection
        self.method = method
        self.url = url
        self.keep_alive = keep_alive
        self.headers: list[tuple[bytes, bytes]] = []
        self.body: bytes = b""
        self.call: Call | None = None
        self.reply: ReplyFormat = http_codec.JSON_REPLY
        self.response: bytes | None = None


class HttpFront:
    """One listening HTTP server. Build and use it on one event loop; `settle` may be called from any thread."""

    def __init__(self, app: AsgiApp, engine: Engine | None = None, limits: Limits | None = None) -> None:
        """With an engine, infer routes are served; `app` answers all else."""
        self.limits = limits or Limits()
        self._app = app
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._arrived: list[Exchange] = []
        self._routes: dict[bytes, tuple[str, str] | None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.connections: set[Connection] = set()
        self._server: asyncio.Server | None = None
        self._sweep: asyncio.TimerHandle | None = None

    async def start(self, host: str, port: int, reuse_port: bool = False) -> int:
        """Listen; returns the port, chosen by the system for 0."""
        self._server = await self._loop.create_server(
            lambda: Connection(self), host, port, reuse_port=reuse_port or None, backlog=1024
        )
        self._sweep = self._loop.call_later(_SWEEP_S, self._close_idle)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self, grace_s: float = 5.0) -> None:
        """Stop listening, let open exchanges end, then close the connections."""
        if self._sweep is not None:
            self._sweep.cancel()
        if self._server is not None:
            self._server.close()
        deadline = self._loop.time() + grace_s
        while any(connection.pending for connection in self.connections) and self._loop.time() < deadline:
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.abort()
        for task in self._tasks:
            task.cancel()

    def handle(self, exchange: Exchange) -> None:
        """A complete request. Infer requests wait for the end of this turn of the loop."""
        if self._engine is not None and self._route(exchange.url) is not None:
            if exchange.method != b"POST":
                exchange.connection.respond(exchange, 405, "method not allowed: infer needs POST")
                return
            if not self._arrived:
                self._loop.call_soon(self._flush)
            self._arrived.append(exchange)
            return
        task = self._loop.create_task(self._run_app(exchange))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def settle(self, calls: Sequence[Call]) -> None:
        """Encode in the caller's thread, write on the loop: one trip for all of them."""
        answered = [(call.token, _encode(call)) for call in calls]
        try:
            self._loop.call_soon_threadsafe(_deliver, answered)
        except RuntimeError:
            _log.debug("the loop is closed: %d answers are dropped", len(answered))

    def _route(self, url: bytes) -> tuple[str, str] | None:
        """(model, version) of an infer URL, else None."""
        if url in self._routes:
            return self._routes[url]
        match = _INFER.fullmatch(url.partition(b"?")[0])
        route = None
        if match is not None:
            name, version = (unquote_to_bytes(part or b"").decode("utf-8", "replace") for part in match.groups())
            route = (name, version)
        if len(self._routes) < _MAX_ROUTES:
            self._routes[url] = route
        return route

    def _flush(self) -> None:
        arrived, self._arrived = self._arrived, []
        calls = []
        for exchange in arrived:
            try:
                request, exchange.reply = self._decode(exchange)
            except InferError as error:
                exchange.connection.respond(exchange, status_of(error), error.message)
                continue
            except Exception as error:
                _log.exception("an infer request could not be decoded")
                exchange.connection.respond(exchange, 500, f"internal error: {type(error).__name__}")
                continue
            exchange.call = call = Call(request, self, exchange)
            exchange.body = b""
            calls.append(call)
        if calls:
            assert self._engine is not None
            submit(self._engine, calls)

    def _decode(self, exchange: Exchange) -> tuple[InferRequest, ReplyFormat]:
        route = self._route(exchange.url)
        assert route is not None and self._engine is not None
        name, version = route
        header_length: int | None = None
        for key, value in exchange.headers:
            if key == b"inference-header-content-length":
                if not value.isdigit() or len(value) > 18:
                    raise InvalidArgument(f"model '{name}': Inference-Header-Content-Length: expected a whole number")
                header_length = int(value)
            elif key == b"content-encoding" and value.lower() != b"identity":
                raise Unsupported(f"model '{name}': Content-Encoding '{value.decode('latin-1')}' is not supported")
        if header_length == 0:
            request = http_codec.decode_raw(self._engine.model(name, version).config, version, exchange.body)
            return request, http_codec.BINARY_REPLY
        return http_codec.decode(name, version, exchange.body, header_length)

    async def _run_app(self, exchange: Exchange) -> None:
        started: dict[str, Any] = {"status": 500, "headers": []}
        body: list[bytes] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": exchange.body, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                started.update(message)
            else:
                body.append(message.get("body", b""))

        try:
            await self._app(_scope(exchange), receive, send)
        except Exception as error:
            _log.exception("%s %s failed", exchange.method.decode("latin-1"), exchange.url.decode("latin-1"))
            exchange.connection.respond(exchange, 500, f"internal error: {type(error).__name__}")
            return
        content = b"".join(body)
        headers = [header for header in started["headers"] if header[0] != b"content-length"]
        head = response_head(started["status"], headers, len(content), exchange.keep_alive)
        exchange.connection.deliver(exchange, head if exchange.method == b"HEAD" else head + content)

    def _close_idle(self) -> None:
        now = self._loop.time()
        for connection in list(self.connections):
            connection.close_if_idle(now)
        self._sweep = self._loop.call_later(_SWEEP_S, self._close_idle)


def _scope(exchange: Exchange) -> dict[str, Any]:
    path, _, query = exchange.url.partition(b"?")
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": exchange.method.decode("latin-1"),
        "scheme": "http",
        "path": unquote_to_bytes(path).decode("utf-8", "replace"),
        "raw_path": path,
        "query_string": query,
        "root_path": "",
        "headers": exchange.headers,
        "client": None,
        "server": None,
    }


def _encode(call: Call) -> bytes:
    exchange: Exchange = call.token
    answer = call.answer
    try:
        if isinstance(answer, InferResponse):
            header_length, body = http_codec.encode(answer, call.request.id, exchange.reply)
            if header_length is None:
                return response_head(200, _JSON_HEADERS, len(body), exchange.keep_alive) + body
            close = b"" if exchange.keep_alive else b"connection: close\r\n"
            return _BINARY_HEAD % (header_length, len(body), close) + body
        assert answer is not None
        raise answer
    except InferError as error:
        return error_response(status_of(error), error.message, exchange.keep_alive)


_JSON_HEADERS = ((b"content-type", b"application/json"),)
_BINARY_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\n"
    b"inference-header-content-length: %d\r\ncontent-length: %d\r\n%s\r\n"
)


def _deliver(answered: Sequence[tuple[Exchange, bytes]]) -> None:
    for exchange, response in answered:
        exchange.connection.deliver(exchange, response)


class Connection(asyncio.Protocol):
    """One client connection: bytes in, exchanges out, responses in the order of the requests."""

    def __init__(self, front: HttpFront) -> None:
        self._front = front
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self.pending: deque[Exchange] = deque()
        self._last_read = 0.0
        self._is_reading = False
        self._is_closing = False
        self._is_write_paused = False
        self._is_read_paused = False
        self._body: list[bytes] = []
        self._start_message()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports do not inherit from it
        self._last_read = asyncio.get_running_loop().time()
        self._front.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._front.connections.discard(self)
        for exchange in self.pending:
            if exchange.call is not None:
                exchange.call.is_cancelled = True
        self.pending.clear()

    def data_received(self, data: bytes) -> None:
        if self._is_closing:
            return
        self._last_read = self._front._loop.time()
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

    def pause_writing(self) -> None:
        self._is_write_paused = True
        self._update_reading()

    def resume_writing(self) -> None:
        self._is_write_paused = False
        self._update_reading()

    # llhttp's callbacks

    def on_message_begin(self) -> None:
        self._start_message()
        self._is_reading = True

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count_header(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))
        self._count_header(len(name) + len(value))

    def on_headers_complete(self) -> None:
        for name, value in self._headers:
            if name == b"content-length" and int(value) > self._front.limits.max_input_size:
                self._refuse(413, self._too_large(int(value)))
            elif name == b"expect" and value.lower() == b"100-continue" and not self.pending and not self._is_closing:
                self._write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body_size += len(body)
        if self._body_size > self._front.limits.max_input_size:
            self._refuse(413, self._too_large(self._body_size))
        elif not self._is_closing:
            self._body.append(body)

    def on_message_complete(self) -> None:
        self._is_reading = False
        if self._parser.should_upgrade():
            self._refuse(400, "protocol upgrades are not supported")
        if self._is_closing:
            return
        exchange = Exchange(self, self._parser.get_method(), self._url, self._parser.should_keep_alive())
        exchange.headers = self._headers
        exchange.body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body = []
        self.pending.append(exchange)
        if not exchange.keep_alive:
            self._is_closing = True
        self._update_reading()
        self._front.handle(exchange)

    # responses

    def respond(self, exchange: Exchange, status: int, message: str) -> None:
        """Answer with an error."""
        self.deliver(exchange, error_response(status, message, exchange.keep_alive))

    def deliver(self, exchange: Exchange, response: bytes) -> None:
        """Write the response now, or when those before it have been written."""
        exchange.response = response
        exchange.call = None  # the two refer to each other: left to the garbage collector, they cost milliseconds
        while self.pending and self.pending[0].response is not None:
            done = self.pending.popleft()
            assert done.response is not None
            self._write(done.response)
            if not done.keep_alive:
                self._close()
                return
        if self._is_read_paused:
            self._update_reading()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def close_if_idle(self, now: float) -> None:
        """Close when nothing was sent for long: between requests silently, within one with a 408."""
        if self.pending or self._is_write_paused or self._is_closing:
            return
        if self._is_reading and now - self._last_read > READ_TIMEOUT_S:
            self._refuse(408, f"no data for {READ_TIMEOUT_S:.0f} s within a request")
        elif not self._is_reading and now - self._last_read > IDLE_TIMEOUT_S:
            self._close()

    def _start_message(self) -> None:
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._header_size = 0
        self._body = []
        self._body_size = 0

    def _count_header(self, size: int) -> None:
        self._header_size += size
        if self._header_size > MAX_HEADER_BYTES and not self._is_closing:
            self._refuse(431, f"headers are larger than {MAX_HEADER_BYTES} bytes")

    def _too_large(self, size: int) -> str:
        return f"the request body has {size} bytes or more, at most {self._front.limits.max_input_size} are accepted"

    def _refuse(self, status: int, message: str) -> None:
        """Answer after what is pending, then close: what follows on this connection cannot be trusted."""
        if self._is_closing:
            return
        self._is_closing = True
        exchange = Exchange(self, b"", b"", keep_alive=False)
        self.pending.append(exchange)
        self.respond(exchange, status, message)

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def _close(self) -> None:
        self._is_closing = True
        if self._transport is not None:
            self._transport.close()

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
