"""DLPack's capsules, read without the library that made them. Knows no library but numpy, and touches no elements.

A capsule points to a struct that says where the elements lie and what they are. Its layout is that of DLPack 0.8, or,
under the name "dltensor_versioned", that of 1.x: https://dmlc.github.io/dlpack/latest/c_api.html. Who consumes a
capsule renames it: it is good for one consumer.
"""

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tutti.core.dtypes import NUMPY, Array

CPU, CUDA, CUDA_HOST = 1, 2, 3
_Shape = tuple[int, ...]

# Kinds of elements, by DLPack's numbers.
_INT, _UINT, _FLOAT, _BFLOAT, _BOOL = 0, 1, 2, 4, 6
_DATATYPES = {
    (_BOOL, 8): "BOOL",
    **{(_UINT, bits): f"UINT{bits}" for bits in (8, 16, 32, 64)},
    **{(_INT, bits): f"INT{bits}" for bits in (8, 16, 32, 64)},
    **{(_FLOAT, bits): f"FP{bits}" for bits in (16, 32, 64)},
    (_BFLOAT, 16): "BF16",
}


class _Type(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_LAYOUTS: dict[bytes, type[_Managed] | type[_Versioned]] = {b"dltensor": _Managed, b"dltensor_versioned": _Versioned}
# Prototypes of our own: those of ctypes.pythonapi belong to everybody.
_name_of = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_Capsule = type(np.empty(0).__dlpack__())


@dataclass(frozen=True, slots=True)
class Description:
    """What a capsule holds; elements are in row-major order and without gaps."""

    device_type: int
    device_id: int
    datatype: str
    shape: _Shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * NUMPY[self.datatype].itemsize


def is_capsule(value: object) -> bool:
    return type(value) is _Capsule


def describe(capsule: Any) -> Description:
    """What a capsule holds. Raises ValueError if it is consumed or strided, or Triton has no name for its elements."""
    tensor = _tensor_in(capsule)
    shape = tuple(tensor.shape[: tensor.ndim])
    if tensor.strides and not _is_row_major(shape, tuple(tensor.strides[: tensor.ndim])):
        raise ValueError(
            "DLPack tensor is not contiguous. Only contiguous DLPack tensors that are stored in C-Order are supported."
        )
    kind = tensor.dtype
    datatype = _DATATYPES.get((kind.code, kind.bits)) if kind.lanes == 1 else None
    if datatype is None:
        element = f"code {kind.code}, {kind.bits} bits, {kind.lanes} lanes"
        raise ValueError(f"DLPack tensor has elements of a type that Triton has no name for: {element}")
    return Description(tensor.device_type, tensor.device_id, datatype, shape)


def relabel(capsule: Any, datatype: str) -> Any:
    """The capsule, its elements called `datatype`, of the same size: numpy, for one, has no BF16, but the same bits.

    A capsule's struct is made for it alone, and its memory is freed by what else is in it.
    """
    code, bits = next(key for key, name in _DATATYPES.items() if name == datatype)
    kind = _tensor_in(capsule).dtype
    assert kind.bits == bits
    kind.code = code
    return capsule


def as_array(capsule: Any) -> Array:
    """A capsule's elements in host memory, without a copy; BF16 as UINT16. The capsule is consumed."""
    if describe(capsule).datatype == "BF16":
        relabel(capsule, "UINT16")
    return np.from_dlpack(Exported(capsule, (CPU, 0)))


class Exported:
    """A capsule as what most libraries take: an object that gives it. Once."""

    def __init__(self, capsule: Any, device: tuple[int, int]) -> None:
        self._capsule = capsule
        self._device = device

    def __dlpack__(self, **options: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device


def _tensor_in(capsule: Any) -> _Tensor:
    name = _name_of(capsule) or b""
    layout = _LAYOUTS.get(name)
    if layout is None:
        is_used = name.startswith(b"used_dltensor")
        raise ValueError("DLPack capsule has been consumed already" if is_used else f"no DLPack capsule: {name!r}")
    managed = layout.from_address(_pointer_of(capsule, name))
    if isinstance(managed, _Versioned) and managed.major != 1:
        raise ValueError(f"DLPack capsule is of version {managed.major}.{managed.minor}, expected 1.x")
    tensor: _Tensor = managed.tensor
    return tensor


def _is_row_major(shape: _Shape, strides: _Shape) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return 0 in shape
        expected *= size
    return True
