"""Open-loop load over HTTP: arrivals come when they come, whether the server keeps up or not.

Latency counts from when a request was due, not from when it could be sent.
"""

import asyncio
import random
import statistics
from collections import deque
from dataclasses import dataclass, field

import uvloop

CONNECTIONS = 1500


@dataclass(slots=True)
class Outcome:
    """What became of the requests of one run; latencies in ms, rates a second.

    `good` answers came within the deadline, `late` ones after it; `lost` found no free connection or lost theirs.
    """

    offered: float = 0.0
    seconds: float = 0.0
    good: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    lost: int = 0

    @property
    def goodput(self) -> float:
        return len(self.good) / self.seconds

    @property
    def refusal_p50_ms(self) -> float:
        return statistics.median(self.refused) if self.refused else 0.0


class _Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self, run: "_Run") -> None:
        self._run = run
        self._received = b""
        self._due = 0.0
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's does not inherit from it
        self._run.free.append(self)

    def send(self, payload: bytes, due: float) -> None:
        self._due = due
        assert self._transport is not None
        self._transport.write(payload)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        at = head.lower().index(b"content-length:") + 15
        if len(body) < int(head[at:].split(b"\r\n", 1)[0]):
            return
        self._received = b""
        self._run.answered(int(head[9:12]), self._due)
        self._run.free.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self._run.free:
            self._run.free.remove(self)
        elif not self._run.is_over:
            self._run.outcome.lost += 1


class _Run:
    def __init__(self, deadline_ms: float) -> None:
        self.free: deque[_Connection] = deque()
        self.outcome = Outcome()
        self.is_over = False
        self._deadline_ms = deadline_ms
        self._loop = asyncio.get_running_loop()

    def answered(self, status: int, due: float) -> None:
        ms = (self._loop.time() - due) * 1e3
        if status != 200:
            self.outcome.refused.append(ms)
        else:
            (self.outcome.good if ms <= self._deadline_ms else self.outcome.late).append(ms)


def run(address: str, payload: bytes, rate: float, seconds: float, deadline_ms: float, seed: int = 0) -> Outcome:
    """Poisson arrivals of `payload`, a whole HTTP request, at `rate` a second."""
    outcome: Outcome = uvloop.run(_run(address, payload, rate, seconds, deadline_ms, seed))
    return outcome


async def _run(address: str, payload: bytes, rate: float, seconds: float, deadline_ms: float, seed: int) -> Outcome:
    host, _, port = address.partition(":")
    loop = asyncio.get_running_loop()
    one = _Run(deadline_ms)
    for _ in range(CONNECTIONS // 50):
        await asyncio.gather(*(loop.create_connection(lambda: _Connection(one), host, int(port)) for _ in range(50)))
    rng = random.Random(seed)
    start = due = loop.time() + 0.05
    count = 0
    while due < start + seconds:
        now = loop.time()
        if due > now:
            await asyncio.sleep(due - now)
        while due <= loop.time() and due < start + seconds:
            count += 1
            if one.free:
                one.free.popleft().send(payload, due)
            else:
                one.outcome.lost += 1
            due += rng.expovariate(rate)
        await asyncio.sleep(0)
    await asyncio.sleep(4 * deadline_ms / 1e3)
    one.is_over = True
    one.outcome.offered, one.outcome.seconds = count / seconds, seconds
    return one.outcome


def http_request(path: str, body: bytes, header_length: int) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nInference-Header-Content-Length: {header_length}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
