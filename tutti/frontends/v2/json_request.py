"""A v2 infer request in JSON, with its binary data beside it, and the form it wants its answer in. Pure.

Knows nothing of HTTP: where the JSON ends and the data begins, whoever carries them says. Sizes and positions are
bytes. Rules follow Triton's binary tensor data extension.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tutti.core import dtypes
from tutti.core.errors import InvalidArgument, Unsupported
from tutti.core.types import InferRequest, Shape, SharedRegion, Tensor
from tutti.frontends.v2.json_values import from_json, parse_json, shown
from tutti.frontends.v2.rules import (
    MAX_OUTPUTS,
    Regions,
    check_classes,
    check_parameters,
    check_shape,
    check_size,
    invalid,
    shared_region,
)


@dataclass(frozen=True, slots=True, eq=False)
class ReplyFormat:
    """Which outputs go as binary: those named in `binary`, by default the others as `default_is_binary` says.

    `coding` is how the whole body is compressed, "" for not at all.
    """

    default_is_binary: bool = False
    binary: Mapping[str, bool] = field(default_factory=dict)
    coding: str = ""

    def is_binary(self, name: str) -> bool:
        return self.binary.get(name, self.default_is_binary)

    def all_binary(self, outputs: Sequence[Tensor]) -> bool:
        if not self.binary:
            return self.default_is_binary
        return all(self.is_binary(tensor.name) for tensor in outputs)


JSON_REPLY = ReplyFormat()
BINARY_REPLY = ReplyFormat(default_is_binary=True)


def decode(
    name: str, version: str, text: memoryview, data: memoryview, regions: Regions
) -> tuple[InferRequest, ReplyFormat]:
    """A request's JSON and its binary data. Raises InvalidArgument naming the model and the tensor."""
    try:
        header = parse_json(text)
    except ValueError as error:
        raise invalid(name, f"the request's JSON does not parse: {error}") from None
    if not isinstance(header, dict):
        raise invalid(name, "the request's JSON: expected an object")
    inputs, used = _inputs(name, header, data, regions)
    if used != len(data):
        raise invalid(
            name,
            f"unexpected additional input data for model '{name}': {len(data) - used} bytes of binary data are left "
            "over after the last input",
        )
    parameters = _object(name, header, "parameters")
    outputs, classes, shared, reply = _outputs(name, header, parameters, regions)
    check_parameters(name, parameters, text, allows_end=False)
    request_id = header.get("id", "")
    if not isinstance(request_id, str):
        raise invalid(name, "'id': expected a string")
    return InferRequest(name, inputs, version, request_id, outputs, parameters, classes, shared), reply


def _inputs(
    model: str, header: Mapping[str, Any], binary: memoryview, regions: Regions
) -> tuple[dict[str, Tensor], int]:
    """The tensors, and how many bytes of `binary` they used."""
    inputs: dict[str, Tensor] = {}
    used = 0
    for entry in _list(model, header, "inputs"):
        name = entry.get("name")
        if not isinstance(name, str):
            raise invalid(model, "an input has no 'name'")
        if name in inputs:
            raise invalid(model, f"input '{name}' already exists in request: it is given more than once")
        datatype = entry.get("datatype")
        if not isinstance(datatype, str) or datatype not in dtypes.NUMPY:
            raise _wrong_datatype(model, name, datatype)
        shape = _shape(model, name, entry.get("shape"))
        parameters = _object(model, entry, "parameters")
        size = parameters.get("binary_data_size")
        region = shared_region(model, f"input '{name}'", parameters)
        if (size is not None) + ("data" in entry) + (region is not None) != 1:
            places = "'data', 'binary_data_size' and 'shared_memory_region'"
            raise invalid(model, f"input '{name}': expected one of {places}")
        if region is not None:
            inputs[name] = Tensor(name, datatype, shape, regions.read(region))
            check_size(model, inputs[name], region.byte_size)
            continue
        if size is None:
            if not isinstance(entry["data"], list):
                raise invalid(model, f"input '{name}': 'data': expected an array, got {shown(entry['data'])}")
            inputs[name] = Tensor(name, datatype, shape, from_json(model, name, datatype, shape, entry["data"]))
            continue
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise invalid(model, f"input '{name}': 'binary_data_size': expected a whole number, got {size!r}")
        if used + size > len(binary):
            raise _too_little_data(model, name, size, len(binary) - used)
        inputs[name] = Tensor(name, datatype, shape, binary[used : used + size])
        check_size(model, inputs[name], size)
        used += size
    return inputs, used


def _wrong_datatype(model: str, name: str, datatype: object) -> InvalidArgument:
    expected = f"expected one of {', '.join(dtypes.NUMPY)}, got {shown(datatype)}"
    return invalid(model, f"invalid datatype for input {name}: 'datatype': {expected}")


def _too_little_data(model: str, name: str, size: int, left: int) -> InvalidArgument:
    more = f"unexpected size for input '{name}', expecting {size - left} additional bytes"
    return invalid(model, f"{more}: input '{name}': expected {size} bytes of binary data, only {left} are left")


def _shape(model: str, name: str, value: Any) -> Shape:
    if not isinstance(value, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in value):
        raise invalid(model, f"input '{name}': 'shape': expected an array of whole numbers, got {shown(value)}")
    shape = tuple(value)
    if min(shape, default=0) < 0:
        unread = "Unable to parse 'shape': attempt to access JSON non-unsigned-integer as unsigned-integer"
        raise invalid(model, f"input '{name}': {unread}: expected sizes of 0 or more, got {value[:40]}")
    check_shape(model, name, shape)
    return shape


def _outputs(
    model: str, header: Mapping[str, Any], parameters: dict[str, Any], regions: Regions
) -> tuple[tuple[str, ...], dict[str, int], dict[str, SharedRegion], ReplyFormat]:
    """Names asked for, once each, classes wanted of them, where they go in shared memory, and their form.

    Takes the wire-only `binary_data_output` out of the parameters.
    """
    default = parameters.pop("binary_data_output", False)
    if not isinstance(default, bool):
        raise invalid(model, f"'binary_data_output': expected true or false, got {default!r}")
    entries = _list(model, header, "outputs")
    if not entries:
        return (), {}, {}, BINARY_REPLY if default else JSON_REPLY
    if len(entries) > MAX_OUTPUTS:
        raise invalid(model, f"at most {MAX_OUTPUTS} outputs can be asked for, got {len(entries)}")
    names: list[str] = []
    binary: dict[str, bool] = {}
    classes = {}
    shared = {}
    for entry in entries:
        name = entry.get("name")
        if not isinstance(name, str):
            raise invalid(model, "an output has no 'name'")
        if name in binary:
            continue  # an output that is named twice is answered once
        wanted = _object(model, entry, "parameters")
        count = _class_count(model, name, wanted)
        if count:
            classes[name] = count
        region = shared_region(model, f"output '{name}'", wanted)
        if region is not None:
            regions.check(region)
            shared[name] = region
        names.append(name)
        is_binary = wanted.get("binary_data", False)
        if not isinstance(is_binary, bool):
            raise invalid(model, f"output '{name}': 'binary_data': expected true or false, got {is_binary!r:.100}")
        binary[name] = is_binary
    return tuple(names), classes, shared, ReplyFormat(default, binary)


def _class_count(model: str, name: str, parameters: Mapping[str, Any]) -> int:
    """How many classes are wanted of an output, 0 for the output itself. Raises Unsupported for other parameters."""
    count = 0
    for key, value in parameters.items():
        if key == "classification":
            count = check_classes(model, name, value) if value != 0 else 0
        elif key != "binary_data" and not key.startswith("shared_memory_"):
            raise Unsupported(f"model '{model}': output '{name}': parameter '{key}' is not supported")
    return count


def _object(model: str, parent: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = parent.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid(model, f"'{key}': expected an object")
    return value


def _list(model: str, parent: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    value = parent.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise invalid(model, f"'{key}': expected an array of objects")
    return value
