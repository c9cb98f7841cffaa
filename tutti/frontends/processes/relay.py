"""Whatever a front-end process cannot answer over HTTP: the engine's own HTTP server does, on the client's connection.

The client keeps its connection, whatever becomes of the engine's. Without an engine the process lives and nothing is
ready; all else is refused.
"""

import asyncio
import re
from asyncio import StreamReader
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from tutti.core.types import now_ns
from tutti.frontends.gate import Gate
from tutti.frontends.held_bytes import COUNTED_BYTES
from tutti.frontends.http import log_events as http_events
from tutti.frontends.http.exchange import Exchange, error_response, response_head
from tutti.frontends.http.log_events import CLIENT_HEADER, client_of
from tutti.frontends.http.status import DIALECT
from tutti.frontends.processes.link import FrontEnd
from tutti.observing.request_log import RequestLog

_HOP_HEADERS = frozenset(
    {b"connection", b"keep-alive", b"content-length", b"transfer-encoding", b"expect", CLIENT_HEADER}
)
_LIVE = (b"/v2/health/live", b"/-/healthz")
_READY = b"/v2/health/ready"
_MODEL_READY = re.compile(rb"/v2/models/([^/]+)(?:/versions/[0-9]+)?/ready")
_NO_BODY = (204, 304)
_MAX_HEAD_BYTES = 1 << 20
_PART_BYTES = 1 << 16
# A question for the server's health is answered after so long even if the engine hangs.
PROBE_TIMEOUT_S = 2.0


class Relay:
    """An ASGI app, called with the exchange itself.

    What the engine's process answers, that notes in the log of requests; here, what it could not answer to the end.
    """

    def __init__(self, link: FrontEnd, gate: Gate, requests: RequestLog) -> None:
        self._link = link
        self._gate = gate
        self._requests = requests

    async def __call__(self, scope: Any, _: Any, __: Any) -> None:
        exchange: Exchange = scope["exchange"]
        path = exchange.url.partition(b"?")[0]
        folder = self._link.folder
        is_probe = path == _READY or path in _LIVE
        if folder is None or (is_probe and not self._link.is_announced):
            self._answer(exchange, path)
            return
        writer: asyncio.StreamWriter | None = None
        passed = _Passed(exchange, now_ns())
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S if is_probe else None):
                reader, writer = await asyncio.open_unix_connection(str(folder / "http"), limit=_MAX_HEAD_BYTES)
                writer.writelines(_request(exchange))
                await _pass_on(reader, exchange, passed)
        except (OSError, EOFError, asyncio.LimitOverrunError) as error:
            # An engine that has ended is replaced, so the server lives; one that hangs is reported as dead.
            if path in _LIVE and self._link.is_announced and isinstance(error, TimeoutError):
                exchange.connection.respond(exchange, 503, "the engine's process does not answer")
            elif exchange.parts is None:
                self._answer(exchange, path)
            else:
                exchange.connection.abort()  # half a response is out: only a broken connection tells the client
                self._note(passed)
        except _Broken:
            self._note(passed)
            event = b"data: %b\n\n" % orjson.dumps({"error": self._link.refusal.message})
            exchange.connection.deliver(exchange, b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event))
        finally:
            if writer is not None:
                writer.close()

    def _answer(self, exchange: Exchange, path: bytes) -> None:
        """Answer without the engine."""
        model = _MODEL_READY.fullmatch(path)
        why = self._link.refusal.message
        if path in _LIVE or path == _READY or model is not None:
            refusal = DIALECT.refusal(self._gate, "health", exchange.headers)
            if refusal is not None:
                exchange.connection.respond(exchange, *refusal)
            elif model is not None:
                name = model[1].decode("utf-8", "replace")
                exchange.connection.respond(exchange, 400, f"model '{name}' is not ready: {why}")
            else:
                head = response_head(200 if path in _LIVE else 400, exchange.about(), 0, exchange.keep_alive)
                exchange.connection.deliver(exchange, head)
            return
        if exchange.method != b"HEAD":
            exchange.connection.respond(exchange, 503, why)
            return
        if self._requests.is_on:
            http_events.note_refusal(self._requests, exchange, 503, why, exchange.connection.passed_ns())
        response = error_response(503, why, exchange.keep_alive, exchange.about())
        exchange.connection.deliver(exchange, response[: response.index(b"\r\n\r\n") + 4])

    def _note(self, passed: "_Passed") -> None:
        """The engine's process has ended amid an answer, and with it what it would have noted."""
        if self._requests.is_on:
            answered = passed.status, passed.size, self._link.refusal.message.encode()
            took_ns = now_ns() - passed.began_ns
            http_events.note_reply(self._requests, passed.exchange, answered, None, took_ns)


@dataclass(slots=True)
class _Passed:
    """What the client has got of an answer that comes in parts, as far as it is known."""

    exchange: Exchange
    began_ns: int
    status: int = 0
    size: int = 0

    async def send(self, part: bytes, size: int) -> None:
        """`size` bytes of it are of the body."""
        await self.exchange.connection.send_part(self.exchange, part)
        self.size += size


class _Broken(Exception):
    """A stream of events ended before its end, between two of its chunks."""


def _request(exchange: Exchange) -> Sequence[Any]:
    version = b"1.0" if exchange.is_http_1_0 else b"1.1"
    head = [b"%s %s HTTP/%s" % (exchange.method, exchange.url, version)]
    head += [b"%s: %s" % header for header in exchange.headers if header[0] not in _HOP_HEADERS]
    head.append(b"%s: %s" % (CLIENT_HEADER, client_of(exchange).encode()))
    head += [b"content-length: %d" % len(exchange.body), b"connection: close", b"", b""]
    return [b"\r\n".join(head), exchange.body]


async def _pass_on(reader: StreamReader, exchange: Exchange, passed: _Passed) -> None:
    """The response, as it comes. Raises EOFError when it breaks off, or _Broken for a stream of events."""
    raw = await reader.readuntil(b"\r\n\r\n")
    first, *lines = raw[:-4].split(b"\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(b": ") for line in lines)}
    if exchange.keep_alive:
        lines = [line for line in lines if not line.lower().startswith(b"connection:")]
    head = b"\r\n".join([first, *lines, b"", b""])
    passed.status = int(first.split(b" ")[1])
    if exchange.method == b"HEAD" or passed.status in _NO_BODY:
        exchange.connection.deliver(exchange, head)
    elif headers.get(b"transfer-encoding") == b"chunked":
        await _pass_chunks(reader, head, passed, headers.get(b"content-type", b"").startswith(b"text/event-stream"))
    else:
        await _pass_length(reader, head, passed, int(headers[b"content-length"]))


async def _pass_length(reader: StreamReader, head: bytes, passed: _Passed, left: int) -> None:
    """A body of known length. A large one goes in parts: to refuse it would contradict what the engine has noted."""
    exchange = passed.exchange
    if len(head) + left < COUNTED_BYTES:
        exchange.connection.deliver(exchange, head + await reader.readexactly(left))
        return
    await passed.send(head, 0)
    while left > _PART_BYTES:
        await passed.send(await reader.readexactly(_PART_BYTES), _PART_BYTES)
        left -= _PART_BYTES
    exchange.connection.deliver(exchange, await reader.readexactly(left))


async def _pass_chunks(reader: StreamReader, head: bytes, passed: _Passed, is_of_events: bool) -> None:
    exchange = passed.exchange
    await passed.send(head, 0)
    while True:
        try:
            line = await reader.readuntil(b"\r\n")
            data = await reader.readexactly(int(line.partition(b";")[0], 16) + 2)
        except (EOFError, OSError):
            if is_of_events:
                raise _Broken from None
            raise
        if line[:1] == b"0":
            exchange.connection.deliver(exchange, line + data)
            return
        await passed.send(line + data, len(data) - 2)
