"""HTTP/1.1 over asyncio and llhttp: infer requests that arrive in one turn of the loop are decoded, submitted and
answered together; nothing is awaited per request. Every other route goes to an ASGI app.

The duties of an HTTP/1.1 connection are in connection.py.
"""

import asyncio
import logging
import re
import ssl
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np

from tutti.core.daemon_threads import Pool
from tutti.core.errors import InferError, InvalidArgument
from tutti.core.types import POOL_PARAMETER, Call, Columns, InferRequest, InferResponse, Parameters, Raw, now_ns
from tutti.frontends.deadlines import TIMEOUT_HEADERS, timeout_ns
from tutti.frontends.door import Door, Elsewhere
from tutti.frontends.held_bytes import COUNTED_BYTES, STALLED_S, WRITE_TIMEOUT_S, Holding
from tutti.frontends.http import answer_headers, compression
from tutti.frontends.http import codec as http_codec
from tutti.frontends.http import log_events as http_events
from tutti.frontends.http.codec import ReplyFormat
from tutti.frontends.http.connection import Connection
from tutti.frontends.http.exchange import Exchange, Head, Response, error_response, response_head
from tutti.frontends.http.status import DIALECT
from tutti.frontends.size_limits import Limits
from tutti.frontends.v2.api import Api

_log = logging.getLogger(__name__)

_SWEEP_S = 5.0
_INFER = re.compile(rb"/v2/models/([^/?]+)(?:/versions/([0-9]{1,19}))?/infer")
_MAX_ROUTES = 1024
_MAX_ROUTE_BYTES = 512

# JSON from here on, and what is compressed, may take long to decode; a thousand times as much may be inflated.
_LONG_JSON_BYTES = 256 * 1024
_LONG_CODED_BYTES = 1024
# A response from here on is written in the pieces it is made of, rather than joined.
LARGE_RESPONSE_BYTES = 64 * 1024

AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]


class _TakesLong(Exception):
    """Decoding it would hold up the loop."""


class HttpFront:
    """One listening HTTP server. Build and use it on one event loop; `settle` may be called from any thread."""

    def __init__(self, app: AsgiApp, api: Api | None = None, memory: Callable[[int], memoryview] | None = None) -> None:
        """With an Api, infer routes are served; `app` answers all else. Large bodies are received in `memory(size)`."""
        self.limits = api.limits if api is not None else Limits()
        self.holding = api.holding if api is not None else Holding(self.limits.max_inflight_bytes)
        # Connections whose clients leave answers unread.
        self.stalled: set[Connection] = set()
        # What takes long to decode does so beside the loop, one after the other.
        self._decoder = Pool(1, "http-decode")
        self.memory = memory or new_memory
        self._app = app
        self._api = api
        self._door = Door(DIALECT, api.engine, api.http, api.tracer) if api is not None else None
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._arrived: list[Exchange] = []
        self._headers = http_codec.HeaderCache()
        self._routes: dict[bytes, tuple[str, str] | None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.connections: set[Connection] = set()
        self.is_draining = False
        self.heads: dict[bytes, Head] = {}
        self._server: asyncio.Server | None = None
        self._sweep: asyncio.TimerHandle | None = None

    async def start(self, host: str, port: int, reuse_port: bool = False, tls: ssl.SSLContext | None = None) -> int:
        """Listen; returns the port, chosen by the system for 0."""
        self._server = await self._loop.create_server(
            lambda: Connection(self), host, port, reuse_port=reuse_port or None, backlog=1024, ssl=tls
        )
        self._sweep = self._loop.call_later(_SWEEP_S, self._close_idle)
        return int(self._server.sockets[0].getsockname()[1])

    async def start_unix(self, path: Path) -> None:
        """Listen on a Unix socket that only this user can reach, by its folder."""
        self._server = await self._loop.create_unix_server(lambda: Connection(self), str(path))
        self._sweep = self._loop.call_later(_SWEEP_S, self._close_idle)

    async def stop(self, drain_s: float = 0.0, grace_s: float = 5.0, error: InferError | None = None) -> None:
        """Stop listening, let open exchanges end, then close the connections.

        For `drain_s` before that, each connection that asks again is told to close with its answer. With `error` those
        that have not ended are answered with it.
        """
        if self._sweep is not None:
            self._sweep.cancel()
        if self._server is not None:
            self._server.close()
        self.is_draining = True
        deadline = self._loop.time() + drain_s
        while self.connections and self._loop.time() < deadline:
            await asyncio.sleep(0.01)
        deadline = self._loop.time() + grace_s
        while any(connection.pending for connection in self.connections) and self._loop.time() < deadline:
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            if error is not None:
                connection.refuse_open(DIALECT.code_of(error), error.message)
            connection.end()
        for task in self._tasks:
            task.cancel()
        self._decoder.shutdown(wait=False, cancel_futures=True)

    def handle(self, exchange: Exchange) -> None:
        """A complete request. Infer requests wait for the end of this turn of the loop."""
        is_known = exchange.head is not None and exchange.head.memo is not None
        if self._api is not None and (is_known or self._route(exchange.url) is not None):
            if not self._api.http.gate.is_open and not self._may_infer(exchange):
                return
            if exchange.method != b"POST":
                exchange.connection.respond(exchange, 405, "method not allowed: infer needs POST")
                return
            if not self._arrived:
                self._loop.call_soon(self._flush)
            self._arrived.append(exchange)
            return
        self._start_app(exchange)

    def _start_app(self, exchange: Exchange) -> None:
        task = exchange.task = self._loop.create_task(self._run_app(exchange))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def settle(self, calls: Sequence[Call]) -> None:
        """Encode in the caller's thread, write on the loop: one trip for all of them."""
        now = now_ns()
        mates = _Mates(now)
        answered = [(call.token, self._encode(call, mates)) for call in calls]
        assert self._api is not None
        deliver = _deliver
        if self._api.requests.is_on:
            deliver = partial(self._deliver_noted, self._note(calls, answered, now), now)
        if threading.get_ident() == self._thread:
            deliver(answered)
            return
        try:
            self._loop.call_soon_threadsafe(deliver, answered)
        except RuntimeError:
            _log.debug("the loop is closed: %d answers are dropped", len(answered))

    def _note(self, calls: Sequence[Call], answered: "_Answered", now: int) -> list[tuple[Call, Response]]:
        """Note all answers but large ones, which are returned: whether there is room for them shows on the loop."""
        assert self._api is not None
        small: list[tuple[Call, Response]] = []
        large: list[tuple[Call, Response]] = []
        for call, (exchange, response) in zip(calls, answered, strict=True):
            if exchange.response is not None:  # it was answered, and noted, when the server stopped
                continue
            is_large = isinstance(response, list) or len(response) >= COUNTED_BYTES
            (large if is_large else small).append((call, response))
        http_events.note_calls(self._api.requests, small, now)
        return large

    def _deliver_noted(self, large: Sequence[tuple[Call, Response]], now: int, answered: "_Answered") -> None:
        assert self._api is not None
        _deliver(answered)
        if large:
            given = [(call, call.token.response or response) for call, response in large]
            http_events.note_calls(self._api.requests, given, now)

    def refused(self, exchange: Exchange, status: int, message: str) -> None:
        if self._api is not None and self._api.requests.is_on:
            since_ns = exchange.connection.passed_ns()
            http_events.note_refusal(self._api.requests, exchange, status, message, since_ns)

    def _route(self, url: bytes) -> tuple[str, str] | None:
        """(model, version) of an infer URL, else None."""
        if url in self._routes:
            return self._routes[url]
        match = _INFER.fullmatch(url.partition(b"?")[0])
        route = None
        if match is not None:
            name, version = (unquote_to_bytes(part or b"").decode("utf-8", "replace") for part in match.groups())
            route = (name, version)
        if len(self._routes) < _MAX_ROUTES and len(url) <= _MAX_ROUTE_BYTES:
            self._routes[url] = route
        return route

    def _may_infer(self, exchange: Exchange) -> bool:
        assert self._door is not None
        refusal = self._door.refusal("inference", exchange.headers)
        if refusal is not None:
            exchange.connection.respond(exchange, *refusal)
        return refusal is None

    def _flush(self) -> None:
        assert self._door is not None
        arrived, self._arrived = self._arrived, []
        calls = []
        for exchange in arrived:
            try:
                calls.append(self._call(exchange))
            except Elsewhere:
                self._start_app(exchange)
            except _TakesLong:
                self._decoder.submit(self._take_long, exchange)
            except Exception as error:  # whatever it is, those that came together with it are answered
                self._refuse(exchange, error)
        if calls:
            self._door.submit(calls)

    def _take_long(self, exchange: Exchange) -> None:
        """In the decoder's thread: a request that would hold up the loop."""
        assert self._door is not None
        later = self._loop.call_soon_threadsafe
        # No name may keep the errors: they lead to this frame, and such a cycle would keep the body.
        try:
            self._door.submit([self._call(exchange, may_take_long=True)])
        except Elsewhere:
            later(self._start_app, exchange)
        except Exception as error:
            later(self._refuse, exchange, error)

    def _refuse(self, exchange: Exchange, error: Exception) -> None:
        """Answer a request that did not decode."""
        assert self._door is not None
        exchange.body = b""  # inflated it may be large, and its client may not read the answer
        failure = self._door.decode_failure(error, *(self._route(exchange.url) or ("", "")))
        exchange.connection.respond(exchange, *failure)

    def _call(self, exchange: Exchange, may_take_long: bool = False) -> Call:
        """The exchange's request as a call. Raises _TakesLong where that is not for this thread."""
        door = self._door
        assert door is not None
        received_ns = now_ns() if door.tracer.is_on else 0
        head = exchange.head.memo if exchange.head is not None else None
        if type(head) is not InferHead:
            head = self._read_head(exchange)
        request, exchange.reply = self._decode(head, exchange, may_take_long)
        call = Call(request, self, exchange)
        door.begin(call, exchange.headers, head.left_ns, received_ns)
        if call.trace is not None:  # it is known by the answer's id, as in logs
            exchange.request_id = exchange.request_id or answer_headers.request_id(request.id)
            call.trace.note("answer_id", exchange.request_id.decode())
        exchange.call = call
        exchange.body = b""
        return call

    def _read_head(self, exchange: Exchange) -> "InferHead":
        route = self._route(exchange.url)
        assert route is not None, "else it is not an infer request"
        head = _infer_head(*route, exchange.headers)
        if exchange.head is not None:
            exchange.head.memo = head
        return head

    def _decode(self, head: "InferHead", exchange: Exchange, may_take_long: bool) -> tuple[InferRequest, ReplyFormat]:
        assert self._api is not None and self._door is not None
        name, version, header_length = head.model, head.version, head.header_length
        exchange.request_id = head.request_id
        if head.coding and self._api.is_front_end:
            raise Elsewhere
        size = len(exchange.body) if header_length is None else header_length
        if (size > _LONG_JSON_BYTES or (head.coding and size > _LONG_CODED_BYTES)) and not may_take_long:
            raise _TakesLong
        if head.coding:
            exchange.body = compression.decompress(exchange.body, head.coding, self.limits.max_input_size)
        if header_length == 0:
            config = self._door.model(name, version).config
            request, reply = http_codec.decode_raw(config, version, exchange.body), http_codec.BINARY_REPLY
        else:
            regions = self._api.shared_memory
            request, reply = http_codec.decode(name, version, exchange.body, header_length, self._headers, regions)
        if request.classes and self._api.is_front_end:
            raise Elsewhere
        if head.reply_coding:
            reply = replace(reply, coding=head.reply_coding)
        return request, reply

    def _encode(self, call: Call, mates: "_Mates") -> Response:
        exchange: Exchange = call.token
        assert self._api is not None and self._door is not None
        try:
            response, shared = self._api.complete(call)
            columns = response.columns
            is_plain = exchange.keep_alive and not call.request.id and not shared
            if columns is not None and is_plain and mates.have(call, response, exchange):
                start, stop = response.start, response.stop
                sent = exchange.request_id
                own = sent + _HEAD_END if sent else answer_headers.place(start)
                data = [raw[start * size : stop * size] for size, raw in columns.raws]
                pieces: list[Raw] = [mates.head, own, mates.header, *data]
                return pieces if mates.is_large else b"".join(pieces)
            header_length, parts = http_codec.encode(response, call.request.id, exchange.reply, shared)
            return _response(call, header_length, parts, response.parameters, mates.now_ns)
        except Exception as error:
            failure = self._door.encode_failure(error, call)
            return error_response(*failure, exchange.keep_alive, _about(call, mates.now_ns))

    async def _run_app(self, exchange: Exchange) -> None:
        """Let the app answer: in one piece, or as it comes where the app sends it in parts."""
        reply = _Reply(exchange)
        scope = _scope(exchange)
        began_ns = now_ns()
        is_received = False

        async def receive() -> dict[str, Any]:
            nonlocal is_received
            if is_received:  # an app that asks again waits for the client to go: it is cancelled then
                await asyncio.Event().wait()
            is_received = True
            body, exchange.body = exchange.body, b""  # what is copied here is not held twice
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        try:
            await self._app(scope, receive, reply.send)
        except Exception as error:
            _log.exception("%s %s failed", exchange.method.decode("latin-1"), exchange.url.decode("latin-1"))
            if exchange.response is not None:  # the app has answered, and tells of it so
                return
            if exchange.parts is None:
                exchange.connection.respond(exchange, 500, f"internal error: {type(error).__name__}")
                reply.status = 0  # it was noted
            else:
                exchange.connection.abort()  # half a response is out: only a broken connection tells the client
        finally:
            exchange.task = None
            exchange.release()
            if self._api is not None and self._api.requests.is_on:
                self._note_reply(exchange, reply, scope.get("call"), now_ns() - began_ns)

    def _note_reply(self, exchange: Exchange, reply: "_Reply", call: Call | None, took_ns: int) -> None:
        assert self._api is not None
        if not reply.status and (exchange.response is not None or self._api.is_front_end):  # whoever answered notes it
            return
        is_begun = exchange.parts is not None or exchange.response is not None
        answered = (reply.status, reply.size, reply.error) if is_begun else (0, 0, b"")
        http_events.note_reply(self._api.requests, exchange, answered, call, took_ns)

    def make_room(self, size: int) -> None:
        """Break with clients that read nothing of their answers, until there is room, if they are enough."""
        now = self._loop.time()
        for connection in sorted(self.stalled, key=lambda stalled: stalled.read_at):
            if self.holding.held + size <= self.holding.limit:
                return
            connection.close_if_unread(now, STALLED_S)

    def _close_idle(self) -> None:
        now = self._loop.time()
        for connection in list(self.connections):
            connection.close_if_idle(now)
        for connection in list(self.stalled):
            connection.close_if_unread(now, WRITE_TIMEOUT_S)
        self._sweep = self._loop.call_later(_SWEEP_S, self._close_idle)


def new_memory(size: int) -> memoryview:
    """Memory of this process: unlike a bytearray not written before it is needed. Raises MemoryError."""
    array: Any = np.empty(size, np.uint8)
    return memoryview(array)


@dataclass(frozen=True, slots=True)
class InferHead:
    """What an infer request's head says: its model, its JSON's length, how it and its answer are compressed, its time.

    `left_ns` is 0 where the client waits for as long as it takes; `request_id` is b"" where it has sent none.
    """

    model: str
    version: str
    header_length: int | None
    coding: str
    reply_coding: str
    left_ns: int
    request_id: bytes


def _infer_head(model: str, version: str, headers: Sequence[tuple[bytes, bytes]]) -> InferHead:
    header_length: int | None = None
    coding = reply_coding = ""
    left_ns, request_id = 0, b""
    for key, value in headers:
        if key == b"inference-header-content-length":
            if not value.isdigit() or len(value) > 18:
                raise InvalidArgument(f"model '{model}': Inference-Header-Content-Length: expected a whole number")
            header_length = int(value)
        elif key == b"content-encoding" and value.lower() != b"identity":
            coding = value.decode("latin-1").lower()
        elif key == b"accept-encoding":
            reply_coding = compression.choose(value.decode("latin-1"))
        elif key in TIMEOUT_HEADERS:
            header_ns = timeout_ns(key, value)
            left_ns = min(left_ns or header_ns, header_ns)
        elif key == answer_headers.ID_HEADER:
            request_id = answer_headers.id_of(value)
    return InferHead(model, version, header_length, coding, reply_coding, left_ns, request_id)


class _Reply:
    """An ASGI app's messages as an HTTP response: chunked where it comes in parts, but for HTTP/1.0, which cannot."""

    def __init__(self, exchange: Exchange) -> None:
        self._held = b""
        self._exchange = exchange
        # 0 until it has begun; and the bytes of its body.
        self.status = self.size = 0
        # Where it is an error that comes in one piece.
        self.error = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._is_begun = False

    async def send(self, message: Any) -> None:
        exchange = self._exchange
        connection = exchange.connection
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._headers = [header for header in message.get("headers", ()) if header[0] != b"content-length"]
            timing, known_as = exchange.about()
            is_timed = any(name == answer_headers.TIMING_HEADER for name, _ in self._headers)
            self._headers += [known_as] if is_timed else [timing, known_as]
            return
        body: bytes = message.get("body", b"")
        self.size += len(body)
        is_last = not message.get("more_body", False)
        if exchange.is_http_1_0:
            self._held += body
            body = self._held
            if not is_last:
                return
        if is_last and not self._is_begun:
            self.error = body if self.status >= 400 else b""
            head = response_head(self.status, self._headers, len(body), exchange.keep_alive)
            answer = head if exchange.method == b"HEAD" else head + body
            connection.deliver(exchange, answer)
            if isinstance(exchange.response, bytes) and exchange.response is not answer:  # there was no room for it
                head, _, self.error = exchange.response.partition(b"\r\n\r\n")
                self.status, self.size = int(head[9:12]), len(self.error)
            return
        part = b""
        if not self._is_begun:
            self._is_begun = True
            part = response_head(self.status, self._headers, None, exchange.keep_alive)
        if body:
            part += b"%x\r\n%b\r\n" % (len(body), body)
        if is_last:
            connection.deliver(exchange, part + b"0\r\n\r\n")
        elif part:
            await connection.send_part(exchange, part)


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
        "exchange": exchange,
    }


def _pieces(parts: list[Raw]) -> Response:
    """Joined, unless a copy costs more than several writes."""
    return b"".join(parts) if sum(map(len, parts)) < LARGE_RESPONSE_BYTES else parts


def _response(call: Call, header_length: int | None, parts: list[Raw], parameters: Parameters, now: int) -> Response:
    exchange: Exchange = call.token
    coding = exchange.reply.coding
    if header_length is not None and exchange.keep_alive and not coding:
        start = _binary_start(header_length, sum(map(len, parts)))
        if parameters:
            start += _pool_line(parameters)
        timing = answer_headers.timing(call.arrived_ns, call.times, now)
        own = exchange.request_id or answer_headers.request_id(call.request.id)
        return _pieces([b"".join([start, _TIMING_LINE, timing, _ID_LINE, own, _HEAD_END]), *parts])
    body = b"".join(parts)
    headers = [_JSON_TYPE] if header_length is None else [_BINARY_TYPE]
    if header_length is not None:
        headers.append((b"inference-header-content-length", b"%d" % header_length))
    if coding:
        body = compression.compress(body, coding)
        headers.append((b"content-encoding", coding.encode()))
    if parameters and (pool := _pool(parameters)):
        headers.append((_POOL_HEADER, pool))
    return response_head(200, headers + _about(call, now), len(body), exchange.keep_alive) + body


_JSON_TYPE = (b"content-type", b"application/json")
_POOL_HEADER = b"tutti-pool"
_POOL_NAME = re.compile(r"[a-z0-9_]{1,64}")
_BINARY_TYPE = (b"content-type", b"application/octet-stream")
_HEAD_END = b"\r\n\r\n"
_TIMING_LINE, _ID_LINE = b"server-timing: ", b"\r\nx-request-id: "
_BINARY_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\n"
    b"inference-header-content-length: %d\r\ncontent-length: %d\r\n"
)


@lru_cache(maxsize=4096)
def _binary_start(header_length: int, length: int) -> bytes:
    """An answer's head up to what is its own."""
    return _BINARY_HEAD % (header_length, length)


class _Mates:
    """What answers that are settled together have in common: nearly always all but their ids and their data."""

    # Up to the answer's id, and from there to its data. Most are made for one answer that needs nothing of this.
    head = header = b""
    is_large = False
    # Of the last answer that was looked at.
    _columns: Columns | None = None
    _reply: ReplyFormat | None = None
    _arrived_ns = _rows = 0
    _parameters: Parameters | None = None
    _is_own = False
    _start = _ids = b""

    def __init__(self, now_ns: int) -> None:
        self.now_ns = now_ns

    def have(self, call: Call, response: InferResponse, exchange: Exchange) -> bool:
        """Whether it is an answer all in binary: then `head` and `header` are its own."""
        if (
            response.columns is not self._columns
            or exchange.reply is not self._reply
            or response.stop - response.start != self._rows
            or response.parameters != self._parameters
            or (not exchange.request_id) is not self._is_own
        ):
            if not self._begin(response, exchange):
                return False
        elif call.arrived_ns == self._arrived_ns:
            return True
        self._arrived_ns = call.arrived_ns
        timing = answer_headers.timing(call.arrived_ns, call.times, self.now_ns)
        self.head = b"%bserver-timing: %b\r\nx-request-id: %b" % (self._start, timing, self._ids)
        return True

    def _begin(self, response: InferResponse, exchange: Exchange) -> bool:
        """Make what does not depend on the time; False for an answer that is not all in binary."""
        header = http_codec.part_header(response, exchange.reply) if not exchange.reply.coding else None
        if header is None:
            return False
        self.header, size = header
        self._columns, self._reply = response.columns, exchange.reply
        self._rows, self._parameters = response.stop - response.start, response.parameters
        self._is_own = not exchange.request_id
        self._ids = answer_headers.new_ids() if self._is_own else b""
        length = len(self.header) + size
        self._start = _binary_start(len(self.header), length)
        if response.parameters:
            self._start += _pool_line(response.parameters)
        self.is_large = length >= LARGE_RESPONSE_BYTES
        return True


def _about(call: Call, now: int) -> list[tuple[bytes, bytes]]:
    """The headers that tell of a request: its id, and where its time went."""
    exchange: Exchange = call.token
    own = answer_headers.ID_HEADER, exchange.request_id or answer_headers.request_id(call.request.id)
    return [(answer_headers.TIMING_HEADER, answer_headers.timing(call.arrived_ns, call.times, now)), own]


def _pool_line(parameters: Parameters) -> bytes:
    pool = _pool(parameters)
    return b"%b: %b\r\n" % (_POOL_HEADER, pool) if pool else b""


def _pool(parameters: Parameters) -> bytes:
    """The pool that answered, where a parameter says so: a model may write there what is no header."""
    pool = parameters.get(POOL_PARAMETER)
    return pool.encode() if isinstance(pool, str) and _POOL_NAME.fullmatch(pool) else b""


_Answered = Sequence[tuple[Exchange, Response]]


def _deliver(answered: _Answered) -> None:
    for exchange, response in answered:
        try:
            exchange.connection.deliver(exchange, response)
        except Exception:  # the others' answers are not lost with it
            _log.exception("an answer could not be written")
            exchange.connection.abort()
