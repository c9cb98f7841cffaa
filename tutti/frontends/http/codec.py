"""Bodies of infer requests and responses over HTTP: JSON headers with binary tensors behind them, and raw ones. Pure.

Clients repeat their JSON header byte for byte, and a model's answers are alike but for their data: what repeats is
read, or written, once. What the JSON of a request says is v2/json_request.py's. Sizes and positions are bytes.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import orjson

from tutti.core import dtypes
from tutti.core.errors import InvalidArgument
from tutti.core.types import InferRequest, InferResponse, Parameters, Raw, Shape, SharedRegion, Tensor
from tutti.frontends.v2 import json_request
from tutti.frontends.v2.json_request import ReplyFormat
from tutti.frontends.v2.json_values import is_not_finite, texts
from tutti.frontends.v2.rules import NO_REGIONS, Regions, invalid
from tutti.repository.model_config import ModelConfig, TensorSpec


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
        start = 0
        for tensor_name, datatype, shape, size in self.heads:
            inputs[tensor_name] = Tensor(tensor_name, datatype, shape, data[start : start + size])
            start += size
        return InferRequest(
            name, inputs, version, "", self.outputs, dict(self.parameters), self.classes, _NOTHING_SHARED, self
        )


_NOTHING_SHARED: dict[str, SharedRegion] = {}


class HeaderCache:
    """Headers that were parsed before. Clients repeat theirs byte for byte, unless they send ids or JSON data."""

    MAX_HEADERS = 1024
    # Longer headers are not kept: a client must not fill the memory.
    MAX_HEADER_BYTES = 8192

    def __init__(self) -> None:
        self._known: dict[bytes, Header] = {}
        # The last header that was found: most requests are like the one before, and comparing is cheaper than hashing.
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
        return json_request.decode(name, version, view, view[:0], regions)
    if header_length > len(view):
        raise invalid(name, f"Inference-Header-Content-Length is {header_length}, the body has {len(view)} bytes")
    data = view[header_length:]
    if cache is None:
        return json_request.decode(name, version, view[:header_length], data, regions)
    header = bytes(view[:header_length])
    request, reply = json_request.decode(name, version, memoryview(header), data, regions)
    cache.remember(header, request, reply)
    return request, reply


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
            outputs.append(orjson.dumps(entry))  # no parameters: clients take any for a sign of data
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
    size = sum(output[3] for output in described)
    header = None
    if size and reply.all_binary(outputs):
        header = _binary_header(response.model_name, response.model_version, parameters, described), size
    columns.memo[key] = header
    return header


# Responses of one model differ only in their data: all else is serialized once.


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
        why = f"sending {tensor.datatype} data via JSON is not supported. Please use the binary data format for output"
        raise invalid(model, f"{why} '{tensor.name}'")
    array = tensor.array().reshape(-1)
    if tensor.datatype == "BYTES":
        return texts(model, tensor.name, array.tolist())
    return np.ascontiguousarray(array)
