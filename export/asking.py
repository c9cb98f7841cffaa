"""A command for a shell that asks a served model as it was asked to prove it."""

import json
import shlex
from collections.abc import Mapping

from tutti.core.dtypes import NUMPY, Array
from tutti.export.draft import Draft

# Where `tutti serve` listens.
_HTTP, _GRPC = "127.0.0.1:8000", "127.0.0.1:8001"
# So many elements are a line that a person can read.
_SHORT = 16
# What JSON has no numbers for.
_NOT_IN_JSON = frozenset(["FP16", "BF16"])


def command(name: str, tensors: Mapping[str, Array], draft: Draft) -> str:
    """curl where its line is short, and else a Python program of a few lines. `tensors` are of one value each."""
    is_short = sum(array.size for array in tensors.values()) <= _SHORT
    if is_short and not any(spec.datatype in _NOT_IN_JSON for spec in draft.inputs):
        return _curl(name, tensors, draft)
    return _program(name, tensors, draft)


def _curl(name: str, tensors: Mapping[str, Array], draft: Draft) -> str:
    inputs = [
        {
            "name": spec.name,
            "shape": list(tensors[spec.name].shape),
            "datatype": spec.datatype,
            "data": [_in_json(value) for value in tensors[spec.name].reshape(-1).tolist()],
        }
        for spec in draft.inputs
    ]
    return f"curl -s http://{_HTTP}/v2/models/{name}/infer -d {shlex.quote(json.dumps({'inputs': inputs}))}"


def _in_json(value: object) -> object:
    return value.decode() if isinstance(value, bytes) else value


def _program(name: str, tensors: Mapping[str, Array], draft: Draft) -> str:
    lines = ["python - <<'END'", "import numpy as np", "from tritonclient import grpc", "", "inputs = []"]
    for spec in draft.inputs:
        array = tensors[spec.name]
        dtype = "object" if spec.datatype == "BYTES" else f"np.{NUMPY[spec.datatype].name}"
        value = array.reshape(-1)[:1].tolist()
        filled = f"np.full({list(array.shape)}, {value[0] if value else 0!r}, {dtype})"
        lines.append(f"inputs.append(grpc.InferInput({spec.name!r}, {list(array.shape)}, {spec.datatype!r}))")
        lines.append(f"inputs[-1].set_data_from_numpy({filled})")
    lines.append(f"answer = grpc.InferenceServerClient({_GRPC!r}).infer({name!r}, inputs)")
    lines += [f"print({spec.name!r}, answer.as_numpy({spec.name!r}))" for spec in draft.outputs]
    return "\n".join([*lines, "END"])
