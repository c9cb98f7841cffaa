"""Clients that send messages when they are told, and tell when each is answered. Nobody waits in them for anybody.

HTTP/1.1 is llhttp (httptools), a connection for each request in flight; gRPC is h2, with many calls on a connection.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import httptools
from tritonclient.grpc import service_pb2 as pb

from tutti.loadtest import http2
from tutti.loadtest.addresses import split
from tutti.loadtest.payloads import Message
from tutti.loadtest.scenario import Target
from tutti.loadtest.wire import Wire, connect

Done = Callable[[int, float, str, str], None]
"""(number of the request, time.perf_counter() when its answer came, what was wrong or "", the server's reason)."""

SERVICE = b"/inference.GRPCInferenceService/"
TIMED_OUT = "no answer in time"
UNREACHABLE = "the server cannot be reached"
_REASON = 300
# Connections that are opened before anybody waits for one.
AHEAD = 16
# Of a request's prefix and id, at most.
_ID_SIZE = 32


class Client(Protocol):
    """What the engine drives. `sent(number)` is called when a request goes out."""

    sent: Callable[[int], None]
    # Requests for which no connection was free, and none could be opened.
    waited: int

    async def start(self) -> None:
        """Open what connections are needed at first. Raises OSError when no server is there."""

    def prepare(self, number: int, payload: int) -> None:
        """Do ahead what can be done for the request that is sent next."""

    def send(self, number: int, payload: int) -> None:
        """Without waiting."""

    def expire(self, now_s: float) -> None:
        """End what has had no answer for too long."""

    async def close(self) -> None: ...


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

    def _received(self, data: bytes, at: float) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, AttributeError) as error:
            self.end(at, f"it sent what is no answer: {error}")
            return
        if self._is_answered:
            self._answer(at)

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

    def _answer(self, at: float) -> None:
        status = self._parser.get_status_code()
        self.end(at, "" if status == 200 else f"HTTP {status}", self._keeps)

    def _lost(self, why: str) -> None:
        if self.number >= 0 and not why and self._has_headers and not self._is_delimited:
            self._answer(time.perf_counter())  # one that ends with its connection
        else:
            self.end(time.perf_counter(), f"the connection broke: {why or 'it was closed'}")

    def end(self, at: float, what: str, keeps: bool = False) -> None:
        number, self.number = self.number, -1
        if number >= 0:
            self.pool.done(number, at, what, self._reason[:_REASON].decode(errors="replace"))
        if keeps and self.wire.is_open:
            self.pool.free(self)
        else:
            self.wire.close()
            self.pool.forget(self)


class HttpClient:
    """As many connections as requests are in flight, up to a most; what is over waits, and is counted as sent late."""

    def __init__(self, target: Target, messages: Sequence[Message], done: Done, timeout_s: float) -> None:
        self.done = done
        self._target = target
        self._timeout_s = timeout_s
        self._hosts = [split(url) for url in target.urls]
        self._data = [
            [one.head + f"Host: {host}:{port}\r\n\r\n".encode() + one.body for one in messages]
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
        made = [self._connect(number % len(self._hosts)) for number in range(min(AHEAD, self._target.connections))]
        for connection in await asyncio.gather(*made):
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


@dataclass(slots=True, eq=False)
class _Call:
    """A request that has no answer yet; where it is, once it was sent."""

    number: int
    payload: int
    deadline_s: float
    connection: http2.Connection | None = None
    stream: int = 0


class _GrpcClient:
    """Calls over connections that are opened as they are needed; the addresses take turns, request by request."""

    METHOD = b""
    # Where each connection to an address has so many calls, another is opened.
    CROWDED = 64

    def __init__(self, target: Target, messages: Sequence[Message], done: Done, timeout_s: float) -> None:
        self._done = done
        self._bodies = [one.body for one in messages]
        self._timeout_s = timeout_s
        self._hosts = [split(url) for url in target.urls]
        own = [(key.lower().encode(), value.encode()) for key, value in target.headers.items()]
        self._headers = [
            [(b":method", b"POST"), (b":scheme", b"http"), (b":path", SERVICE + self.METHOD),
             (b":authority", f"{host}:{port}".encode()), (b"te", b"trailers"), (b"content-type", b"application/grpc"),
             *self._more_headers(), *own]
            for host, port in self._hosts
        ]  # fmt: skip
        self._pools: list[list[http2.Connection]] = [[] for _ in self._hosts]
        self._most = target.connections
        self._opening: dict[int, asyncio.Task[None]] = {}
        # All, the oldest first; those of them that no connection has room for, by address.
        self._calls: dict[int, _Call] = {}
        self._waiting: list[deque[_Call]] = [deque() for _ in self._hosts]
        # (connection, stream, bytes) of the request that is sent next.
        self._ready: tuple[http2.Connection, int, bytes] | None = None
        self.waited = 0
        self.sent: Callable[[int], None] = lambda _: None

    def _more_headers(self) -> list[tuple[bytes, bytes]]:
        return []

    def _opened(self, connection: http2.Connection) -> None:
        """It may be used now."""

    def _received(self, key: Any, data: bytes, at: float) -> None:
        """Of an answer's messages."""

    def _ended(self, key: Any, status: str, message: str, at: float) -> None:
        raise NotImplementedError

    def _load(self, connection: http2.Connection) -> int:
        """Requests that it has."""
        raise NotImplementedError

    def _fits(self, connection: http2.Connection, payload: int) -> bool:
        """Whether a request could go at once and whole."""
        raise NotImplementedError

    def _put(self, connection: http2.Connection, number: int, payload: int) -> tuple[int, bytes]:
        """The stream, and what is to be written for a request."""
        raise NotImplementedError

    def _forget(self, connection: http2.Connection, call: _Call) -> None:
        """Its answer is not waited for any more."""
        raise NotImplementedError

    async def start(self) -> None:
        await asyncio.gather(*(self._open(number % len(self._hosts)) for number in range(max(4, len(self._hosts)))))

    async def _open(self, address: int) -> None:
        """Raises OSError, also when nobody there speaks HTTP/2."""
        connected = await connect(*self._hosts[address])
        connection = http2.Connection(connected, self._headers[address], self._received, self._ended)
        try:
            async with asyncio.timeout(self._timeout_s):
                await connection.greeted.wait()
        except TimeoutError:
            connection.close()
        if not connection.is_open:
            raise OSError("it does not answer in HTTP/2")
        self._opened(connection)
        self._pools[address].append(connection)

    def prepare(self, number: int, payload: int) -> None:
        if self._ready is not None:
            return
        address = number % len(self._hosts)
        # Bytes of a connection go out in the order in which they were made: nobody may come between.
        connection = None if self._waiting[address] else self._pick(address)
        if connection is not None and self._fits(connection, payload):
            self._ready = (connection, *self._put(connection, number, payload))

    def send(self, number: int, payload: int) -> None:
        call = _Call(number, payload, time.perf_counter() + self._timeout_s)
        self._calls[number] = call
        ready, self._ready = self._ready, None
        if ready is not None and ready[0].is_open:
            self._go(call, *ready)
            return
        if ready is not None:
            ready[0].forget(ready[1])
        self._place(call)

    def _place(self, call: _Call) -> None:
        """On a connection, or where it waits for one."""
        address = call.number % len(self._hosts)
        connection = self._pick(address)
        if connection is not None:
            self._go(call, connection, *self._put(connection, call.number, call.payload))
        else:
            call.connection = None
            self._waiting[address].append(call)
            self._grow(address)
            self.waited += self._is_full

    def _go(self, call: _Call, connection: http2.Connection, stream: int, data: bytes) -> None:
        call.connection, call.stream = connection, stream
        self.sent(call.number)
        connection.write(data)

    def _pick(self, address: int) -> http2.Connection | None:
        pool = self._pools[address]
        best = min((one for one in pool if one.has_room), key=self._load, default=None)
        if best is not None and best.in_flight >= self.CROWDED:
            self._grow(address)
        return best

    @property
    def _is_full(self) -> bool:
        return sum(map(len, self._pools)) + len(self._opening) >= self._most

    def _grow(self, address: int) -> None:
        self._pools[address] = [one for one in self._pools[address] if one.is_open]
        if address not in self._opening and not self._is_full:
            self._opening[address] = asyncio.get_running_loop().create_task(self._grow_by_one(address))

    async def _grow_by_one(self, address: int) -> None:
        try:
            await self._open(address)
        except OSError as error:
            while self._waiting[address] and not self._pools[address]:
                call = self._waiting[address].popleft()
                self.sent(call.number)
                self._finish(call.number, time.perf_counter(), UNREACHABLE, str(error))
        finally:
            del self._opening[address]
        self._send_waiting(address)

    def _send_waiting(self, address: int) -> None:
        waiting = self._waiting[address]
        while waiting and (connection := self._pick(address)) is not None:
            call = waiting.popleft()
            if call.number in self._calls:
                self._go(call, connection, *self._put(connection, call.number, call.payload))
        if waiting:
            self._grow(address)

    def _finish(self, number: int, at: float, what: str, reason: str) -> None:
        if self._calls.pop(number, None) is not None:
            self._done(number, at, what, reason)

    def expire(self, now_s: float) -> None:
        while self._calls:
            call = next(iter(self._calls.values()))
            if call.deadline_s > now_s:
                return
            if call.connection is not None:
                self._forget(call.connection, call)
            self._finish(call.number, now_s, TIMED_OUT, "")

    async def close(self) -> None:
        for task in self._opening.values():
            task.cancel()
        for connection in (one for pool in self._pools for one in pool):
            connection.close()


class GrpcClient(_GrpcClient):
    """Unary calls."""

    METHOD = b"ModelInfer"

    def __init__(self, target: Target, messages: Sequence[Message], done: Done, timeout_s: float) -> None:
        super().__init__(target, messages, done, timeout_s)
        self._framed = [_framed(body) for body in self._bodies]

    def _more_headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"grpc-timeout", f"{max(1, int(self._timeout_s * 1e3))}m".encode())]

    def _load(self, connection: http2.Connection) -> int:
        return connection.in_flight

    def _fits(self, connection: http2.Connection, payload: int) -> bool:
        return connection.fits(len(self._framed[payload]))

    def _put(self, connection: http2.Connection, number: int, payload: int) -> tuple[int, bytes]:
        stream = connection.open_call(number)
        connection.put(stream, self._framed[payload], True)
        return stream, connection.take()

    def _ended(self, number: int, status: str, message: str, at: float) -> None:
        call = self._calls.get(number)
        if call is None or call.connection is None:
            return  # it was given up, or only prepared
        if status == http2.UNPROCESSED and at < call.deadline_s:
            self._place(call)
        else:
            what = {"OK": "", "DEADLINE_EXCEEDED": TIMED_OUT, http2.UNPROCESSED: http2.UNAVAILABLE}.get(status, status)
            self._finish(number, at, what, message)
        self._send_waiting(number % len(self._hosts))

    def _forget(self, connection: http2.Connection, call: _Call) -> None:
        connection.cancel(call.stream)


class _Stream:
    """One ModelStreamInfer call: the requests that it has, and what is there of the answer that comes."""

    def __init__(self, connection: http2.Connection) -> None:
        self.connection = connection
        self.number = connection.open_call(self)
        self.open: set[int] = set()
        self.buffer = bytearray()


class StreamClient(_GrpcClient):
    """Requests over a few ModelStreamInfer streams; answers are told apart by their ids."""

    METHOD = b"ModelStreamInfer"

    def __init__(self, target: Target, messages: Sequence[Message], done: Done, timeout_s: float) -> None:
        super().__init__(target, messages, done, timeout_s)
        self._streams: dict[http2.Connection, _Stream] = {}

    def _opened(self, connection: http2.Connection) -> None:
        self._streams[connection] = _Stream(connection)
        connection.write(connection.take())

    def _load(self, connection: http2.Connection) -> int:
        return len(self._streams[connection].open)

    def _fits(self, connection: http2.Connection, payload: int) -> bool:
        return connection.fits(len(self._bodies[payload]) + _ID_SIZE, self._streams[connection].number)

    def _put(self, connection: http2.Connection, number: int, payload: int) -> tuple[int, bytes]:
        stream = self._streams[connection]
        own = pb.ModelInferRequest(id=str(number)).SerializeToString()  # fields of a message may follow each other
        connection.put(stream.number, _framed(self._bodies[payload] + own), False)
        return stream.number, connection.take()

    def _go(self, call: _Call, connection: http2.Connection, stream: int, data: bytes) -> None:
        self._streams[connection].open.add(call.number)
        super()._go(call, connection, stream, data)

    def _received(self, stream: _Stream, data: bytes, at: float) -> None:
        stream.buffer += data
        while len(stream.buffer) >= 5:
            end = 5 + int.from_bytes(stream.buffer[1:5], "big")
            if len(stream.buffer) < end:
                return
            answer = pb.ModelStreamInferResponse.FromString(bytes(stream.buffer[5:end]))
            del stream.buffer[:end]
            number = int(answer.infer_response.id or -1)
            stream.open.discard(number)
            self._finish(number, at, answer.error_message, "")

    def _ended(self, stream: _Stream, status: str, message: str, at: float) -> None:
        del self._streams[stream.connection]
        stream.connection.close()
        for number in stream.open:
            self._finish(number, at, f"the stream broke: {status}", message)

    def _forget(self, connection: http2.Connection, call: _Call) -> None:
        if connection in self._streams:
            self._streams[connection].open.discard(call.number)


CLIENTS: dict[str, Callable[[Target, Sequence[Message], Done, float], Client]] = {
    "http": HttpClient,
    "grpc": GrpcClient,
    "grpc-stream": StreamClient,
}


def _framed(message: bytes) -> bytes:
    """A message as gRPC sends it: not compressed, its length, itself."""
    return b"\0" + len(message).to_bytes(4, "big") + message
