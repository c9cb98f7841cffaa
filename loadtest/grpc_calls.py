"""Which connection a gRPC request goes out on: what the clients of unary calls and of streams share.

Connections are opened as they are needed, and a request that none has room for waits. How a request becomes bytes of a
connection, and which answer is whose, the clients say (grpc_client.py, grpc_stream.py).
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tutti.loadtest import http2
from tutti.loadtest.addresses import split
from tutti.loadtest.client import TIMED_OUT, UNREACHABLE, Done
from tutti.loadtest.payloads import Message
from tutti.loadtest.scenario import Target
from tutti.loadtest.wire import connect

SERVICE = b"/inference.GRPCInferenceService/"


@dataclass(slots=True, eq=False)
class Call:
    """A request that has no answer yet. `connection` and `stream` say where it was sent; None and 0 before."""

    number: int
    payload: int
    deadline_s: float
    connection: http2.Connection | None = None
    stream: int = 0


class CallPool:
    """Calls over connections that are opened as they are needed; the addresses take turns, request by request."""

    METHOD = b""
    # Another connection is opened when each one to an address has this many calls.
    CROWDED = 64

    def __init__(self, target: Target, messages: Sequence[Message], done: Done, timeout_s: float) -> None:
        self._done = done
        self._bodies = [message.body for message in messages]
        self._timeout_s = timeout_s
        self._hosts = [split(url) for url in target.urls]
        more = [(key.lower().encode(), value.encode()) for key, value in target.headers.items()]
        self._headers = [
            [(b":method", b"POST"), (b":scheme", b"http"), (b":path", SERVICE + self.METHOD),
             (b":authority", f"{host}:{port}".encode()), (b"te", b"trailers"), (b"content-type", b"application/grpc"),
             *self._more_headers(), *more]
            for host, port in self._hosts
        ]  # fmt: skip
        self._pools: list[list[http2.Connection]] = [[] for _ in self._hosts]
        self._most = target.connections
        self._opening: dict[int, asyncio.Task[None]] = {}
        # All calls without an answer, the oldest first; and those that wait for room on a connection, by address.
        self._calls: dict[int, Call] = {}
        self._waiting: list[deque[Call]] = [deque() for _ in self._hosts]
        # (connection, stream, bytes) of the request that is sent next.
        self._ready: tuple[http2.Connection, int, bytes] | None = None
        self.waited = 0
        self.sent: Callable[[int], None] = lambda _: None

    def _more_headers(self) -> list[tuple[bytes, bytes]]:
        return []

    def _opened(self, connection: http2.Connection) -> None:
        """A new connection may be used from now on."""

    def _received(self, key: Any, data: bytes, done_s: float) -> None:
        """A part of an answer's messages has come."""

    def _ended(self, key: Any, status: str, message: str, done_s: float) -> None:
        raise NotImplementedError

    def _load(self, connection: http2.Connection) -> int:
        """How many requests are in flight on it."""
        raise NotImplementedError

    def _fits(self, connection: http2.Connection, payload: int) -> bool:
        """Whether a request could go at once and whole."""
        raise NotImplementedError

    def _put(self, connection: http2.Connection, number: int, payload: int) -> tuple[int, bytes]:
        """The stream, and what is to be written for a request."""
        raise NotImplementedError

    def _forget(self, connection: http2.Connection, call: Call) -> None:
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
        # A connection's bytes go out in the order in which they were made (HPACK has state): no call may go before.
        connection = None if self._waiting[address] else self._pick(address)
        if connection is not None and self._fits(connection, payload):
            self._ready = (connection, *self._put(connection, number, payload))

    def send(self, number: int, payload: int) -> None:
        call = Call(number, payload, time.perf_counter() + self._timeout_s)
        self._calls[number] = call
        ready, self._ready = self._ready, None
        if ready is not None and ready[0].is_open:
            self._go(call, *ready)
            return
        if ready is not None:
            ready[0].forget(ready[1])
        self._place(call)

    def _place(self, call: Call) -> None:
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

    def _go(self, call: Call, connection: http2.Connection, stream: int, data: bytes) -> None:
        call.connection, call.stream = connection, stream
        self.sent(call.number)
        connection.write(data)

    def _pick(self, address: int) -> http2.Connection | None:
        pool = self._pools[address]
        best = min((connection for connection in pool if connection.has_room), key=self._load, default=None)
        if best is not None and best.in_flight >= self.CROWDED:
            self._grow(address)
        return best

    @property
    def _is_full(self) -> bool:
        return sum(map(len, self._pools)) + len(self._opening) >= self._most

    def _grow(self, address: int) -> None:
        self._pools[address] = [connection for connection in self._pools[address] if connection.is_open]
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

    def _finish(self, number: int, done_s: float, error: str, reason: str) -> None:
        if self._calls.pop(number, None) is not None:
            self._done(number, done_s, error, reason)

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
        for connection in (connection for pool in self._pools for connection in pool):
            connection.close()


def framed(message: bytes) -> bytes:
    """A message as gRPC sends it: not compressed, its length, itself."""
    return b"\0" + len(message).to_bytes(4, "big") + message
