"""The load tester's HTTP/2 against another implementation (python-hyper's h2) that does what servers may do."""

import asyncio
import contextlib
import random
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import pytest
import uvloop

from tests.loadtest.test_clients import tcp_server, until
from tutti.loadtest.http2 import OK, Connection
from tutti.loadtest.wire import connect

pytestmark = pytest.mark.timeout(60)

CODES = h2.settings.SettingCodes
HEADERS = [
    (b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/service/method"), (b":authority", b"there"),
    (b"te", b"trailers"), (b"content-type", b"application/grpc"), (b"authorization", b"Bearer abc"),
]  # fmt: skip


class Server:
    """Echoes each call's bytes: in chunks, padded, late, with headers that change, and windows that open by drops."""

    def __init__(self, numbers: random.Random, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._random, self._reader, self._writer = numbers, reader, writer
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
        self._h2.local_settings = h2.settings.Settings(
            client=False,
            initial_values={
                CODES.INITIAL_WINDOW_SIZE: numbers.choice([1000, 65_535, 1 << 20]),
                CODES.HEADER_TABLE_SIZE: numbers.choice([0, 64, 4096, 65_536]),
                CODES.MAX_CONCURRENT_STREAMS: 100,
            },
        )
        self._said: dict[int, bytearray] = {}
        self._owed: dict[int, int] = {}
        self._answers: set[asyncio.Task[None]] = set()
        self._writing = asyncio.Lock()
        self._is_settled = False

    async def run(self) -> None:
        self._h2.initiate_connection()
        await self._flush()
        while data := await self._reader.read(self._random.choice([7, 1000, 1 << 16])):
            for event in self._h2.receive_data(data):
                self._take_in(event)
            for stream in list(self._owed):
                if self._random.random() < 0.7:
                    self._give_back(stream)
            if self._random.random() < 0.1:
                self._h2.ping(b"are you ")
            if self._is_settled and self._random.random() < 0.1:  # h2 takes one acknowledgement for all that is new
                self._is_settled = False
                sizes = [(CODES.INITIAL_WINDOW_SIZE, 2000), (CODES.INITIAL_WINDOW_SIZE, 70_000)]
                sizes += [(CODES.HEADER_TABLE_SIZE, size) for size in (0, 100, 4096)]
                self._h2.update_settings(dict([self._random.choice(sizes)]))
            await self._flush()
            if self._owed:  # nothing may come before they are given back
                self._h2.ping(b"drop by ")
                for stream in list(self._owed):
                    self._give_back(stream)
                await self._flush()
        for task in self._answers:
            task.cancel()

    def _give_back(self, stream: int) -> None:
        """By hand: h2 waits for half of a window, which may never come where one has become smaller meanwhile."""
        size = self._owed.pop(stream)
        if not size:
            return
        self._h2.increment_flow_control_window(size)
        with contextlib.suppress(h2.exceptions.StreamClosedError):
            self._h2.increment_flow_control_window(size, stream)

    def _take_in(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            assert [tuple(one) for one in event.headers] == HEADERS
            self._said[event.stream_id] = bytearray()
        elif isinstance(event, h2.events.DataReceived):
            self._said[event.stream_id] += event.data
            self._owed[event.stream_id] = self._owed.get(event.stream_id, 0) + event.flow_controlled_length
        elif isinstance(event, h2.events.SettingsAcknowledged):
            self._is_settled = True
        elif isinstance(event, h2.events.StreamEnded):
            task = asyncio.ensure_future(self._answer(event.stream_id, bytes(self._said.pop(event.stream_id))))
            self._answers.add(task)

    async def _answer(self, stream: int, data: bytes) -> None:
        numbers = self._random
        await asyncio.sleep(numbers.choice([0, 0, 0.01]))
        more = (
            [(b"x-%d" % numbers.randrange(5), b"y" * numbers.choice([1, 200, 20_000]))]
            if numbers.random() < 0.3
            else []
        )
        self._h2.send_headers(stream, [(b":status", b"200"), *more])
        status = b"3" if data[-1] % 2 else b"0"
        while data:
            size = numbers.choice([1, 500, 16_000])
            self._h2.send_data(stream, data[:size], pad_length=numbers.choice([None, None, 0, 30]))
            data = data[size:]
            if numbers.random() < 0.2:
                await self._flush()
                await asyncio.sleep(0)
        self._h2.send_headers(
            stream, [(b"grpc-status", status), (b"grpc-message", b"%C3%A4 " + status)], end_stream=True
        )
        await self._flush()

    async def _flush(self) -> None:
        async with self._writing:
            data = self._h2.data_to_send()
            while data:
                size = self._random.choice([3, 1000, 1 << 20])
                self._writer.write(data[:size])
                data = data[size:]
                if self._random.random() < 0.1:
                    await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(40))
def test_calls_are_what_another_implementation_says(seed: int) -> None:
    numbers = random.Random(seed)
    got: dict[int, bytearray] = {}
    ended: dict[int, tuple[str, str]] = {}
    sent: dict[int, bytes] = {}

    def on_data(key: Any, data: bytes, _: float) -> None:
        got[key] += data

    def on_end(key: Any, status: str, message: str, _: float) -> None:
        assert key not in ended
        ended[key] = (status, message)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await Server(random.Random(seed + 1000), reader, writer).run()

    async def run() -> None:
        async with tcp_server(serve) as (url, _):
            host, port = url.split(":")
            connection = Connection(await connect(host, int(port)), HEADERS, on_data, on_end)
            try:
                await say(connection)
                await until(lambda: len(ended) == 60)
                assert connection.is_open, "neither side found fault with the other"
            finally:
                connection.close()

    async def say(connection: Connection) -> None:
        await connection.greeted.wait()
        for key in range(60):
            sent[key] = numbers.randbytes(numbers.choice([1, 30, 30, 5000, 100_000]))
            got[key] = bytearray()
            stream = connection.open_call(key)
            cut = numbers.randrange(len(sent[key]))
            connection.put(stream, sent[key][:cut], False)
            connection.put(stream, sent[key][cut:], True)
            connection.write(connection.take())
            await asyncio.sleep(numbers.choice([0, 0, 0.005]))
            await until(lambda: connection.has_room)

    uvloop.run(run())
    assert {key: bytes(data) for key, data in got.items()} == sent
    assert ended == {key: (("INVALID_ARGUMENT", "ä 3") if sent[key][-1] % 2 else (OK, "ä 0")) for key in sent}
