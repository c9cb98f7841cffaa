"""The unary methods of `inference.GRPCInferenceService` but ModelInfer, as functions of messages: no server in sight.

Both gRPC servers, the native one and grpcio, serve this one table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from tutti.core import errors
from tutti.core.errors import InferError, InvalidArgument, NotFound
from tutti.frontends.door import Dialect
from tutti.frontends.gate import Category
from tutti.frontends.v2.api import Api

SERVICE = "/inference.GRPCInferenceService/"
MODEL_INFER = SERVICE + "ModelInfer"
MODEL_STREAM_INFER = SERVICE + "ModelStreamInfer"
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
HEALTH_WATCH = "/grpc.health.v1.Health/Watch"

INTERNAL = 13
RESOURCE_EXHAUSTED = 8
UNAVAILABLE = 14
# The one table from errors to gRPC status codes (numbers of grpc.StatusCode).
_CODES: dict[type[InferError], int] = {
    errors.InvalidArgument: 3,
    errors.NotFound: 5,
    errors.Unavailable: UNAVAILABLE,
    errors.DeadlineExceeded: 4,
    errors.Unsupported: 12,
    errors.Cancelled: 1,
    errors.Unknown: 2,
    errors.AlreadyExists: 6,
    errors.Internal: INTERNAL,
}


RawAnswered = Callable[[int, bytes, str], None]
"""`answered(code, message, details)`: gRPC's status code, 0 for a serialized response, and the error's text."""


def _details(error: InferError) -> str:
    """What the caller is told. A deadline is told in gRPC's own words, as when the client's clock ends the call."""
    is_late = isinstance(error, errors.DeadlineExceeded | errors.TooLate)
    return f"Deadline Exceeded: {error.message}" if is_late else error.message


def metadata_headers(metadata: Any) -> Mapping[str, str]:
    """A call's text metadata; names are lower-case."""
    return {name: value for name, value in metadata or () if isinstance(value, str)}


DIALECT = Dialect(
    "GRPC",
    _CODES,
    INTERNAL,
    {
        "restricted": (UNAVAILABLE, "This protocol is restricted, expecting header 'triton-grpc-protocol-<key>'"),
        "unauthenticated": (16, "an API key is needed: authorization: Bearer KEY"),
    },
    metadata_headers,
    _details,
)


@dataclass(frozen=True, slots=True)
class Method:
    """Serialized request -> serialized response; raises InferErrors. `blocks` says that it may take long."""

    answer: Callable[[bytes], bytes]
    category: Category
    blocks: bool = False


def methods(api: Api) -> dict[str, Method]:
    """Path -> method."""
    handlers = _Methods(api)
    table: dict[str, tuple[Category, Any, Callable[[Any], Any]]] = {
        "ServerLive": ("health", pb.ServerLiveRequest, lambda _: pb.ServerLiveResponse(live=True)),
        "ServerReady": ("health", pb.ServerReadyRequest, lambda _: pb.ServerReadyResponse(ready=api.engine.is_ready())),
        "ModelReady": ("health", pb.ModelReadyRequest, handlers.model_ready),
        "ServerMetadata": ("metadata", pb.ServerMetadataRequest, handlers.server_metadata),
        "ModelMetadata": ("metadata", pb.ModelMetadataRequest, handlers.metadata),
        "ModelConfig": ("model-config", pb.ModelConfigRequest, handlers.config),
        "ModelStatistics": ("statistics", pb.ModelStatisticsRequest, handlers.statistics),
        "RepositoryIndex": ("model-repository", pb.RepositoryIndexRequest, handlers.index),
        "RepositoryModelLoad": ("model-repository", pb.RepositoryModelLoadRequest, handlers.load),
        "RepositoryModelUnload": ("model-repository", pb.RepositoryModelUnloadRequest, handlers.unload),
        "TraceSetting": ("trace", pb.TraceSettingRequest, handlers.trace),
        "LogSettings": ("logging", pb.LogSettingsRequest, handlers.logs),
        "SystemSharedMemoryStatus": ("shared-memory", pb.SystemSharedMemoryStatusRequest, handlers.shared_status),
        "SystemSharedMemoryRegister": ("shared-memory", pb.SystemSharedMemoryRegisterRequest, handlers.register_shared),
        "SystemSharedMemoryUnregister": (
            "shared-memory", pb.SystemSharedMemoryUnregisterRequest, handlers.unregister_shared,
        ),
        "CudaSharedMemoryStatus": ("shared-memory", pb.CudaSharedMemoryStatusRequest, handlers.cuda_status),
        "CudaSharedMemoryRegister": ("shared-memory", pb.CudaSharedMemoryRegisterRequest, handlers.register_cuda),
        "CudaSharedMemoryUnregister": ("shared-memory", pb.CudaSharedMemoryUnregisterRequest, handlers.unregister_cuda),
    }  # fmt: skip
    slow = (
        "RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload", "TraceSetting", "LogSettings",
        "SystemSharedMemoryUnregister", "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister",
    )  # fmt: skip
    by_path = {
        SERVICE + name: Method(_unary(request, handle), category, name in slow)
        for name, (category, request, handle) in table.items()
    }
    by_path[HEALTH_CHECK] = Method(lambda payload: health(api, payload), "health")
    return by_path


def health(api: Api, payload: bytes) -> bytes:
    """grpc.health.v1: an empty service name, or our service's, asks for the whole server, and a model's name for it.

    The messages have one field each: the service's name, and the status.
    """
    name = _first_string(payload)
    if name in ("", SERVICE.strip("/")):
        return SERVING if api.engine.is_ready() else NOT_SERVING
    if all(name != entry.name for entry in api.engine.index()):
        raise NotFound(f"unknown service '{name[:100]}'")
    return SERVING if api.is_model_ready(name, "") else NOT_SERVING


SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"


def _first_string(payload: bytes) -> str:
    try:
        return str(pb.ModelReadyRequest.FromString(payload).name)  # the same shape: field 1, a string
    except DecodeError:
        raise InvalidArgument("the request message does not parse") from None


def _unary(request: Any, handle: Callable[[Any], Any]) -> Callable[[bytes], bytes]:
    def answer(payload: bytes) -> bytes:
        try:
            message = request.FromString(payload)
        except DecodeError:
            raise InvalidArgument("the request message does not parse") from None
        return bytes(handle(message).SerializeToString())

    return answer


def _scalars(parameters: Any) -> dict[str, Any]:
    """A map of parameter messages as plain values."""
    return {
        key: getattr(value, value.WhichOneof("parameter_choice") or "string_param") for key, value in parameters.items()
    }


class _Methods:
    def __init__(self, api: Api) -> None:
        self._api = api

    def model_ready(self, request: Any) -> Any:
        return pb.ModelReadyResponse(ready=self._api.is_model_ready(request.name, request.version))

    def server_metadata(self, _: Any) -> Any:
        return pb.ServerMetadataResponse(**self._api.server_metadata())

    def metadata(self, request: Any) -> Any:
        return json_format.ParseDict(
            self._api.model_metadata(request.name, request.version), pb.ModelMetadataResponse()
        )

    def config(self, request: Any) -> Any:
        return pb.ModelConfigResponse(config=self._api.model_config(request.name, request.version))

    def statistics(self, request: Any) -> Any:
        return json_format.ParseDict(self._api.statistics(request.name, request.version), pb.ModelStatisticsResponse())

    def index(self, request: Any) -> Any:
        index = pb.RepositoryIndexResponse.ModelIndex
        return pb.RepositoryIndexResponse(models=[index(**entry) for entry in self._api.index(request.ready)])

    def load(self, request: Any) -> Any:
        self._api.load(request.model_name, _scalars(request.parameters))
        return pb.RepositoryModelLoadResponse()

    def unload(self, request: Any) -> Any:
        self._api.unload(request.model_name, _scalars(request.parameters))
        return pb.RepositoryModelUnloadResponse()

    def trace(self, request: Any) -> Any:
        changes = {key: _trace_value(key, list(value.value)) for key, value in request.settings.items()}
        model = request.model_name
        settings = self._api.update_trace_settings(model, changes) if changes else self._api.trace_settings(model)
        response = pb.TraceSettingResponse()
        for key, value in settings.items():
            response.settings[key].value.extend(value if isinstance(value, list) else [value])
        return response

    def logs(self, request: Any) -> Any:
        changes = _scalars(request.settings)
        settings = self._api.logs.update(changes) if changes else self._api.logs.settings()
        response = pb.LogSettingsResponse()
        for key, value in settings.items():
            field = {bool: "bool_param", int: "uint32_param", str: "string_param"}[type(value)]
            setattr(response.settings[key], field, value)
        return response

    def shared_status(self, request: Any) -> Any:
        response = pb.SystemSharedMemoryStatusResponse()
        for region in self._api.shared_memory.status(request.name):
            shown = response.regions[region.name]
            shown.name, shown.key = region.name, region.key
            shown.offset, shown.byte_size = region.offset, region.byte_size
        return response

    def register_shared(self, request: Any) -> Any:
        self._api.shared_memory.register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    def unregister_shared(self, request: Any) -> Any:
        self._api.shared_memory.unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    def cuda_status(self, request: Any) -> Any:
        response = pb.CudaSharedMemoryStatusResponse()
        for region in self._api.shared_memory.cuda_status(request.name):
            shown = response.regions[region.name]
            shown.name, shown.device_id, shown.byte_size = region.name, region.device_id, region.byte_size
        return response

    def register_cuda(self, request: Any) -> Any:
        handle, device_id, size = request.raw_handle, request.device_id, request.byte_size
        self._api.shared_memory.register_cuda(request.name, handle, device_id, size)
        return pb.CudaSharedMemoryRegisterResponse()

    def unregister_cuda(self, request: Any) -> Any:
        self._api.shared_memory.unregister_cuda(request.name)
        return pb.CudaSharedMemoryUnregisterResponse()


def _trace_value(key: str, values: list[str]) -> Any:
    """A setting's value: None, which clears it, for no values; the level alone may have several."""
    if not values:
        return None
    if key == "trace_level":
        return values
    if len(values) > 1:
        raise InvalidArgument(f"trace setting '{key[:100]}': expected one value, got {len(values)}")
    return values[0]
