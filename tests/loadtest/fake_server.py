"""A server whose behaviour is known: fixed latency, a stall now and then, errors, one request at a time at a rate.

    python -m tests.loadtest.fake_server HTTP_PORT GRPC_PORT [--delay-ms 5] [--stall-every-s 20 --stall-s 1]
                                         [--errors 0.01] [--rate 500] [--slower-by 1.1]

HTTP and gRPC, quick enough that what is measured is what it does, not what it costs.
"""

import argparse
import asyncio
import heapq
import itertools
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import uvloop
from pygrpc_native import EVENT_CALL, NativeGrpcFront
from tritonclient.grpc import service_pb2 as pb

from loadtest.timers import Alarm

METADATA = {
    "name": "fake", "versions": ["1"], "platform": "none",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
}  # fmt: skip
UNAVAILABLE = 14
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


class Http(asyncio.Protocol):
    """Enough of HTTP/1.1: one request after the other on a connection."""

    def __init__(self, behaviour: Behaviour, later: Later) -> None:
        self._behaviour, self._later = behaviour, later
        self._buffer = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
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
            at, is_error = self._behaviour.answer(time.perf_counter())
            self._later.call(at, lambda is_error=is_error: self._write(503 if is_error else 200, b"{}"))  # type: ignore[misc]

    def _write(self, status: int, body: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(b"HTTP/1.1 %d OK\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body))


def serve_grpc(port: int, behaviour: Behaviour, later: Later, loop: asyncio.AbstractEventLoop) -> NativeGrpcFront:
    service = "/inference.GRPCInferenceService/"
    front = NativeGrpcFront(
        f"127.0.0.1:{port}", [(f"{service}ModelInfer", False), (f"{service}ModelMetadata", False)], io_threads=1
    )
    answer = pb.ModelInferResponse(model_name="fake", model_version="1").SerializeToString()
    tensors = [
        pb.ModelMetadataResponse.TensorMetadata(name=one["name"], datatype="FP32", shape=[-1, 4])
        for one in METADATA["inputs"]
    ]
    metadata = pb.ModelMetadataResponse(name="fake", versions=["1"], inputs=tensors).SerializeToString()

    def take(calls: list[int]) -> None:
        for call in calls:
            at, is_error = behaviour.answer(time.perf_counter())
            if is_error:
                later.call(at, lambda call=call: front.fail(call, UNAVAILABLE, "an error that was planned"))  # type: ignore[misc]
            else:
                later.call(at, lambda call=call: front.respond(call, answer))  # type: ignore[misc]

    def receive() -> None:
        while (burst := front.recv_batch(64)) is not None:
            calls = []
            for kind, call, method, *_ in burst:
                if kind == EVENT_CALL and method == 1:
                    front.respond(call, metadata)
                elif kind == EVENT_CALL:
                    calls.append(call)
            if calls:
                loop.call_soon_threadsafe(take, calls)

    front.start()
    threading.Thread(target=receive, daemon=True).start()
    return front


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
    behaviour, later, loop = Behaviour(options), Later(), asyncio.get_running_loop()
    await loop.create_server(lambda: Http(behaviour, later), "127.0.0.1", options.http, backlog=2048)
    front = serve_grpc(options.grpc, behaviour, later, loop)
    print("ready", flush=True)
    await later.run()
    front.close()


if __name__ == "__main__":
    uvloop.run(main())
