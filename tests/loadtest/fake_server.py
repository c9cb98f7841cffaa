"""A server whose behaviour is known: fixed latency, a stall now and then, errors, one request at a time at a rate.

    python -m tests.loadtest.fake_server HTTP_PORT GRPC_PORT [--delay-ms 5] [--stall-every-s 20 --stall-s 1]
                                         [--errors 0.01] [--rate 500] [--slower-by 1.1]

HTTP and gRPC. Delays count from when a request arrived at the machine, so that what is measured is what the server
does, not what it costs to wake it.
"""

import argparse
import asyncio
import functools
import heapq
import itertools
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import h2.config
import h2.connection
import h2.events
import uvloop
from tritonclient.grpc import service_pb2 as pb

from tutti.loadtest.timers import Alarm
from tutti.loadtest.wire import Wire

METADATA = {
    "name": "fake", "versions": ["1"], "platform": "none",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
}  # fmt: skip
HEADERS = [(b":status", b"200"), (b"content-type", b"application/grpc")]
GRPC_ANSWER = pb.ModelInferResponse(model_name="fake", model_version="1").SerializeToString()
GRPC_METADATA = pb.ModelMetadataResponse(
    name="fake",
    versions=["1"],
    inputs=[pb.ModelMetadataResponse.TensorMetadata(name="x", datatype="FP32", shape=[-1, 4])],
).SerializeToString()
# It waits awake for what is due so soon: sleeping takes tens of microseconds to end.
_SPIN_S = 0.006


class Behaviour:
    """When a request that comes now is answered, and how."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._delay_s = options.delay_ms / 1e3 * options.slower_by
        self._every_s, self._stall_s = options.stall_every_s, options.stall_s
        self._errors, self._rate = options.errors, options.rate
        self._start = time.perf_counter()
        self._numbers = itertools.count(1)
        self._free_at = 0.0

    def answer(self, now: float) -> tuple[float, bool]:
        """(when, whether it is an error)."""
        begins = self._after_stall(now)
        if self._rate:  # one after the other
            begins = max(begins, self._free_at)
            self._free_at = begins + 1 / self._rate
            begins = self._free_at
        number = next(self._numbers)
        # Evenly: every hundredth for 0.01.
        is_error = bool(self._errors) and int(number * self._errors) != int((number - 1) * self._errors)
        return begins + self._delay_s, is_error

    def _after_stall(self, now: float) -> float:
        """The server stands still for the end of each period: what comes then begins after it."""
        if not self._every_s:
            return now
        into = (now - self._start) % self._every_s
        return now + self._every_s - into if into > self._every_s - self._stall_s else now


class Later:
    """Calls functions when they are due, to some tens of microseconds."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._more = asyncio.Event()

    def call(self, at: float, function: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (at, next(self._order), function))
        if self._heap[0][0] == at:
            self._more.set()

    async def run(self) -> None:
        alarm = Alarm()
        while True:
            self._more.clear()
            now = time.perf_counter()
            while self._heap and self._heap[0][0] <= now:
                heapq.heappop(self._heap)[2]()
                now = time.perf_counter()
            if not self._heap:
                await self._more.wait()
                continue
            if self._heap[0][0] - now < _SPIN_S:
                await asyncio.sleep(0)  # and look at what has come
                continue
            waits = asyncio.ensure_future(self._more.wait())
            rings = asyncio.ensure_future(alarm.sleep(self._heap[0][0] - now - _SPIN_S / 2))
            await asyncio.wait({waits, rings}, return_when=asyncio.FIRST_COMPLETED)
            waits.cancel()
            rings.cancel()


class Http:
    """Enough of HTTP/1.1: one request after the other on a connection."""

    def __init__(self, connected: socket.socket, behaviour: Behaviour, later: Later) -> None:
        self._behaviour, self._later = behaviour, later
        self._buffer = b""
        self._wire = Wire(connected, self._received, lambda _: None)

    def _received(self, data: bytes, now: float) -> None:
        self._buffer += data
        while b"\r\n\r\n" in self._buffer:
            head, _, rest = self._buffer.partition(b"\r\n\r\n")
            length = next(
                (int(one.split(b":")[1]) for one in head.split(b"\r\n") if one.lower().startswith(b"content-length:")),
                0,
            )
            if len(rest) < length:
                return
            self._buffer = rest[length:]
            if head.startswith(b"GET"):
                self._write(200, json.dumps(METADATA).encode())
                continue
            at, is_error = self._behaviour.answer(now)
            self._later.call(at, functools.partial(self._write, 503 if is_error else 200, b"{}"))

    def _write(self, status: int, body: bytes) -> None:
        self._wire.write(b"HTTP/1.1 %d OK\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body))


class Grpc:
    """ModelInfer, ModelMetadata, and ModelStreamInfer, where each request has one answer."""

    def __init__(self, connected: socket.socket, behaviour: Behaviour, later: Later) -> None:
        self._behaviour, self._later = behaviour, later
        self._paths: dict[int, bytes] = {}
        self._said: dict[int, bytearray] = {}
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
        self._h2.encoder.header_table_size = 0  # answers are made when they are asked for, and sent in any order
        self._h2.initiate_connection()
        self._wire = Wire(connected, self._received, lambda _: None)
        self._write(self._h2.data_to_send())

    def _received(self, data: bytes, now: float) -> None:
        for event in self._h2.receive_data(data):
            if isinstance(event, h2.events.RequestReceived):
                self._paths[event.stream_id] = path = dict(event.headers)[b":path"].rpartition(b"/")[2]
                self._said[event.stream_id] = bytearray()
                if path == b"ModelStreamInfer":
                    self._h2.send_headers(event.stream_id, HEADERS)
            elif isinstance(event, h2.events.DataReceived):
                self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                self._said[event.stream_id] += event.data
                if self._paths[event.stream_id] == b"ModelStreamInfer":
                    self._stream(event.stream_id, self._said[event.stream_id], now)
            elif isinstance(event, h2.events.StreamEnded):
                self._unary(event.stream_id, now)
            elif isinstance(event, h2.events.StreamReset):
                self._paths.pop(event.stream_id, None)
        self._write(self._h2.data_to_send())

    def _unary(self, stream: int, now: float) -> None:
        if self._paths[stream] == b"ModelMetadata":
            self._write(self._answer(stream, GRPC_METADATA))
        elif self._paths[stream] == b"ModelInfer":
            at, is_error = self._behaviour.answer(now)
            answer = self._answer(stream, None if is_error else GRPC_ANSWER)
            self._later.call(at, functools.partial(self._write, answer))

    def _answer(self, stream: int, message: bytes | None) -> bytes:
        if message is None:
            failure = [*HEADERS, (b"grpc-status", b"14"), (b"grpc-message", b"an error that was planned")]
            self._h2.send_headers(stream, failure, end_stream=True)
        else:
            self._h2.send_headers(stream, HEADERS)
            self._h2.send_data(stream, framed(message))
            self._h2.send_headers(stream, [(b"grpc-status", b"0")], end_stream=True)
        return self._h2.data_to_send()

    def _stream(self, stream: int, said: bytearray, now: float) -> None:
        while len(said) >= 5 and len(said) >= (end := 5 + int.from_bytes(said[1:5], "big")):
            answer = pb.ModelStreamInferResponse()
            answer.infer_response.id = pb.ModelInferRequest.FromString(bytes(said[5:end])).id
            del said[:end]
            at, is_error = self._behaviour.answer(now)
            answer.error_message = "an error that was planned" if is_error else ""
            self._h2.send_data(stream, framed(answer.SerializeToString()))
            self._later.call(at, functools.partial(self._write, self._h2.data_to_send()))

    def _write(self, data: bytes) -> None:
        if data:
            self._wire.write(data)


def framed(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4, "big") + message


async def listen(port: int, made: Callable[[socket.socket], Any]) -> None:
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", port), backlog=2048) as listening:
        listening.setblocking(False)
        while True:
            connected, _ = await loop.sock_accept(listening)
            connected.setblocking(False)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            made(connected)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("http", type=int)
    parser.add_argument("grpc", type=int)
    for name, default in (
        ("delay-ms", 5.0),
        ("stall-every-s", 0.0),
        ("stall-s", 1.0),
        ("errors", 0.0),
        ("rate", 0.0),
        ("slower-by", 1.0),
    ):
        parser.add_argument(f"--{name}", type=float, default=default)
    options = parser.parse_args()
    behaviour, later = Behaviour(options), Later()
    async with asyncio.TaskGroup() as group:
        group.create_task(listen(options.http, lambda one: Http(one, behaviour, later)))
        group.create_task(listen(options.grpc, lambda one: Grpc(one, behaviour, later)))
        await asyncio.sleep(0)
        print("ready", flush=True)
        await later.run()


if __name__ == "__main__":
    uvloop.run(main())
