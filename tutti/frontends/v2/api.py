"""What both protocols offer besides the form of a request: one method per question, plain data in and out.

A front-end turns its messages into these calls, and infer requests into `Call`s; everything else it needs to know of
the server is here: limits, gates, shared memory, traces.
"""

import asyncio
import base64
import binascii
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from tutti import SERVER_NAME, __version__
from tutti.core.daemon_threads import Pool
from tutti.core.errors import InferError, InvalidArgument, NotFound
from tutti.core.types import Call, InferRequest, InferResponse
from tutti.frontends.door import Access, response_of
from tutti.frontends.held_bytes import Holding
from tutti.frontends.size_limits import Limits
from tutti.frontends.v2.classification import classify
from tutti.frontends.v2.shared_memory import SharedMemory
from tutti.observing.logs import Logs
from tutti.observing.request_log import RequestLog
from tutti.observing.statistics import Duration
from tutti.observing.tracing import Tracer
from tutti.repository.config import as_json
from tutti.repository.model_config import ModelConfig
from tutti.serving.engine import Engine
from tutti.serving.interface import Override
from tutti.serving.model import Model

_EXTENSIONS = [
    "classification", "sequence", "model_repository", "model_repository(unload_dependents)", "schedule_policy",
    "model_configuration", "binary_tensor_data", "parameters", "statistics", "trace", "logging",
]  # fmt: skip
_FILE_PREFIX = "file:"
_MOST_CONTROL_CALLS = 64
T = TypeVar("T")


class Api:
    """One server as its front-ends see it. Errors are InferErrors."""

    def __init__(
        self,
        engine: Engine,
        limits: Limits | None = None,
        http: Access | None = None,
        grpc: Access | None = None,
        shared_memory: SharedMemory | None = None,
        tracer: Tracer | None = None,
        logs: Logs | None = None,
        is_front_end: bool = False,
        server_name: str = SERVER_NAME,
        requests: RequestLog | None = None,
    ) -> None:
        """`is_front_end`: the engine is in another process, and only infer is known here."""
        self.engine = engine
        self._server_name = server_name
        self.is_front_end = is_front_end
        self.limits = limits or Limits()
        self.holding = Holding(self.limits.max_inflight_bytes)
        self.http = http or Access()
        self.grpc = grpc or Access()
        self.shared_memory = shared_memory or SharedMemory()
        self.tracer = tracer or Tracer()
        if not is_front_end:
            self.tracer.version_of = self._version_of
        self.logs = logs or Logs()
        self.requests = requests or RequestLog(self.logs)
        # Threads for what may wait for long, as a load does: it must not use up those of others.
        self.control = Pool(_MOST_CONTROL_CALLS, "control")

    async def in_thread(self, do: Callable[..., T], *arguments: Any) -> T:
        """Call what may wait for long in one of the threads for that."""
        return await asyncio.get_running_loop().run_in_executor(self.control, do, *arguments)

    def close(self) -> None:
        """Write what is left of the traces and of the log of requests, and let go of clients' memory."""
        self.tracer.close()
        self.requests.close()
        self.shared_memory.close()

    # inference

    def _version_of(self, request: InferRequest) -> str:
        """The version that a refused request has asked for, or the one that would have answered it."""
        if request.model_version:
            return request.model_version
        try:
            return str(self.engine.model(request.model_name).version)
        except InferError:
            return ""

    def complete(self, call: Call) -> tuple[InferResponse, Collection[str]]:
        """A settled call's response as its request asks for it, and the outputs that are now in shared memory."""
        answer, request = call.answer, call.request
        if type(answer) is InferResponse and not request.classes and not request.shared_outputs and call.trace is None:
            return answer, ()  # the usual case
        return self.as_asked(request, response_of(call, self.tracer))

    def as_asked(self, request: InferRequest, response: InferResponse) -> tuple[InferResponse, Collection[str]]:
        """As `complete`, for one of several answers."""
        if request.classes:
            response = self._in_classes(request, response)
        if not request.shared_outputs:
            return response, ()
        return response, self._store(request, response)

    def _store(self, request: InferRequest, response: InferResponse) -> list[str]:
        stored = []
        for tensor in response.outputs:
            region = request.shared_outputs.get(tensor.name)
            if region is None:
                continue
            raw = tensor.raw()
            if len(raw) > region.byte_size:
                raise InvalidArgument(
                    f"model '{request.model_name}': output '{tensor.name}': shared memory region '{region.name}': "
                    f"the size given with the request ({region.byte_size} bytes) should be at least {len(raw)} bytes "
                    "to hold the results"
                )
            self.shared_memory.write(region, raw)
            stored.append(tensor.name)
        return stored

    def _in_classes(self, request: InferRequest, response: InferResponse) -> InferResponse:
        """The response with the outputs that `request.classes` names as their top classes."""
        model = self.engine.model(request.model_name, request.model_version)
        name, is_batched = model.config.name, model.config.is_batched
        outputs = [
            classify(name, tensor, request.classes[tensor.name], self._labels(model, tensor.name), is_batched)
            if tensor.name in request.classes
            else tensor
            for tensor in response.outputs
        ]
        return InferResponse(response.model_name, response.model_version, outputs, response.parameters)

    def _labels(self, model: Model, output: str) -> Sequence[str]:
        """The class names of an output; an ensemble's are those of the step that makes it, unless it names its own."""
        if output in model.labels:
            return model.labels[output]
        for step in model.config.steps:
            for inner, outer in step.output_map.items():
                if outer == output:
                    return self._labels(self.engine.model(step.model_name, step.version), inner)
        return ()

    # health and metadata

    def is_model_ready(self, name: str, version: str) -> bool:
        """Whether the version answers now; false for a model that is not there."""
        try:
            model = self.engine.model(name, version)
            return model.is_ready() and not model.is_stuck()
        except InferError:
            return False

    def server_metadata(self) -> dict[str, Any]:
        shared = ["system_shared_memory"] if self.shared_memory.is_allowed else []
        shared += ["cuda_shared_memory"] if self.shared_memory.is_cuda_allowed else []
        return {"name": self._server_name, "version": __version__, "extensions": _EXTENSIONS + shared}

    def model_metadata(self, name: str, version: str = "") -> dict[str, Any]:
        """Of a version, or of the newest; the versions are all of them, or the one that was asked for."""
        model = self.engine.model(name, version)
        config = model.config
        return {
            "name": config.name,
            "versions": [str(model.version)] if version else self.engine.versions(config.name),
            "platform": config.platform,
            "inputs": _tensors(config, "inputs"),
            "outputs": _tensors(config, "outputs"),
        }

    def model_config(self, name: str, version: str = "") -> Any:
        """The ModelConfig message."""
        return self.engine.model(name, version).config.proto

    def model_config_json(self, name: str, version: str = "") -> dict[str, Any]:
        return as_json(self.model_config(name, version))

    def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """Triton's statistics extension, times in nanoseconds: of one model, all its versions, or all models."""
        models = self.engine.models()
        if name:
            try:
                self.engine.model(name, version)
            except NotFound as error:  # as in Triton
                raise InvalidArgument(error.message) from None
            models = [m for m in models if m.config.name == name and (not version or str(m.version) == version)]
        return {"model_stats": [_model_statistics(model) for model in models]}

    # the repository

    def index(self, only_ready: bool = False) -> list[dict[str, str]]:
        """Name, version, state and reason of each version known."""
        return [
            {"name": e.name, "version": e.version, "state": e.state, "reason": e.reason}
            for e in self.engine.index()
            if e.state == "READY" or not only_ready
        ]

    def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Parameters: `config`, a configuration in JSON, and `file:VERSION/FILE`, its content as bytes or base64.

        Blocks until the model serves.
        """
        config: str | None = None
        files: dict[str, bytes] = {}
        for key, value in parameters.items():
            if key == "config" and isinstance(value, str):
                config = value
            elif key.startswith(_FILE_PREFIX) and isinstance(value, str | bytes):
                files[key.removeprefix(_FILE_PREFIX)] = _file_content(name, key, value)
            else:
                raise InvalidArgument(
                    f"model '{name}': load parameter {key[:100]!r}: expected 'config' as text, or 'file:VERSION/FILE'"
                )
        self.engine.load(name, Override(config, files) if config is not None or files else None)

    def unload(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Parameter: `unload_dependents`. Blocks until the model's requests have ended."""
        for key, value in parameters.items():
            if key != "unload_dependents" or not isinstance(value, bool):
                raise InvalidArgument(
                    f"model '{name}': unload parameter {key[:100]!r}: expected 'unload_dependents' as a boolean"
                )
        self.engine.unload(name, bool(parameters.get("unload_dependents", False)))

    # settings

    def trace_settings(self, model: str = "") -> dict[str, Any]:
        self._check_known(model)
        return self.tracer.settings(model)

    def update_trace_settings(self, model: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        self._check_known(model)
        return self.tracer.update(model, changes)

    def _check_known(self, model: str) -> None:
        if model and not self.engine.is_known(model):
            raise InvalidArgument(f"Request for unknown model : {model}")


def _file_content(model: str, key: str, value: str | bytes) -> bytes:
    if isinstance(value, bytes):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidArgument(f"model '{model}': load parameter {key[:100]!r}: expected base64") from None


def _tensors(config: ModelConfig, which: str) -> list[dict[str, Any]]:
    specs = getattr(config, which)
    return [{"name": s.name, "datatype": s.datatype, "shape": list(config.wire_shape(s))} for s in specs]


def _model_statistics(model: Model) -> dict[str, Any]:
    counts = model.statistics.counts
    stats = {
        "success": counts.success, "fail": counts.fail, "queue": counts.queue,
        "compute_input": counts.compute_input, "compute_infer": counts.compute_infer,
        "compute_output": counts.compute_output, "cache_hit": counts.cache_hit, "cache_miss": counts.cache_miss,
    }  # fmt: skip
    return {
        "name": model.config.name,
        "version": str(model.version),
        "last_inference": counts.last_inference_ms,
        "inference_count": counts.inferences,
        "execution_count": counts.executions,
        "inference_stats": {key: _duration(value) for key, value in stats.items()},
        "response_stats": {},
        "batch_stats": [
            {
                "batch_size": size,
                "compute_input": _duration(durations[0]),
                "compute_infer": _duration(durations[1]),
                "compute_output": _duration(durations[2]),
            }
            for size, durations in sorted(counts.batches.items())
        ],
        "memory_usage": [],
    }


def _duration(duration: Duration) -> dict[str, int]:
    return {"count": duration.count, "ns": duration.ns}
