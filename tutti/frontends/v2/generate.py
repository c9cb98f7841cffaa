"""Triton's generate extension: plain JSON in, plain JSON out. Pure.

Members of the request that are named as inputs become tensors; the object `parameters`, and every other member,
become the request's parameters.
"""

import json
import math
from typing import Any

import orjson

from tutti.core.errors import InvalidArgument
from tutti.core.types import InferRequest, InferResponse, Parameters, Shape, Tensor
from tutti.frontends.v2 import json_values, rules
from tutti.repository.model_config import ModelConfig, TensorSpec


def decode(config: ModelConfig, version: str, body: bytes) -> InferRequest:
    """Raises InvalidArgument naming the model and the member."""
    name = config.name
    try:
        members = json_values.parse_json(body)
    except ValueError as error:
        raise InvalidArgument(f"model '{name}': the request's JSON does not parse: {error}") from None
    if not isinstance(members, dict):
        raise InvalidArgument(f"model '{name}': the request's JSON: expected an object")
    specs = {spec.name: spec for spec in config.inputs}
    _check_members(name, members, specs, body)
    inputs: dict[str, Tensor] = {}
    parameters: Parameters = {}
    for key, value in members.items():
        if key in specs:
            inputs[key] = _tensor(config, specs[key], value)
        elif key == "parameters":
            parameters.update(_parameters(name, value))
        else:
            parameters[key] = value
    rules.check_parameters(name, parameters, body)
    request_id = members.get("id", "")
    if not isinstance(request_id, str):
        raise InvalidArgument(f"model '{name}': 'id': expected a string")
    return InferRequest(name, inputs, version, request_id, (), parameters)


def _check_members(name: str, members: dict[str, Any], specs: dict[str, TensorSpec], body: bytes) -> None:
    """Raises InvalidArgument for an input that the JSON object has more than once, where the reader keeps the last."""
    if all(body.count(b'"%s"' % key.encode()) < 2 for key in specs if key in members):
        return
    seen: set[str] = set()
    try:
        pairs = json.loads(body, object_pairs_hook=list)
    except RecursionError:
        raise InvalidArgument(f"model '{name}': the request's JSON is nested too deep") from None
    for key, _ in pairs:
        if key in specs and key in seen:
            raise InvalidArgument(f"model '{name}': input '{key}' already exists in request")
        seen.add(key)


def _parameters(name: str, value: Any) -> dict[str, Any]:
    keyword = "keyword: 'parameters'"
    if not isinstance(value, dict):
        raise InvalidArgument(f"model '{name}': Expected JSON object for {keyword}, got {str(value)[:40]}")
    try:
        rules.check_parameters(name, value)
    except InvalidArgument as error:
        told = error.message.removeprefix(f"model '{name}': ")
        raise InvalidArgument(f"model '{name}': Converting {keyword}: {told}") from None
    return value


def encode(response: InferResponse, request_id: str) -> bytes:
    """One answer as a flat JSON object: a single element as itself, several as an array."""
    shown: dict[str, Any] = {"id": request_id} if request_id else {}
    shown |= {"model_name": response.model_name, "model_version": response.model_version}
    for key, value in response.parameters.items():
        shown[key] = value
    for tensor in response.outputs:
        shown[tensor.name] = _values(response.model_name, tensor)
    if any(json_values.is_not_finite(tensor.data) for tensor in response.outputs):
        return json.dumps(shown).encode()
    return orjson.dumps(shown)


def _tensor(config: ModelConfig, spec: TensorSpec, value: Any) -> Tensor:
    """A value, or an array of them, as a tensor of the input's dims: a variable one takes what is there."""
    count = len(value) if isinstance(value, list) else 1
    known = math.prod(dim for dim in spec.dims if dim != -1)
    variable = iter([count // known, *[1] * len(spec.dims)])
    shape: Shape = tuple(next(variable) if dim == -1 else dim for dim in spec.dims)
    if config.is_batched:
        shape = (1 if -1 in spec.dims else count // known, *shape)
    return Tensor(
        spec.name,
        spec.datatype,
        shape,
        json_values.from_json(config.name, spec.name, spec.datatype, shape, value),
    )


def _values(model: str, tensor: Tensor) -> Any:
    if tensor.datatype in ("FP16", "BF16"):
        raise InvalidArgument(f"model '{model}': output '{tensor.name}': {tensor.datatype} cannot be shown as JSON")
    values = tensor.array().reshape(-1).tolist()
    if tensor.datatype == "BYTES":
        values = json_values.texts(model, tensor.name, values)
    return values[0] if len(values) == 1 else values
