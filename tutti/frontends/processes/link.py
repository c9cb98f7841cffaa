"""Between front-end processes and the engine's: bursts of calls one way, groups of answers the other.

A front-end process decodes, checks and encodes; what it cannot do alone (shared memory, classification, streams,
everything but infer) it hands on whole. Frames go over Unix sockets that only this user can reach; large tensors lie in
memory that both processes have mapped. When the engine's process ends, what it held is answered with an error, and so
is what comes until there is another.
"""

import asyncio
import itertools
import logging
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tutti.core.errors import Unavailable
from tutti.core.types import Call, Raw, SharedRegion, now_ns, settle_all
from tutti.frontends.arrival import Arrival
from tutti.frontends.door import Elsewhere
from tutti.frontends.grpc.methods import HEALTH_CHECK, NOT_SERVING, SERVICE, UNAVAILABLE, RawAnswered
from tutti.frontends.processes.bursts import Answered, Unpacking, groups, pack
from tutti.frontends.processes.link_end import End
from tutti.frontends.v2.following import Followed, TracesElsewhere
from tutti.observing.logs import Settings

_log = logging.getLogger(__name__)

CANCEL_INTERVAL_S = 0.05
# What a front-end process says of itself, and of the models, while there is no engine: it lives, nothing is ready.
_WITHOUT_ENGINE = {
    SERVICE + "ServerLive": b"\x08\x01",
    SERVICE + "ServerReady": b"",
    SERVICE + "ModelReady": b"",
    HEALTH_CHECK: NOT_SERVING,
}
_OF_SERVER = (SERVICE + "ServerLive", SERVICE + "ServerReady", HEALTH_CHECK)


class _Connection(End):
    """One engine's process, as long as it lives."""

    def __init__(self, owner: "FrontEnd") -> None:
        super().__init__()
        self._owner = owner
        # Set once the engine's process has said how to log and trace.
        self.follows = asyncio.Event()

    def handle(self, values: Any, data: memoryview) -> None:
        kind = values[0]
        if kind == "answers":
            self._owner.answered(values[1], Unpacking(data, self.find))
        elif kind == "free":
            if self.arena is not None:
                self.arena.given_back(values[1])
        elif kind == "follow":
            self._owner.follow(Followed(*values[2]))
            self.follows.set()
            self.send(("followed", values[1]))
        else:
            _, number, code, details = values
            self._owner.answered_raw(number, code, bytes(data), details)

    def woken(self) -> None:
        self._owner.send_arrived()
        super().woken()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.follows.set()
        self._owner.lost(self)

    @property
    def has_ended(self) -> bool:
        return self._transport is None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class FrontEnd:
    """The engine as a front-end process sees it, whichever process that is now: an `Infer`.

    `folder` has its sockets, None while there is none; `reason` says why the last one ended, where that is known.
    `is_announced`: every front-end process knows it, so that a client may count on any of them, and it has not been
    reported to fail, after which it may not answer any more.
    """

    def __init__(
        self, on_lost: Callable[[], None] = lambda: None, on_logs: Callable[[Settings], object] = lambda _: None
    ) -> None:
        """`on_lost` is called, on the loop, when there is no engine any more; `on_logs` to log as the engine does."""
        self._on_lost = on_lost
        self._on_logs = on_logs
        self.traces = TracesElsewhere()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._connection: _Connection | None = None
        # Calls that other threads have brought.
        self._arrived: deque[Call] = deque()
        self._next = 1
        # Only the loop's thread looks at it.
        self._open: dict[int, Call] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._raw: dict[int, tuple[str, RawAnswered]] = {}
        self.folder: Path | None = None
        self.reason = ""
        self.is_announced = False
        self._look_for_cancelled()

    async def connect(self, folder: Path) -> None:
        """Send to the engine whose sockets are in `folder` from now on. Raises OSError when it does not listen."""
        connection = _Connection(self)
        unix_socket = socket.socket(socket.AF_UNIX)
        unix_socket.setblocking(False)
        try:
            await self._loop.sock_connect(unix_socket, str(folder / "engine"))
            connection.greet(unix_socket)
            await connection.meet(unix_socket)
            await self._loop.create_unix_connection(lambda: connection, sock=unix_socket)
        except BaseException:
            connection.give_up(unix_socket)
            raise
        await connection.follows.wait()
        before = self._connection
        if before is not None:  # an engine that was replaced, but has not ended
            self.lost(before)
            before.close()
        if connection.has_ended:
            raise ConnectionError("the engine's process has ended")
        with self._lock:
            self._connection, self.folder, self.reason = connection, folder, ""

    def memory(self, size: int) -> memoryview:
        """Where to receive `size` bytes, so that the engine can read them where they are."""
        connection = self._connection
        arena = connection.arena if connection is not None else None
        block = arena.take(size) if arena is not None else None
        if block is not None:
            return block
        array: Any = np.empty(size, np.uint8)
        return memoryview(array)

    @property
    def refusal(self) -> Unavailable:
        """What callers are told while there is no engine."""
        why = f" ({self.reason})" if self.reason else ""
        return Unavailable(f"the engine's process has ended{why}; it is started anew, try again later")

    def __call__(self, calls: Sequence[Call]) -> None:
        if threading.get_ident() == self._thread:
            self._send(calls)
            return
        self._arrived.extend(calls)
        connection = self._connection
        if connection is not None:
            connection.wake()
        else:
            self._loop.call_soon_threadsafe(self.send_arrived)

    def follow(self, followed: Followed) -> None:
        """On the loop: do as the engine's process does."""
        self.traces.is_on, self.traces.needs_headers = followed.is_traced, followed.has_contexts
        self._on_logs(followed.logs)

    def send_arrived(self) -> None:
        """On the loop: send what other threads have brought."""
        calls = []
        while self._arrived:
            calls.append(self._arrived.popleft())
        if calls:
            self._send(calls)

    def _send(self, calls: Sequence[Call]) -> None:
        connection = self._connection
        if connection is None:
            settle_all(calls, self.refusal)
            return
        now, first = now_ns(), self._next
        entries, pieces = [], list[Raw]()
        for group in groups(calls, now):
            for call in group:
                call.arrived_ns = now
            entries.append(tuple(pack(group, self._next, now, connection.lend, pieces)))
            self._open.update(enumerate(group, self._next))
            self._next += len(group)
        if self.traces.is_on:
            arrivals = self.traces.arrivals(self._open, range(first, self._next))
            connection.send(("infer", entries, arrivals), pieces)
        else:
            connection.send(("infer", entries), pieces)

    def ask_raw(
        self, path: str, payload: bytes, left_ns: int, answered: RawAnswered, arrival: Arrival | None = None
    ) -> None:
        """Have the engine's process answer a serialized request of a unary gRPC method."""
        number = next(self._numbers)
        with self._lock:
            connection = self._connection
            is_of_server = path in _OF_SERVER and (path != HEALTH_CHECK or not payload)
            is_mine = connection is None or (is_of_server and not self.is_announced)
            if not is_mine:
                self._raw[number] = path, answered
        if is_mine or connection is None:
            self._refuse_raw(path, answered)
        else:
            told = (tuple(arrival),) if arrival is not None else ()
            connection.send(("raw", number, path, left_ns, *told), [payload])

    def model(self, name: str, version: str) -> Any:
        """Raises Elsewhere: a front-end process knows no models."""
        raise Elsewhere

    def answered_raw(self, number: int, code: int, message: bytes, details: str) -> None:
        with self._lock:
            _, answered = self._raw.pop(number, ("", None))
        if answered is not None:
            answered(code, message, details)

    def answered(self, entries: Sequence[tuple[Any, ...]], unpacking: Unpacking) -> None:
        by_sink: dict[int, list[Call]] = {}
        for values in entries:
            entry = Answered._make(values)
            for number, (answer, times) in enumerate(entry.timed(unpacking.answers(entry)), entry.first):
                call = self._open.pop(number, None)
                if call is not None:
                    call.answer, call.times = answer, times
                    by_sink.setdefault(id(call.sink), []).append(call)
        for group in by_sink.values():
            group[0].sink.settle(group)

    def lost(self, connection: _Connection) -> None:
        """Answer what an engine's process held: it has ended."""
        if connection is not self._connection:
            return
        with self._lock:
            self._connection, self.folder, self.is_announced = None, None, False
            raw, self._raw = list(self._raw.values()), {}
        lost, self._open = list(self._open.values()), {}
        self.send_arrived()
        settle_all(lost, self.refusal)
        for path, answered in raw:
            self._refuse_raw(path, answered)
        self._on_lost()

    def _refuse_raw(self, path: str, answered: RawAnswered) -> None:
        if path in _WITHOUT_ENGINE:
            answered(0, _WITHOUT_ENGINE[path], "")
        else:
            answered(UNAVAILABLE, b"", self.refusal.message)

    def _look_for_cancelled(self) -> None:
        """Tell the engine now and then which calls are cancelled: callers only mark them."""
        connection = self._connection
        gone = [number for number, call in self._open.items() if call.is_cancelled]
        if gone and connection is not None:
            connection.send(("cancel", gone))
        self._loop.call_later(CANCEL_INTERVAL_S, self._look_for_cancelled)


class RegionsElsewhere:
    """Clients' shared memory, which the engine's process has."""

    is_allowed = is_cuda_allowed = False

    def read(self, region: SharedRegion) -> bytes:
        raise Elsewhere

    def check(self, region: SharedRegion) -> None:
        raise Elsewhere

    def close(self) -> None:
        """Nothing here."""
