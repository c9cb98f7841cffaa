"""The questions both front-ends answer besides inference, as plain data, and the settings they share."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutti import SERVER_NAME, __version__
from tutti.classification import classify
from tutti.config import ModelConfig
from tutti.engine import Engine
from tutti.errors import InferError, Internal, Unsupported
from tutti.model import Model
from tutti.statistics import Duration
from tutti.types import Call, Infer, InferRequest, InferResponse, settle_all

_log = logging.getLogger(__name__)

EXTENSIONS = ["classification", "binary_tensor_data", "model_configuration", "model_repository", "statistics"]


def submit(serve: Infer, calls: Sequence[Call]) -> None:
    """Hand calls over. An Infer never raises; should one do so all the same, its callers get an answer."""
    try:
        serve(calls)
    except Exception as error:
        _log.exception("a burst of %d calls was not taken", len(calls))
        settle_all([call for call in calls if call.answer is None], Internal(f"internal error: {type(error).__name__}"))


def is_model_ready(engine: Engine, name: str, version: str) -> bool:
    """Whether the version answers now; false for a model that is not there."""
    try:
        return engine.model(name, version).is_ready()
    except InferError:
        return False


def refuse_control_parameters(name: str, parameters: Mapping[str, Any]) -> None:
    """Parameters of load and unload, none of which is supported but the default of one. Raises Unsupported."""
    for key, value in parameters.items():
        if key != "unload_dependents" or value:
            raise Unsupported(f"model '{name}': load and unload parameter '{key}' is not supported")


def in_classes(engine: Engine, request: InferRequest, response: InferResponse) -> InferResponse:
    """The response with the outputs that `request.classes` names as their top classes."""
    model = engine.model(request.model_name, request.model_version)
    name, is_batched = model.config.name, model.config.is_batched
    outputs = [
        classify(name, tensor, request.classes[tensor.name], labels_of(engine, model, tensor.name), is_batched)
        if tensor.name in request.classes
        else tensor
        for tensor in response.outputs
    ]
    return InferResponse(response.model_name, response.model_version, outputs, response.parameters)


def labels_of(engine: Engine, model: Model, output: str) -> Sequence[str]:
    """The class names of an output; an ensemble's are those of the step that makes it, where it names none itself."""
    if output in model.labels:
        return model.labels[output]
    for step in model.config.steps:
        for inner, outer in step.output_map.items():
            if outer == output:
                return labels_of(engine, engine.model(step.model_name, step.version), inner)
    return ()


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes in bytes."""

    max_input_size: int = 64 * 1024 * 1024
    max_grpc_message_size: int = 2**31 - 1


def server_metadata() -> dict[str, Any]:
    return {"name": SERVER_NAME, "version": __version__, "extensions": EXTENSIONS}


def model_metadata(engine: Engine, model: Model) -> dict[str, Any]:
    config = model.config
    return {
        "name": config.name,
        "versions": engine.versions(config.name),
        "platform": config.platform,
        "inputs": _tensors(config, "inputs"),
        "outputs": _tensors(config, "outputs"),
    }


def _tensors(config: ModelConfig, which: str) -> list[dict[str, Any]]:
    specs = getattr(config, which)
    return [{"name": s.name, "datatype": s.datatype, "shape": list(config.wire_shape(s))} for s in specs]


def model_statistics(model: Model) -> dict[str, Any]:
    """Triton's statistics extension, times in nanoseconds."""
    counts = model.statistics.counts
    empty = Duration()
    stats = {
        "success": counts.success, "fail": counts.fail, "queue": counts.queue,
        "compute_input": counts.compute_input, "compute_infer": counts.compute_infer,
        "compute_output": counts.compute_output, "cache_hit": empty, "cache_miss": empty,
    }  # fmt: skip
    return {
        "name": model.config.name,
        "version": str(model.version),
        "last_inference": counts.last_inference_ms,
        "inference_count": counts.inferences,
        "execution_count": counts.executions,
        "inference_stats": {key: _duration(value) for key, value in stats.items()},
        "batch_stats": [
            {
                "batch_size": size,
                "compute_input": _duration(durations[0]),
                "compute_infer": _duration(durations[1]),
                "compute_output": _duration(durations[2]),
            }
            for size, durations in sorted(counts.batches.items())
        ],
    }


def _duration(duration: Duration) -> dict[str, int]:
    return {"count": duration.count, "ns": duration.ns}
