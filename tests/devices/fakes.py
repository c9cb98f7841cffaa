"""A GPU for tests without one: host memory whose DLPack capsules say that it is on a CUDA device."""

from collections.abc import Callable
from typing import Any

from tutti.core.dtypes import Array
from tutti.devices import dlpack


def on_device(capsule: Any, kind: int, number: int) -> Any:
    """The capsule, of memory that it says is elsewhere."""
    tensor = dlpack._tensor_in(capsule)
    tensor.device_type, tensor.device_id = kind, number
    return capsule


class CudaArray:
    """What torch's and cupy's tensors on a GPU look like to DLPack. `datatype` is BF16 for uint16 that is called so."""

    def __init__(self, array: Array, number: int = 0, datatype: str = "") -> None:
        self.memory = array
        self.number = number
        self.datatype = datatype
        self.streams: list[Any] = []

    def __dlpack__(self, *, stream: Any = None) -> Any:
        self.streams.append(stream)
        capsule = on_device(self.memory.__dlpack__(), dlpack.CUDA, self.number)
        return dlpack.relabel(capsule, self.datatype) if self.datatype else capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.number


class FakeLibrary:
    """A `tensors.Library` over CudaArrays; `log` has what was asked of it. `error` is what waiting raises."""

    STREAM = 77

    def __init__(self, gpus: int = 2) -> None:
        self.log: list[str] = []
        self.error: Exception | None = None
        self.sole = False
        self._gpus = gpus

    def ordered(self, exporter: Any, device: int) -> tuple[Any, Callable[[], None]]:
        return exporter.__dlpack__(stream=self.STREAM), self._wait

    def adopted(self, capsule: Any, device: int) -> Any:
        return CudaArray(self._taken(capsule), device)

    def on_host(self, exported: dlpack.Exported) -> Array:
        self.log.append("to host")
        return self._taken(exported.__dlpack__())

    def copied(self, exported: dlpack.Exported, device: int) -> Any:
        self.log.append("copied")
        return CudaArray(self._taken(exported.__dlpack__()), device)

    def placed(self, array: Array, device: int) -> Any:
        self.log.append(f"to cuda:{device}")
        return CudaArray(array.copy(), device)

    def count(self) -> int:
        return self._gpus

    def is_sole(self, exporter: Any) -> bool:
        return self.sole

    def _wait(self) -> None:
        self.log.append("waited")
        if self.error is not None:
            raise self.error

    def _taken(self, capsule: Any) -> Array:
        """A copy of the capsule's memory: numpy exports none that it got from an old capsule."""
        return dlpack.as_array(on_device(capsule, dlpack.CPU, 0)).copy()
