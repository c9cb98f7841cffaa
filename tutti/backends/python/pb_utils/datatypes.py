"""Triton's datatypes as numpy has them, and BYTES in wire form."""

from typing import Any

import numpy as np
from tritonclient.grpc import model_config_pb2 as pb

from tutti.core import dtypes
from tutti.core.dtypes import Array

TRITON_STRING_TO_NUMPY = {
    dtypes.to_config(name): bool if name == "BOOL" else dtype.type for name, dtype in dtypes.NUMPY.items()
}


def triton_to_numpy_type(data_type: int) -> Any:
    """DataType's number -> numpy type."""
    return triton_string_to_numpy(pb.DataType.Name(data_type))


def numpy_to_triton_type(numpy_type: Any) -> int:
    """Numpy type -> DataType's number."""
    name = dtypes.to_config(dtypes.from_numpy(np.dtype(numpy_type)))
    return int(pb.DataType.Value(name))


def triton_string_to_numpy(type_name: str) -> Any:
    """`TYPE_FP32` -> numpy.float32; `TYPE_STRING` -> numpy.object_."""
    return dtypes.NUMPY[dtypes.from_config(type_name)].type


def serialize_byte_tensor(tensor: Array) -> bytes:
    """BYTES elements in wire form."""
    return dtypes.encode_bytes(tensor.reshape(-1))


def deserialize_bytes_tensor(encoded: bytes) -> Array:
    """The inverse: a flat object array of bytes."""
    elements: list[bytes] = []
    position = 0
    while position < len(encoded):
        length = int.from_bytes(encoded[position : position + 4], "little")
        elements.append(encoded[position + 4 : position + 4 + length])
        position += 4 + length
    return np.array(elements, dtype=object)
