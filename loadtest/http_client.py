"""The HTTP/1.1 client: a connection for each request in flight, responses parsed by llhttp (httptools).

It knows nothing of the bodies that it sends: messages are bytes already.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import httptools

from tutti.loadtest.addresses import split
from tutti.loadtest.client import TIMED_OUT, UNREACHABLE, Done
from tutti.loadtest.payloads import Message
from tutti.loadtest.scenario import Target
from tutti.loadtest.wire import Wire, connect

_REASON = 300
# Connections that are opened before anybody waits for one.
AHEAD = 16


class _Connection:
    """One request at a time."""

    def __init__(self, pool: "HttpClient", address: int, connected: Any) -> None:
        self.pool = pool
        self.address = address
        self.number = -1
        self.deadline_s = 0.0
        self._parser: Any = None
        self._has_headers = self._is_delimited = self._is_answered = self._keeps = False
        self._reason = b""
        self.wire = Wire(connected, self._received, self._lost)

    def send(self, number: int, data: bytes, deadline_s: float) -> None:
        self.number, self.deadline_s = number, deadline_s
        self._parser = httptools.HttpResponseParser(self)
        self._has_headers = self._is_delimited = self._is_answered = self._keeps = False
        self._reason = b""
        self.wire.write(data)

    def _received(self, data: bytes, done_s: float) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, AttributeError) as error:
            self.end(done_s, f"it sent what is no answer: {error}")
            return
        if self._is_answered:
            self._answer(done_s)

    def on_header(self, name: bytes, _: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._is_delimited = True

    def on_headers_complete(self) -> None:
        self._has_headers = True

    def on_body(self, data: bytes) -> None:
        if self._parser.get_status_code() != 200 and len(self._reason) < _REASON:
            self._reason += data

    def on_message_complete(self) -> None:
        self._is_answered, self._keeps = True, self._parser.should_keep_alive()

    def _answer(self, done_s: float) -> None:
        status = self._parser.get_status_code()
        self.end(done_s, "" if status == 200 else f"HTTP {status}", self._keeps)

    def _lost(self, why: str) -> None:
        if self.number >= 0 and not why and self._has_headers and not self._is_delimited:
            self._answer(time.perf_counter())  # a body without a length ends with its connection
        else:
            self.end(time.perf_counter(), f"the connection broke: {why or 'it was closed'}")

    def end(self, done_s: float, error: str, keeps: bool = False) -> None:
        number, self.number = self.number, -1
        if number >= 0:
            self.pool.done(number, done_s, error, self._reason[:_REASON].decode(errors="replace"))
        if keeps and self.wire.is_open:
            self.pool.free(self)
        else:
            self.wire.close()
            self.pool.forget(self)


class HttpClient:
    """As many connections as requests in flight, up to a limit; a request beyond it waits, and counts as sent late."""

    def __init__(self, target: Target, messages: Sequence[Message], done: Done, timeout_s: float) -> None:
        self.done = done
        self._target = target
        self._timeout_s = timeout_s
        self._hosts = [split(url) for url in target.urls]
        self._data = [
            [message.head + f"Host: {host}:{port}\r\n\r\n".encode() + message.body for message in messages]
            for host, port in self._hosts
        ]
        self._free: list[deque[_Connection]] = [deque() for _ in self._hosts]
        self._open = 0
        self._all: set[_Connection] = set()
        self._waiting: deque[tuple[int, int]] = deque()
        # Requests that found no connection free, and none that could be opened.
        self.waited = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.sent: Callable[[int], None] = lambda _: None

    async def start(self) -> None:
        opening = [self._connect(number % len(self._hosts)) for number in range(min(AHEAD, self._target.connections))]
        for connection in await asyncio.gather(*opening):
            self._free[connection.address].append(connection)

    def prepare(self, number: int, payload: int) -> None:
        """Nothing: messages are bytes already."""

    def send(self, number: int, payload: int) -> None:
        address = number % len(self._hosts)
        free = self._free[address]
        if free:
            self._write(free.pop(), number, payload)
        elif self._open < self._target.connections:
            task = asyncio.get_running_loop().create_task(self._open_for(address, number, payload))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self.waited += 1
            self._waiting.append((number, payload))

    def _write(self, connection: _Connection, number: int, payload: int) -> None:
        self.sent(number)
        connection.send(number, self._data[connection.address][payload], time.perf_counter() + self._timeout_s)

    async def _open_for(self, address: int, number: int, payload: int) -> None:
        try:
            connection = await self._connect(address)
        except OSError as error:
            self.sent(number)
            self.done(number, time.perf_counter(), UNREACHABLE, str(error))
            return
        self._write(connection, number, payload)

    async def _connect(self, address: int) -> _Connection:
        self._open += 1
        host, port = self._hosts[address]
        try:
            connection = _Connection(self, address, await connect(host, port))
        except OSError:
            self._open -= 1
            raise
        self._all.add(connection)
        return connection

    def free(self, connection: _Connection) -> None:
        if self._waiting:
            self._write(connection, *self._waiting.popleft())
        else:
            self._free[connection.address].append(connection)

    def forget(self, connection: _Connection) -> None:
        if connection in self._all:
            self._all.discard(connection)
            self._open -= 1
            if connection in self._free[connection.address]:
                self._free[connection.address].remove(connection)
        if self._waiting and self._open < self._target.connections:
            self.send(*self._waiting.popleft())

    def expire(self, now_s: float) -> None:
        for connection in list(self._all):
            if connection.number >= 0 and connection.deadline_s < now_s:
                connection.end(now_s, TIMED_OUT)

    async def close(self) -> None:
        for connection in list(self._all):
            connection.wire.close()
