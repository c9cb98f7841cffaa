"""What a person is told of a server that has started: its models, where it listens, and a line to try. Pure."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence

from tutti.repository.model_config import ModelConfig, TensorSpec
from tutti.serving.model import Model

_COLUMNS = ("model", "version", "backend", "instances", "batch", "loaded in")
# An example's tensors have so many elements at most: it is one line.
MAX_ELEMENTS = 16
_WHOLE = frozenset(["INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"])
_VALUES: Mapping[str, object] = {"BOOL": False, "BYTES": "text", "FP32": 0.0, "FP64": 0.0, **dict.fromkeys(_WHOLE, 0)}


def table(models: Iterable[Model]) -> list[str]:
    """The models as aligned lines, the names of the columns first."""
    return aligned([_COLUMNS, *(_row(model) for model in models)])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines with their columns below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _row(model: Model) -> tuple[str, ...]:
    config = model.config
    instances = "its steps'" if config.is_ensemble else model.instances
    return config.name, str(model.version), config.backend, instances, batch(config), f"{model.load_s:.2f} s"


def batch(config: ModelConfig) -> str:
    """How many rows are executed together."""
    return f"up to {config.max_batch_size}" if config.max_batch_size > 1 else "none"


def example(models: Sequence[Model], url: str) -> str:
    """A command for a shell that asks a model, or for its metadata where no request is short; "" without models.

    It is for the server at `url`, over HTTP: "" where that is "".
    The model with the fewest input elements is asked. Zeros are numbers to any model, where a text may be no picture:
    one that takes bytes is asked only where no other is, as is a step of an ensemble.
    """
    if not url:
        return ""
    steps = {step.model_name for model in models for step in model.config.steps}
    configs = [model.config for model in models if not model.config.is_decoupled and not model.config.sequences]
    short = [config for config in configs if _elements(config) <= MAX_ELEMENTS]
    if short:
        config = min(short, key=lambda config: (_takes_bytes(config), config.name in steps, _elements(config)))
        body = json.dumps({"inputs": [_tensor(spec, config) for spec in config.inputs]})
        return f"curl -s {url}/v2/models/{config.name}/infer -d '{body}'"
    return f"curl -s {url}/v2/models/{models[0].config.name}" if models else ""


def _takes_bytes(config: ModelConfig) -> bool:
    return any(spec.datatype == "BYTES" for spec in config.inputs)


def _tensor(spec: TensorSpec, config: ModelConfig) -> dict[str, object]:
    shape = _shape(spec, config)
    data = [_VALUES[spec.datatype]] * math.prod(shape)
    return {"name": spec.name, "shape": shape, "datatype": spec.datatype, "data": data}


def _elements(config: ModelConfig) -> float:
    """Of all inputs of the shortest request; infinite where JSON does not carry one of them."""
    if not config.inputs or any(spec.datatype not in _VALUES for spec in config.inputs):
        return math.inf
    return sum(math.prod(_shape(spec, config)) for spec in config.inputs)


def _shape(spec: TensorSpec, config: ModelConfig) -> list[int]:
    return [1 if size < 0 else size for size in config.wire_shape(spec)]
