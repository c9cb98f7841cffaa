"""The load tester's clients, against servers that behave, break, refuse and take their leave."""

import asyncio
import contextlib
import functools
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
import uvloop
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from tutti.loadtest.client import TIMED_OUT, UNREACHABLE
from tutti.loadtest.clients import CLIENTS
from tutti.loadtest.payloads import Message
from tutti.loadtest.process import free_ports
from tutti.loadtest.scenario import Target
from tutti.loadtest.wire import Wire

pytestmark = pytest.mark.timeout(60)

SETTINGS = bytes.fromhex("000000040000000000")  # HTTP/2's, of nothing


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **options: Any) -> None:
        uvloop.run(test(*args, **options))

    return run


@dataclass
class Seen:
    """What a client told: (what was wrong, the server's reason) of each request, and how long it took."""

    ended: dict[int, tuple[str, str]] = field(default_factory=dict)
    took_s: dict[int, float] = field(default_factory=dict)
    sent_s: dict[int, float] = field(default_factory=dict)

    @property
    def counts(self) -> Counter[str]:
        return Counter(what for what, _ in self.ended.values())


@contextlib.asynccontextmanager
async def client(
    protocol: str, url: str, body: bytes = b"", timeout_s: float = 20.0, **target: Any
) -> AsyncIterator[tuple[Any, Seen]]:
    seen = Seen()

    def done(number: int, at: float, what: str, reason: str) -> None:
        assert number not in seen.ended, "told twice"
        seen.ended[number] = (what, reason)
        seen.took_s[number] = at - seen.sent_s[number]

    head = (
        f"POST /v2/models/m/infer HTTP/1.1\r\nContent-Length: {len(body)}\r\n".encode() if protocol == "http" else b""
    )
    made = CLIENTS[protocol](
        Target(protocol=protocol, urls=[url], **target), [Message("m", body, head)], done, timeout_s
    )
    made.sent = lambda number: seen.sent_s.setdefault(number, time.perf_counter())  # type: ignore[assignment]
    await made.start()
    try:
        yield made, seen
    finally:
        await made.close()


async def until(condition: Callable[[], bool], made: Any = None) -> None:
    async with asyncio.timeout(30):
        while not condition():
            if made is not None:
                made.expire(time.perf_counter())
            await asyncio.sleep(0.01)


def is_cut_off(made: Any) -> bool:
    """Whether a client over gRPC knows of all its connections that they take no more."""
    return not any(one.is_open for pool in made._pools for one in pool)


class Service(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers with what it was asked; takes a time, fails, or ends its streams, as it is told."""

    def __init__(self) -> None:
        self.wait_s = 0.0
        self.peers: set[str] = set()
        self.asked: list[int] = []
        self.fails = False

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:  # noqa: N802
        self.peers.add(context.peer())
        self.asked.append(request.ByteSize())
        await asyncio.sleep(self.wait_s)
        if self.fails:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "100% of it is wröng")
        return pb.ModelInferResponse(raw_output_contents=request.raw_input_contents)

    async def ModelStreamInfer(  # noqa: N802
        self, requests: Any, context: Any
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        self.peers.add(context.peer())
        async for request in requests:
            if self.fails:
                await context.abort(grpc.StatusCode.INTERNAL, "no more")
            answer = pb.ModelInferResponse(id=request.id, raw_output_contents=request.raw_input_contents)
            yield pb.ModelStreamInferResponse(infer_response=answer)


@contextlib.asynccontextmanager
async def grpc_server(**options: int) -> AsyncIterator[tuple[Service, str, grpc.aio.Server]]:
    (port,) = free_ports(1)
    own = [("grpc.max_receive_message_length", -1), *((f"grpc.{name}", value) for name, value in options.items())]
    server, service = grpc.aio.server(options=own), Service()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield service, f"127.0.0.1:{port}", server
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def tcp_server(
    handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[tuple[str, list[int]]]:
    """Its address, and how often it was connected to."""
    (port,) = free_ports(1)
    connected: list[int] = []
    handling: set[asyncio.Task[Any]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.append(len(connected))
        task = asyncio.current_task()
        assert task is not None
        handling.add(task)
        task.add_done_callback(handling.discard)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await handle(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(accept, "127.0.0.1", port)
    async with server:
        yield f"127.0.0.1:{port}", connected
        await until(lambda: not handling)


def message(size: int) -> bytes:
    return pb.ModelInferRequest(model_name="m", raw_input_contents=[bytes(size)]).SerializeToString()


@pytest.mark.skipif(sys.platform != "linux", reason="stamps are Linux's")
@in_a_loop
async def test_an_answer_counts_from_when_it_arrived_not_from_when_it_was_read() -> None:
    found: list[tuple[bytes, float]] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    near.setblocking(False)
    wire = Wire(near, lambda data, at: found.append((data, at)), lambda _: None)
    late_s: list[float] = []
    while len(late_s) < 5 and (not late_s or late_s[-1] > 0.15):  # the kernel begins to stamp when it comes to it
        far.sendall(b"now")
        written = time.perf_counter()
        time.sleep(0.3)  # the reader is busy
        await until(lambda: len(found) > len(late_s))
        late_s.append(found[-1][1] - written)
    wire.close()
    far.close()
    assert {data for data, _ in found} == {b"now"}
    assert late_s[-1] <= 0.15, late_s


@pytest.mark.parametrize("protocol", ["grpc", "grpc-stream"])
@in_a_loop
async def test_messages_of_any_size_both_ways(protocol: str) -> None:
    async with grpc_server() as (service, url, _):
        for size in (0, 1, 70_000, 3_000_000):
            async with client(protocol, url, message(size)) as (made, seen):
                for number in range(6):
                    made.prepare(number, 0)
                    made.send(number, 0)
                await until(lambda seen=seen: len(seen.ended) == 6)
                assert seen.counts == {"": 6}
        if protocol == "grpc":
            assert service.asked[-6:] == [len(message(3_000_000))] * 6


@in_a_loop
async def test_more_calls_than_a_connection_may_have() -> None:
    """Others are opened, up to `connections`; then they wait."""
    async with grpc_server(max_concurrent_streams=4) as (service, url, _):
        service.wait_s = 0.3
        for connections, least in ((4096, 10), (5, 5)):
            service.peers.clear()
            async with client("grpc", url, message(4), connections=connections) as (made, seen):
                for number in range(40):
                    made.send(number, 0)
                await until(lambda seen=seen: len(seen.ended) == 40)
                assert seen.counts == {"": 40}
                assert len(service.peers) >= least
                assert (made.waited > 0) == (connections == 5)
                assert len(service.peers) <= connections


@in_a_loop
async def test_a_server_that_takes_its_leave_answers_what_it_has() -> None:
    async with grpc_server() as (service, url, server):
        service.wait_s = 0.5
        async with client("grpc", url, message(4)) as (made, seen):
            for number in range(12):
                made.send(number, 0)
            await until(lambda: len(service.asked) == 12)
            made.prepare(12, 0)  # for a connection that will take no more
            stopping = asyncio.create_task(server.stop(10))
            await until(lambda: is_cut_off(made))
            made.send(12, 0)
            await until(lambda: len(seen.ended) == 13)
            await stopping
            assert [what for what, _ in (seen.ended[number] for number in range(12))] == [""] * 12
            assert seen.ended[12][0] == UNREACHABLE


@pytest.mark.parametrize("protocol", ["grpc", "grpc-stream"])
@in_a_loop
async def test_failures_have_their_reasons(protocol: str) -> None:
    async with grpc_server() as (service, url, _), client(protocol, url, message(4)) as (made, seen):
        service.fails = True
        made.send(0, 0)
        await until(lambda: len(seen.ended) == 1)
        service.fails = False
        for number in range(1, 9):  # a stream that ended is opened again
            made.send(number, 0)
        await until(lambda: len(seen.ended) == 9)
    first = (
        ("INVALID_ARGUMENT", "100% of it is wröng") if protocol == "grpc" else ("the stream broke: INTERNAL", "no more")
    )
    assert seen.ended[0] == first
    assert seen.counts[""] == 8


@pytest.mark.parametrize("protocol", ["http", "grpc", "grpc-stream"])
@in_a_loop
async def test_what_takes_too_long_is_given_up(protocol: str) -> None:
    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if protocol != "http":
            writer.write(SETTINGS)
        await reader.read()

    async with tcp_server(never) as (url, _), client(protocol, url, message(4), timeout_s=0.3) as (made, seen):
        for number in range(20):
            made.send(number, 0)
        await until(lambda: len(seen.ended) == 20, made)
        assert seen.counts == {TIMED_OUT: 20}
        assert all(0.29 < took < 10 for took in seen.took_s.values())


@pytest.mark.parametrize("protocol", ["http", "grpc", "grpc-stream"])
@pytest.mark.parametrize("says", [b"", b"what is this\r\n\r\n", bytes(200), b"\0\0\4\1\5\0\0\0\1junk"])
@in_a_loop
async def test_a_server_that_breaks_its_connections(protocol: str, says: bytes) -> None:
    """Each request ends once, with an error; the next finds another connection."""

    async def breaks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if protocol != "http":
            writer.write(SETTINGS)
            await reader.readexactly(100)
        await reader.read(1)
        await asyncio.sleep(0.1)
        writer.write(says)
        await writer.drain()

    async with tcp_server(breaks) as (url, _), client(protocol, url, message(4)) as (made, seen):
        for number in range(10):
            made.send(number, 0)
        await until(lambda: len(seen.ended) == 10)
        made.send(10, 0)
        await until(lambda: len(seen.ended) == 11)
        assert "" not in seen.counts


@pytest.mark.parametrize("protocol", ["http", "grpc", "grpc-stream"])
@in_a_loop
async def test_nobody_there_any_more(protocol: str) -> None:
    closing = asyncio.Event()

    async def closes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if protocol != "http":
            writer.write(SETTINGS)
        await closing.wait()

    async with contextlib.AsyncExitStack() as stack:
        async with tcp_server(closes) as (url, _):
            made, seen = await stack.enter_async_context(client(protocol, url))
            closing.set()
        await asyncio.sleep(0.1)
        made.send(0, 0)
        await until(lambda: len(seen.ended) == 1)
        assert seen.counts == {UNREACHABLE: 1}
        assert "Errno 111" in seen.ended[0][1]


HTTP = {
    "length": (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", True, ""),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", True, ""),
    "its end": (b"HTTP/1.1 200 OK\r\n\r\n{}", False, ""),
    "close": (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}", False, ""),
    "cut": (b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{}", False, "the connection broke: it was closed"),
    "error": (b"HTTP/1.1 404 Not\r\nContent-Length: 4\r\n\r\nnone", True, "HTTP 404"),
}


@pytest.mark.parametrize("name", HTTP)
@in_a_loop
async def test_answers_over_http(name: str) -> None:
    answer, keeps, what = HTTP[name]

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            await reader.readexactly(4)
            for half in (answer[:25], answer[25:]):
                writer.write(half)
                await asyncio.sleep(0.01)
            if not keeps:
                return

    async with tcp_server(handle) as (url, connected), client("http", url, b"body") as (made, seen):
        for number in range(30):
            made.prepare(number, 0)
            made.send(number, 0)
            await until(lambda number=number: len(seen.ended) == number + 1)
        assert seen.counts == {what: 30}
        if what.startswith("HTTP"):
            assert seen.ended[0][1] == "none"
        ahead = 16
        assert len(connected) == ahead if keeps else len(connected) >= 30
