"""Clients that send messages when they are told, and tell when each is answered. Nobody waits in them for anybody.

HTTP/1.1 is llhttp (httptools) over asyncio's transports, a connection for each request in flight; gRPC is grpc.aio with
messages as bytes.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import httptools
from tritonclient.grpc import service_pb2 as pb

from loadtest.payloads import Message
from loadtest.scenario import Target

Done = Callable[[int, float, str], None]
"""(number of the request, time.perf_counter() when it was answered, what was wrong or "")."""

SERVICE = "/inference.GRPCInferenceService/"
TIMED_OUT = "no answer in time"


class _Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self, pool: "HttpClient", address: int) -> None:
        self.pool = pool
        self.address = address
        self.transport: Any = None
        self.number = -1
        self.deadline_s = 0.0
        self._parser: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def send(self, number: int, data: bytes, deadline_s: float) -> None:
        self.number, self.deadline_s = number, deadline_s
        self._parser = httptools.HttpResponseParser(self)
        self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, AttributeError) as error:
            self._end(f"it sent what is no answer: {error}")
            self.transport.abort()

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        keeps = self._parser.should_keep_alive()
        self._end("" if status == 200 else f"HTTP {status}", keeps)

    def connection_lost(self, error: Exception | None) -> None:
        self.pool.forget(self)
        self._end(f"the connection broke: {error or 'it was closed'}")

    def _end(self, what: str, keeps: bool = False) -> None:
        number, self.number = self.number, -1
        if number >= 0:
            self.pool.done(number, time.perf_counter(), what)
            if keeps:
                self.pool.free(self)
            elif not self.transport.is_closing():
                self.transport.close()


class HttpClient:
    """As many connections as requests are in flight, up to a most; what is over waits, and is counted as sent late."""

    def __init__(self, target: Target, messages: Sequence[Message], done: Done, timeout_s: float) -> None:
        self.done = done
        self._target = target
        self._timeout_s = timeout_s
        self._hosts = [_split(url) for url in target.urls]
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

    async def start(self, ahead: int = 16) -> None:
        """Open some connections before anybody waits for one."""
        made = [self._connect(number % len(self._hosts)) for number in range(min(ahead, self._target.connections))]
        for connection in await asyncio.gather(*made):
            self._free[connection.address].append(connection)

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
            self.done(number, time.perf_counter(), f"it cannot be reached: {error}")
            return
        self._write(connection, number, payload)

    async def _connect(self, address: int) -> _Connection:
        self._open += 1
        host, port = self._hosts[address]
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(self, address), host, port
            )
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
        """End what has had no answer for too long."""
        for connection in list(self._all):
            if connection.number >= 0 and connection.deadline_s < now_s:
                number, connection.number = connection.number, -1
                self.done(number, now_s, TIMED_OUT)
                connection.transport.abort()

    async def close(self) -> None:
        for connection in list(self._all):
            connection.transport.abort()


class _GrpcClient:
    """Channels of their own, to each address in turn."""

    CHANNELS = 4

    def __init__(self, target: Target, messages: Sequence[Message], done: Done, timeout_s: float) -> None:
        self._done = done
        self._bodies = [one.body for one in messages]
        self._timeout_s = timeout_s
        self._metadata = tuple((key.lower(), value) for key, value in target.headers.items())
        self._urls = target.urls
        self._channels: list[Any] = []
        self.sent: Callable[[int], None] = lambda _: None

    async def start(self, ahead: int = 0) -> None:
        own = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        for number in range(max(self.CHANNELS, len(self._urls))):
            channel = grpc.aio.insecure_channel(self._urls[number % len(self._urls)], options=own)
            self._channels.append(channel)
            self._opened(channel)
        await asyncio.wait_for(asyncio.gather(*(one.channel_ready() for one in self._channels)), 30)

    def _opened(self, channel: Any) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        await asyncio.gather(*(one.close() for one in self._channels))


class GrpcClient(_GrpcClient):
    """Unary calls over a few connections."""

    def __init__(self, target: Target, messages: Sequence[Message], done: Done, timeout_s: float) -> None:
        super().__init__(target, messages, done, timeout_s)
        self._calls: list[Any] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def _opened(self, channel: Any) -> None:
        self._calls.append(channel.unary_unary(f"{SERVICE}ModelInfer"))  # bytes in, bytes out

    def send(self, number: int, payload: int) -> None:
        self.sent(number)
        task = asyncio.get_running_loop().create_task(self._ask(number, payload))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, number: int, payload: int) -> None:
        call = self._calls[number % len(self._calls)]
        try:
            await call(self._bodies[payload], timeout=self._timeout_s, metadata=self._metadata)
            what = ""
        except grpc.aio.AioRpcError as error:
            code = error.code()
            what = TIMED_OUT if code is grpc.StatusCode.DEADLINE_EXCEEDED else code.name
        self._done(number, time.perf_counter(), what)

    def expire(self, now_s: float) -> None:
        """gRPC does so itself."""

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await super().close()


class StreamClient(_GrpcClient):
    """Requests over a few ModelStreamInfer streams; answers are told apart by their ids."""

    def __init__(self, target: Target, messages: Sequence[Message], done: Done, timeout_s: float) -> None:
        super().__init__(target, messages, done, timeout_s)
        self._queues: list[asyncio.Queue[bytes | None]] = []
        self._readers: list[asyncio.Task[None]] = []
        self._open: dict[int, float] = {}

    def _opened(self, channel: Any) -> None:
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._queues.append(queue)
        self._readers.append(asyncio.create_task(self._read(channel, queue)))

    def send(self, number: int, payload: int) -> None:
        self.sent(number)
        now = time.perf_counter()
        self._open[number] = now + self._timeout_s
        own = pb.ModelInferRequest(id=str(number)).SerializeToString()  # fields of a message may follow each other
        self._queues[number % len(self._queues)].put_nowait(self._bodies[payload] + own)

    async def _read(self, channel: Any, queue: "asyncio.Queue[bytes | None]") -> None:
        async def requests() -> Any:
            while (body := await queue.get()) is not None:
                yield body

        try:
            async for data in channel.stream_stream(f"{SERVICE}ModelStreamInfer")(requests(), metadata=self._metadata):
                now = time.perf_counter()
                answer = pb.ModelStreamInferResponse.FromString(data)
                number = int(answer.infer_response.id or -1)
                if self._open.pop(number, None) is not None:
                    self._done(number, now, answer.error_message)
        except grpc.aio.AioRpcError as error:
            for number in list(self._open):
                del self._open[number]
                self._done(number, time.perf_counter(), f"the stream broke: {error.code().name}")

    def expire(self, now_s: float) -> None:
        for number in [one for one, deadline_s in self._open.items() if deadline_s < now_s]:
            del self._open[number]
            self._done(number, now_s, TIMED_OUT)

    async def close(self) -> None:
        for queue in self._queues:
            queue.put_nowait(None)
        for reader in self._readers:
            reader.cancel()
        await super().close()


CLIENTS: dict[str, Any] = {"http": HttpClient, "grpc": GrpcClient, "grpc-stream": StreamClient}


def _split(url: str) -> tuple[str, int]:
    host, _, port = url.rpartition(":")
    return host or "127.0.0.1", int(port)
