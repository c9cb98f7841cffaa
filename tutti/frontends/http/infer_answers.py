"""Answers to infer requests as HTTP/1.1 responses. What the answers to one batch have in common is made once."""

import re
from collections.abc import Collection
from functools import lru_cache

from tutti.core.types import POOL_PARAMETER, Call, Columns, InferResponse, Parameters, Raw
from tutti.frontends.http import answer_headers, compression
from tutti.frontends.http import codec as http_codec
from tutti.frontends.http.exchange import Exchange, Response, response_head
from tutti.frontends.v2.json_request import ReplyFormat

# A larger response is written in the pieces that it is made of: joining them would cost more.
LARGE_RESPONSE_BYTES = 64 * 1024

HEAD_END = b"\r\n\r\n"
_JSON_TYPE = (b"content-type", b"application/json")
_POOL_HEADER = b"tutti-pool"
_POOL_NAME = re.compile(r"[a-z0-9_]{1,64}")
_BINARY_TYPE = (b"content-type", b"application/octet-stream")
_TIMING_LINE, _ID_LINE = b"server-timing: ", b"\r\nx-request-id: "
_BINARY_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\n"
    b"inference-header-content-length: %d\r\ncontent-length: %d\r\n"
)


@lru_cache(maxsize=4096)
def _binary_start(header_length: int, length: int) -> bytes:
    """The part of an answer's head that depends on lengths alone."""
    return _BINARY_HEAD % (header_length, length)


class Mates:
    """What answers that are settled together have in common: nearly always all but their ids and their data."""

    # The response up to its id, and from behind the id to its data.
    head = header = b""
    is_large = False
    # What the two were made for.
    _columns: Columns | None = None
    _reply: ReplyFormat | None = None
    _arrived_ns = _rows = 0
    _parameters: Parameters | None = None
    _is_own = False
    _start = _ids = b""

    def __init__(self, now_ns: int) -> None:
        self.now_ns = now_ns

    def have(self, call: Call, response: InferResponse, exchange: Exchange) -> bool:
        """Whether all of the answer is binary. If so, `head` and `header` are those of this answer."""
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


def encode(call: Call, response: InferResponse, shared: Collection[str], now: int) -> Response:
    """The response of a call whose token is its exchange; outputs in `shared` are in shared memory already."""
    exchange: Exchange = call.token
    reply: ReplyFormat = exchange.reply
    header_length, parts = http_codec.encode(response, call.request.id, reply, shared)
    parameters = response.parameters
    if header_length is not None and exchange.keep_alive and not reply.coding:
        start = _binary_start(header_length, sum(map(len, parts)))
        if parameters:
            start += _pool_line(parameters)
        timing = answer_headers.timing(call.arrived_ns, call.times, now)
        known_as = exchange.request_id or answer_headers.request_id(call.request.id)
        return _pieces([b"".join([start, _TIMING_LINE, timing, _ID_LINE, known_as, HEAD_END]), *parts])
    body = b"".join(parts)
    headers = [_JSON_TYPE] if header_length is None else [_BINARY_TYPE]
    if header_length is not None:
        headers.append((b"inference-header-content-length", b"%d" % header_length))
    if reply.coding:
        body = compression.compress(body, reply.coding)
        headers.append((b"content-encoding", reply.coding.encode()))
    if parameters and (pool := _pool(parameters)):
        headers.append((_POOL_HEADER, pool))
    return response_head(200, headers + about(call, now), len(body), exchange.keep_alive) + body


def _pieces(parts: list[Raw]) -> Response:
    """Joined, unless a copy costs more than several writes."""
    return b"".join(parts) if sum(map(len, parts)) < LARGE_RESPONSE_BYTES else parts


def about(call: Call, now: int) -> list[tuple[bytes, bytes]]:
    """The headers that tell of a request: its id, and where its time went."""
    exchange: Exchange = call.token
    known_as = exchange.request_id or answer_headers.request_id(call.request.id)
    timing = answer_headers.timing(call.arrived_ns, call.times, now)
    return [(answer_headers.TIMING_HEADER, timing), (answer_headers.ID_HEADER, known_as)]


def _pool_line(parameters: Parameters) -> bytes:
    pool = _pool(parameters)
    return b"%b: %b\r\n" % (_POOL_HEADER, pool) if pool else b""


def _pool(parameters: Parameters) -> bytes:
    """The pool that answered, if a parameter names one. A model may write anything there: b"" if it is no header."""
    pool = parameters.get(POOL_PARAMETER)
    return pool.encode() if isinstance(pool, str) and _POOL_NAME.fullmatch(pool) else b""
