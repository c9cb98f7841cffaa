"""ModelInfer messages: protobuf in and out. Pure."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from tutti.core import dtypes
from tutti.core.errors import InvalidArgument, Unsupported
from tutti.core.types import Columns, InferRequest, InferResponse, Parameters, Raw, Shape, SharedRegion, Tensor
from tutti.frontends.v2 import rules
from tutti.frontends.v2.rules import NO_REGIONS, Regions

# Where typed `contents` hold each datatype. FP16 and BF16 travel raw only.
_CONTENTS = {
    "BOOL": "bool_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
# ModelInferResponse.raw_output_contents is field 6, length-delimited; id is field 3.
_RAW_TAG = b"\x32"
# ModelInferRequest.raw_input_contents is field 7.
_RAW_INPUT_TAG = b"\x3a"
_ID_TAG = b"\x1a"
LARGE_MESSAGE_BYTES = 16 * 1024
# A message with more fields is left to protobuf, which reads many fields faster than Python does.
MAX_FIELDS = 256


def decode(payload: bytes, regions: Regions = NO_REGIONS) -> InferRequest:
    """A serialized ModelInferRequest. Raises InvalidArgument naming the model and the tensor."""
    # Large tensors are taken out first: protobuf would copy them twice.
    head, views = _take_raw_inputs(payload) if len(payload) >= LARGE_MESSAGE_BYTES else (payload, None)
    try:
        message = pb.ModelInferRequest.FromString(head)
    except Exception:
        raise InvalidArgument("the request is not a ModelInferRequest message") from None
    model = message.model_name
    raw = message.raw_input_contents if views is None else views
    inputs: dict[str, Tensor] = {}
    used = 0
    for item in message.inputs:
        name, datatype = item.name, item.datatype
        shape = tuple(item.shape)
        if name in inputs:
            raise _bad(model, f"input '{name}' already exists in request: it is given more than once")
        if datatype not in dtypes.NUMPY:
            raise _bad(model, f"input '{name}': expected a datatype of {', '.join(dtypes.NUMPY)}, got '{datatype}'")
        rules.check_shape(model, name, shape)
        if item.parameters:  # the rare case: a tensor's only parameters are those of shared memory
            inputs[name] = _shared(model, item, shape, regions)
        elif not raw:
            inputs[name] = Tensor(name, datatype, shape, _typed(model, name, datatype, shape, item.contents))
        else:
            if item.HasField("contents"):
                raise _bad(model, f"input '{name}': both contents and raw_input_contents are given")
            if used < len(raw):
                inputs[name] = tensor = Tensor(name, datatype, shape, raw[used])
                rules.check_size(model, tensor, len(raw[used]))
            used += 1
    if raw and used != len(raw):
        raise _bad(model, f"expected {used} raw_input_contents, one per input, got {len(raw)}")
    outputs, classes, shared_outputs = _outputs(model, message, regions)
    parameters = _parameters(message.parameters)
    if parameters:
        rules.check_parameters(model, parameters)
    return InferRequest(model, inputs, message.model_version, message.id, outputs, parameters, classes, shared_outputs)


def target(payload: bytes) -> tuple[str, str]:
    """(model, version) of a request that may not decode; nothing where it does not say."""
    return named(payload)[:2]


def named(payload: bytes) -> tuple[str, str, str]:
    """(model, version, id) of a request that may be wrong in any way; nothing where it does not say.

    Quick, however large its tensors are: they are not copied.
    """
    try:
        message = pb.ModelInferRequest.FromString(_take_raw_inputs(payload)[0])
    except Exception:
        return "", "", ""
    return message.model_name, message.model_version, message.id


def _take_raw_inputs(payload: bytes) -> tuple[bytes, list[memoryview] | None]:
    """The message without its raw inputs, and these as views of it; (payload, None) when it cannot be told apart."""
    view = memoryview(payload)
    kept: list[Raw] = []
    inputs = []
    end = 0
    try:
        while end < len(payload):
            start = end
            tag, end = _read_varint(payload, end)
            kind = tag & 7
            if kind == 0:
                _, end = _read_varint(payload, end)
            elif kind == 1:
                end += 8
            elif kind == 5:
                end += 4
            elif kind == 2:
                size, end = _read_varint(payload, end)
                end += size
                if tag == _RAW_INPUT_TAG[0] and end <= len(payload):
                    inputs.append(view[end - size : end])
                    continue
            else:
                return payload, None
            if len(kept) > MAX_FIELDS:
                return payload, None
            kept.append(view[start:end])
    except IndexError:
        return payload, None
    if end != len(payload):
        return payload, None
    return b"".join(kept), inputs


def _read_varint(data: bytes, offset: int) -> tuple[int, int]:
    """(value, where it ends). Raises IndexError when it does not end."""
    value = shift = 0
    while True:
        byte = data[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset
        shift += 7
        if shift > 63:
            raise IndexError("a varint has at most ten bytes")


@dataclass(frozen=True, slots=True, eq=False)
class Template:
    """All of a serialized request but its data, which is at the message's end. Its requests' signature.

    `fixed` are (offset, bytes) that a message must have to be of this form, `heads` (name, datatype, shape, start,
    stop) of its tensors.
    """

    model_name: str
    version: str
    outputs: tuple[str, ...]
    parameters: Parameters
    classes: Mapping[str, int]
    fixed: tuple[tuple[int, bytes], ...]
    heads: tuple[tuple[str, str, Shape, int, int], ...]

    def fits(self, payload: bytes) -> bool:
        """Whether a message of the same length differs in nothing but its data."""
        return all(payload.startswith(part, offset) for offset, part in self.fixed)

    def request(self, payload: bytes) -> InferRequest:
        view = memoryview(payload)
        inputs = {
            name: Tensor(name, datatype, shape, view[start:stop]) for name, datatype, shape, start, stop in self.heads
        }
        parameters = dict(self.parameters)
        return InferRequest(
            self.model_name, inputs, self.version, "", self.outputs, parameters, self.classes, _NOTHING_SHARED, self
        )


_NOTHING_SHARED: dict[str, SharedRegion] = {}


class TemplateCache:
    """Messages that were read before, but for their data: clients repeat all else, unless they send ids."""

    MAX_TEMPLATES = 1024
    MAX_OF_A_LENGTH = 8
    # The size of a message without its data. Longer ones are not kept: a client must not fill the memory.
    MAX_TEMPLATE_BYTES = 8192

    def __init__(self) -> None:
        self._by_length: dict[int, list[Template]] = {}
        self._count = 0

    def decode(self, payload: bytes, regions: Regions = NO_REGIONS) -> InferRequest:
        """As the function `decode`."""
        for template in self._by_length.get(len(payload), ()):
            if template.fits(payload):
                return template.request(payload)
        request = decode(payload, regions)
        self._remember(payload, request)
        return request

    def _remember(self, payload: bytes, request: InferRequest) -> None:
        tensors = request.inputs.values()
        if request.id or request.shared_outputs or any(isinstance(tensor.data, np.ndarray) for tensor in tensors):
            return
        tail = [(_RAW_INPUT_TAG + _varint(size), size) for t in tensors for size in [len(t.raw())]]
        offset = len(payload) - sum(len(head) + size for head, size in tail)
        if offset > self.MAX_TEMPLATE_BYTES:
            return
        fixed, heads = [(0, payload[: max(offset, 0)])], []
        for tensor, (head, size) in zip(tensors, tail, strict=True):
            fixed.append((offset, head))
            offset += len(head)
            heads.append((tensor.name, tensor.datatype, tensor.shape, offset, offset + size))
            offset += size
        classes, parameters = request.classes, dict(request.parameters)
        template = Template(
            request.model_name, request.model_version, request.outputs, parameters, classes, tuple(fixed), tuple(heads)
        )
        # A message whose fields are in another order, or whose input is in shared memory, makes no template.
        if fixed[1:] and fixed[1][0] >= 0 and template.fits(payload) and _is_same(template.request(payload), request):
            if self._count >= self.MAX_TEMPLATES:
                self._by_length.clear()
                self._count = 0
            known = self._by_length.setdefault(len(payload), [])
            if len(known) >= self.MAX_OF_A_LENGTH:  # drop the oldest: it is the least likely to come again
                known.pop(0)
                self._count -= 1
            known.append(template)
            self._count += 1


def _is_same(request: InferRequest, other: InferRequest) -> bool:
    return all(request.inputs[name].data == tensor.data for name, tensor in other.inputs.items())


def encode(response: InferResponse, request_id: str, shared: Collection[str] = ()) -> bytes:
    """A serialized ModelInferResponse; every output goes raw, but for those in `shared`, which are there already.

    Concatenated protobuf messages merge, so the unchanging head is serialized once per signature.
    """
    if response.columns is not None and not shared and not request_id:
        return _encode_part(response, response.columns)
    signature = tuple([(t.name, t.datatype, t.shape) for t in response.outputs])
    head = _head(response.model_name, response.model_version, signature)
    parts = [head]
    if request_id:
        encoded = request_id.encode()
        parts += (_ID_TAG, _varint(len(encoded)), encoded)
    if response.parameters:
        parts.append(_parameters_message(response.parameters))
    for tensor in response.outputs:
        raw: Raw = b"" if tensor.name in shared else tensor.raw()
        parts += (_RAW_TAG, _varint(len(raw)), raw)  # type: ignore[arg-type]
    return b"".join(parts)


def _encode_part(response: InferResponse, columns: Columns) -> bytes:
    """A part of a batch: what batch-mates have in common is made once."""
    start, stop = response.start, response.stop
    parameters = tuple(response.parameters.items())
    key = (stop - start, parameters, tuple(map(type, response.parameters.values())))
    known = columns.memo.get(key)
    if known is None:
        outputs = columns.part(start, stop)
        signature = tuple([(t.name, t.datatype, t.shape) for t in outputs])
        tags = [_RAW_TAG + _varint(len(tensor.raw())) for tensor in outputs]
        head = _head(response.model_name, response.model_version, signature)
        tags[0] = head + (_parameters_message(response.parameters) if parameters else b"") + tags[0]
        known = columns.memo[key] = tags
    parts: list[Raw] = []
    for tag, (size, raw) in zip(known, columns.raws, strict=True):
        parts += (tag, raw[start * size : stop * size])
    return b"".join(parts)


def encode_stream(message: bytes) -> bytes:
    """A serialized ModelInferResponse as a serialized ModelStreamInferResponse."""
    return b"\x12" + _varint(len(message)) + message


def encode_stream_error(message: str, request_id: str) -> bytes:
    """A serialized ModelStreamInferResponse that carries an error."""
    response = pb.ModelStreamInferResponse(error_message=message)
    if request_id:
        response.infer_response.id = request_id
    return bytes(response.SerializeToString())


def id_of(payload: bytes) -> str:
    """The id of a request that may be wrong in any way; "" when it cannot be told."""
    return named(payload)[2]


def _bad(model: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"model '{model}': {why}")


def _refuse_parameters(model: str, name: str, parameters: Any) -> None:
    for key in parameters:
        raise Unsupported(f"model '{model}': tensor '{name}': parameter '{key}' is not supported")


def _shared(model: str, item: Any, shape: Shape, regions: Regions) -> Tensor:
    """An input in shared memory. Raises Unsupported for parameters that say something else."""
    parameters = _parameters(item.parameters)
    region = rules.shared_region(model, f"input '{item.name}'", parameters)
    if region is None:
        _refuse_parameters(model, item.name, parameters)
        raise AssertionError("refused above")
    if item.HasField("contents"):
        raise _bad(model, f"input '{item.name}': both contents and shared memory are given")
    tensor = Tensor(item.name, item.datatype, shape, regions.read(region))
    rules.check_size(model, tensor, region.byte_size)
    return tensor


def _typed(model: str, name: str, datatype: str, shape: Shape, contents: Any) -> Any:
    field = _CONTENTS.get(datatype)
    if field is None:
        raise _bad(model, f"input '{name}': {datatype} data must be in raw_input_contents")
    values = getattr(contents, field)
    filled = [descriptor.name for descriptor, _ in contents.ListFields()]
    if filled not in ([], [field]):
        raise _bad(model, f"input '{name}': expected {field} for {datatype}, got {', '.join(filled)}")
    if len(values) != math.prod(shape):
        raise _bad(model, f"input '{name}': expected {math.prod(shape)} elements for {list(shape)}, got {len(values)}")
    if datatype == "BYTES":
        elements = np.empty(len(values), dtype=object)
        elements[:] = list(values)
        return elements.reshape(shape)
    try:
        return np.array(values, dtype=dtypes.NUMPY[datatype]).reshape(shape)
    except OverflowError:
        raise _bad(model, f"input '{name}': an element does not fit {datatype}") from None


def _outputs(
    model: str, message: Any, regions: Regions
) -> tuple[tuple[str, ...], dict[str, int], dict[str, SharedRegion]]:
    """Names asked for, the classes wanted of them, and where they go in shared memory."""
    names: list[str] = []
    classes = {}
    shared = {}
    if len(message.outputs) > rules.MAX_OUTPUTS:
        raise _bad(model, f"at most {rules.MAX_OUTPUTS} outputs can be asked for, got {len(message.outputs)}")
    for item in message.outputs:
        if item.name in names:
            continue  # an output that is named twice is answered once
        parameters = _parameters(item.parameters)
        if "classification" in parameters:
            classes[item.name] = rules.check_classes(model, item.name, parameters.pop("classification"))
        region = rules.shared_region(model, f"output '{item.name}'", parameters)
        if region is not None:
            regions.check(region)
            shared[item.name] = region
            parameters = {key: value for key, value in parameters.items() if not key.startswith("shared_memory_")}
        _refuse_parameters(model, item.name, parameters)
        names.append(item.name)
    return tuple(names), classes, shared


def _parameters(parameters: Any) -> Parameters:
    return {key: getattr(value, _choice(key, value)) for key, value in parameters.items()}


def _choice(key: str, value: Any) -> str:
    choice: str | None = value.WhichOneof("parameter_choice")
    if choice is None:
        raise InvalidArgument(
            f"invalid value type for '{key}' parameter, expected a number, text or a boolean, got none"
        )
    return choice


def _parameters_message(parameters: Parameters) -> bytes:
    message = pb.ModelInferResponse()
    for key, value in parameters.items():
        field = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(message.parameters[key], field, value)
    return bytes(message.SerializeToString())


@lru_cache(maxsize=4096)
def _head(model: str, version: str, signature: tuple[tuple[str, str, Shape], ...]) -> bytes:
    tensor = pb.ModelInferResponse.InferOutputTensor
    outputs = [tensor(name=name, datatype=datatype, shape=shape) for name, datatype, shape in signature]
    return bytes(pb.ModelInferResponse(model_name=model, model_version=version, outputs=outputs).SerializeToString())


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
