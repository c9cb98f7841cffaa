"""What a front-end process passes on from the engine's HTTP server, and what it notes of answers that break off."""

import asyncio
import http.client
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.serving import Noted, wait_until
from tutti.core.errors import Unavailable
from tutti.frontends.gate import Gate
from tutti.frontends.held_bytes import COUNTED_BYTES
from tutti.frontends.http.infer import HttpFront
from tutti.frontends.processes.relay import Relay
from tutti.frontends.v2.api import Api

HEAD = b"HTTP/1.1 200 OK\r\n"
EVENTS = HEAD + b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n"


class Relaying:
    """A front-end process's HTTP server before an engine's that sends `answer`, and closes."""

    def __init__(self, folder: Path) -> None:
        self.log = Noted()
        self.answer = b""
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.front, self._engine, self.port = self.call(self._start(folder))

    def call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    async def _start(self, folder: Path) -> Any:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(self.answer)
            await writer.drain()
            writer.close()

        engine = await asyncio.start_unix_server(serve, str(folder / "http"))
        link: Any = SimpleNamespace(folder=folder, is_announced=True, refusal=Unavailable("the engine has ended"))
        api = Api(link, is_front_end=True, requests=self.log)
        front = HttpFront(Relay(link, Gate(), self.log), api)
        return front, engine, await front.start("127.0.0.1", 0)

    def ask(self, method: str = "GET") -> tuple[int, bytes]:
        """The status and the body, as far as it comes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(method, "/v2")
        with connection.getresponse() as response:
            try:
                body = response.read()
            except http.client.IncompleteRead as error:
                body = error.partial
            except ConnectionError:
                body = b""
        connection.close()
        return response.status, body

    def close(self) -> None:
        self._engine.close()
        self.call(self.front.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(20)
        self.loop.close()


@pytest.fixture
def relaying(tmp_path: Path) -> Iterator[Relaying]:
    relaying = Relaying(tmp_path)
    yield relaying
    relaying.close()


@pytest.mark.parametrize("size", [0, 1000, *range(COUNTED_BYTES - 90, COUNTED_BYTES + 2, 7), 3 * COUNTED_BYTES])
def test_what_the_engine_has_answered_is_never_refused_for_its_size(relaying: Relaying, size: int) -> None:
    """The engine's process has noted it."""
    relaying.front.holding.limit = 0
    relaying.answer = HEAD + b"content-length: %d\r\n\r\n%b" % (size, bytes(size))
    assert relaying.ask() == (200, bytes(size))
    assert not relaying.log.events


@pytest.mark.parametrize(
    ("answer", "status", "body", "noted_bytes"),
    [
        (b"", 503, b'{"error":"the engine has ended"}', 0),
        (HEAD + b"content-length: 100\r\n\r\nhalf", 503, b'{"error":"the engine has ended"}', 0),
        (HEAD + b"content-length: 140000\r\n\r\n" + bytes(70_000), 200, bytes(COUNTED_BYTES), COUNTED_BYTES),
        (EVENTS, 200, b'firstdata: {"error":"the engine has ended"}\n\n', 5),
    ],
    ids=["none", "small", "large", "events"],
)
def test_an_answer_that_breaks_off_is_noted_here(
    relaying: Relaying, answer: bytes, status: int, body: bytes, noted_bytes: int
) -> None:
    relaying.answer = answer
    got, came = relaying.ask()
    assert got == status
    assert came == body[: len(came)]
    assert len(came) == len(body) or noted_bytes == COUNTED_BYTES  # a reset connection may lose what was sent
    wait_until(lambda: relaying.log.events)
    ((said_status, said_bytes, error),) = [(one.status, one.bytes_out, one.error) for one in relaying.log.events]
    assert (said_status, said_bytes, error) == (status, noted_bytes, "the engine has ended")


def test_a_refusal_without_a_body_is_noted(relaying: Relaying) -> None:
    relaying.front._app._link.folder = None  # type: ignore[attr-defined]
    assert relaying.ask("HEAD") == (503, b"")
    assert [(one.status, one.error) for one in relaying.log.events] == [(503, "the engine has ended")]
