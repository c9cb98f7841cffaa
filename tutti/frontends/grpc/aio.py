"""gRPC on grpcio's asyncio server: the same methods and codec as native.py, with TLS, deflate and streams.

It serves ModelStreamInfer behind the native server, and everything on its own where TLS or `--grpc-server grpcio`
asks for it.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import grpc

from tutti.core.errors import InferError
from tutti.core.types import Call, InferRequest, InferResponse, now_ns
from tutti.frontends.awaited_answers import Answers, Item
from tutti.frontends.door import Door, Failure, answer_of
from tutti.frontends.gate import Category
from tutti.frontends.grpc import codec as grpc_codec
from tutti.frontends.grpc import log_events as grpc_events
from tutti.frontends.grpc import methods as grpc_methods
from tutti.frontends.grpc.methods import DIALECT, HEALTH_WATCH, MODEL_INFER, MODEL_STREAM_INFER, metadata_headers
from tutti.frontends.v2.api import Api

_log = logging.getLogger(__name__)

# A call's metadata is read from its context, and only where somebody wants to see it.
_DIALECT = replace(DIALECT, read_headers=lambda context: metadata_headers(context.invocation_metadata()))
_STATUS = {code.value[0]: code for code in grpc.StatusCode}
_WATCH_S = 0.5
# How many requests of a stream may be open: a client that does not wait for answers is not read further.
_MAX_STREAM_CALLS = 4096


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Contents of PEM files. With a `root_certificate` clients must show a certificate that it has signed."""

    certificate: bytes
    key: bytes
    root_certificate: bytes | None = None


def _named(settings: tuple[tuple[str, int], ...]) -> list[tuple[str, int]]:
    """As gRPC's channel arguments."""
    return [(f"grpc.{name}", value) for name, value in settings]


class GrpcioFront:
    """One grpcio server. Build and use it on one event loop."""

    def __init__(self, api: Api, address: str, tls: TlsFiles | None = None, shares_port: bool = False) -> None:
        """`address` is HOST:PORT or unix:PATH."""
        self._api = api
        self._door = Door(_DIALECT, api.engine, api.grpc, api.tracer)
        self._open: set[Answers] = set()
        limit = min(api.limits.max_grpc_message_size, api.limits.max_inflight_bytes, 2**31 - 1)
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", int(shares_port)),
                *(() if address.startswith("unix:") else _named(api.limits.grpc_settings)),
            ]
        )
        self._server.add_generic_rpc_handlers((_Handler(self._routes()),))
        if tls is None:
            self._port = self._server.add_insecure_port(address)
        else:
            credentials = grpc.ssl_server_credentials(
                [(tls.key, tls.certificate)], tls.root_certificate, tls.root_certificate is not None
            )
            self._port = self._server.add_secure_port(address, credentials)

    async def start(self) -> int:
        """Listen; returns the port."""
        await self._server.start()
        return int(self._port)

    def refuse_open(self, error: InferError) -> None:
        """End the calls that are inside with an error, after the answers that they have."""
        for answers in self._open:
            answers.fail(error)

    async def stop(self, grace_s: float = 0.5) -> None:
        await self._server.stop(grace_s)

    def _routes(self) -> dict[str, Any]:
        routes = {
            MODEL_INFER: grpc.unary_unary_rpc_method_handler(self._infer),
            MODEL_STREAM_INFER: grpc.stream_stream_rpc_method_handler(self._stream),
            HEALTH_WATCH: grpc.unary_stream_rpc_method_handler(self._watch),
        }
        for path, method in grpc_methods.methods(self._api).items():
            routes[path] = grpc.unary_unary_rpc_method_handler(self._unary(path, method))
        return routes

    def _unary(self, path: str, method: grpc_methods.Method) -> Any:
        async def answer(payload: bytes, context: Any) -> bytes:
            await self._check(method.category, path, payload, context)
            began_ns, message = now_ns(), b""
            failure: Failure | None = None
            try:
                message = await self._api.in_thread(method.answer, payload) if method.blocks else method.answer(payload)
            except Exception as error:
                failure = DIALECT.failure(error, "a gRPC call failed")
            except asyncio.CancelledError:
                failure = _left(context)
                raise
            finally:
                if method.category != "health" and self._api.requests.is_on:
                    sizes, took_ns = (len(payload), len(message)), now_ns() - began_ns
                    grpc_events.note_method(self._api.requests, path, failure, sizes, context.peer(), took_ns)
            if failure is not None:
                await context.abort(_STATUS[failure[0]], failure[1])
            return message

        return answer

    async def _check(self, category: Category, path: str, payload: bytes, context: Any) -> None:
        if self._api.grpc.gate.is_open:
            return
        refusal = self._door.refusal(category, context)
        if refusal is not None:
            if self._api.requests.is_on:
                grpc_events.note_refusal(self._api.requests, path, refusal, payload, context.peer())
            code, message = refusal
            await context.abort(_STATUS[code], message)

    async def _infer(self, payload: bytes, context: Any) -> bytes:
        await self._check("inference", MODEL_INFER, payload, context)
        answers = Answers()
        self._open.add(answers)
        failure: Failure | None = None
        call: Call | None = None
        message = b""
        try:
            call = answers.call(grpc_codec.decode(payload, self._api.shared_memory))
            call.emit = None  # one answer only
            self._door.begin(call, context, _left_ns(context))
            self._door.submit([call])
            await answers.get()
            response, shared = self._api.complete(call)
            message = grpc_codec.encode(response, call.request.id, shared)
        except Exception as error:
            if call is None:
                failure = self._door.decode_failure(error, *grpc_codec.target(payload))
            else:
                failure = self._door.encode_failure(error, call)
        except asyncio.CancelledError:
            failure = _left(context)
            raise
        finally:
            self._open.discard(answers)
            answers.cancel()
            if self._api.requests.is_on:
                self._note(call, failure, payload, message, context)
        if failure is not None:
            code, details = failure
            await context.abort(_STATUS[code], details)
        return message

    def _note(self, call: Call | None, failure: Failure | None, payload: bytes, message: bytes, context: Any) -> None:
        log, peer = self._api.requests, context.peer()
        if call is not None:
            grpc_events.note_call(log, call, failure, (len(payload), len(message)), peer)
        elif failure is not None:
            grpc_events.note_refusal(log, MODEL_INFER, failure, payload, peer)

    async def _stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """Requests are taken as they come; each answer goes out as soon as it is there, with its request's id."""
        await self._check("inference", MODEL_STREAM_INFER, b"", context)
        ends_on_error = metadata_headers(context.invocation_metadata()).get("triton_grpc_error", "").lower() == "true"
        answers = Answers()
        self._open.add(answers)
        room = asyncio.Semaphore(_MAX_STREAM_CALLS)
        reader = asyncio.create_task(self._read(requests, context, answers, room))
        failure: Failure | None = None
        try:
            while (item := await answers.next()) is not None:
                if item.is_final:
                    room.release()
                failed: Failure | None = None
                try:
                    message = self._shown(item)
                except InferError as error:
                    failed = self._door.encode_failure(error, item.call)
                    if ends_on_error:
                        self._note_stream(item, failed, 0, context)
                        raise
                    message = grpc_codec.encode_stream_error(failed[1], item.call.request.id)
                if item.is_final:
                    self._note_stream(item, failed, len(message), context)
                if message:
                    yield message
        except InferError as error:
            failure = DIALECT.failure(error, "a stream failed")
            await context.abort(_STATUS[failure[0]], failure[1])
        finally:
            self._open.discard(answers)
            answers.cancel()
            reader.cancel()
            if self._api.requests.is_on:
                for call in list(answers.open):  # the stream has ended without their answers
                    grpc_events.note_streamed(self._api.requests, call, failure or _left(context), 0, context.peer())

    def _note_stream(self, item: Item, failure: Failure | None, size: int, context: Any) -> None:
        """A request of a stream has its last answer, of `size` bytes."""
        if self._api.requests.is_on:
            grpc_events.note_streamed(self._api.requests, item.call, failure, size, context.peer())

    async def _read(
        self, requests: AsyncIterator[bytes], context: Any, answers: Answers, room: asyncio.Semaphore
    ) -> None:
        try:
            async for payload in requests:
                self._api.holding.streamed += len(payload)
                await room.acquire()
                try:
                    request = grpc_codec.decode(payload, self._api.shared_memory)
                except Exception as error:
                    refused = answers.call(InferRequest("", {}, id=grpc_codec.id_of(payload)))
                    refused.finish(answer_of(error, "an infer request could not be decoded"))
                    continue
                wants_empty = bool(request.parameters.pop("triton_enable_empty_final_response", False))
                call = answers.call(request, wants_empty)
                self._door.begin(call, context, _left_ns(context))
                self._door.submit([call])
        except Exception:
            _log.debug("a stream was not read to its end", exc_info=True)
        finally:
            answers.end()

    def _shown(self, item: Item) -> bytes:
        """The message of one answer, none for a null one that was not asked for. Raises the answer's error."""
        call, answer = item.call, item.answer
        if item.is_final or isinstance(answer, InferError):
            response, shared = self._api.complete(call)
        else:
            response, shared = self._api.as_asked(call.request, answer)
        if response.is_null and not call.token:
            return b""
        parameters = {**response.parameters, "triton_final_response": item.is_final}
        version = "" if response.is_null else response.model_version
        shown = InferResponse(response.model_name, version, response.outputs, parameters)
        return grpc_codec.encode_stream(grpc_codec.encode(shown, call.request.id, shared))

    async def _watch(self, payload: bytes, context: Any) -> AsyncIterator[bytes]:
        """grpc.health.v1 Watch: the status now, and whenever it changes."""
        await self._check("health", HEALTH_WATCH, b"", context)
        shown = b""
        while not context.cancelled():
            try:
                now = grpc_methods.health(self._api, payload)
            except InferError:
                now = b"\x08\x03"  # SERVICE_UNKNOWN
            if now != shown:
                shown = now
                yield now
            await asyncio.sleep(_WATCH_S)


def _left_ns(context: Any) -> int:
    """How long a call's client waits; 0 for as long as it takes."""
    left_s = context.time_remaining()
    return 0 if left_s is None else max(1, int(left_s * 1e9))


def _left(context: Any) -> Failure:
    """What the client of a cancelled call has seen: the end of its deadline, or its own cancelling."""
    left_s = context.time_remaining()
    return grpc_events.left(grpc_events.GONE, 0 if left_s is None else now_ns() + int(left_s * 1e9))


class _Handler(grpc.GenericRpcHandler):
    """Paths -> handlers of bytes."""

    def __init__(self, routes: dict[str, Any]) -> None:
        self._routes = routes

    def service(self, handler_call_details: Any) -> Any:
        return self._routes.get(handler_call_details.method)
