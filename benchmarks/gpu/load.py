"""A closed loop of clients that saturates a server: each asks again as soon as it is answered.

    python -m benchmarks.gpu.load JOB.json

One process of several, which `measure` starts. HTTP clients are sockets in an epoll loop, with no more parsing than
finding the answer's end; gRPC calls go over the load tester's HTTP/2. What is not OK ends the run with its reason. A
process that was busy for nine tenths of the time is told: the figure may be its own limit.
"""

import asyncio
import json
import os
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.context import ROOT
from benchmarks.gpu.frame import environment
from benchmarks.gpu.requests import METHOD, Request

_READ = 1 << 18
_BUSY = 0.9
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CALLS_OF_A_CONNECTION = 32
_PROCESSES = max(1, min(6, (os.cpu_count() or 2) * 3 // 8))
_SAMPLES = 20_000


class Refused(Exception):
    """The server did not say OK, or is gone; the text is what it said."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one measurement. `generator` and the others are cores; `is_busy` is whether a generator's process was."""

    rate: float
    p50_ms: float
    p99_ms: float
    generator_cores: float
    is_generator_busy: bool
    answers: int


class Notes:
    """What a process measured between `start_s` and `stop_s` (time.monotonic())."""

    def __init__(self, start_s: float, stop_s: float) -> None:
        self.start_s, self.stop_s = start_s, stop_s
        self.times_s: list[float] = []
        self._cpu_s: float | None = None

    def note(self, sent_s: float, now_s: float) -> None:
        if self.start_s <= now_s < self.stop_s:
            if self._cpu_s is None:
                self._cpu_s = time.process_time()
            self.times_s.append(now_s - sent_s)

    def result(self) -> dict[str, Any]:
        """Right after the end."""
        cpu_s = 0.0 if self._cpu_s is None else time.process_time() - self._cpu_s
        times = np.array(self.times_s)
        sample = times if len(times) <= _SAMPLES else times[:: len(times) // _SAMPLES + 1]
        cores = cpu_s / max(1e-9, time.monotonic() - self.start_s)
        return {"answers": len(times), "times_ms": (1e3 * sample).round(4).tolist(), "cpu": cores}


class _Socket:
    """One HTTP client."""

    def __init__(self, address: tuple[str, int], request: bytes) -> None:
        self.socket = socket.create_connection(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self._request = request
        self._unsent = memoryview(b"")
        self._head = b""
        self._left = -1
        self.sent_s = 0.0

    def ask(self, now_s: float) -> bool:
        """Whether all could be sent at once."""
        self.sent_s = now_s
        self._unsent = memoryview(self._request)
        return self.push()

    def push(self) -> bool:
        try:
            sent = self.socket.send(self._unsent)
        except BlockingIOError:
            return False
        self._unsent = self._unsent[sent:]
        return not self._unsent

    def read(self) -> bool:
        """Whether the answer is whole. Raises Refused for one that is not 200."""
        try:
            data = self.socket.recv(_READ)
        except BlockingIOError:
            return False
        if not data:
            raise Refused("the server closed the connection")
        if self._left >= 0:
            self._left -= len(data)
        else:
            self._left = self._begin(data)
        if self._left > 0 or (self._left < 0 and self._head):
            return False
        self._left, self._head = -1, b""
        return True

    def _begin(self, data: bytes) -> int:
        """What is missing of the body, or -1 while headers are."""
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            return -1
        if not self._head.startswith(b"HTTP/1.1 200"):
            raise Refused(self._head[:500].decode(errors="replace"))
        length = _LENGTH.search(self._head, 0, end)
        if length is None:
            raise Refused("an answer without Content-Length")
        return int(length[1]) - (len(self._head) - end - 4)


def over_http(address: tuple[str, int], request: Request, clients: int, notes: Notes) -> None:
    """Until the notes' end."""
    head, body = request.http()
    whole = head + f"Host: {address[0]}:{address[1]}\r\n\r\n".encode() + body
    sockets = {one.socket.fileno(): one for one in (_Socket(address, whole) for _ in range(clients))}
    poll = select.epoll()
    clock = time.monotonic
    for number, client in sockets.items():
        poll.register(number, select.EPOLLIN if client.ask(clock()) else select.EPOLLIN | select.EPOLLOUT)
    while clock() < notes.stop_s:
        for number, event in poll.poll(0.2):
            client = sockets[number]
            if event & select.EPOLLOUT and client.push():
                poll.modify(number, select.EPOLLIN)
            if event & ~select.EPOLLOUT and client.read():
                now = clock()
                notes.note(client.sent_s, now)
                if not client.ask(now):
                    poll.modify(number, select.EPOLLIN | select.EPOLLOUT)
    for client in sockets.values():
        client.socket.close()


def over_grpc(address: tuple[str, int], request: Request, clients: int, notes: Notes) -> None:
    """The same with calls on connections of at most 32."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_grpc(address, request.grpc(), clients, notes))


async def _grpc(address: tuple[str, int], message: bytes, clients: int, notes: Notes) -> None:
    from tutti.loadtest import http2
    from tutti.loadtest.wire import connect

    headers = [
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", METHOD.encode()),
        (b":authority", f"{address[0]}:{address[1]}".encode()), (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    ]  # fmt: skip
    failed: list[str] = []
    connections: list[Any] = []

    def ask(connection: Any) -> None:
        stream = connection.open_call((connection, time.monotonic()))
        connection.put(stream, message, True)

    def ended(key: Any, status: str, text: str, _: float) -> None:
        connection, sent_s = key
        if status != http2.OK:
            failed.append(f"{status}: {text}")
            return
        notes.note(sent_s, time.monotonic())
        if time.monotonic() < notes.stop_s:
            ask(connection)

    count = -(-clients // _CALLS_OF_A_CONNECTION)
    for number in range(count):
        connection = http2.Connection(await connect(*address), headers, lambda *_: None, ended)
        await connection.greeted.wait()
        connections.append(connection)
        for _ in range(clients // count + (number < clients % count)):
            ask(connection)
        connection.write(connection.take())
    while time.monotonic() < notes.stop_s and not failed:
        await asyncio.sleep(0.05)
    for connection in connections:
        connection.close()
    if failed and time.monotonic() < notes.stop_s:
        raise Refused(failed[0])


PROTOCOLS: dict[str, Callable[[tuple[str, int], Request, int, Notes], None]] = {"http": over_http, "grpc": over_grpc}


def measure(
    protocol: str, address: str, request: Request, clients: int, seconds: float, warm_s: float, folder: Path,
    during: Callable[[float, float], None] = lambda start_s, stop_s: None, most_processes: int = _PROCESSES,
) -> Figures:  # fmt: skip
    """Ask for `warm_s` and then `seconds`; `during` is called once the load is on, with when it measures.

    Raises Refused with the reason of the first process that failed.
    """
    count = max(1, min(most_processes, clients // 4))
    shares = [clients // count + (number < clients % count) for number in range(count)]
    path = folder / "load.npz"
    np.savez(path, **dict(request.tensors))  # type: ignore[arg-type]
    job = {"protocol": protocol, "address": address, "model": request.model, "tensors": str(path),
           "output": request.output}  # fmt: skip
    processes = [_process({**job, "clients": share}) for share in shares]
    try:
        start_s = _begin(processes, warm_s, seconds)
        during(start_s, start_s + seconds)
        told = [process.communicate(timeout=warm_s + seconds + 30)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return _together([json.loads(text or "{}") for text in told], seconds)


def _process(job: dict[str, Any]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "benchmarks.gpu.load", json.dumps(job)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()
    )


def _begin(processes: list["subprocess.Popen[str]"], warm_s: float, seconds: float) -> float:
    """Tell all, once the slowest is ready, when the measurement begins."""
    for process in processes:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise Refused("a process of the load did not start")
    start_s = time.monotonic() + warm_s
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{start_s} {start_s + seconds}\n")
        process.stdin.flush()
    return start_s


def _together(told: list[dict[str, Any]], seconds: float) -> Figures:
    for one in told:
        if "answers" not in one:
            raise Refused(one.get("failed", "a process of the load died"))
    times = np.concatenate([np.array(one["times_ms"]) for one in told])
    # A process that answered more has a sample of as many as the others: weigh it.
    weights = np.concatenate(
        [np.full(len(one["times_ms"]), one["answers"] / max(1, len(one["times_ms"]))) for one in told]
    )
    order = np.argsort(times)
    reached = np.cumsum(weights[order]) / max(1e-9, weights.sum())
    answers = sum(one["answers"] for one in told)
    if not answers:
        raise Refused("no answer came in the time that was measured")
    p50, p99 = (float(times[order][min(len(times) - 1, int(np.searchsorted(reached, q)))]) for q in (0.5, 0.99))
    cores = [one["cpu"] for one in told]
    return Figures(answers / seconds, p50, p99, sum(cores), max(cores) > _BUSY, answers)


def as_row(figures: Figures, request: Request) -> dict[str, Any]:
    rows = len(request.tensors[0][1])
    shown = asdict(figures)
    return {
        "requests/s": shown["rate"], "rows/s": shown["rate"] * rows, "p50 ms": shown["p50_ms"],
        "p99 ms": shown["p99_ms"], "load cores": shown["generator_cores"],
        **({"load is busy": True} if shown["is_generator_busy"] else {}),
    }  # fmt: skip


def _tell(result: dict[str, Any]) -> None:
    """Whole: an event loop may have left the pipe as one that takes what fits, and forgets the rest."""
    os.set_blocking(1, True)
    with os.fdopen(os.dup(1), "w") as told:
        json.dump(result, told)


def main() -> int:
    job = json.loads(sys.argv[1])
    with np.load(job["tensors"]) as file:
        request = Request(job["model"], [(name, file[name]) for name in file.files], job["output"])
    host, _, port = job["address"].partition(":")
    print("ready", flush=True)
    start_s, stop_s = map(float, sys.stdin.readline().split())
    notes = Notes(start_s, stop_s)
    try:
        PROTOCOLS[job["protocol"]]((host, int(port)), request, job["clients"], notes)
    except (Refused, OSError) as error:
        _tell({"failed": f"{type(error).__name__}: {error}"})
        return 1
    _tell(notes.result())
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)
