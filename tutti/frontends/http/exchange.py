"""One HTTP request and its response, and how responses are written. Knows neither sockets nor inference."""

import asyncio
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Protocol

import orjson

from tutti.core.errors import shown
from tutti.core.types import Raw
from tutti.frontends.held_bytes import Holding
from tutti.frontends.http import answer_headers

# In one piece, or in several that are written one after the other.
Response = bytes | list[Raw]


class Cancellable(Protocol):
    """Work for a client: once `is_cancelled` is set, nobody waits for it."""

    is_cancelled: bool


class Client(Protocol):
    """The connection that a request has come on, as those see it who answer. All but `has_gone` on its loop."""

    holding: Holding
    # The client's address, as the system says it.
    peer: Any

    @property
    def has_gone(self) -> bool:
        """Whether the connection has ended. From any thread."""

    def passed_ns(self) -> int:
        """Nanoseconds since something came last."""

    def respond(self, exchange: "Exchange", status: int, message: str) -> None:
        """Answer with an error."""

    def deliver(self, exchange: "Exchange", response: Response) -> None:
        """Write the response when those before it have been written."""

    async def send_part(self, exchange: "Exchange", data: bytes) -> None:
        """Write a part of a response that `deliver` ends. Waits while the client does not read."""

    def abort(self) -> None:
        """Break the connection."""


class Head:
    """A request's head, read before. `memo` is for what a front makes of it once."""

    __slots__ = ("headers", "keep_alive", "length", "memo", "method", "url")

    def __init__(self, exchange: "Exchange", length: int) -> None:
        self.method = exchange.method
        self.url = exchange.url
        self.headers = exchange.headers
        self.keep_alive = exchange.keep_alive
        self.length = length
        self.memo: object = None


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
    """A whole response. `about` are the headers that tell of its request; without them it gets a new id."""
    body = orjson.dumps({"error": shown(message)})
    headers = [
        (b"content-type", b"application/json"),
        *(about or ((answer_headers.ID_HEADER, answer_headers.new_id()),)),
    ]
    if status == 503:
        headers.append((b"retry-after", b"1"))
    return response_head(status, headers, len(body), keep_alive) + body


class Exchange:
    """One request on a connection, and its response once there is one."""

    __slots__ = (
        "body",
        "call",
        "connection",
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
        "url",
    )

    def __init__(self, connection: Client, method: bytes, url: bytes, keep_alive: bool) -> None:
        self.connection = connection
        self.method = method
        self.url = url
        self.keep_alive = keep_alive
        self.is_http_1_0 = False
        self.head: Head | None = None
        self.headers: list[tuple[bytes, bytes]] = []
        self.body: Raw = b""
        # What is cancelled when the client goes, until there is a response.
        self.call: Cancellable | None = None
        self.task: asyncio.Task[None] | None = None
        self.parts: list[bytes] | None = None
        # The form of the answer, which only the front knows.
        self.reply: Any = None
        # The client's x-request-id, b"" for none that may come back.
        self.request_id = b""
        # What was delivered: the answer, or a refusal in its place.
        self.response: Response | None = None
        # Bytes held: of its body, then of its answer until that is written.
        self.held = 0

    def known_as(self, body_id: str = "") -> tuple[bytes, bytes]:
        """The header that has the request's id: the client's header, else the one in its body, else a new one."""
        if not self.request_id:
            sent = next((value for name, value in self.headers if name == answer_headers.ID_HEADER), b"")
            self.request_id = answer_headers.id_of(sent) or answer_headers.request_id(body_id)
        return answer_headers.ID_HEADER, self.request_id

    def about(self) -> list[tuple[bytes, bytes]]:
        """The headers of an answer that no model has given: how long it took since its request came, and its id."""
        return [(answer_headers.TIMING_HEADER, answer_headers.total(self.connection.passed_ns())), self.known_as()]

    def release(self) -> None:
        held, self.held = self.held, 0
        self.connection.holding.give(held)
