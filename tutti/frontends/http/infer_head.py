"""What the head of an infer request says: its model, how its body is written, and how its answer is to be. Pure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from tutti.core.errors import InvalidArgument
from tutti.frontends.deadlines import TIMEOUT_HEADERS, timeout_ns
from tutti.frontends.http import answer_headers, compression

_INFER = re.compile(rb"/v2/models/([^/?]+)(?:/versions/([0-9]{1,19}))?/infer")
_MAX_ROUTES = 1024
_MAX_ROUTE_BYTES = 512

Route = tuple[str, str]
"""A model's name and its version, "" for the newest."""


class Routes:
    """Infer URLs and their models. URLs that were asked for before are looked up."""

    def __init__(self) -> None:
        self._known: dict[bytes, Route | None] = {}

    def find(self, url: bytes) -> Route | None:
        """The model of an infer URL; None for any other."""
        if url in self._known:
            return self._known[url]
        match = _INFER.fullmatch(url.partition(b"?")[0])
        route = None
        if match is not None:
            name, version = (unquote_to_bytes(part or b"").decode("utf-8", "replace") for part in match.groups())
            route = (name, version)
        if len(self._known) < _MAX_ROUTES and len(url) <= _MAX_ROUTE_BYTES:
            self._known[url] = route
        return route


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


def read_head(route: Route, headers: Sequence[tuple[bytes, bytes]]) -> InferHead:
    """Raises InvalidArgument for a header that does not make sense."""
    model, version = route
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
