"""The tensors of models: over arrays, over memory of a GPU, and to and from DLPack.

What the rest of the server has of a tensor is a core Tensor: `sent` and `received` are the way there and back.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from tritonclient.grpc import model_config_pb2 as pb

from tutti.backends.python.pb_utils.datatypes import numpy_to_triton_type
from tutti.backends.python.pb_utils.errors import TritonModelException
from tutti.backends.python.pb_utils.values import text_of
from tutti.core import dtypes
from tutti.core.dtypes import Array
from tutti.core.types import RAW_TYPES, OnDevice
from tutti.core.types import Tensor as CoreTensor
from tutti.devices import dlpack
from tutti.devices.tensors import DeviceTensor


class Tensor:
    """A named tensor over a numpy array, or over memory of a GPU."""

    # `_datatype` is "" where it is that of the array's own dtype.
    __slots__ = ("_data", "_datatype", "_name")

    def __init__(self, name: str, array: Array) -> None:
        if array is None:
            raise TypeError(f"tensor '{name}': expected an array, got None")
        self._name = _tensor_name(name)
        self._data: Array | OnDevice = array if type(array) is np.ndarray else np.asarray(array)
        self._datatype = ""

    @classmethod
    def from_dlpack(cls, name: str, tensor: Any) -> "Tensor":
        """A tensor over a DLPack capsule, or anything with `__dlpack__`, as torch's and cupy's tensors, without a copy.

        Elements are in row-major order. Work on a GPU that this thread has begun is waited for before anyone reads
        them; a capsule's maker has to see to work that other threads or streams do.
        """
        name = _tensor_name(name)
        try:
            data, datatype = _of_dlpack(tensor)
        except ValueError as error:
            raise TritonModelException(f"tensor '{name}': {error}") from None
        return cls._over(name, data, datatype)

    @classmethod
    def _over(cls, name: str, data: Array | OnDevice, datatype: str) -> "Tensor":
        self = cls.__new__(cls)
        self._name = name
        self._data = data
        self._datatype = datatype
        return self

    @classmethod
    def _received(cls, tensor: CoreTensor, is_on_host: bool) -> "Tensor":
        """A tensor that came to a model; its elements are there.

        In host memory they are a copy: the model may write to what it gets, which others read, or are sent again.
        """
        if not is_on_host:
            data = tensor.data
            if not isinstance(data, np.ndarray) and not isinstance(data, RAW_TYPES):
                data.wait()
                return cls._over(tensor.name, data, tensor.datatype)
        copy = cls(tensor.name, tensor.array().copy())
        if tensor.datatype == "BF16":
            copy._datatype = "BF16"
        return copy

    def _sent(self) -> CoreTensor:
        data = self._data
        if isinstance(data, np.ndarray) and not self._datatype:
            is_text = data.dtype == object or data.dtype.kind in "SU"
            return CoreTensor.of(self._name, dtypes.as_bytes(data) if is_text else data)
        return CoreTensor(self._name, self._datatype, tuple(data.shape), data)

    def _settle(self, stays: bool) -> None:
        """Let the elements be those of now, whatever the model does next: on their device where it `stays`."""
        data = self._data
        if isinstance(data, np.ndarray):
            return
        if not stays:
            self._data = data.array()
            self._datatype = "BF16" if self._datatype == "BF16" else ""
        elif isinstance(data, DeviceTensor):
            self._data = data.lasting()
        else:
            data.wait()

    def to_dlpack(self) -> Any:
        """A DLPack capsule. BYTES have none."""
        return self.__dlpack__()

    def __dlpack__(self, stream: Any = None, **options: Any) -> Any:
        """The elements are complete, so any stream may read them."""
        data = self._data
        if not isinstance(data, np.ndarray):
            return data.__dlpack__(stream=stream, **options)
        if data.dtype.kind in "OSU":
            raise TritonModelException("DLPack does not have support for string tensors.")
        # A read-only array, as one over the wire's bytes is, cannot be exported.
        capsule = (data if data.flags.writeable else data.copy()).__dlpack__(**options)
        return dlpack.relabel(capsule, "BF16") if self._datatype == "BF16" else capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._data.__dlpack_device__()

    def name(self) -> str:
        return self._name

    def shape(self) -> list[int]:
        return list(self._data.shape)

    def as_numpy(self) -> Array:
        """BYTES tensors are object arrays of bytes. Tensors on a GPU, and of BF16, are for DLPack only."""
        if not isinstance(self._data, np.ndarray):
            raise TritonModelException("Tensor is stored in GPU and cannot be converted to NumPy.")
        if self._datatype == "BF16":
            raise TritonModelException(
                "Tensor dtype is BF16 and cannot be converted to NumPy. Use to_dlpack() and from_dlpack() instead."
            )
        return self._data

    def triton_dtype(self) -> int:
        if isinstance(self._data, np.ndarray) and not self._datatype:
            return numpy_to_triton_type(self._data.dtype)
        return int(pb.DataType.Value(dtypes.to_config(self._datatype)))

    def is_cpu(self) -> bool:
        return isinstance(self._data, np.ndarray)


received, over, sent = Tensor._received, Tensor._over, Tensor._sent
"""For the server: a tensor that comes to a model; one over elements; and what the server has of a model's."""


def checked_tensors(values: Iterable[Tensor]) -> list[Tensor]:
    """A model's tensors. Raises TypeError where it gives no list, TritonModelException for what is no tensor."""
    tensors = list(values)
    for value in tensors:
        if not isinstance(value, Tensor):
            raise TritonModelException(f"expected tensors, got a {type(value).__name__} among them")
    return tensors


def _tensor_name(name: Any) -> str:
    text = name if type(name) is str else text_of(name)
    if not text:
        raise TritonModelException("Tensor name cannot be an empty string.")
    return text


def _of_dlpack(tensor: Any) -> tuple[Array | OnDevice, str]:
    """(the elements, "BF16" or that of a tensor on a device). Raises ValueError."""
    if dlpack.is_capsule(tensor):
        kind = dlpack.describe(tensor).device_type
    elif hasattr(tensor, "__dlpack__") and hasattr(tensor, "__dlpack_device__"):
        kind = int(tensor.__dlpack_device__()[0])
    else:
        raise ValueError(
            "Provided tensor is not supported. Tensor must be a DLPack capsule or have `__dlpack__` and "
            f"`__dlpack_device__` attributes, got a {type(tensor).__name__}"
        )
    if kind == dlpack.CUDA:
        on_device = DeviceTensor.of_capsule(tensor) if dlpack.is_capsule(tensor) else DeviceTensor.of(tensor)
        return on_device, on_device.datatype
    if kind not in (dlpack.CPU, dlpack.CUDA_HOST):
        raise ValueError(f"DLDevice type {kind} is not support by Python backend.")
    capsule = tensor if dlpack.is_capsule(tensor) else _exported(tensor)
    datatype = "BF16" if dlpack.describe(capsule).datatype == "BF16" else ""
    return dlpack.as_array(capsule), datatype


def _exported(tensor: Any) -> Any:
    """A capsule of host memory; of the newer kind where the tensor is read-only, which the older one cannot say."""
    try:
        return tensor.__dlpack__()
    except BufferError:
        return tensor.__dlpack__(max_version=(1, 0))
