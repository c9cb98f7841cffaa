"""The KServe v2 infer request and response over HTTP: JSON, binary tensors and raw bodies. Pure.

Sizes and positions are bytes. Rules follow Triton's binary tensor data extension.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import orjson

from tutti.core import dtypes
from tutti.core.errors import InvalidArgument, Unsupported
from tutti.core.types import InferRequest, InferResponse, Parameters, Raw, Shape, SharedRegion, Tensor
from tutti.repository.config import ModelConfig, TensorSpec

MAX_DIMENSIONS = 32
MAX_ELEMENTS = 2**40
# Of arrays in 'data', whatever the tensor's rank: Triton reads as many.
MAX_NESTING = 100
MAX_OUTPUTS = 1024
# Of one request's JSON.
MAX_CONTAINERS = 2**20
MAX_VALUES = 2**22
_UNCOUNTED_JSON_BYTES = 64 * 1024
_COUNTED_AT_ONCE = 1024 * 1024
_BOM = b"\xef\xbb\xbf"
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# Numbers of so many digits may not fit 64 bits: orjson reads those that do not as floats.
_LONG_NUMBER = re.compile(rb"[:\s](-?[0-9]{19,})\s*[,}]")


class Regions(Protocol):
    """Clients' registered shared memory. Methods raise InferErrors."""

    def read(self, region: SharedRegion) -> bytes | bytearray: ...

    def check(self, region: SharedRegion) -> None:
        """Whether something may be written there."""


class NoRegions:
    """Where there is no shared memory."""

    def read(self, region: SharedRegion) -> bytes:
        raise Unsupported(f"shared memory region '{region.name}': shared memory is off")

    def check(self, region: SharedRegion) -> None:
        self.read(region)


NO_REGIONS = NoRegions()


@dataclass(frozen=True, slots=True, eq=False)
class ReplyFormat:
    """Which outputs go as binary: those named in `binary`, by default the others as `default_is_binary` says."""

    default_is_binary: bool = False
    binary: Mapping[str, bool] = field(default_factory=dict)

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
        raise _bad(name, f"Inference-Header-Content-Length is {header_length}, the body has {len(view)} bytes")
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
        raise _bad(name, f"the request's JSON does not parse: {error}") from None
    if not isinstance(header, dict):
        raise _bad(name, "the request's JSON: expected an object")
    inputs, used = _inputs(name, header, data, regions)
    if used != len(data):
        raise _bad(
            name,
            f"unexpected additional input data for model '{name}': {len(data) - used} bytes of binary data are left "
            "over after the last input",
        )
    parameters = _object(name, header, "parameters")
    outputs, classes, shared, reply = _outputs(name, header, parameters, regions)
    check_parameters(name, parameters, text, allows_end=False)
    request_id = header.get("id", "")
    if not isinstance(request_id, str):
        raise _bad(name, "'id': expected a string")
    return InferRequest(name, inputs, version, request_id, outputs, parameters, classes, shared), reply


def parse_json(text: Raw) -> Any:
    """JSON, with NaN, Infinity and -Infinity for numbers, which Triton and its clients write. Raises ValueError."""
    if len(text) > _UNCOUNTED_JSON_BYTES:
        _check_values(text)
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        plain = bytes(text).removeprefix(_BOM)
        if b"NaN" in plain or b"Infinity" in plain:
            return _parse_not_finite(plain)
        if len(plain) == len(text):
            raise
        return orjson.loads(plain)


def _check_values(text: Raw) -> None:
    """Before it is parsed: each value takes up to forty times its text. Raises ValueError."""
    containers = values = 0
    for at in range(0, len(text), _COUNTED_AT_ONCE):
        piece = bytes(text[at : at + _COUNTED_AT_ONCE])
        containers += piece.count(b"[") + piece.count(b"{")
        values += piece.count(b",")
    if containers > MAX_CONTAINERS or values > MAX_VALUES:
        limits = f"{MAX_CONTAINERS} arrays and objects, or {MAX_VALUES} values"
        raise ValueError(f"it has more than {limits}: send tensors as binary data")


def _parse_not_finite(text: bytes) -> Any:
    """By Python's parser, which is laxer: its text may hold halves of surrogate pairs, which no encoding carries."""
    try:
        value = json.loads(text.decode())
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if _ESCAPED_SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text has half of a surrogate pair") from None
    return value


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


# How long a client waits: gRPC's header, which HTTP gateways pass on under its name, and Envoy's, in milliseconds.
TIMEOUT_HEADERS = frozenset({b"grpc-timeout", b"x-envoy-expected-rq-timeout-ms"})
_UNIT_NS = {b"H": 3600 * 10**9, b"M": 60 * 10**9, b"S": 10**9, b"m": 10**6, b"u": 1000, b"n": 1}


def timeout_ns(header: bytes, value: bytes) -> int:
    """What one of TIMEOUT_HEADERS says, at least 1. Raises InvalidArgument."""
    is_grpc = header == b"grpc-timeout"
    digits, unit_ns = (value[:-1], _UNIT_NS.get(value[-1:], 0)) if is_grpc else (value, 10**6)
    if not unit_ns or not digits.isdigit() or len(digits) > 8:
        expected = "at most 8 digits and a unit, one of HMSmun" if is_grpc else "at most 8 digits, milliseconds"
        raise InvalidArgument(f"header {header.decode()}: expected {expected}, got {value[:40].decode('latin-1')!r}")
    return max(1, int(digits) * unit_ns)


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


def is_not_finite(data: Any) -> bool:
    """Whether numbers are among `data` that plain JSON has no word for."""
    return isinstance(data, np.ndarray) and data.dtype.kind == "f" and not np.isfinite(data).all()


def _bad(model: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"model '{model}': {why}")


def _object(model: str, parent: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = parent.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _bad(model, f"'{key}': expected an object")
    return value


def _list(model: str, parent: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    value = parent.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise _bad(model, f"'{key}': expected an array of objects")
    return value


_WANTS_END = "triton_enable_empty_final_response"


def check_parameters(model: str, parameters: Mapping[str, Any], text: Raw = b"", allows_end: bool = True) -> None:
    """A request's parameters are numbers, text or booleans, under names that are not the server's own.

    `text` is the JSON that they come from, which tells a whole number of more than 64 bits from a large float. With
    `allows_end` one of Triton's own names may be there, which asks a stream to tell its end. Raises InvalidArgument.
    """
    for key, value in parameters.items():
        if key.startswith("triton_") and not (allows_end and key == _WANTS_END):
            only = f"Only the following keys starting with 'triton_' are allowed: {_WANTS_END}; " if allows_end else ""
            raise _bad(
                model,
                "parameter keys starting with 'triton_' are reserved for Triton usage and should not be specified. "
                f"{only}got '{key}'",
            )
        if not isinstance(value, bool | int | float | str):
            raise _bad(
                model,
                f"parameter '{key}' has invalid type. It should be either 'int', 'bool', or 'string', or a number",
            )
        if type(value) is int and not -(2**63) <= value < 2**64:
            raise _bad(model, f"parameter '{key}': {value} does not fit 64 bits")
        if type(value) is float:
            _check_float(model, key, value, text)
        if key in _OF_THE_SERVER:
            _check_own(model, key, value)


# Parameters that say something to the server itself: what they are, since another type would be passed over.
_OF_THE_SERVER: dict[str, tuple[tuple[type, ...], str]] = {
    "priority": ((int,), "a whole number of 0 or more"),
    "timeout": ((int,), "a whole number of microseconds"),
    "sequence_id": ((int, str), "a whole number or text"),
    "sequence_start": ((bool,), "true or false"),
    "sequence_end": ((bool,), "true or false"),
}


def _check_own(model: str, key: str, value: Any) -> None:
    types, expected = _OF_THE_SERVER[key]
    if type(value) not in types or (key == "priority" and value < 0):
        raise _bad(model, f"invalid value type for '{key}' parameter, expected {expected}, got {value!r:.100}")


def _check_float(model: str, key: str, value: float, text: Raw) -> None:
    if not math.isfinite(value):
        raise _bad(model, f"parameter '{key}': expected a finite number, got {value}")
    if abs(value) >= 2**63 and any(float(number) == value for number in _LONG_NUMBER.findall(text)):
        raise _bad(model, f"parameter '{key}': {int(value)} does not fit 64 bits")


def shared_region(model: str, what: str, parameters: Mapping[str, Any]) -> SharedRegion | None:
    """The shared memory that a tensor's parameters name, if they name any. Raises InvalidArgument."""
    name = parameters.get("shared_memory_region")
    if name is None:
        return None
    size, offset = parameters.get("shared_memory_byte_size"), parameters.get("shared_memory_offset", 0)
    if not isinstance(name, str):
        raise _bad(model, f"{what}: 'shared_memory_region': expected a name")
    for key, value in (("shared_memory_byte_size", size), ("shared_memory_offset", offset)):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**62:
            raise _bad(model, f"{what}: '{key}': expected a whole number, got {value!r}")
    assert isinstance(size, int) and isinstance(offset, int)
    return SharedRegion(name, offset, size)


def _inputs(
    model: str, header: Mapping[str, Any], binary: memoryview, regions: Regions
) -> tuple[dict[str, Tensor], int]:
    """The tensors, and how many bytes of `binary` they used."""
    inputs: dict[str, Tensor] = {}
    at = 0
    for item in _list(model, header, "inputs"):
        name = item.get("name")
        if not isinstance(name, str):
            raise _bad(model, "an input has no 'name'")
        if name in inputs:
            raise _bad(model, f"input '{name}' already exists in request: it is given more than once")
        datatype = item.get("datatype")
        if not isinstance(datatype, str) or datatype not in dtypes.NUMPY:
            raise _bad(
                model,
                f"invalid datatype for input {name}: 'datatype': expected one of {', '.join(dtypes.NUMPY)}, "
                f"got {datatype!r}",
            )
        shape = _shape(model, name, item.get("shape"))
        given = _object(model, item, "parameters")
        size = given.get("binary_data_size")
        region = shared_region(model, f"input '{name}'", given)
        if (size is not None) + ("data" in item) + (region is not None) != 1:
            raise _bad(model, f"input '{name}': expected one of 'data', 'binary_data_size' and 'shared_memory_region'")
        if region is not None:
            inputs[name] = Tensor(name, datatype, shape, regions.read(region))
            check_size(model, inputs[name], region.byte_size)
            continue
        if size is None:
            if not isinstance(item["data"], list):
                raise _bad(model, f"input '{name}': 'data': expected an array, got {str(item['data'])[:40]!r}")
            inputs[name] = Tensor(name, datatype, shape, from_json(model, name, datatype, shape, item["data"]))
            continue
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise _bad(model, f"input '{name}': 'binary_data_size': expected a whole number, got {size!r}")
        if at + size > len(binary):
            more = f"unexpected size for input '{name}', expecting {at + size - len(binary)} additional bytes"
            raise _bad(
                model,
                f"{more}: input '{name}': expected {size} bytes of binary data, only {len(binary) - at} are left",
            )
        inputs[name] = Tensor(name, datatype, shape, binary[at : at + size])
        check_size(model, inputs[name], size)
        at += size
    return inputs, at


def check_size(model: str, tensor: Tensor, size: int) -> None:
    """Raise InvalidArgument unless `size` bytes are what the tensor's shape and datatype take."""
    if tensor.datatype == "BYTES":
        return
    expected = math.prod(tensor.shape) * dtypes.NUMPY[tensor.datatype].itemsize
    if size != expected:
        shape = f"{tensor.datatype}{list(tensor.shape)}"
        raise InvalidArgument(
            f"input byte size mismatch for input '{tensor.name}' for model '{model}'. Expected {expected}, got {size}: "
            f"expected {expected} bytes for {shape}"
        )


def check_shape(model: str, name: str, shape: Shape) -> None:
    """Raise InvalidArgument for negative, too many or too large dimensions."""
    # Zeros do not count: numpy multiplies the others.
    product = math.prod(shape) if 0 not in shape else math.prod(size or 1 for size in shape)
    if product > MAX_ELEMENTS and min(shape) >= 0:
        most = f"causes total element count to exceed maximum size of {MAX_ELEMENTS}"
        raise _bad(model, f"input '{name}': 'shape' {list(shape)[:40]} {most}")
    if len(shape) > MAX_DIMENSIONS or min(shape, default=0) < 0 or product > MAX_ELEMENTS:
        limits = f"at most {MAX_DIMENSIONS} sizes of 0 or more with a product of at most {MAX_ELEMENTS}"
        raise _bad(model, f"input '{name}': 'shape': expected {limits}, got {list(shape)[:40]}")


def _shape(model: str, name: str, value: Any) -> Shape:
    if not isinstance(value, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in value):
        raise _bad(model, f"input '{name}': 'shape': expected an array of whole numbers, got {str(value)[:100]}")
    shape = tuple(value)
    if min(shape, default=0) < 0:
        what = "Unable to parse 'shape': attempt to access JSON non-unsigned-integer as unsigned-integer"
        raise _bad(model, f"input '{name}': {what}: expected sizes of 0 or more, got {value[:40]}")
    check_shape(model, name, shape)
    return shape


def from_json(model: str, name: str, datatype: str, shape: Shape, data: Any) -> Any:
    """The numpy array of a JSON value. Raises InvalidArgument."""
    flat: list[Any] = []
    if not _flatten(data if isinstance(data, list) else [data], flat, MAX_NESTING):
        what = f"JSON nesting depth exceeds maximum allowed limit ({MAX_NESTING})"
        raise _bad(model, f"input '{name}': {what}: 'data' is nested more than that")
    if len(flat) != math.prod(shape):
        raise _bad(
            model,
            f"input '{name}': Unable to parse 'data': Shape does not match true shape of 'data' field: expected "
            f"{math.prod(shape)} elements for shape {list(shape)}, got {len(flat)}",
        )
    if datatype in ("FP16", "BF16") and flat:
        what = (
            f"receiving {datatype} data via JSON is not supported. Please use the binary data format for input {name}"
        )
        raise _bad(model, f"{what}: its data must be binary")
    if datatype == "BYTES":
        return _text_array(model, name, flat).reshape(shape)
    allowed = {"b": (bool,), "i": (int,), "u": (int,), "f": (int, float)}[dtypes.NUMPY[datatype].kind]
    if not set(map(type, flat)) <= set(allowed):
        for element in [element for element in flat if type(element) not in allowed][:1]:
            raise _bad(
                model,
                f"input '{name}': Unable to parse 'data': attempt to access JSON {_accessed(datatype)}: expected "
                f"{datatype} elements, got {str(element)[:40]!r}",
            )
    try:
        with np.errstate(over="ignore"):  # what is too large for a float is infinite
            return np.array(flat, dtype=dtypes.NUMPY[datatype]).reshape(shape)
    except OverflowError:
        raise _bad(model, f"input '{name}': an element does not fit {datatype}") from None


def _accessed(datatype: str) -> str:
    """What Triton's reader calls an element that is of another type than a datatype's."""
    kinds = {
        "b": "non-boolean as boolean", "i": "non-signed-integer as signed-integer",
        "u": "non-unsigned-integer as unsigned-integer", "f": "non-number as double", "O": "non-string as string",
    }  # fmt: skip
    return kinds[dtypes.NUMPY[datatype].kind]


def _flatten(value: list[Any], flat: list[Any], depth: int) -> bool:
    """Append the elements to `flat`; False when they lie deeper than `depth`."""
    for item in value:
        if not isinstance(item, list):
            flat.append(item)
        elif not depth or not _flatten(item, flat, depth - 1):
            return False
    return True


def _text_array(model: str, name: str, flat: list[Any]) -> Any:
    if not all(isinstance(element, str) for element in flat):
        raise _bad(
            model,
            f"input '{name}': Unable to parse JSON bytes array: attempt to access JSON {_accessed('BYTES')}: expected "
            "BYTES elements as strings",
        )
    array = np.empty(len(flat), dtype=object)
    array[:] = [element.encode() for element in flat]
    return array


def _outputs(
    model: str, header: Mapping[str, Any], parameters: dict[str, Any], regions: Regions
) -> tuple[tuple[str, ...], dict[str, int], dict[str, SharedRegion], ReplyFormat]:
    """Names asked for, once each, classes wanted of them, where they go in shared memory, and their form.

    Takes the wire-only `binary_data_output` out of the parameters.
    """
    default = parameters.pop("binary_data_output", False)
    if not isinstance(default, bool):
        raise _bad(model, f"'binary_data_output': expected true or false, got {default!r}")
    items = _list(model, header, "outputs")
    if not items:
        return (), {}, {}, BINARY_REPLY if default else JSON_REPLY
    if len(items) > MAX_OUTPUTS:
        raise _bad(model, f"at most {MAX_OUTPUTS} outputs can be asked for, got {len(items)}")
    names: list[str] = []
    binary: dict[str, bool] = {}
    classes = {}
    shared = {}
    for item in items:
        name = item.get("name")
        if not isinstance(name, str):
            raise _bad(model, "an output has no 'name'")
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
            raise _bad(model, f"output '{name}': 'binary_data': expected true or false, got {is_binary!r:.100}")
        binary[name] = is_binary
    return tuple(names), classes, shared, ReplyFormat(default, binary)


def check_classes(model: str, name: str, value: Any) -> int:
    """The `classification` parameter of an output. Raises InvalidArgument unless it is a whole number of 1 or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _bad(model, f"output '{name}': 'classification': expected a whole number of 1 or more, got {value!r}")
    return value


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
        raise _bad(config.name, f"a raw request of {size} bytes does not fit input dims {list(dims)}")
    return tuple(size // known if dim == -1 else dim for dim in dims)


def _with_row(tensor: Tensor) -> Any:
    return tensor.data[np.newaxis] if isinstance(tensor.data, np.ndarray) else tensor.data


def _json_data(model: str, tensor: Tensor) -> Any:
    if tensor.datatype in ("FP16", "BF16"):
        what = f"sending {tensor.datatype} data via JSON is not supported. Please use the binary data format for output"
        raise _bad(model, f"{what} '{tensor.name}'")
    array = tensor.array().reshape(-1)
    if tensor.datatype == "BYTES":
        return texts(model, tensor.name, array.tolist())
    return np.ascontiguousarray(array)


def texts(model: str, name: str, elements: Iterable[Any]) -> list[str]:
    """BYTES elements as JSON has them. Raises InvalidArgument for what is no UTF-8: other bytes would come out."""
    found = []
    for element in elements:
        try:
            found.append(element.decode() if isinstance(element, bytes) else str(element))
        except UnicodeDecodeError as error:
            what = f"element {len(found)} is no UTF-8, and JSON cannot carry it: ask for binary data ({error})"
            raise _bad(model, f"output '{name}': {what}") from None
    return found
