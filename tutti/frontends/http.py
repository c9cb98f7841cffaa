"""HTTP/1.1 over asyncio and llhttp: infer requests that arrive in one turn of the loop are decoded, submitted and
answered together; nothing is awaited per request. Every other route goes to an ASGI app.

The duties of an HTTP/1.1 connection are in http_connection.py.
"""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import unquote_to_bytes

from tutti.engine import Engine
from tutti.errors import InferError, InvalidArgument
from tutti.frontends import compression, http_codec
from tutti.frontends.api import Limits, in_classes, submit
from tutti.frontends.http_codec import ReplyFormat
from tutti.frontends.http_connection import Connection, Exchange, error_response, response_head
from tutti.frontends.http_status import status_of
from tutti.types import Call, InferRequest, InferResponse

_log = logging.getLogger(__name__)

_SWEEP_S = 5.0
_INFER = re.compile(rb"/v2/models/([^/?]+)(?:/versions/([^/?]+))?/infer")
_MAX_ROUTES = 1024

AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]


class HttpFront:
    """One listening HTTP server. Build and use it on one event loop; `settle` may be called from any thread."""

    def __init__(self, app: AsgiApp, engine: Engine | None = None, limits: Limits | None = None) -> None:
        """With an engine, infer routes are served; `app` answers all else."""
        self.limits = limits or Limits()
        self._app = app
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._arrived: list[Exchange] = []
        self._headers = http_codec.HeaderCache()
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
        answered = [(call.token, self._encode(call)) for call in calls]
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
                limit = self.limits.max_input_size
                exchange.body = compression.decompress(exchange.body, value.decode("latin-1").lower(), limit)
            elif key == b"accept-encoding":
                exchange.encoding = compression.choose(value.decode("latin-1"))
        if header_length == 0:
            request = http_codec.decode_raw(self._engine.model(name, version).config, version, exchange.body)
            return request, http_codec.BINARY_REPLY
        return http_codec.decode(name, version, exchange.body, header_length, self._headers)

    def _encode(self, call: Call) -> bytes:
        exchange: Exchange = call.token
        answer = call.answer
        try:
            if isinstance(answer, InferResponse):
                if call.request.classes:
                    assert self._engine is not None
                    answer = in_classes(self._engine, call.request, answer)
                header_length, body = http_codec.encode(answer, call.request.id, exchange.reply)
                return _response(exchange, header_length, body)
            assert answer is not None
            raise answer
        except InferError as error:
            return error_response(status_of(error), error.message, exchange.keep_alive)
        except Exception as error:
            _log.exception("a response of model '%s' could not be encoded", call.request.model_name)
            return error_response(500, f"internal error: {type(error).__name__}", exchange.keep_alive)

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


def _response(exchange: Exchange, header_length: int | None, body: bytes) -> bytes:
    if header_length is not None and exchange.keep_alive and not exchange.encoding:
        return _BINARY_HEAD % (header_length, len(body)) + body
    headers = [_JSON_TYPE] if header_length is None else [_BINARY_TYPE]
    if header_length is not None:
        headers.append((b"inference-header-content-length", b"%d" % header_length))
    if exchange.encoding:
        body = compression.compress(body, exchange.encoding)
        headers.append((b"content-encoding", exchange.encoding.encode()))
    return response_head(200, headers, len(body), exchange.keep_alive) + body


_JSON_TYPE = (b"content-type", b"application/json")
_BINARY_TYPE = (b"content-type", b"application/octet-stream")
_BINARY_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\n"
    b"inference-header-content-length: %d\r\ncontent-length: %d\r\n\r\n"
)


def _deliver(answered: Sequence[tuple[Exchange, bytes]]) -> None:
    for exchange, response in answered:
        exchange.connection.deliver(exchange, response)
