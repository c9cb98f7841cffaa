"""Between front-end processes and the engine's: bursts of calls one way, groups of answers the other.

A front-end process decodes, checks and encodes; what it cannot do alone (shared memory, classification, streams,
everything but infer) it hands on whole. Frames are pickled, with their length in front, over Unix sockets that only
this user can reach. When the engine's process ends, what it held is answered with an error, and so is what comes until
there is another.
"""

import asyncio
import itertools
import logging
import pickle
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from tutti import wire
from tutti.errors import InferError, Unavailable
from tutti.frontends import grpc_codec
from tutti.frontends.api import Api, Elsewhere
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
from tutti.types import Call, SharedRegion, now_ns, settle_all

_log = logging.getLogger(__name__)

_LENGTH = struct.Struct("<Q")
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


class _Frames(asyncio.Protocol):
    """Frames in and out of one connection."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        at = 0
        while len(received) - at >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(received, at)
            if len(received) - at - _LENGTH.size < size:
                break
            frame = bytes(memoryview(received)[at + _LENGTH.size : at + _LENGTH.size + size])
            at += _LENGTH.size + size
            self.handle(*pickle.loads(frame))
        if at:
            del received[:at]

    def send(self, *frame: Any) -> None:
        """From any thread."""
        data = pickle.dumps(frame, protocol=5)
        pieces = [_LENGTH.pack(len(data)), data]
        if threading.get_ident() == self._thread:
            self._write(pieces)
            return
        try:
            self._loop.call_soon_threadsafe(self._write, pieces)
        except RuntimeError:
            _log.debug("the loop is closed: a frame is dropped")

    def handle(self, kind: str, *content: Any) -> None:
        raise NotImplementedError

    def _write(self, pieces: list[bytes]) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.writelines(pieces)


class EngineSide:
    """Where front-end processes reach the engine. Lives on one event loop."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._methods = methods(api)
        self._ends: set[EngineEnd] = set()
        self._server: asyncio.Server | None = None

    async def listen(self, path: Path) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: EngineEnd(self._api, self._methods, self._ends), str(path))

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
        if self._server is not None:
            self._server.close()


class EngineEnd(_Frames):
    """One front-end process as the engine's process sees it. The sink of its calls; their tokens are its ids."""

    def __init__(self, api: Api, table: dict[str, Method], siblings: "set[EngineEnd]") -> None:
        super().__init__()
        self._api = api
        self._methods = table
        self._siblings = siblings
        self.open: dict[int, Call] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._siblings.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._siblings.discard(self)
        for call in list(self.open.values()):
            call.is_cancelled = True

    def pause(self) -> None:
        """Leave unread what comes."""
        if self._transport is not None and self._transport.is_reading():
            self._transport.pause_reading()

    def handle(self, kind: str, *content: Any) -> None:
        if kind == "infer":
            ids, message = content
            calls = wire.unpack_calls(message, self, now_ns())
            for number, call in zip(ids, calls, strict=True):
                call.token = number
                if self._api.tracer.is_on:
                    self._api.tracer.begin(call, "")
                self.open[number] = call
            self._api.submit(calls)
        elif kind == "cancel":
            for number in content[0]:
                if number in self.open:
                    self.open[number].is_cancelled = True
        else:
            self._begin_raw(*content)

    def settle(self, calls: Sequence[Call]) -> None:
        plain = [call for call in calls if type(call.token) is int]
        for call in plain:
            self.open.pop(call.token, None)
            if call.trace is not None:
                self._api.tracer.end(call)
        if plain:
            answers = [cast(Any, call.answer) for call in plain]
            self.send("answers", [call.token for call in plain], wire.pack_answers(answers))
        for call in calls:
            if type(call.token) is not int:
                self._end_raw(call)

    def _begin_raw(self, number: int, path: str, payload: bytes, left_ns: int) -> None:
        """A serialized request of a unary gRPC method."""
        if path != MODEL_INFER:
            self._ask(number, self._methods[path], payload)
            return
        try:
            call = Call(grpc_codec.decode(payload, self._api.shared_memory), self, (number,))
        except InferError as error:
            self.send("raw", number, code_of(error), b"", error.message)
            return
        call.deadline_ns = now_ns() + left_ns if left_ns else 0
        self.open[number] = call
        self._api.submit([call])

    def _end_raw(self, call: Call) -> None:
        (number,) = call.token
        self.open.pop(number, None)
        try:
            response, shared = self._api.complete(call)
            self.send("raw", number, 0, grpc_codec.encode(response, call.request.id, shared), "")
        except InferError as error:
            self.send("raw", number, code_of(error), b"", error.message)
        except Exception as error:
            _log.exception("a response of model '%s' could not be encoded", call.request.model_name)
            self.send("raw", number, INTERNAL, b"", f"internal error: {type(error).__name__}")

    def _ask(self, number: int, method: Method, payload: bytes) -> None:
        if method.blocks:
            self._loop.run_in_executor(None, self._answer, number, method, payload)
        else:
            self._answer(number, method, payload)

    def _answer(self, number: int, method: Method, payload: bytes) -> None:
        try:
            self.send("raw", number, 0, method.answer(payload), "")
        except InferError as error:
            self.send("raw", number, code_of(error), b"", error.message)
        except Exception as error:
            _log.exception("a gRPC call failed")
            self.send("raw", number, INTERNAL, b"", f"internal error: {type(error).__name__}")


class _Connection(_Frames):
    """One engine's process, as long as it lives."""

    def __init__(self, owner: "FrontEnd") -> None:
        super().__init__()
        self._owner = owner

    def handle(self, kind: str, *content: Any) -> None:
        if kind == "raw":
            self._owner.answered_raw(*content)
        else:
            self._owner.answered(*content)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
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
        self._connection: _Connection | None = None
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._open: dict[int, Call] = {}
        self._raw: dict[int, tuple[str, RawAnswered]] = {}
        self.folder: Path | None = None
        self.reason = ""
        self.is_announced = False
        self._look_for_cancelled()

    async def connect(self, folder: Path) -> None:
        """Send to the engine whose sockets are in `folder` from now on. Raises OSError when it does not listen."""
        _, connection = await self._loop.create_unix_connection(lambda: _Connection(self), str(folder / "engine"))
        before = self._connection
        if before is not None:  # it has been given up, and lives on
            self.lost(before)
            before.close()
        if connection.has_ended:
            raise ConnectionError("the engine's process has ended")
        with self._lock:
            self._connection, self.folder, self.reason = connection, folder, ""

    @property
    def refusal(self) -> Unavailable:
        """What callers are told while there is no engine."""
        why = f" ({self.reason})" if self.reason else ""
        return Unavailable(f"the engine's process has ended{why}; it is started anew, try again later")

    def __call__(self, calls: Sequence[Call]) -> None:
        groups: dict[tuple[str, str], list[Call]] = {}
        for call in calls:
            groups.setdefault((call.request.model_name, call.request.model_version), []).append(call)
        now = now_ns()
        for group in groups.values():
            ids = [next(self._numbers) for _ in group]
            with self._lock:
                connection = self._connection
                if connection is not None:
                    self._open.update(zip(ids, group, strict=True))
            if connection is None:
                settle_all(group, self.refusal)
            else:
                connection.send("infer", ids, wire.pack_calls(group, now))

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
            connection.send("raw", number, path, payload, left_ns)

    def model(self, name: str, version: str) -> Any:
        """Nothing of models is known here."""
        raise Elsewhere

    def answered_raw(self, number: int, code: int, message: bytes, details: str) -> None:
        with self._lock:
            _, answered = self._raw.pop(number, ("", None))
        if answered is not None:
            answered(code, message, details)

    def answered(self, ids: Sequence[int], message: Any) -> None:
        answers = wire.unpack_answers(message)
        by_sink: dict[int, list[Call]] = {}
        with self._lock:
            for number, answer in zip(ids, answers, strict=True):
                call = self._open.pop(number, None)
                if call is not None:
                    call.answer = answer
                    by_sink.setdefault(id(call.sink), []).append(call)
        for group in by_sink.values():
            group[0].sink.settle(group)

    def lost(self, connection: _Connection) -> None:
        """Answer what an engine's process held: it has ended."""
        with self._lock:
            if connection is not self._connection:
                return
            self._connection, self.folder, self.is_announced = None, None, False
            lost, self._open = list(self._open.values()), {}
            raw, self._raw = list(self._raw.values()), {}
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
        with self._lock:
            connection = self._connection
            gone = [number for number, call in self._open.items() if call.is_cancelled]
        if gone and connection is not None:
            connection.send("cancel", gone)
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
