"""An ASGI app's messages and an HTTP exchange: what the app is told of a request, and what it answers with."""

from typing import Any
from urllib.parse import unquote_to_bytes

from tutti.frontends.http import answer_headers
from tutti.frontends.http.exchange import Exchange, response_head


class Reply:
    """An ASGI app's messages as an HTTP response. Parts are sent as chunks, but joined for HTTP/1.0, which has none."""

    def __init__(self, exchange: Exchange) -> None:
        self._held = b""
        self._exchange = exchange
        # The status is 0 until the response has begun; the size is that of its body so far.
        self.status = self.size = 0
        # The body of an error that comes in one piece.
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


def scope_of(exchange: Exchange) -> dict[str, Any]:
    """ASGI's scope; with the exchange itself, for apps of this project."""
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
