"""Where a model would like the outputs of a request that it makes."""

from tutti.backends.python.pb_utils.constants import TRITONSERVER_MEMORY_CPU, TRITONSERVER_MEMORY_GPU
from tutti.backends.python.pb_utils.errors import TritonModelException
from tutti.backends.python.pb_utils.tensors import Tensor, over, sent
from tutti.devices import dlpack
from tutti.devices.tensors import DeviceTensor, gpus


class PreferredMemory:
    """Where a model would like the outputs of a request it makes."""

    def __init__(self, preferred_memory_type: int = TRITONSERVER_MEMORY_CPU, preferred_device_id: int = 0) -> None:
        if preferred_memory_type not in (TRITONSERVER_MEMORY_CPU, TRITONSERVER_MEMORY_GPU):
            raise TritonModelException(f"PreferredMemory: unknown memory type {preferred_memory_type!r}")
        self.preferred_memory_type = preferred_memory_type
        self.preferred_device_id = preferred_device_id


def moved(tensor: Tensor, device: int) -> Tensor:
    """The tensor in the memory of a GPU. BYTES, and all tensors where there is no such GPU, stay in the host's."""
    inner = sent(tensor)
    is_there = tensor.__dlpack_device__() == (dlpack.CUDA, device) if inner.datatype != "BYTES" else True
    if is_there or device >= gpus():
        return tensor
    return over(inner.name, DeviceTensor.of_array(inner.array(), inner.datatype, device), inner.datatype)
