"""The engine's process as front-end processes reach it: bursts of calls come in, groups of answers go out.

Requests that are alike come as one entry. They are one call where their model joins them anyway, so that what a request
costs here does not grow with the front-ends; should such a call fail, its requests go on one by one.
"""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from tutti.core.errors import InferError, Unavailable
from tutti.core.types import Answer, Call, InferResponse, Raw, now_ns
from tutti.frontends.arrival import UNKNOWN, Arrival
from tutti.frontends.door import Door, Failure, answer_of
from tutti.frontends.freed_memory import INTERVAL_S, Freed
from tutti.frontends.grpc import codec as grpc_codec
from tutti.frontends.grpc.methods import DIALECT, MODEL_INFER, Method, methods
from tutti.frontends.held_bytes import COUNTED_BYTES
from tutti.frontends.processes.bursts import Entry, Joined, Unpacking, pack_answers
from tutti.frontends.processes.link_end import End
from tutti.frontends.v2.api import Api
from tutti.frontends.v2.following import Follower, Leader

_log = logging.getLogger(__name__)

_MAX_SIGNATURES = 4096
# Front-ends that send within so long of each other count as sending at once: their bursts are joined.
_BESIDE_OTHERS_S = 0.001
# A call for several requests takes at most one part in so many of a batch: others are to fit in beside it.
_SHARE_OF_BATCH = 2
# How much may wait for a front-end process to read it, besides what lies in arenas.
_MOST_UNSENT_BYTES = 64 * 1024 * 1024
# How long calls may take that came while the last answers were awaited.
_LAST_S = 0.2


class EngineSide:
    """Where front-end processes reach the engine. Lives on one event loop."""

    def __init__(self, api: Api) -> None:
        self._api = api
        # What comes through it are calls of front-end processes, and serialized messages of gRPC.
        self.door = Door(DIALECT, api.engine, api.grpc, api.tracer)
        self._methods = methods(api)
        self._ends: set[EngineEnd] = set()
        self._arrived: list[Call] = []
        # Who sent last, and until when others are expected to send as well.
        self._last_end: EngineEnd | None = None
        self._others_until_s = 0.0
        self._accepting: asyncio.Task[None] | None = None
        self._giving_back: asyncio.Task[None] | None = None
        self._meeting: set[asyncio.Task[None]] = set()
        self._signatures: dict[Hashable, Hashable] = {}
        self.leader = Leader(api, self._ends)

    async def listen(self, path: Path) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.setblocking(False)
        listener.bind(str(path))
        listener.listen(128)
        self._accepting = asyncio.get_running_loop().create_task(self._accept(listener))
        with contextlib.suppress(OSError):  # the system does not tell
            self._giving_back = asyncio.get_running_loop().create_task(_give_back(Freed()))

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
        for task in (self._accepting, self._giving_back):
            if task is not None:
                task.cancel()
        for task in self._meeting:
            task.cancel()

    def submit(self, calls: Sequence[Call], end: "EngineEnd") -> None:
        """Hand calls over: with those that others send in this turn of the loop, if others have sent a moment ago."""
        now_s = time.monotonic()
        if end is not self._last_end:
            self._last_end, self._others_until_s = end, now_s + _BESIDE_OTHERS_S
        if not self._arrived and now_s > self._others_until_s:
            self.door.submit(calls)
            return
        if not self._arrived:
            asyncio.get_running_loop().call_soon(self._flush)
        self._arrived += calls

    def calls(self, entries: Sequence[tuple[Any, ...]], data: memoryview, end: "EngineEnd") -> list[Call]:
        """Calls for several requests each, where their model joins those anyway, else one for each."""
        unpacking = Unpacking(data, end.find)
        now = now_ns()
        calls: list[Call] = []
        for values in entries:
            entry = Entry(*values)
            if entry.requests == 1:
                calls.append(unpacking.single(entry, end, now))
                continue
            if len(self._signatures) >= _MAX_SIGNATURES:
                self._signatures.clear()
            joined = unpacking.entry(entry, now, self._signatures)
            together = self._together(entry)
            if together == 1:
                calls += joined.alone(end)
                continue
            for start in range(0, len(joined), together):
                calls.append(joined.part(start, start + together).call(end))
        return calls

    def forget(self, end: "EngineEnd") -> None:
        """A front-end process has gone."""
        if self._last_end is end:
            self._last_end = None

    def _together(self, entry: Entry) -> int:
        """How many of an entry's requests become one call. While requests are traced, each is its own."""
        if self._api.tracer.is_on:
            return 1
        try:
            config = self.door.model(entry.model_name, entry.model_version).config
        except InferError:  # each request is told by itself
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
            self.door.submit(calls)


class EngineEnd(End, Follower):
    """One front-end process as the engine's process sees it. The sink of its calls.

    Their tokens are their numbers, or a Joined for several.
    """

    def __init__(self, api: Api, table: dict[str, Method], side: EngineSide, siblings: "set[EngineEnd]") -> None:
        super().__init__()
        self._api = api
        self._door = side.door
        self._methods = table
        self._side = side
        self._siblings = siblings
        # Calls by the number of their first request.
        self.open: dict[int, Call] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._siblings.add(self)  # first: a change that comes now is then told, too
        self._side.leader.tell([self])

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._siblings.discard(self)
        self.has_ended = True
        self._side.leader.look()
        self._side.forget(self)
        for call in list(self.open.values()):
            call.is_cancelled = True
            if isinstance(call.token, Joined):
                call.token.gone.update(call.token.numbers)
        self.open.clear()

    def pause(self) -> None:
        """Read no more."""
        if self._transport is not None and self._transport.is_reading():
            self._transport.pause_reading()

    def handle(self, values: Any, data: memoryview) -> None:
        kind = values[0]
        if kind == "infer":
            calls = self._side.calls(values[1], data, self)  # with the deadlines that are in their entries
            is_traced, arrivals = self._api.tracer.is_on, values[2] if len(values) > 2 else {}
            for call in calls:
                token = call.token
                self.open[token if type(token) is int else token.first] = call
                if is_traced and type(token) is int:
                    self._door.resume(call, Arrival(*arrivals.get(token, UNKNOWN)))
            self._side.submit(calls, self)
        elif kind == "free":
            if self.arena is not None:
                self.arena.given_back(values[1])
        elif kind == "cancel":
            for number in values[1]:
                self._cancel(number)
        elif kind == "followed":
            self.followed = values[1]
            self._side.leader.look()
        else:
            _, number, path, left_ns, *told = values
            arrival = Arrival(*told[0]) if told else self._door.arrival(None)
            self._begin_raw(number, path, left_ns, data, arrival)

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
            elif isinstance(call.answer, InferError):  # one request may be to blame: each is tried alone
                again += token.alone(self)
                self.open.update((single.token, single) for single in again[-len(token) :])
            else:
                self.open.pop(token.first, None)
                plain.append(call)
        if plain and self._transport is not None:
            self._send_answers(plain)
        if again:
            self._door.submit(again)

    def _send_answers(self, calls: Sequence[Call]) -> None:
        """Send answers. One that cannot be packed becomes an error, and the others are sent all the same.

        A front-end process that does not keep up with reading gets no more large ones.
        """
        unsent = self.unsent_bytes()
        if unsent > _MOST_UNSENT_BYTES:
            for call in calls:
                if type(call.token) is int and _is_large(call.answer):
                    call.answer = Unavailable(f"the server holds {unsent} bytes of answers already: try again later")
        pieces: list[Raw] = []
        try:
            packed = list(map(tuple, pack_answers(calls, self.lend, pieces)))
        except Exception as error:
            if len(calls) > 1:
                for call in calls:
                    self._send_answers([call])
                return
            model = calls[0].request.model_name
            calls[0].answer = answer_of(error, "a response of model '%s' could not be encoded", model)
            pieces, packed = [], list(map(tuple, pack_answers(calls, self.lend, [])))
        self.send(("answers", packed), pieces)

    def _cancel(self, number: int) -> None:
        call = self.open.get(number)
        if call is None or isinstance(call.token, Joined):
            call = next((other for other in self.open.values() if _stands_for(other, number)), None)
        if call is None:
            return
        if isinstance(call.token, Joined):
            call.token.gone.add(number)
            call.is_cancelled = len(call.token.gone) == len(call.token)
        else:
            call.is_cancelled = True

    def _begin_raw(self, number: int, path: str, left_ns: int, data: memoryview, arrival: Arrival) -> None:
        """A serialized request of a unary gRPC method."""
        payload = bytes(data)
        if path != MODEL_INFER:
            self._ask(number, self._methods[path], payload)
            return
        try:
            call = Call(grpc_codec.decode(payload, self._api.shared_memory), self, (number,))
        except Exception as error:
            self._refuse_raw(number, self._door.decode_failure(error))
            return
        self.open[number] = call
        self._door.resume(call, arrival, left_ns)
        self._door.submit([call])

    def _end_raw(self, call: Call) -> None:
        (number,) = call.token
        self.open.pop(number, None)
        try:
            response, shared = self._api.complete(call)
            self._send_raw(number, 0, grpc_codec.encode(response, call.request.id, shared))
        except Exception as error:
            self._refuse_raw(number, self._door.encode_failure(error, call))

    def _refuse_raw(self, number: int, failure: Failure) -> None:
        code, details = failure
        self._send_raw(number, code, details=details)

    def _send_raw(self, number: int, code: int, message: bytes = b"", details: str = "") -> None:
        self.send(("raw", number, code, details), [message])

    def _ask(self, number: int, method: Method, payload: bytes) -> None:
        if method.blocks:
            self._loop.run_in_executor(self._api.control, self._answer, number, method, payload)
        else:
            self._answer(number, method, payload)

    def _answer(self, number: int, method: Method, payload: bytes) -> None:
        try:
            self._send_raw(number, 0, method.answer(payload))
        except Exception as error:
            self._refuse_raw(number, DIALECT.failure(error, "a gRPC call failed"))


def _is_large(answer: Answer | None) -> bool:
    if not isinstance(answer, InferResponse):
        return False
    return any(len(tensor.raw()) >= COUNTED_BYTES for tensor in answer.outputs)


async def _give_back(freed: Freed) -> None:
    """Give freed memory back now and then. Large answers that arenas have no room for are sent from it."""
    while True:
        await asyncio.sleep(INTERVAL_S)
        await asyncio.to_thread(freed.give_back, 0, time.monotonic())


def _stands_for(call: Call, number: int) -> bool:
    return isinstance(call.token, Joined) and number in call.token.numbers
