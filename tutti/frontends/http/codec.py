"""The KServe v2 infer request and response over HTTP: JSON, binary tensors and raw bodies. Pure.

Sizes and positions are bytes. Rules follow Triton's binary tensor data extension.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import orjson

from tutti.core import dtypes
from tutti.core.errors import InvalidArgument, Unsupported
from tutti.core.types import InferRequest, InferResponse, Parameters, Raw, Shape, SharedRegion, Tensor
from tutti.frontends.v2.json_values import from_json, is_not_finite, parse_json, shown, texts
from tutti.frontends.v2.rules import (
    MAX_OUTPUTS,
    NO_REGIONS,
    Regions,
    check_classes,
    check_parameters,
    check_shape,
    check_size,
    invalid,
    shared_region,
)
from tutti.repository.config import ModelConfig, TensorSpec


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


@dataclass(frozen=True, slots=True, eq=False)
class Header:
    """A parsed JSON header of which every tensor is binary: all of a request but its data. Its requests' signature.

    `heads` are (name, datatype, shape, bytes) in the order of the data.
    """

    heads: tuple[tuple[str, str, Shape, int], ...]
    outputs: tuple[str, ...]
    parameters: Parameters
    classes: Mapping[str, int]
    reply: ReplyFormat
    data_size: int

    def request(self, name: str, version: str, data: memoryview) -> InferRequest:
        """The request with `data_size` bytes of data; tensors are views of them."""
        inputs = {}
        at = 0
        for tensor_name, datatype, shape, size in self.heads:
            inputs[tensor_name] = Tensor(tensor_name, datatype, shape, data[at : at + size])
            at += size
        return InferRequest(
            name, inputs, version, "", self.outputs, dict(self.parameters), self.classes, _NOTHING_SHARED, self
        )


_NOTHING_SHARED: dict[str, SharedRegion] = {}


class HeaderCache:
    """Headers that were parsed before. Clients repeat theirs byte for byte, unless they send ids or JSON data."""

    MAX_HEADERS = 1024
    # Longer ones are read each time: what is kept must not be a client's to fill.
    MAX_HEADER_BYTES = 8192

    def __init__(self) -> None:
        self._known: dict[bytes, Header] = {}
        # The last one that was found: to compare costs less than to look up, and most follow their like.
        self._last: tuple[bytes, Header | None] = b"", None

    def find(self, body: Raw, length: int) -> Header | None:
        """The header in the first `length` bytes of a body, where it is known and the body has the rest of it."""
        last_text, header = self._last
        if length != len(last_text) or type(body) is not bytes or not body.startswith(last_text):
            text = bytes(body[:length])
            header = self._known.get(text)
            if header is not None:
                self._last = text, header
        return header if header is not None and header.data_size == len(body) - length else None

    def remember(self, header: bytes, request: InferRequest, reply: ReplyFormat) -> None:
        """Keep the header of a request that decoded, if another one may have the same."""
        tensors = request.inputs.values()
        if len(header) > self.MAX_HEADER_BYTES or request.id or request.shared_outputs:
            return
        if any(type(tensor.data) is not memoryview for tensor in tensors):
            return  # only a request's own binary data is a view of it
        if len(self._known) >= self.MAX_HEADERS:
            self._known.clear()
        heads = tuple((t.name, t.datatype, t.shape, len(t.raw())) for t in tensors)
        size = sum(head[3] for head in heads)
        self._known[header] = Header(heads, request.outputs, dict(request.parameters), request.classes, reply, size)


def decode(
    name: str,
    version: str,
    body: Raw,
    header_length: int | None,
    cache: HeaderCache | None = None,
    regions: Regions = NO_REGIONS,
) -> tuple[InferRequest, ReplyFormat]:
    """A request body with a JSON header of `header_length` bytes, or all JSON for None.

    Raises InvalidArgument naming the model and the tensor.
    """
    known = cache.find(body, header_length) if cache is not None and header_length is not None else None
    view = memoryview(body)
    if known is not None:
        return known.request(name, version, view[header_length:]), known.reply
    if header_length is None:
        return _decode(name, version, view, view[:0], regions)
    if header_length > len(view):
        raise invalid(name, f"Inference-Header-Content-Length is {header_length}, the body has {len(view)} bytes")
    data = view[header_length:]
    if cache is None:
        return _decode(name, version, view[:header_length], data, regions)
    header = bytes(view[:header_length])
    request, reply = _decode(name, version, memoryview(header), data, regions)
    cache.remember(header, request, reply)
    return request, reply


def _decode(
    name: str, version: str, text: memoryview, data: memoryview, regions: Regions
) -> tuple[InferRequest, ReplyFormat]:
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


def decode_raw(config: ModelConfig, version: str, body: Raw) -> InferRequest:
    """A whole body that is the model's one input. Its one variable dimension, if any, follows from the size."""
    if len(config.inputs) != 1:
        raise InvalidArgument(
            "Raw request must only have 1 input (found 1) to be deduced but got "
            f"{len(config.inputs)} inputs in '{config.name}' model configuration"
        )
    spec = config.inputs[0]
    if spec.datatype == "BYTES":
        if spec.dims != (1,):
            raise InvalidArgument(
                f"For BYTE datatype raw input '{spec.name}', the model must have input shape [1]: model "
                f"'{config.name}' has {list(spec.dims)}"
            )
        shape: Shape = (1,)
        element = np.empty(shape, dtype=object)
        element[0] = bytes(body)
        tensor = Tensor(spec.name, "BYTES", shape, element)
    else:
        shape = _raw_shape(config, spec, len(body), dtypes.NUMPY[spec.datatype].itemsize)
        tensor = Tensor(spec.name, spec.datatype, shape, body)
    if config.is_batched:
        tensor = Tensor(spec.name, spec.datatype, (1, *tensor.shape), _with_row(tensor))
    return InferRequest(config.name, {spec.name: tensor}, version)


def encode(
    response: InferResponse, request_id: str, reply: ReplyFormat, shared: Collection[str] = ()
) -> tuple[int | None, list[Raw]]:
    """(header length, the body's pieces); the length is None when the body is all JSON.

    Outputs in `shared` are in shared memory already. Raises InvalidArgument for a datatype that JSON cannot carry.
    """
    if not request_id and not shared and not response.parameters and reply.all_binary(response.outputs):
        raws = [tensor.raw() for tensor in response.outputs]
        described = tuple([(t.name, t.datatype, t.shape, len(r)) for t, r in zip(response.outputs, raws, strict=True)])
        header = _binary_header(response.model_name, response.model_version, b"", described)
        return (len(header) if any(raws) else None), [header, *raws]
    outputs, binaries = [], []
    for tensor in response.outputs:
        if tensor.name in shared:
            entry = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
            outputs.append(orjson.dumps(entry))  # and nothing else: clients take any parameters for those of data
        elif reply.is_binary(tensor.name):
            raw = tensor.raw()
            binaries.append(raw)
            outputs.append(_binary_output(tensor.name, tensor.datatype, tensor.shape, len(raw)))
        else:
            outputs.append(_json_output(response.model_name, tensor))
    parameters = orjson.dumps(response.parameters) if response.parameters else b""
    head = _response_head(response.model_name, response.model_version, parameters)
    shown_id = b'"id":%s,' % orjson.dumps(request_id) if request_id else b""
    header = b'%s%s"outputs":[%s]}' % (head, shown_id, b",".join(outputs))
    if not any(binaries):
        return None, [header]
    return len(header), [header, *binaries]


def part_header(response: InferResponse, reply: ReplyFormat) -> tuple[bytes, int] | None:
    """The JSON header of a part of a batch whose outputs all go as binary, and their bytes; None for other responses.

    What batch-mates have in common is made once.
    """
    columns = response.columns
    if columns is None:
        return None
    start, stop = response.start, response.stop
    parameters = orjson.dumps(response.parameters) if response.parameters else b""
    key = (reply, stop - start, parameters)
    header: tuple[bytes, int] | None
    if key in columns.memo:
        header = columns.memo[key]
        return header
    outputs = columns.part(start, stop)
    described = tuple([(t.name, t.datatype, t.shape, len(t.raw())) for t in outputs])
    size = sum(item[3] for item in described)
    header = None
    if size and reply.all_binary(outputs):
        header = _binary_header(response.model_name, response.model_version, parameters, described), size
    columns.memo[key] = header
    return header


# Responses of one model repeat all but their data: what does not change is serialized once.


@lru_cache(maxsize=1024)
def _response_head(model: str, version: str, parameters: bytes) -> bytes:
    head = orjson.dumps({"model_name": model, "model_version": version})[:-1] + b","
    return head + b'"parameters":%s,' % parameters if parameters else head


@lru_cache(maxsize=4096)
def _binary_header(
    model: str, version: str, parameters: bytes, outputs: tuple[tuple[str, str, Shape, int], ...]
) -> bytes:
    """The JSON header of a response without id whose outputs are all binary; `parameters` are JSON."""
    shown = b",".join([_binary_output(*output) for output in outputs])
    return b'%s"outputs":[%s]}' % (_response_head(model, version, parameters), shown)


@lru_cache(maxsize=4096)
def _binary_output(name: str, datatype: str, shape: Shape, size: int) -> bytes:
    parameters = {"binary_data_size": size}
    return orjson.dumps({"name": name, "datatype": datatype, "shape": shape, "parameters": parameters})


def _json_output(model: str, tensor: Tensor) -> bytes:
    data = _json_data(model, tensor)
    entry = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape, "data": data}
    if is_not_finite(data):  # orjson would write null
        return json.dumps({**entry, "data": data.tolist()}).encode()
    return orjson.dumps(entry, option=orjson.OPT_SERIALIZE_NUMPY)


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


def _inputs(
    model: str, header: Mapping[str, Any], binary: memoryview, regions: Regions
) -> tuple[dict[str, Tensor], int]:
    """The tensors, and how many bytes of `binary` they used."""
    inputs: dict[str, Tensor] = {}
    at = 0
    for item in _list(model, header, "inputs"):
        name = item.get("name")
        if not isinstance(name, str):
            raise invalid(model, "an input has no 'name'")
        if name in inputs:
            raise invalid(model, f"input '{name}' already exists in request: it is given more than once")
        datatype = item.get("datatype")
        if not isinstance(datatype, str) or datatype not in dtypes.NUMPY:
            raise invalid(
                model,
                f"invalid datatype for input {name}: 'datatype': expected one of {', '.join(dtypes.NUMPY)}, "
                f"got {shown(datatype)}",
            )
        shape = _shape(model, name, item.get("shape"))
        given = _object(model, item, "parameters")
        size = given.get("binary_data_size")
        region = shared_region(model, f"input '{name}'", given)
        if (size is not None) + ("data" in item) + (region is not None) != 1:
            raise invalid(
                model, f"input '{name}': expected one of 'data', 'binary_data_size' and 'shared_memory_region'"
            )
        if region is not None:
            inputs[name] = Tensor(name, datatype, shape, regions.read(region))
            check_size(model, inputs[name], region.byte_size)
            continue
        if size is None:
            if not isinstance(item["data"], list):
                raise invalid(model, f"input '{name}': 'data': expected an array, got {shown(item['data'])}")
            inputs[name] = Tensor(name, datatype, shape, from_json(model, name, datatype, shape, item["data"]))
            continue
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise invalid(model, f"input '{name}': 'binary_data_size': expected a whole number, got {size!r}")
        if at + size > len(binary):
            more = f"unexpected size for input '{name}', expecting {at + size - len(binary)} additional bytes"
            raise invalid(
                model,
                f"{more}: input '{name}': expected {size} bytes of binary data, only {len(binary) - at} are left",
            )
        inputs[name] = Tensor(name, datatype, shape, binary[at : at + size])
        check_size(model, inputs[name], size)
        at += size
    return inputs, at


def _shape(model: str, name: str, value: Any) -> Shape:
    if not isinstance(value, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in value):
        raise invalid(model, f"input '{name}': 'shape': expected an array of whole numbers, got {shown(value)}")
    shape = tuple(value)
    if min(shape, default=0) < 0:
        what = "Unable to parse 'shape': attempt to access JSON non-unsigned-integer as unsigned-integer"
        raise invalid(model, f"input '{name}': {what}: expected sizes of 0 or more, got {value[:40]}")
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
    items = _list(model, header, "outputs")
    if not items:
        return (), {}, {}, BINARY_REPLY if default else JSON_REPLY
    if len(items) > MAX_OUTPUTS:
        raise invalid(model, f"at most {MAX_OUTPUTS} outputs can be asked for, got {len(items)}")
    names: list[str] = []
    binary: dict[str, bool] = {}
    classes = {}
    shared = {}
    for item in items:
        name = item.get("name")
        if not isinstance(name, str):
            raise invalid(model, "an output has no 'name'")
        if name in binary:
            continue  # once is enough
        wanted = _object(model, item, "parameters")
        for key, value in wanted.items():
            if key == "classification":
                if value != 0:  # none wanted
                    classes[name] = check_classes(model, name, value)
            elif key != "binary_data" and not key.startswith("shared_memory_"):
                raise Unsupported(f"model '{model}': output '{name}': parameter '{key}' is not supported")
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


def _raw_shape(config: ModelConfig, spec: TensorSpec, size: int, item_size: int) -> Shape:
    dims = spec.dims
    known = math.prod(dim for dim in dims if dim != -1) * item_size
    variable = dims.count(-1)
    if variable > 1:
        raise InvalidArgument(
            f"The shape of the raw input '{spec.name}' can not be deduced because there are more than one "
            f"variable-sized dimension: model '{config.name}' has {list(dims)}"
        )
    if size % known or (not variable and size != known):
        raise invalid(config.name, f"a raw request of {size} bytes does not fit input dims {list(dims)}")
    return tuple(size // known if dim == -1 else dim for dim in dims)


def _with_row(tensor: Tensor) -> Any:
    return tensor.data[np.newaxis] if isinstance(tensor.data, np.ndarray) else tensor.data


def _json_data(model: str, tensor: Tensor) -> Any:
    if tensor.datatype in ("FP16", "BF16"):
        what = f"sending {tensor.datatype} data via JSON is not supported. Please use the binary data format for output"
        raise invalid(model, f"{what} '{tensor.name}'")
    array = tensor.array().reshape(-1)
    if tensor.datatype == "BYTES":
        return texts(model, tensor.name, array.tolist())
    return np.ascontiguousarray(array)
