"""What the log of requests is told of answers over HTTP. Called only where somebody wants to know.

Status and id stand in the answer's own head, so that nothing is kept of a request for the sake of logs.
"""

import contextlib
import re
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote_to_bytes

import orjson

from tutti.core.errors import InferError
from tutti.core.types import POOL_PARAMETER, Answer, Call, InferResponse
from tutti.frontends.http.exchange import Exchange, Response
from tutti.observing.request_log import Event, RequestLog, harmless

# How a front-end process tells the engine's who has asked it.
CLIENT_HEADER = b"tutti-client"
_PROBES = frozenset({b"/v2/health/live", b"/v2/health/ready", b"/-/healthz"})
_OF_MODEL = re.compile(rb"/v2/models/([^/]+)(?:/versions/([0-9]{1,19}))?/(infer|generate|generate_stream)")
_HEAD_BYTES = 2048
# The status that other servers log, too, for a client that had gone before its answer.
GONE = 499
GONE_MESSAGE = "the client had gone before its answer"


def note_calls(log: RequestLog, answered: Sequence[tuple[Call, Response]], now_ns: int) -> None:
    """Infer requests that have been answered together."""
    at_s = time.time()
    for call, response in answered:
        total_ns = now_ns - call.arrived_ns if call.arrived_ns else 0
        if log.wants(total_ns):
            _note_call(log, call, response, at_s, total_ns)


@harmless
def _note_call(log: RequestLog, call: Call, response: Response, at_s: float, total_ns: int) -> None:
    exchange: Exchange = call.token
    head, size = _head(response)
    model, version, pool, error = about(call.request.model_name, call.request.model_version, call.answer)
    status = int(head[9:12])
    if exchange.connection.has_gone:
        status, size, error = GONE, 0, GONE_MESSAGE
    elif status >= 400 and not error:  # the answer could not be encoded
        error = _message((b"".join(response) if isinstance(response, list) else response)[len(head) :])
    log.note(
        Event(
            at_s, _id(head), "http", "infer", model, version, status, _bytes_in(exchange), size, total_ns,
            call.times.spent(call.arrived_ns) if call.times is not None else None, pool, client_of(exchange), error,
        )
    )  # fmt: skip


@harmless
def note_refusal(log: RequestLog, exchange: Exchange, status: int, message: str, total_ns: int) -> None:
    """A request that was answered with an error before any model was asked."""
    if log.wants(total_ns):
        _, sent_id = exchange.known_as()
        request, model, version = _target(exchange)
        if exchange.connection.has_gone:
            status, message = GONE, GONE_MESSAGE
        log.note(
            Event(
                time.time(), sent_id.decode("latin-1"), "http", request, model, version, status, _bytes_in(exchange), 0,
                total_ns, None, "", client_of(exchange), message,
            )
        )  # fmt: skip


@harmless
def note_reply(
    log: RequestLog, exchange: Exchange, reply: tuple[int, int, bytes], call: Call | None, total_ns: int
) -> None:
    """What is no infer request, but for probes: `reply` is (status, bytes, an error's body), `call` its inference.

    The status is 0 where nothing was sent, since the client had gone.
    """
    status, size, failed = reply
    path = exchange.url.partition(b"?")[0]
    if path in _PROBES or not log.wants(total_ns):
        return
    request, model, version = _target(exchange)
    pool, spent, error = "", None, _message(failed)
    if call is not None:
        model, version, pool, failure = about(model, version, call.answer)
        error = failure or error
        spent = call.times.spent(call.arrived_ns) if call.times is not None else None
    if not status:
        status, size, error = GONE, 0, GONE_MESSAGE
    elif exchange.connection.has_gone and exchange.response is None:  # gone amid its answer
        error = error or GONE_MESSAGE
    _, sent_id = exchange.known_as()
    log.note(
        Event(
            time.time(), sent_id.decode("latin-1"), "http", request, model, version, status, _bytes_in(exchange), size,
            total_ns, spent, pool, client_of(exchange), error,
        )
    )  # fmt: skip


def about(model: str, version: str, answer: Answer | None) -> tuple[str, str, str, str]:
    """(model, version, pool, error) of a request to that model, by its answer."""
    if isinstance(answer, InferResponse):
        pool = answer.parameters.get(POOL_PARAMETER, "") if answer.parameters else ""
        return model, answer.model_version or version, str(pool), ""
    return model, version, "", answer.message if isinstance(answer, InferError) else ""


def client_of(exchange: Exchange) -> str:
    """HOST:PORT, where it is known; behind front-end processes they tell it."""
    return _address(exchange.connection.peer) or _sent(exchange, CLIENT_HEADER).decode("latin-1")


def _address(peer: Any) -> str:
    if not isinstance(peer, tuple):
        return ""
    host, port = peer[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _target(exchange: Exchange) -> tuple[str, str, str]:
    """(what was asked, of which model, in which version)."""
    path = exchange.url.partition(b"?")[0]
    match = _OF_MODEL.fullmatch(path)
    if match is None:
        return (exchange.method + b" " + path).decode("latin-1").strip(), "", ""
    name, version = (unquote_to_bytes(part or b"").decode("utf-8", "replace") for part in match.groups()[:2])
    return match[3].decode(), name, version


def _bytes_in(exchange: Exchange) -> int:
    """Bytes of the body, as announced."""
    if exchange.head is not None:
        return exchange.head.length
    length = _sent(exchange, b"content-length")
    return int(length) if length.isdigit() and len(length) < 19 else len(exchange.body)


def _sent(exchange: Exchange, header: bytes) -> bytes:
    return next((value for name, value in exchange.headers if name == header), b"")


def _head(response: Response) -> tuple[bytes, int]:
    """An answer's head, and how many bytes its body has."""
    if not isinstance(response, list):
        begun, size = response[:_HEAD_BYTES], len(response)
    else:
        begun, size = b"", sum(map(len, response))
        for piece in response:  # however many it has been written in
            begun += bytes(piece[:_HEAD_BYTES])
            if b"\r\n\r\n" in begun:
                break
    end = begun.find(b"\r\n\r\n") + 4
    return begun[:end], size - end


def _id(head: bytes) -> str:
    _, _, after = head.partition(b"\r\nx-request-id: ")
    return after.partition(b"\r\n")[0].decode("latin-1")


def _message(body: bytes) -> str:
    """Of an error, {"error": MESSAGE}; another body as it is."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return str(orjson.loads(body)["error"])
    return body.decode("utf-8", "replace")
