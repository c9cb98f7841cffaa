"""Infer requests over HTTP/1.1: those that arrive in one turn of the loop are decoded, submitted and answered together.

Nothing is awaited per request. Every other route goes to an ASGI app, as in server.py. What an infer request's head
says is in infer_head.py, its body in codec.py, its answer in infer_answers.py.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from tutti.core.daemon_threads import Pool
from tutti.core.errors import InferError
from tutti.core.types import Call, InferRequest, Raw, now_ns
from tutti.frontends.door import Door, Elsewhere
from tutti.frontends.held_bytes import COUNTED_BYTES
from tutti.frontends.http import answer_headers, compression, infer_answers
from tutti.frontends.http import codec as http_codec
from tutti.frontends.http import log_events as http_events
from tutti.frontends.http.asgi import Reply
from tutti.frontends.http.exchange import Exchange, Response, error_response
from tutti.frontends.http.infer_answers import HEAD_END, Mates
from tutti.frontends.http.infer_head import InferHead, Routes, read_head
from tutti.frontends.http.server import AsgiApp, HttpServer
from tutti.frontends.http.status import DIALECT
from tutti.frontends.v2.api import Api
from tutti.frontends.v2.json_request import BINARY_REPLY, ReplyFormat

_log = logging.getLogger(__name__)

# Larger JSON takes long to decode, and so may compressed bodies, which can inflate a thousandfold.
_LONG_JSON_BYTES = 256 * 1024
_LONG_CODED_BYTES = 1024


class _TakesLong(Exception):
    """Decoding it would hold up the loop."""


class HttpFront(HttpServer):
    """An HTTP server with infer routes. The sink of their calls: `settle` may be called from any thread."""

    def __init__(self, app: AsgiApp, api: Api, memory: Callable[[int], memoryview] | None = None) -> None:
        """`app` answers all but infer requests."""
        super().__init__(app, api.limits, api.holding, memory)
        self._api = api
        self._door = Door(DIALECT, api.engine, api.http, api.tracer)
        self._is_open = api.http.gate.is_open
        # Decodes what takes long beside the loop, one request after the other.
        self._decoder = Pool(1, "http-decode")
        self._thread = threading.get_ident()
        self._arrived: list[Exchange] = []
        self._headers = http_codec.HeaderCache()
        self._routes = Routes()

    async def stop(self, drain_s: float = 0.0, grace_s: float = 5.0, error: InferError | None = None) -> None:
        await super().stop(drain_s, grace_s, error)
        self._decoder.shutdown(wait=False, cancel_futures=True)

    def handle(self, exchange: Exchange) -> None:
        """A complete request. Infer requests wait for the end of this turn of the loop."""
        is_known = exchange.head is not None and exchange.head.memo is not None
        if not is_known and self._routes.find(exchange.url) is None:
            self._start_app(exchange)
        elif not self._is_open and not self._may_infer(exchange):
            return
        elif exchange.method != b"POST":
            exchange.connection.respond(exchange, 405, "method not allowed: infer needs POST")
        else:
            if not self._arrived:
                self._loop.call_soon(self._flush)
            self._arrived.append(exchange)

    def settle(self, calls: Sequence[Call]) -> None:
        """Encode in the caller's thread, write on the loop: one trip for all of them."""
        now = now_ns()
        mates = Mates(now)
        answered = [(call.token, self._encode(call, mates)) for call in calls]
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
        """Note the small answers, and return the large ones: whether there is room for them shows on the loop."""
        small: list[tuple[Call, Response]] = []
        large: list[tuple[Call, Response]] = []
        for call, (exchange, response) in zip(calls, answered, strict=True):
            if exchange.response is not None:  # it was answered and noted when the server stopped
                continue
            is_large = isinstance(response, list) or len(response) >= COUNTED_BYTES
            (large if is_large else small).append((call, response))
        http_events.note_calls(self._api.requests, small, now)
        return large

    def _deliver_noted(self, large: Sequence[tuple[Call, Response]], now: int, answered: "_Answered") -> None:
        _deliver(answered)
        if large:
            delivered = [(call, call.token.response or response) for call, response in large]
            http_events.note_calls(self._api.requests, delivered, now)

    def refused(self, exchange: Exchange, status: int, message: str) -> None:
        if self._api.requests.is_on:
            since_ns = exchange.connection.passed_ns()
            http_events.note_refusal(self._api.requests, exchange, status, message, since_ns)

    def app_answered(self, exchange: Exchange, reply: Reply, call: Call | None, took_ns: int) -> None:
        if not self._api.requests.is_on:
            return
        if not reply.status and (exchange.response is not None or self._api.is_front_end):
            return  # whoever answered has noted it
        is_begun = exchange.parts is not None or exchange.response is not None
        answered = (reply.status, reply.size, reply.error) if is_begun else (0, 0, b"")
        http_events.note_reply(self._api.requests, exchange, answered, call, took_ns)

    def _may_infer(self, exchange: Exchange) -> bool:
        refusal = self._door.refusal("inference", exchange.headers)
        if refusal is not None:
            exchange.connection.respond(exchange, *refusal)
        return refusal is None

    def _flush(self) -> None:
        arrived, self._arrived = self._arrived, []
        calls = []
        for exchange in arrived:
            try:
                calls.append(self._call(exchange))
            except Elsewhere:
                self._start_app(exchange)
            except _TakesLong:
                self._decoder.submit(self._take_long, exchange)
            except Exception as error:  # the other requests of the burst go on
                self._refuse(exchange, error)
        if calls:
            self._door.submit(calls)

    def _take_long(self, exchange: Exchange) -> None:
        """In the decoder's thread: a request that would hold up the loop."""
        later = self._loop.call_soon_threadsafe
        # The error is passed on and not kept: it leads to this frame, and the cycle would keep the body.
        try:
            self._door.submit([self._call(exchange, may_take_long=True)])
        except Elsewhere:
            later(self._start_app, exchange)
        except Exception as error:
            later(self._refuse, exchange, error)

    def _refuse(self, exchange: Exchange, error: Exception) -> None:
        """Answer a request that did not decode."""
        exchange.body = b""  # let it go now: it may be large, and its client slow to read the answer
        failure = self._door.decode_failure(error, *(self._routes.find(exchange.url) or ("", "")))
        exchange.connection.respond(exchange, *failure)

    def _call(self, exchange: Exchange, may_take_long: bool = False) -> Call:
        """The exchange's request as a call. Raises _TakesLong where that is not for this thread."""
        door = self._door
        received_ns = now_ns() if door.tracer.is_on else 0
        head = exchange.head.memo if exchange.head is not None else None
        if type(head) is not InferHead:
            head = self._read_head(exchange)
        request, exchange.reply = self._decode(head, exchange, may_take_long)
        call = Call(request, self, exchange)
        door.begin(call, exchange.headers, head.left_ns, received_ns)
        if call.trace is not None:  # traces and logs name a request by its answer's id
            exchange.request_id = exchange.request_id or answer_headers.request_id(request.id)
            call.trace.note("answer_id", exchange.request_id.decode())
        exchange.call = call
        exchange.body = b""
        return call

    def _read_head(self, exchange: Exchange) -> InferHead:
        route = self._routes.find(exchange.url)
        assert route is not None, "else it is not an infer request"
        head = read_head(route, exchange.headers)
        if exchange.head is not None:
            exchange.head.memo = head
        return head

    def _decode(self, head: InferHead, exchange: Exchange, may_take_long: bool) -> tuple[InferRequest, ReplyFormat]:
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
            request, reply = http_codec.decode_raw(config, version, exchange.body), BINARY_REPLY
        else:
            regions = self._api.shared_memory
            request, reply = http_codec.decode(name, version, exchange.body, header_length, self._headers, regions)
        if request.classes and self._api.is_front_end:
            raise Elsewhere
        if head.reply_coding:
            reply = replace(reply, coding=head.reply_coding)
        return request, reply

    def _encode(self, call: Call, mates: Mates) -> Response:
        exchange: Exchange = call.token
        try:
            response, shared = self._api.complete(call)
            columns = response.columns
            is_plain = exchange.keep_alive and not call.request.id and not shared
            if columns is not None and is_plain and mates.have(call, response, exchange):
                start, stop = response.start, response.stop
                sent = exchange.request_id
                id_line = sent + HEAD_END if sent else answer_headers.place(start)
                data = [raw[start * size : stop * size] for size, raw in columns.raws]
                pieces: list[Raw] = [mates.head, id_line, mates.header, *data]
                return pieces if mates.is_large else b"".join(pieces)
            return infer_answers.encode(call, response, shared, mates.now_ns)
        except Exception as error:
            failure = self._door.encode_failure(error, call)
            return error_response(*failure, exchange.keep_alive, infer_answers.about(call, mates.now_ns))


_Answered = Sequence[tuple[Exchange, Response]]


def _deliver(answered: _Answered) -> None:
    for exchange, response in answered:
        try:
            exchange.connection.deliver(exchange, response)
        except Exception:  # the other answers are delivered all the same
            _log.exception("an answer could not be written")
            exchange.connection.abort()
