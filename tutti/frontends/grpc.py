"""gRPC on pygrpc_native: calls reach Python in bursts; each burst is decoded and submitted together.

Answers go out from whichever thread settles them. HTTP/2 itself runs in Rust, outside the GIL.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import DecodeError
from pygrpc_native import EVENT_CALL, NativeGrpcFront
from tritonclient.grpc import service_pb2 as pb

from tutti import errors
from tutti.engine import Engine
from tutti.errors import InferError, InvalidArgument
from tutti.frontends import api, grpc_codec
from tutti.frontends.api import Limits, in_classes, submit
from tutti.types import Call, InferResponse

_log = logging.getLogger(__name__)

_SERVICE = "/inference.GRPCInferenceService/"
_BURST = 64
# The one table from errors to gRPC status codes (numbers of grpc.StatusCode).
_CODES: dict[type[InferError], int] = {
    errors.InvalidArgument: 3,
    errors.NotFound: 5,
    errors.Unavailable: 14,
    errors.Unsupported: 12,
    errors.Cancelled: 1,
    errors.Internal: 13,
}
_RESOURCE_EXHAUSTED = 8
# Calls that block: they must not hold up the receiving thread.
_SLOW = ("RepositoryModelLoad", "RepositoryModelUnload")
_INTERNAL = 13


def code_of(error: InferError) -> int:
    return next((_CODES[kind] for kind in type(error).__mro__ if kind in _CODES), _INTERNAL)


class GrpcFront:
    """One listening gRPC server with one receiving thread. The sink of its infer calls; its token is the call's id."""

    def __init__(self, engine: Engine, host: str, port: int, limits: Limits | None = None) -> None:
        self._engine = engine
        self._limits = limits or Limits()
        self._handlers = _handlers(engine)
        paths = ["ModelInfer", *self._handlers]
        self._by_id: list[Callable[[bytes], bytes] | None] = [None, *self._handlers.values()]
        # Only with call_details does the front tell of unary calls that were cancelled or ran out of time.
        methods = [(_path(name), False) for name in paths]
        self._front = NativeGrpcFront(f"{host}:{port}", methods, io_threads=1, call_details=True)
        self._slow = {paths.index(name) for name in _SLOW}
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="grpc-control")
        self._open: dict[int, Call] = {}
        self._thread = threading.Thread(target=self._receive, name="grpc", daemon=True)

    def start(self) -> int:
        """Listen; returns the port, chosen by the system for 0."""
        self._front.start()
        self._thread.start()
        return int(self._front.bound_port)

    def stop(self) -> None:
        self._front.close()
        self._thread.join(timeout=5.0)
        self._workers.shutdown(wait=False)

    def settle(self, calls: Sequence[Call]) -> None:
        for call in calls:
            self._open.pop(call.token, None)
            answer = call.answer
            try:
                if isinstance(answer, InferResponse):
                    if call.request.classes:
                        answer = in_classes(self._engine, call.request, answer)
                    self._front.respond(call.token, grpc_codec.encode(answer, call.request.id))
                    continue
                assert answer is not None
                raise answer
            except InferError as error:
                self._front.fail(call.token, code_of(error), error.message)
            except Exception as error:
                _log.exception("a response of model '%s' could not be encoded", call.request.model_name)
                self._front.fail(call.token, _INTERNAL, f"internal error: {type(error).__name__}")

    def _receive(self) -> None:
        while (events := self._front.recv_batch(_BURST)) is not None:
            calls = []
            for kind, call_id, method, payload, _ in events:
                if kind != EVENT_CALL:
                    self._cancel(call_id)
                elif method == 0:
                    call = self._decode(call_id, payload or b"")
                    if call is not None:
                        calls.append(call)
                elif method in self._slow:
                    self._workers.submit(self._answer, call_id, method, payload or b"")
                else:
                    self._answer(call_id, method, payload or b"")
            if calls:
                submit(self._engine, calls)

    def _cancel(self, call_id: int) -> None:
        call = self._open.get(call_id)
        if call is not None:
            call.is_cancelled = True

    def _decode(self, call_id: int, payload: bytes) -> Call | None:
        limit = self._limits.max_grpc_message_size
        if len(payload) > limit:
            self._front.fail(
                call_id, _RESOURCE_EXHAUSTED, f"the message has {len(payload)} bytes, at most {limit} pass"
            )
            return None
        try:
            call = Call(grpc_codec.decode(payload), self, call_id)
        except InferError as error:
            self._front.fail(call_id, code_of(error), error.message)
            return None
        except Exception as error:
            _log.exception("a ModelInfer message could not be decoded")
            self._front.fail(call_id, _INTERNAL, f"internal error: {type(error).__name__}")
            return None
        self._open[call_id] = call
        return call

    def _answer(self, call_id: int, method: int, payload: bytes) -> None:
        handler = self._by_id[method]
        assert handler is not None
        try:
            self._front.respond(call_id, handler(payload))
        except DecodeError:
            self._front.fail(call_id, code_of(InvalidArgument("")), "the request message does not parse")
        except InferError as error:
            self._front.fail(call_id, code_of(error), error.message)
        except Exception as error:
            _log.exception("a gRPC call failed")
            self._front.fail(call_id, _INTERNAL, f"internal error: {type(error).__name__}")


def _path(name: str) -> str:
    return name if name.startswith("/") else _SERVICE + name


def _handlers(engine: Engine) -> dict[str, Callable[[bytes], bytes]]:
    """Every unary method but ModelInfer: serialized request -> serialized response."""
    routes = _Methods(engine)
    table: dict[str, tuple[Any, Callable[[Any], Any]]] = {
        "ServerLive": (pb.ServerLiveRequest, lambda _: pb.ServerLiveResponse(live=True)),
        "ServerReady": (pb.ServerReadyRequest, lambda _: pb.ServerReadyResponse(ready=engine.is_ready())),
        "ModelReady": (pb.ModelReadyRequest, routes.model_ready),
        "ServerMetadata": (pb.ServerMetadataRequest, lambda _: pb.ServerMetadataResponse(**api.server_metadata())),
        "ModelMetadata": (pb.ModelMetadataRequest, routes.metadata),
        "ModelConfig": (pb.ModelConfigRequest, routes.config),
        "ModelStatistics": (pb.ModelStatisticsRequest, routes.statistics),
        "RepositoryIndex": (pb.RepositoryIndexRequest, routes.index),
        "RepositoryModelLoad": (pb.RepositoryModelLoadRequest, routes.load),
        "RepositoryModelUnload": (pb.RepositoryModelUnloadRequest, routes.unload),
    }
    handlers = {name: _unary(request, handle) for name, (request, handle) in table.items()}
    # grpc.health.v1: an empty service name asks for the whole server; SERVING is 1, NOT_SERVING 2.
    handlers["/grpc.health.v1.Health/Check"] = lambda _: b"\x08\x01" if engine.is_ready() else b"\x08\x02"
    return handlers


def _unary(request: Any, handle: Callable[[Any], Any]) -> Callable[[bytes], bytes]:
    return lambda payload: bytes(handle(request.FromString(payload)).SerializeToString())


def _scalars(parameters: Any) -> dict[str, Any]:
    return {key: getattr(value, value.WhichOneof("parameter_choice")) for key, value in parameters.items()}


class _Methods:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def model_ready(self, request: Any) -> Any:
        return pb.ModelReadyResponse(ready=api.is_model_ready(self._engine, request.name, request.version))

    def metadata(self, request: Any) -> Any:
        shown = api.model_metadata(self._engine, self._engine.model(request.name, request.version))
        return json_format.ParseDict(shown, pb.ModelMetadataResponse())

    def config(self, request: Any) -> Any:
        return pb.ModelConfigResponse(config=self._engine.model(request.name, request.version).config.proto)

    def statistics(self, request: Any) -> Any:
        models = [self._engine.model(request.name, request.version)] if request.name else self._engine.models()
        shown = {"model_stats": [api.model_statistics(model) for model in models]}
        return json_format.ParseDict(shown, pb.ModelStatisticsResponse())

    def load(self, request: Any) -> Any:
        api.refuse_control_parameters(request.model_name, _scalars(request.parameters))
        self._engine.load(request.model_name)
        return pb.RepositoryModelLoadResponse()

    def unload(self, request: Any) -> Any:
        api.refuse_control_parameters(request.model_name, _scalars(request.parameters))
        self._engine.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    def index(self, request: Any) -> Any:
        entries = [e for e in self._engine.index() if e.state == "READY" or not request.ready]
        index = pb.RepositoryIndexResponse.ModelIndex
        return pb.RepositoryIndexResponse(
            models=[index(name=e.name, version=e.version, state=e.state, reason=e.reason) for e in entries]
        )
