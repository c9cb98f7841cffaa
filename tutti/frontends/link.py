"""Between front-end processes and the engine's: bursts of calls one way, groups of answers the other.

A front-end process decodes, checks and encodes; what it cannot do alone (shared memory, classification, streams,
everything but infer) it hands on whole. Frames go over Unix sockets that only this user can reach; large tensors lie in
memory that both processes have mapped. When the engine's process ends, what it held is answered with an error, and so
is what comes until there is another.
"""

import asyncio
import contextlib
import itertools
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tutti.errors import InferError, Unavailable
from tutti.frontends import grpc_codec
from tutti.frontends.api import Api, Elsewhere
from tutti.frontends.blocks import Arena, Borrowed, Place, new_arena, receive_arena, send_arena
from tutti.frontends.bursts import Answered, Entry, Joined, Unpacking, groups, pack, pack_answers
from tutti.frontends.frames import Frames
from tutti.frontends.grpc_methods import (
    HEALTH_CHECK,
    INTERNAL,
    MODEL_INFER,
    NOT_SERVING,
    SERVICE,
    Method,
    code_of,
    methods,
)
from tutti.types import Call, Raw, SharedRegion, now_ns, settle_all

_log = logging.getLogger(__name__)

_MAX_SIGNATURES = 4096
# Front-ends that have sent within such a time send at once.
_BESIDE_OTHERS_S = 0.001
# Blocks are given back together, this long after the first.
_GIVE_BACK_S = 0.002
# One call for several requests takes no more of a batch than this: others are to fit in beside it.
_SHARE_OF_BATCH = 2
CANCEL_INTERVAL_S = 0.05
# What came while the last answers were awaited may end, too.
_LAST_S = 0.2
_UNAVAILABLE = 14
# What a front-end process says of itself, and of the models, while there is no engine: it lives, nothing is ready.
_WITHOUT_ENGINE = {
    SERVICE + "ServerLive": b"\x08\x01",
    SERVICE + "ServerReady": b"",
    SERVICE + "ModelReady": b"",
    HEALTH_CHECK: NOT_SERVING,
}
_OF_SERVER = (SERVICE + "ServerLive", SERVICE + "ServerReady", HEALTH_CHECK)

RawAnswered = Callable[[int, bytes, str], None]
"""`answered(code, message, details)`: gRPC's status code, 0 for a serialized response, and the error's text."""


class _End(Frames):
    """One end of a link: frames, memory of its own that the peer reads, and the peer's."""

    def __init__(self) -> None:
        super().__init__()
        self.arena: Arena | None = new_arena()
        self._borrowed: Borrowed | None = None
        # Blocks of the peer's that nobody here reads any more.
        self._ended: deque[int] = deque()
        self._is_giving_back = False

    def greet(self, connection: socket.socket) -> None:
        """Before anything is received. Raises OSError."""
        send_arena(connection, self.arena)

    def give_up(self, connection: socket.socket) -> None:
        """There is no link after all."""
        connection.close()
        if self.arena is not None:
            self.arena.close_file()

    async def meet(self, connection: socket.socket) -> None:
        """Receive the peer's greeting. Raises OSError when it has gone."""
        await _readable(self._loop, connection)
        self._borrowed = receive_arena(connection, self._give_back)

    def connection_lost(self, exc: Exception | None) -> None:
        """What is still looked at keeps the memory that it is in."""
        self._transport = None
        self.arena = self._borrowed = None

    def lend(self, raw: Raw) -> Place | None:
        arena = self.arena
        return arena.lend(raw) if arena is not None else None

    def find(self, place: Place, size: int) -> Raw:
        assert self._borrowed is not None
        return self._borrowed.view(place, size)

    def _give_back(self, block: int) -> None:
        """From any thread, at any moment: a view of the peer's memory has gone."""
        self._ended.append(block)
        if self._is_giving_back:
            return
        self._is_giving_back = True
        with contextlib.suppress(RuntimeError):  # the loop is closed: so is the link
            self._loop.call_soon_threadsafe(self._loop.call_later, _GIVE_BACK_S, self._send_ended)

    def _send_ended(self) -> None:
        self._is_giving_back = False  # before: what comes meanwhile is sent later
        ended = []
        while self._ended:
            ended.append(self._ended.popleft())
        self.send(("free", ended))


async def _readable(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
    is_readable = loop.create_future()

    def readable() -> None:
        if not is_readable.done():
            is_readable.set_result(None)

    loop.add_reader(connection, readable)
    try:
        await is_readable
    finally:
        loop.remove_reader(connection)


class EngineSide:
    """Where front-end processes reach the engine. Lives on one event loop."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._methods = methods(api)
        self._ends: set[EngineEnd] = set()
        self._arrived: list[Call] = []
        # Who sent last, and until when others are taken to send, too.
        self._last_end: EngineEnd | None = None
        self._others_until_s = 0.0
        self._accepting: asyncio.Task[None] | None = None
        self._meeting: set[asyncio.Task[None]] = set()
        self._signatures: dict[Hashable, Hashable] = {}

    async def listen(self, path: Path) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.setblocking(False)
        listener.bind(str(path))
        listener.listen(128)
        self._accepting = asyncio.get_running_loop().create_task(self._accept(listener))

    async def settle(self, grace_s: float) -> None:
        """Before this process ends: wait until what is inside now is answered, then read no more."""
        loop = asyncio.get_running_loop()
        inside = [(end, number) for end in self._ends for number in end.open]
        until = loop.time() + grace_s
        while any(number in end.open for end, number in inside) and loop.time() < until:
            await asyncio.sleep(0.005)
        for end in self._ends:
            end.pause()
        until = loop.time() + _LAST_S
        while any(end.open for end in self._ends) and loop.time() < until:
            await asyncio.sleep(0.005)

    def close(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
        for task in self._meeting:
            task.cancel()

    def submit(self, calls: Sequence[Call], end: "EngineEnd") -> None:
        """Hand calls over: with what others send in this turn of the loop, where others do send just now."""
        now_s = time.monotonic()
        if end is not self._last_end:
            self._last_end, self._others_until_s = end, now_s + _BESIDE_OTHERS_S
        if not self._arrived and now_s > self._others_until_s:
            self._api.submit(calls)
            return
        if not self._arrived:
            asyncio.get_running_loop().call_soon(self._flush)
        self._arrived += calls

    def calls(self, entries: Sequence[tuple[Any, ...]], data: memoryview, end: "EngineEnd") -> list[Call]:
        """Calls for several requests each, where their model joins those anyway, else one for each."""
        unpacking = Unpacking(data, end.find)
        now = now_ns()
        found: list[Call] = []
        for values in entries:
            entry = Entry(*values)
            if entry.requests == 1:
                found.append(unpacking.single(entry, end, now))
                continue
            if len(self._signatures) >= _MAX_SIGNATURES:
                self._signatures.clear()
            joined = unpacking.entry(entry, now, self._signatures)
            together = self._together(entry)
            if together == 1:
                found += joined.alone(end)
                continue
            for start in range(0, len(joined), together):
                found.append(joined.part(start, start + together).call(end))
        return found

    def forget(self, end: "EngineEnd") -> None:
        """It has gone."""
        if self._last_end is end:
            self._last_end = None

    def _together(self, entry: Entry) -> int:
        """How many of an entry's requests are one call. Traces are of single ones."""
        if self._api.tracer.is_on:
            return 1
        try:
            config = self._api.engine.model(entry.model_name, entry.model_version).config
        except InferError:  # it will be told to each
            return 1
        if not config.may_merge or not all(head[2] for head in entry.heads):
            return 1
        # Others are to fit into the batch beside them.
        return max(1, config.max_batch_size // _SHARE_OF_BATCH // max(1, entry.heads[0][2][0]))

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                connection, _ = await loop.sock_accept(listener)
                task = loop.create_task(self._meet(connection))
                self._meeting.add(task)
                task.add_done_callback(self._meeting.discard)
        finally:
            listener.close()

    async def _meet(self, connection: socket.socket) -> None:
        end = EngineEnd(self._api, self._methods, self, self._ends)
        try:
            await end.meet(connection)
            end.greet(connection)
            await asyncio.get_running_loop().connect_accepted_socket(lambda: end, connection)
        except BaseException as error:
            end.give_up(connection)
            if not isinstance(error, OSError):
                raise
            _log.debug("a front-end process has gone: %s", error)

    def _flush(self) -> None:
        calls, self._arrived = self._arrived, []
        if calls:
            self._api.submit(calls)


class EngineEnd(_End):
    """One front-end process as the engine's process sees it. The sink of its calls.

    Their tokens are their numbers, or a Joined for several.
    """

    def __init__(self, api: Api, table: dict[str, Method], side: EngineSide, siblings: "set[EngineEnd]") -> None:
        super().__init__()
        self._api = api
        self._methods = table
        self._side = side
        self._siblings = siblings
        # By the number of the first request of each.
        self.open: dict[int, Call] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._siblings.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._siblings.discard(self)
        self._side.forget(self)
        for call in list(self.open.values()):
            call.is_cancelled = True
            if isinstance(call.token, Joined):
                call.token.gone.update(call.token.numbers)
        self.open.clear()

    def pause(self) -> None:
        """Leave unread what comes."""
        if self._transport is not None and self._transport.is_reading():
            self._transport.pause_reading()

    def handle(self, values: Any, data: memoryview) -> None:
        kind = values[0]
        if kind == "infer":
            calls = self._side.calls(values[1], data, self)
            for call in calls:
                token = call.token
                self.open[token if type(token) is int else token.first] = call
                if self._api.tracer.is_on:
                    self._api.tracer.begin(call, "")
            self._side.submit(calls, self)
        elif kind == "free":
            if self.arena is not None:
                self.arena.given_back(values[1])
        elif kind == "cancel":
            for number in values[1]:
                self._cancel(number)
        else:
            _, number, path, left_ns = values
            self._begin_raw(number, path, left_ns, data)

    def settle(self, calls: Sequence[Call]) -> None:
        plain: list[Call] = []
        again: list[Call] = []
        for call in calls:
            token = call.token
            if type(token) is int:
                self.open.pop(token, None)
                if call.trace is not None:
                    self._api.tracer.end(call)
                plain.append(call)
            elif type(token) is tuple:
                self._end_raw(call)
            elif isinstance(call.answer, InferError):  # one of them may be to blame: others are not to pay for it
                again += token.alone(self)
                self.open.update((one.token, one) for one in again[-len(token) :])
            else:
                self.open.pop(token.first, None)
                plain.append(call)
        if plain and self._transport is not None:
            pieces: list[Raw] = []
            self.send(("answers", list(map(tuple, pack_answers(plain, self.lend, pieces)))), pieces)
        if again:
            self._api.submit(again)

    def _cancel(self, number: int) -> None:
        call = self.open.get(number)
        if call is None or isinstance(call.token, Joined):
            call = next((one for one in self.open.values() if _stands_for(one, number)), None)
        if call is None:
            return
        if isinstance(call.token, Joined):
            call.token.gone.add(number)
            call.is_cancelled = len(call.token.gone) == len(call.token)
        else:
            call.is_cancelled = True

    def _begin_raw(self, number: int, path: str, left_ns: int, data: memoryview) -> None:
        """A serialized request of a unary gRPC method."""
        payload = bytes(data)
        if path != MODEL_INFER:
            self._ask(number, self._methods[path], payload)
            return
        try:
            call = Call(grpc_codec.decode(payload, self._api.shared_memory), self, (number,))
        except InferError as error:
            self._send_raw(number, code_of(error), details=error.message)
            return
        call.deadline_ns = now_ns() + left_ns if left_ns else 0
        self.open[number] = call
        self._api.submit([call])

    def _end_raw(self, call: Call) -> None:
        (number,) = call.token
        self.open.pop(number, None)
        try:
            response, shared = self._api.complete(call)
            self._send_raw(number, 0, grpc_codec.encode(response, call.request.id, shared))
        except InferError as error:
            self._send_raw(number, code_of(error), details=error.message)
        except Exception as error:
            _log.exception("a response of model '%s' could not be encoded", call.request.model_name)
            self._send_raw(number, INTERNAL, details=f"internal error: {type(error).__name__}")

    def _send_raw(self, number: int, code: int, message: bytes = b"", details: str = "") -> None:
        self.send(("raw", number, code, details), [message])

    def _ask(self, number: int, method: Method, payload: bytes) -> None:
        if method.blocks:
            self._loop.run_in_executor(None, self._answer, number, method, payload)
        else:
            self._answer(number, method, payload)

    def _answer(self, number: int, method: Method, payload: bytes) -> None:
        try:
            self._send_raw(number, 0, method.answer(payload))
        except InferError as error:
            self._send_raw(number, code_of(error), details=error.message)
        except Exception as error:
            _log.exception("a gRPC call failed")
            self._send_raw(number, INTERNAL, details=f"internal error: {type(error).__name__}")


def _stands_for(call: Call, number: int) -> bool:
    return isinstance(call.token, Joined) and number in call.token.numbers


class _Connection(_End):
    """One engine's process, as long as it lives."""

    def __init__(self, owner: "FrontEnd") -> None:
        super().__init__()
        self._owner = owner

    def handle(self, values: Any, data: memoryview) -> None:
        kind = values[0]
        if kind == "answers":
            self._owner.answered(values[1], Unpacking(data, self.find))
        elif kind == "free":
            if self.arena is not None:
                self.arena.given_back(values[1])
        else:
            _, number, code, details = values
            self._owner.answered_raw(number, code, bytes(data), details)

    def woken(self) -> None:
        self._owner.send_arrived()
        super().woken()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
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

    def __init__(self, on_lost: Callable[[], None] = lambda: None) -> None:
        """`on_lost` is called, on the loop, when there is no engine any more."""
        self._on_lost = on_lost
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
        own = socket.socket(socket.AF_UNIX)
        own.setblocking(False)
        try:
            await self._loop.sock_connect(own, str(folder / "engine"))
            connection.greet(own)
            await connection.meet(own)
            await self._loop.create_unix_connection(lambda: connection, sock=own)
        except BaseException:
            connection.give_up(own)
            raise
        before = self._connection
        if before is not None:  # it has been given up, and lives on
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
        now = now_ns()
        entries, pieces = [], list[Raw]()
        for group in groups(calls, now):
            entries.append(tuple(pack(group, self._next, now, connection.lend, pieces)))
            self._open.update(enumerate(group, self._next))
            self._next += len(group)
        connection.send(("infer", entries), pieces)

    def ask_raw(self, path: str, payload: bytes, left_ns: int, answered: RawAnswered) -> None:
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
            connection.send(("raw", number, path, left_ns), [payload])

    def model(self, name: str, version: str) -> Any:
        """Nothing of models is known here."""
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
            for number, answer in enumerate(unpacking.answers(entry), entry.first):
                call = self._open.pop(number, None)
                if call is not None:
                    call.answer = answer
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
            answered(_UNAVAILABLE, b"", self.refusal.message)

    def _look_for_cancelled(self) -> None:
        """Callers only mark their calls: now and then the engine is told."""
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
