"""Serving in tests: an engine in this process, calls that wait for their answers, and real server processes."""

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tutti import ensembles
from tutti.core.types import Answer, Call, Infer, InferRequest
from tutti.loadtest.process import START_TIMEOUT_S, free_ports, server_name, stop, wait_until_ready
from tutti.observing.logs import Logs
from tutti.observing.request_log import Event, RequestLog
from tutti.serving import local
from tutti.serving.engine import Engine

T = TypeVar("T")


def timer(delay_s: float, callback: object) -> None:
    one = threading.Timer(delay_s, callback)  # type: ignore[arg-type]
    one.daemon = True
    one.start()


@contextmanager
def engine_over(root: Path) -> Iterator[Engine]:
    """An engine with everything loaded, closed at the end."""
    engine = local.make_engine(root, timer, ensembles.load)
    engine.load_all()
    try:
        yield engine
    finally:
        engine.close()


class Gather:
    """A sink that waits for a number of calls."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._condition = threading.Condition()

    def settle(self, calls: Sequence[Call]) -> None:
        with self._condition:
            self._left -= len(calls)
            self._condition.notify_all()

    def wait(self) -> None:
        with self._condition:
            assert self._condition.wait_for(lambda: self._left <= 0, timeout=60), f"{self._left} calls never settled"
            assert self._left == 0, "a call was settled more than once"


class Noted(RequestLog):
    """A log of requests that keeps its events; it wants all that take at least `from_ns`."""

    def __init__(self, from_ns: int = 0) -> None:
        super().__init__(Logs())
        self.is_on = True
        self.events: list[Event] = []
        self._from_ns = from_ns

    def wants(self, total_ns: int) -> bool:
        return total_ns >= self._from_ns

    def note(self, event: Event) -> None:
        self.events.append(event)


def infer(serve: Infer, requests: Sequence[InferRequest]) -> list[Answer]:
    """Submit together and wait for all answers."""
    gather = Gather(len(requests))
    calls = [Call(request, gather) for request in requests]
    serve(calls)
    gather.wait()
    return [call.answer for call in calls if call.answer is not None]


def wait_until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Poll until `condition` holds; fails the test when it never does."""
    pause = threading.Event()
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        pause.wait(0.005)


@contextmanager
def at_once(servers: Sequence[AbstractContextManager[T]]) -> Iterator[list[T]]:
    """What each gives, in their order; they start at the same time, and end so: much of both is waiting."""
    with ThreadPoolExecutor(len(servers)) as pool:
        starts = [pool.submit(one.__enter__) for one in servers]
        begun = [one for one, start in zip(servers, starts, strict=True) if start.exception() is None]
        try:
            yield [start.result() for start in starts]
        finally:
            for end in [pool.submit(one.__exit__, None, None, None) for one in begun]:
                end.result()


@dataclass(frozen=True)
class Served:
    """Addresses of a server process that is ready."""

    http: str
    grpc: str
    metrics: str
    process: "subprocess.Popen[bytes]"


@contextmanager
def serving(
    root: Path, log: Path, *flags: str, python: str = sys.executable, is_guarded: bool = False
) -> Iterator[Served]:
    """`tutti serve ROOT` in a process of its own, ready. Raises RuntimeError with its log if it does not start.

    One that `is_guarded`, by keys or TLS, cannot be asked whether it is ready: its log says so.
    """
    http, grpc, metrics = free_ports(3)
    ports = ["--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [python, "-m", "tutti.app.cli", "serve", str(root), *ports, *flags], stdout=file, stderr=file, cwd="/"
        )
        try:
            if is_guarded:
                wait_until(
                    lambda: re.search(r"ready(:| on Ray)", log.read_text()) or process.poll() is not None,
                    START_TIMEOUT_S,
                )
                assert process.poll() is None, log.read_text()
                yield Served(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", f"127.0.0.1:{metrics}", process)
                return
            wait_until_ready(process, f"http://127.0.0.1:{http}/v2/health/ready", log)
            assert server_name(f"127.0.0.1:{http}") == "tutti", "another server has taken the port"
            yield Served(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", f"127.0.0.1:{metrics}", process)
        finally:
            assert stop(process), "the server did not stop by itself"
