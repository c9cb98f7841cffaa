"""gRPC on pygrpc_native: calls reach Python in bursts; each burst is decoded and submitted together.

Answers go out from whichever thread settles them. HTTP/2 itself runs in Rust, outside the GIL. What it does not do,
bidirectional streams, goes to the grpcio server of aio.py behind it.
"""

import asyncio
import hashlib
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pygrpc_native import EVENT_CALL, NativeGrpcFront

from tutti.core.errors import InferError
from tutti.core.types import Call, now_ns
from tutti.frontends.arrival import Arrival
from tutti.frontends.deadlines import timeout_ns
from tutti.frontends.door import Door, Elsewhere, Failure
from tutti.frontends.gate import Category
from tutti.frontends.grpc import codec as grpc_codec
from tutti.frontends.grpc import keepalive
from tutti.frontends.grpc import log_events as grpc_events
from tutti.frontends.grpc import methods as grpc_methods
from tutti.frontends.grpc.given_answers import GivenAnswers
from tutti.frontends.grpc.memory_guard import Guard
from tutti.frontends.grpc.methods import DIALECT, MODEL_INFER, RESOURCE_EXHAUSTED, UNAVAILABLE
from tutti.frontends.held_bytes import COUNTED_BYTES
from tutti.frontends.v2.api import Api

_log = logging.getLogger(__name__)

_BURST = 64
# While messages are large fewer are taken at a time: each one taken is copied into memory of its own.
_BURST_OF_LARGE = 4
_NOBODY: tuple[Call | None, str] = (None, "")
# How long the native server may need to send what it was given last.
_LAST_S = 0.1


class GrpcFront:
    """One listening gRPC server with one receiving thread. The sink of its infer calls; its token is the call's id."""

    def __init__(
        self,
        api: Api,
        host: str,
        port: int,
        fallback: str | None = None,
        raw: Callable[..., None] | None = None,
        shares_port: bool = False,
    ) -> None:
        """`fallback` is the Unix socket of the server for all other methods.

        A front-end process has `raw` take the path and the serialized request of what it cannot answer itself.
        """
        self._api = api
        self._door = Door(DIALECT, api.engine, api.grpc, api.tracer)
        self._is_open = api.grpc.gate.is_open
        self._is_ending = False  # whoever comes then is late
        self._late: deque[tuple[int, int, str]] = deque()
        self._max_message_size = min(api.limits.max_grpc_message_size, api.limits.max_inflight_bytes)
        self._raw = raw
        table = grpc_methods.methods(api)
        self._methods = [None, *table.values()]
        self._paths = [MODEL_INFER, *table]
        self._front = _native_front(api, f"{host}:{port}", self._paths, shares_port)
        if fallback is not None:
            self._front.set_fallback(fallback)
        self._templates = grpc_codec.TemplateCache()
        # Calls that wait for their answers, by id, and whom each is from, "" where nobody knows.
        self._open: dict[int, tuple[Call, str]] = {}
        # Calls that another process answers.
        self._elsewhere: set[int] = set()
        self._answers = GivenAnswers(self._front, api.holding, self._open)
        self._guard = None
        if sys.platform == "linux":
            self._guard = Guard(self._max_message_size, api.holding, self._answers.under_way, not api.is_front_end)
        # Bytes of the requests that count as held: the large ones.
        self._held: dict[int, int] = {}
        # Bytes of all requests, while requests are noted.
        self._sizes: dict[int, int] = {}
        self._thread = threading.Thread(target=self._receive, name="grpc", daemon=True)

    def start(self) -> int:
        """Listen; returns the port, chosen by the system for 0."""
        self._front.start()
        self._thread.start()
        if self._guard is not None:
            self._guard.start(int(self._front.bound_port))
        return int(self._front.bound_port)

    async def drain(self, drain_s: float) -> None:
        """Wait for a moment without calls."""
        until = time.monotonic() + drain_s
        while (self._open or self._elsewhere) and time.monotonic() < until:
            await asyncio.sleep(0.001)

    async def finish(self, drain_s: float, grace_s: float) -> None:
        """Wait for a moment without calls; then let what is inside end, and refuse what came meanwhile.

        It is refused last: clients ask again a few times within a second, and the connection that they would do it on
        closes only then.
        """
        await self.drain(drain_s)
        self._is_ending, self._is_open = True, False
        await self.drain(grace_s)
        self._refuse_late()
        await asyncio.sleep(_LAST_S)  # the last answers leave before the connections close
        self._refuse_late()  # those that came in the meantime

    def _refuse_late(self) -> None:
        refusal = UNAVAILABLE, "the server is shutting down: try again later"
        while self._late:
            call_id, index, peer = self._late.popleft()
            self._refuse(call_id, self._paths[index], refusal, b"", peer)

    def refuse_open(self, error: InferError) -> None:
        """Answer the calls that are inside with an error."""
        told = DIALECT.failure(error, "a call was refused")
        for call_id in list(self._open):
            call, peer = self._open.pop(call_id, _NOBODY)
            if call is not None:
                failure = self._fail(call_id, told, call.deadline_ns)
                if self._api.requests.is_on:
                    self._note(call, failure, 0, peer)

    def stop(self) -> None:
        if self._guard is not None:
            self._guard.stop()
        self._front.close()
        self._thread.join(timeout=5.0)

    def settle(self, calls: Sequence[Call]) -> None:
        guard, answers = self._guard, self._answers
        is_noted = self._api.requests.is_on
        for call in calls:
            known, peer = self._open.pop(call.token, _NOBODY)
            if self._held:
                self._api.holding.give(self._held.pop(call.token, 0))
            failure: Failure | None = None
            message = b""
            try:
                response, shared = self._api.complete(call)
                message = grpc_codec.encode(response, call.request.id, shared)
                if guard is not None and (len(message) >= COUNTED_BYTES or guard.is_owing):
                    failure = answers.give(guard, call.token, message, peer)
                else:
                    failure = answers.respond(call.token, message)
            except Exception as error:
                failure = self._door.encode_failure(error, call)
            if failure is not None:
                failure = self._fail(call.token, failure, call.deadline_ns)
            if (is_noted or self._sizes) and known is not None:  # else it was refused when the server stopped
                self._note(call, failure, len(message), peer)

    def _note(self, call: Call, failure: Failure | None, size: int, peer: str) -> None:
        sizes = self._sizes.pop(call.token, 0), size if failure is None else 0
        grpc_events.note_call(self._api.requests, call, failure, sizes, peer)

    def _fail(self, call_id: int, failure: Failure, deadline_ns: int = 0) -> Failure:
        """End a call with an error. Returns what its client has seen, which differs if it has left."""
        return failure if self._front.fail(call_id, *failure) else grpc_events.left(failure, deadline_ns)

    def _receive(self) -> None:
        receive: Callable[[int], Any] = self._front.recv_batch
        needs_headers = self._api.grpc.needs_headers
        if needs_headers or self._api.tracer.needs_headers:
            receive = self._front.recv_batch_details
        usual = self._front.recv_batch_details if needs_headers else self._front.recv_batch
        guard = self._guard
        # Whom a call is from costs time to tell, and the guard needs it only while it watches connections.
        burst = _BURST
        while (events := receive(burst)) is not None:
            if guard is not None:
                burst = _BURST_OF_LARGE if guard.is_watching else _BURST
                if guard.is_watching:
                    _tell(guard, events)
                if guard.needs_peers or self._api.requests.is_on or self._api.tracer.needs_headers:
                    receive = self._front.recv_batch_details
                elif receive is not usual:
                    receive = usual
            self._take(events)
            del events  # else their messages would be kept until the next ones come

    def _take(self, events: Sequence[Any]) -> None:
        calls = []
        for kind, call_id, method, payload, timeout, *rest in events:
            details = rest[0] if rest else None
            try:
                if kind != EVENT_CALL:
                    self._cancel(call_id)
                elif method == 0:
                    call = self._accept(call_id, payload or b"", timeout, details)
                    if call is not None:
                        calls.append(call)
                else:
                    self._ask(call_id, method, payload or b"", details)
            except Exception as error:  # the other calls of the burst go on
                self._front.fail(call_id, *DIALECT.failure(error, "a gRPC call was not taken"))
        if calls:
            self._door.submit(calls)

    def _cancel(self, call_id: int) -> None:
        call, _ = self._open.get(call_id, _NOBODY)
        if call is not None:
            call.is_cancelled = True

    def _accept(self, call_id: int, payload: bytes, timeout: bytes | str | None, details: Any) -> Call | None:
        """An infer request, decoded; None when it has been answered with an error.

        `timeout` is the header's value, or a text where there is none.
        """
        api = self._api
        if (len(payload) > self._max_message_size or not self._is_open) and not self._may_pass(
            call_id, 0, "inference", payload, details
        ):
            return None
        if len(payload) >= COUNTED_BYTES and not api.holding.take(len(payload)):
            refusal = UNAVAILABLE, api.holding.refusal
            self._refuse(call_id, MODEL_INFER, refusal, payload, _peer(timeout, details))
            return None
        call: Call | None = None
        try:
            call = self._decode(call_id, payload, timeout, details)
        finally:
            if call is None and len(payload) >= COUNTED_BYTES:
                api.holding.give(len(payload))
        return call

    def _decode(self, call_id: int, payload: bytes, timeout: bytes | str | None, details: Any) -> Call | None:
        api = self._api
        left_ns = 0
        try:
            if isinstance(timeout, bytes):
                left_ns = timeout_ns(b"grpc-timeout", timeout)
            request = self._templates.decode(payload, api.shared_memory)
            if request.classes and api.is_front_end:
                raise Elsewhere
            call = Call(request, self, call_id)
        except Elsewhere:
            arrival = self._door.arrival(details and details[0]) if api.tracer.is_on else None
            self._ask_elsewhere(call_id, 0, payload, left_ns, _peer(timeout, details), arrival)
            return None
        except Exception as error:
            failure = self._door.decode_failure(error, *grpc_codec.target(payload))
            self._refuse(call_id, MODEL_INFER, failure, payload, _peer(timeout, details))
            return None
        self._door.begin(call, details and details[0], left_ns)
        self._open[call_id] = call, timeout if type(timeout) is str else _peer(timeout, details)
        if api.requests.is_on:
            self._sizes[call_id] = len(payload)
        if len(payload) >= COUNTED_BYTES:
            self._held[call_id] = len(payload)
        return call

    def _refuse(self, call_id: int, path: str, failure: Failure, payload: bytes, peer: str) -> None:
        """Answer a call with an error before any model is asked."""
        failure = self._fail(call_id, failure)
        if self._api.requests.is_on:
            grpc_events.note_refusal(self._api.requests, path, failure, payload, peer)

    def _ask_elsewhere(
        self, call_id: int, index: int, payload: bytes, left_ns: int, peer: str, arrival: Arrival | None = None
    ) -> None:
        """Have the engine's process answer a call."""
        assert self._raw is not None
        method, path = self._methods[index], self._paths[index]
        outside: grpc_events.Outside | None = None
        if self._api.requests.is_on and (method is None or method.category != "health"):
            outside = grpc_events.outside(path, payload, peer, left_ns)
        owed_by = peer if method is None else None
        self._elsewhere.add(call_id)
        self._raw(path, payload, left_ns, partial(self._answer_raw, call_id, owed_by, outside), arrival)

    def _answer_raw(
        self,
        call_id: int,
        peer: str | None,
        outside: grpc_events.Outside | None,
        code: int,
        message: bytes,
        details: str,
    ) -> None:
        """`peer` is None for what is no infer request, `outside` where nobody wants to know of the call."""
        self._elsewhere.discard(call_id)
        failure = (code, details) if code else None
        if failure is None and self._guard is not None and peer is not None and len(message) >= COUNTED_BYTES:
            failure = self._answers.give(self._guard, call_id, message, peer)
        elif failure is None and peer is not None:
            failure = self._answers.respond(call_id, message)
        elif failure is None and not self._front.respond(call_id, message):
            failure = grpc_events.GONE
        if failure is not None:
            failure = self._fail(call_id, failure, outside.deadline_ns if outside is not None else 0)
        if outside is not None:
            size = len(message) if failure is None else 0
            grpc_events.note_outside(self._api.requests, outside, failure, size)

    def _may_pass(self, call_id: int, index: int, category: Category, payload: bytes, details: Any) -> bool:
        """Check size and gate. A call that may not pass is answered at once; a late one, when the server ends."""
        if self._is_ending:
            self._late.append((call_id, index, _peer(None, details)))
            return False
        refusal: Failure | None = None
        if len(payload) > self._max_message_size:
            too_large = f"the message has {len(payload)} bytes, at most {self._max_message_size} pass"
            refusal = RESOURCE_EXHAUSTED, too_large
        elif not self._api.grpc.gate.is_open:
            refusal = self._door.refusal(category, details and details[0])
        if refusal is not None:
            self._refuse(call_id, self._paths[index], refusal, payload, _peer(None, details))
        return refusal is None

    def _ask(self, call_id: int, index: int, payload: bytes, details: Any) -> None:
        method = self._methods[index]
        assert method is not None
        if not self._may_pass(call_id, index, method.category, payload, details):
            return
        if self._raw is not None:
            self._ask_elsewhere(call_id, index, payload, _left_ns(details), _peer(None, details))
        elif method.blocks:  # it must not hold up the receiving thread
            self._api.control.submit(self._answer, call_id, index, payload, details)
        else:
            self._answer(call_id, index, payload, details)

    def _answer(self, call_id: int, index: int, payload: bytes, details: Any) -> None:
        method = self._methods[index]
        assert method is not None
        began_ns, message = now_ns(), b""
        failure: Failure | None = None
        try:
            message = method.answer(payload)
            if not self._front.respond(call_id, message):
                failure = grpc_events.GONE
        except Exception as error:
            failure = DIALECT.failure(error, "a gRPC call failed")
        if failure is not None:
            left_ns = _left_ns(details)
            failure = self._fail(call_id, failure, began_ns + left_ns if left_ns else 0)
        if method.category != "health" and self._api.requests.is_on:
            sizes, took_ns = (len(payload), len(message) if failure is None else 0), now_ns() - began_ns
            peer = _peer(None, details)
            grpc_events.note_method(self._api.requests, self._paths[index], failure, sizes, peer, took_ns)


def _native_front(api: Api, address: str, paths: Sequence[str], shares_port: bool) -> Any:
    """The server in Rust, which does not listen yet."""
    # The native server checks API keys itself: it does so before it reads and decompresses a message.
    keys = [hashlib.sha256(key.encode()).digest() for key in api.grpc.gate.api_keys]
    settings: Any = keepalive.native(api.limits.grpc_settings)
    return NativeGrpcFront(
        address,
        [(path, False) for path in paths],
        io_threads=1,
        # This header comes with each call at no cost; all details of calls would cost a tenth of the rate.
        client_key_metadata="grpc-timeout",
        # Without it the server does not tell of unary calls that were cancelled or ran out of time.
        call_details=True,
        bearer_token_sha256=keys or None,
        unauthenticated_message=DIALECT.refusals["unauthenticated"][1],
        # GivenAnswers reads from them how many bytes of answers have left the server, or were dropped.
        metrics=True,
        reuse_port=shares_port,
        **settings,
    )


def _peer(key: bytes | str | None, details: Any) -> str:
    """Whom a call is from. The native server puts the peer, a text, in place of a header that the call has not."""
    if isinstance(key, str):
        return key
    return str(details[1]) if details is not None else ""


def _left_ns(details: Any) -> int:
    """How long a call's client waited when it came, where its details are known; 0 for as long as it takes."""
    return max(1, int(details[2] * 1e9)) if details is not None and details[2] is not None else 0


def _tell(guard: Guard, events: Sequence[Any]) -> None:
    for kind, _, _, payload, key, *rest in events:
        if kind == EVENT_CALL:
            peer = rest[0][1] if rest and rest[0] is not None else key
            if isinstance(peer, str):
                guard.took(peer, len(payload or b""))
            elif payload and len(payload) >= COUNTED_BYTES:
                guard.took_unknown()
