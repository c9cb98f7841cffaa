"""Joining requests into one batch along the first axis, and splitting the outputs back. Pure."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tutti.core import dtypes
from tutti.core.dtypes import Array
from tutti.core.errors import InvalidArgument
from tutti.core.types import RAW_TYPES, Columns, InferRequest, InferResponse, Shape, Tensor


class Scratch:
    """Memory for large joined inputs, by name: fresh pages for each batch would cost more than the copy itself.

    Who has one executes one batch at a time, and keeps no input.
    """

    MIN_BYTES = 256 * 1024

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}

    def take(self, name: str, size: int) -> Array:
        """`size` bytes, of any content."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[name] = np.empty(size, np.uint8)
        return buffer[:size]


def is_large(requests: Sequence[InferRequest]) -> bool:
    """Whether joining these requests, which are of about one size, takes copies that count."""
    data = [tensor.data for tensor in requests[0].inputs.values()]
    size = sum([len(part) if isinstance(part, RAW_TYPES) else part.nbytes for part in data])
    return size * len(requests) >= Scratch.MIN_BYTES


def join(requests: Sequence[InferRequest], name: str, scratch: Scratch | None = None) -> Array:
    """Input `name` of all requests, concatenated along the first axis: one copy, none for a single request.

    The requests share a batch key, so all but the first axis agree.
    """
    return concatenate([request.inputs[name] for request in requests], name, scratch)


def concatenate(tensors: Sequence[Tensor], name: str = "", scratch: Scratch | None = None) -> Array:
    """The tensors along their first axis: one copy, none for a single one or for stretches of one array."""
    first = tensors[0]
    if len(tensors) == 1:
        return first.array()
    whole = _whole(tensors)
    if whole is not None:
        return whole
    raws = [tensor.data for tensor in tensors if isinstance(tensor.data, RAW_TYPES)]
    if first.datatype == "BYTES" or len(raws) < len(tensors):
        return np.concatenate([tensor.array() for tensor in tensors])
    size = sum([len(raw) for raw in raws])
    if scratch is not None and size >= scratch.MIN_BYTES:
        buffer = scratch.take(name, size)
        parts: list[Any] = [np.frombuffer(raw, np.uint8) for raw in raws]
        np.concatenate(parts, out=buffer)
        return buffer.view(dtypes.NUMPY[first.datatype]).reshape(-1, *first.shape[1:])
    joined = b"".join(raws)
    return np.frombuffer(joined, dtypes.NUMPY[first.datatype]).reshape(-1, *first.shape[1:])


def _whole(tensors: Sequence[Tensor]) -> Array | None:
    """The array that the tensors are all of, one after the other; None where there is none."""
    base = tensors[0].data.base if isinstance(tensors[0].data, np.ndarray) else None
    if not isinstance(base, np.ndarray) or base.dtype != tensors[0].data.dtype:  # type: ignore[union-attr]
        return None
    address = base.ctypes.data
    for tensor in tensors:
        data = tensor.data
        if not isinstance(data, np.ndarray) or data.base is not base or data.ctypes.data != address:
            return None
        address += data.nbytes
    is_all = address == base.ctypes.data + base.nbytes and base.shape[1:] == tensors[0].shape[1:]
    return base if is_all else None


def values(tensor: Tensor) -> Array:
    """The elements in host memory; wire bytes that need no decoding stay what the tensor has.

    Raises InvalidArgument where data and shape disagree.
    """
    data = tensor.data
    if tensor.datatype == "BYTES" or not isinstance(data, RAW_TYPES):
        return tensor.array()
    dtype = dtypes.NUMPY[tensor.datatype]
    size = math.prod(tensor.shape) * dtype.itemsize
    if len(data) != size:
        problem = f"expected {size} bytes for {tensor.datatype}{list(tensor.shape)}, got {len(data)}"
        raise InvalidArgument(f"input '{tensor.name}': {problem}")
    return np.frombuffer(data, dtype).reshape(tensor.shape)


def part(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Some rows of a tensor, without a copy where its memory can be looked at in part."""
    data: Any = tensor.data
    if isinstance(data, np.ndarray) or not hasattr(data, "part"):
        data = tensor.array()[start:stop]
    else:
        data = data.part(start, stop)
    return Tensor(tensor.name, tensor.datatype, data.shape, data)


def split(tensor: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """The inverse of join for an output: consecutive slices of `rows` rows each, without a copy."""
    if len(rows) == 1:
        return [tensor]
    name, datatype, tail = tensor.name, tensor.datatype, tensor.shape[1:]
    parts = []
    start = 0
    if datatype == "BYTES":
        array = tensor.array()
        for n in rows:
            parts.append(Tensor(name, datatype, (n, *tail), array[start : start + n]))
            start += n
        return parts
    view = memoryview(tensor.raw())
    row_size = len(view) // max(1, tensor.shape[0])
    for n in rows:
        size = n * row_size
        parts.append(Tensor(name, datatype, (n, *tail), view[start : start + size]))
        start += size
    return parts


def answers(
    name: str, version: str, requests: Sequence[InferRequest], outputs: list[Tensor], is_alike: bool
) -> list[InferResponse]:
    """Each request's share of the joined outputs of one execution; `is_alike` when all ask for the same ones."""
    if len(requests) == 1:
        return [InferResponse(name, version, outputs)]
    first_input = next(iter(requests[0].inputs))
    sizes = [request.inputs[first_input].shape[0] for request in requests]
    if is_alike and all(tensor.datatype != "BYTES" for tensor in outputs):
        return parts(name, version, Columns(outputs), sizes)
    answers = []
    splits = zip(*[split(output, sizes) for output in outputs], strict=True)
    for request, tensors in zip(requests, splits, strict=True):
        asked = request.outputs
        answers.append(InferResponse(name, version, [part for part in tensors if not asked or part.name in asked]))
    return answers


def parts(name: str, version: str, columns: Columns, sizes: Sequence[int]) -> list[InferResponse]:
    """Responses of `sizes` rows each, one after the other."""
    parts = []
    start = 0
    for size in sizes:
        parts.append(InferResponse.of_part(name, version, columns, start, start + size))
        start += size
    return parts


def reshape(tensor: Tensor, dims: Shape, wanted: Shape, is_batched: bool) -> Tensor:
    """The tensor, whose shape fits the dims `given`, with the dims `wanted`: variable ones correspond in order."""
    body = tensor.shape[is_batched:]
    variable = iter([size for size, dim in zip(body, dims, strict=True) if dim == -1])
    shape = (*tensor.shape[:is_batched], *(next(variable) if dim == -1 else dim for dim in wanted))
    data = tensor.data if isinstance(tensor.data, RAW_TYPES) else tensor.array().reshape(shape)
    return Tensor(tensor.name, tensor.datatype, shape, data)
