"""Between front-end processes and the engine's: bursts of calls one way, groups of answers the other.

A front-end process decodes, checks and encodes; what it cannot do alone (shared memory, classification, streams,
everything but infer) it hands on whole. Frames are pickled, with their length in front, over Unix sockets that only
this user can reach.
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
from tutti.frontends.grpc_methods import INTERNAL, code_of
from tutti.types import Call, SharedRegion, now_ns, settle_all

_log = logging.getLogger(__name__)

_LENGTH = struct.Struct("<Q")
CANCEL_INTERVAL_S = 0.05

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


class EngineEnd(_Frames):
    """One front-end process as the engine's process sees it. The sink of its calls; their tokens are its ids."""

    def __init__(self, api: Api) -> None:
        super().__init__()
        self._api = api
        self._open: dict[int, Call] = {}

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        for call in list(self._open.values()):
            call.is_cancelled = True

    def handle(self, kind: str, *content: Any) -> None:
        if kind == "infer":
            ids, message = content
            calls = wire.unpack_calls(message, self, now_ns())
            for number, call in zip(ids, calls, strict=True):
                call.token = number
                if self._api.tracer.is_on:
                    self._api.tracer.begin(call, "")
                self._open[number] = call
            self._api.submit(calls)
        elif kind == "cancel":
            for number in content[0]:
                if number in self._open:
                    self._open[number].is_cancelled = True
        else:
            self._begin_raw(*content)

    def settle(self, calls: Sequence[Call]) -> None:
        plain = [call for call in calls if type(call.token) is int]
        for call in plain:
            self._open.pop(call.token, None)
            if call.trace is not None:
                self._api.tracer.end(call)
        if plain:
            answers = [cast(Any, call.answer) for call in plain]
            self.send("answers", [call.token for call in plain], wire.pack_answers(answers))
        for call in calls:
            if type(call.token) is not int:
                self._end_raw(call)

    def _begin_raw(self, number: int, payload: bytes, left_ns: int) -> None:
        """A serialized ModelInferRequest."""
        try:
            call = Call(grpc_codec.decode(payload, self._api.shared_memory), self, (number,))
        except InferError as error:
            self.send("raw", number, code_of(error), b"", error.message)
            return
        call.deadline_ns = now_ns() + left_ns if left_ns else 0
        self._open[number] = call
        self._api.submit([call])

    def _end_raw(self, call: Call) -> None:
        (number,) = call.token
        self._open.pop(number, None)
        try:
            response, shared = self._api.complete(call)
            self.send("raw", number, 0, grpc_codec.encode(response, call.request.id, shared), "")
        except InferError as error:
            self.send("raw", number, code_of(error), b"", error.message)
        except Exception as error:
            _log.exception("a response of model '%s' could not be encoded", call.request.model_name)
            self.send("raw", number, INTERNAL, b"", f"internal error: {type(error).__name__}")


class FrontEnd(_Frames):
    """The engine as a front-end process sees it: an `Infer`. `on_lost` is called when the engine's process has gone."""

    def __init__(self, on_lost: Callable[[], None]) -> None:
        super().__init__()
        self._on_lost = on_lost
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._open: dict[int, Call] = {}
        self._raw: dict[int, RawAnswered] = {}

    @classmethod
    async def connect(cls, path: Path, on_lost: Callable[[], None]) -> "FrontEnd":
        _, protocol = await asyncio.get_running_loop().create_unix_connection(lambda: cls(on_lost), str(path))
        protocol._look_for_cancelled()
        return protocol

    def __call__(self, calls: Sequence[Call]) -> None:
        groups: dict[tuple[str, str], list[Call]] = {}
        for call in calls:
            groups.setdefault((call.request.model_name, call.request.model_version), []).append(call)
        now = now_ns()
        for group in groups.values():
            ids = [next(self._numbers) for _ in group]
            with self._lock:
                self._open.update(zip(ids, group, strict=True))
            if self._transport is None:
                self.connection_lost(None)
            else:
                self.send("infer", ids, wire.pack_calls(group, now))

    def ask_raw(self, payload: bytes, left_ns: int, answered: RawAnswered) -> None:
        """Have the engine's process answer a serialized ModelInferRequest."""
        number = next(self._numbers)
        with self._lock:
            self._raw[number] = answered
        self.send("raw", number, payload, left_ns)

    def model(self, name: str, version: str) -> Any:
        """Nothing of models is known here."""
        raise Elsewhere

    def handle(self, kind: str, *content: Any) -> None:
        if kind == "raw":
            with self._lock:
                answered = self._raw.pop(content[0], None)
            if answered is not None:
                answered(*content[1:])
            return
        ids, message = content
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

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        with self._lock:
            lost, self._open = list(self._open.values()), {}
            raw, self._raw = list(self._raw.values()), {}
        settle_all(lost, Unavailable("the engine's process has gone"))
        for answered in raw:
            answered(14, b"", "the engine's process has gone")
        self._on_lost()

    def _look_for_cancelled(self) -> None:
        """Callers only mark their calls: now and then the engine is told."""
        with self._lock:
            gone = [number for number, call in self._open.items() if call.is_cancelled]
        if gone:
            self.send("cancel", gone)
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
