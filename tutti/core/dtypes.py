"""KServe datatypes: names, numpy dtypes, element sizes, and the BYTES wire form.

BF16 has no numpy dtype: its elements are carried as the upper 16 bits of a float32, in a uint16 array.
"""

import struct
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from tutti.core.errors import InvalidArgument

Array = npt.NDArray[Any]

NUMPY: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "BF16": np.dtype(np.uint16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(object),
}

_BY_NUMPY = {dtype: name for name, dtype in NUMPY.items() if name != "BF16"}
_LENGTH = struct.Struct("<I")


def from_numpy(dtype: np.dtype[Any]) -> str:
    """The datatype of a numpy dtype; byte and text strings are BYTES. Raises InvalidArgument for others."""
    if dtype.kind in "SU":
        return "BYTES"
    try:
        return _BY_NUMPY[dtype]
    except KeyError:
        raise InvalidArgument(f"numpy dtype {dtype} has no Triton datatype") from None


def from_config(type_name: str) -> str:
    """`TYPE_STRING` -> `BYTES`, `TYPE_FP32` -> `FP32`."""
    return "BYTES" if type_name == "TYPE_STRING" else type_name.removeprefix("TYPE_")


def to_config(datatype: str) -> str:
    """`BYTES` -> `TYPE_STRING`, `FP32` -> `TYPE_FP32`."""
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"


def as_bytes(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Elements of text as BYTES are everywhere: an object array of bytes. What is that already is not copied.

    Who reads a tensor compares its elements with bytes, whichever backend made them.
    """
    elements = array.ravel().tolist()
    if array.dtype == object and set(map(type, elements)) <= {bytes}:
        return array
    encoded = np.empty(len(elements), dtype=object)
    encoded[:] = [_element(element) for element in elements]
    return encoded.reshape(array.shape)


def _element(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return bytes(value) if isinstance(value, bytearray | memoryview) else str(value).encode()


def encode_bytes(elements: Iterable[Any]) -> bytes:
    """BYTES elements in row-major order -> a 4-byte little-endian length and the bytes, per element."""
    parts = []
    for element in elements:
        if type(element) is not bytes:
            element = _element(element)
        parts.append(_LENGTH.pack(len(element)))
        parts.append(element)
    return b"".join(parts)


def decode_bytes(raw: bytes | memoryview, count: int) -> list[bytes]:
    """The inverse of encode_bytes. Raises InvalidArgument unless `raw` holds exactly `count` elements."""
    view = memoryview(raw)
    elements: list[bytes] = []
    offset, end = 0, len(view)
    while offset < end and len(elements) < count:
        if offset + 4 > end:
            raise InvalidArgument("BYTES data ends inside a length prefix")
        (length,) = _LENGTH.unpack_from(view, offset)
        offset += 4
        if offset + length > end:
            raise InvalidArgument(
                f"BYTES element {len(elements)} announces {length} bytes, but only {end - offset} are left"
            )
        elements.append(bytes(view[offset : offset + length]))
        offset += length
    if len(elements) != count or offset != end:
        raise InvalidArgument(f"expected {count} BYTES elements, got {len(elements)} and {end - offset} bytes over")
    return elements
