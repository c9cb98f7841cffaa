"""Tensors in a GPU's memory, from any library that speaks DLPack and for any other.

What CUDA must do for them, torch or cupy does, whichever is there: neither is imported before there is such a tensor.
Knows no model and no request.
"""

import contextlib
import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from tutti.core.dtypes import Array
from tutti.core.errors import Unsupported
from tutti.core.types import Shape
from tutti.devices import dlpack
from tutti.devices.errors import sticky

_NAMES = ("torch", "cupy")


class Library(Protocol):
    """What works with a GPU's memory. `exporter` is any object with `__dlpack__` and `__dlpack_device__` on CUDA."""

    def ordered(self, exporter: Any, device: int) -> tuple[Any, Callable[[], None]]:
        """A capsule of its memory, and what waits, asleep, for the work that this thread has begun on it.

        Raises what the exporter raises.
        """

    def adopted(self, capsule: Any, device: int) -> Any:
        """An exporter in the capsule's place, which can be exported any number of times."""

    def on_host(self, exported: dlpack.Exported) -> Array: ...

    def copied(self, exported: dlpack.Exported, device: int) -> Any:
        """A copy on the same device, begun after the work of this thread."""

    def placed(self, array: Array, device: int) -> Any:
        """A copy of host memory on the device. The array is not of BF16."""

    def count(self) -> int:
        """How many GPUs it sees."""

    def is_sole(self, exporter: Any) -> bool:
        """Whether nothing but this object refers to its memory; False where that cannot be told."""


class DeviceTensor:
    """Elements in a GPU's memory: an OnDevice.

    The work that fills them may still be under way; who wants them waits for it. `datatype` is Triton's name.
    """

    __slots__ = ("_exporter", "_library", "_number", "_wait", "datatype", "nbytes", "shape")

    def __init__(self, exporter: Any, library: Library, datatype: str = "") -> None:
        """Over `exporter`, after the work that this thread has begun. Raises ValueError as dlpack.describe does."""
        self._exporter = exporter
        self._library = library
        self._number = int(exporter.__dlpack_device__()[1])
        capsule, self._wait = library.ordered(exporter, self._number)
        described = dlpack.describe(capsule)
        self.datatype = datatype or described.datatype
        self.nbytes: int = described.nbytes
        self.shape: Shape = described.shape

    @classmethod
    def of(cls, exporter: Any) -> "DeviceTensor":
        """Over anything with `__dlpack__` on CUDA, which is kept as it is."""
        return cls(exporter, library_for(exporter))

    @classmethod
    def of_capsule(cls, capsule: Any) -> "DeviceTensor":
        """Over a capsule on CUDA, which is consumed."""
        library = library_for(None)
        described = dlpack.describe(capsule)
        if described.datatype == "BF16":  # cupy has none
            dlpack.relabel(capsule, "UINT16")
        return cls(library.adopted(capsule, described.device_id), library, described.datatype)

    @classmethod
    def of_array(cls, array: Array, datatype: str, device: int) -> "DeviceTensor":
        """A copy of host memory."""
        library = library_for(None)
        return cls(library.placed(array, device), library, datatype)

    @property
    def device(self) -> str:
        return f"cuda:{self._number}"

    def wait(self) -> None:
        self._wait()
        self._wait = _nothing

    def array(self) -> Array:
        return self._library.on_host(dlpack.Exported(self._capsule("UINT16"), self.__dlpack_device__()))

    def lasting(self) -> "DeviceTensor":
        """These elements, as they are after the work so far, whatever their maker does with its memory; complete.

        No copy where nobody else refers to the memory.
        """
        if sys.getrefcount(self._exporter) <= _REFERENCES_OF_ITS_OWN and self._library.is_sole(self._exporter):
            self.wait()
            return self
        exported = dlpack.Exported(self._capsule("UINT16"), self.__dlpack_device__())
        copy = DeviceTensor(self._library.copied(exported, self._number), self._library, self.datatype)
        copy.wait()
        return copy

    def __dlpack__(
        self, *, stream: Any = None, dl_device: tuple[int, int] | None = None, copy: bool | None = None, **options: Any
    ) -> Any:
        """The elements are complete, so any stream may read them, and any version may be asked for."""
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError(f"a tensor on {self.device} is exported as it is, where it is")
        return self._capsule()

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self._number

    def _capsule(self, bf16_as: str = "BF16") -> Any:
        self.wait()
        capsule, _ = self._library.ordered(self._exporter, self._number)
        return dlpack.relabel(capsule, bf16_as) if self.datatype == "BF16" else capsule


# The tensor's, and getrefcount's argument.
_REFERENCES_OF_ITS_OWN = 2


def _nothing() -> None:
    """There is nothing to wait for."""


def library_for(exporter: Any) -> Library:
    """The exporter's own library, else one that is imported already, else one that is there. Raises Unsupported."""
    maker = type(exporter).__module__.partition(".")[0]
    there = sorted(_NAMES, key=lambda name: (name != maker, name not in sys.modules))
    for name in there:
        with _lock:
            if name not in _libraries and importlib.util.find_spec(name) is not None:
                _libraries[name] = _MAKERS[name]()
            if name in _libraries:
                return _libraries[name]
    raise Unsupported("a tensor on a CUDA device needs PyTorch (pip install torch) or CuPy (pip install cupy-cuda13x)")


def gpus() -> int:
    """How many GPUs tensors can be on."""
    try:
        return library_for(None).count()
    except Unsupported:
        return 0


def failure(device: int) -> str:
    """Asks a GPU, by the library that this process uses it with: why it has failed for good, "" where it has not."""
    if not any(name in sys.modules for name in _NAMES):
        return ""
    try:
        library_for(None).placed(np.zeros(1, np.float32), device)
    except Exception as error:
        return sticky(error)
    return ""


class _Torch:
    """By PyTorch. A stream of each thread's own gets behind the work of the thread's current one."""

    def __init__(self) -> None:
        self._torch: Any = importlib.import_module("torch")
        self._here = threading.local()
        self._count: Any = getattr(self._torch._C, "_storage_Use_Count", None)
        # What counts besides the tensor differs between versions.
        self._alone = self._uses(self._torch.empty(1))

    def ordered(self, exporter: Any, device: int) -> tuple[Any, Callable[[], None]]:
        cuda = self._torch.cuda
        with cuda.device(device):
            stream = self._stream(device)
            capsule = exporter.__dlpack__(stream=stream.cuda_stream)
            event = cuda.Event(blocking=True)
            event.record(stream)
        return capsule, event.synchronize

    def adopted(self, capsule: Any, device: int) -> Any:
        return self._torch.from_dlpack(capsule)

    def on_host(self, exported: dlpack.Exported) -> Array:
        array: Array = self._torch.from_dlpack(exported).cpu().numpy()
        return array

    def copied(self, exported: dlpack.Exported, device: int) -> Any:
        return self._torch.from_dlpack(exported).clone()

    def placed(self, array: Array, device: int) -> Any:
        return self._torch.tensor(array, device=f"cuda:{device}")

    def count(self) -> int:
        return int(self._torch.cuda.device_count())

    def is_sole(self, exporter: Any) -> bool:
        is_plain = type(exporter) is self._torch.Tensor and self._count is not None
        return is_plain and self._uses(exporter) <= self._alone

    def _uses(self, tensor: Any) -> int:
        return int(self._count(tensor.untyped_storage()._cdata)) if self._count is not None else 0

    def _stream(self, device: int) -> Any:
        streams = self._here.__dict__.setdefault("streams", {})
        if device not in streams:
            streams[device] = self._torch.cuda.Stream(device)
        return streams[device]


class _CuPy:
    """By CuPy, in the same way."""

    def __init__(self) -> None:
        self._cupy: Any = importlib.import_module("cupy")
        self._here = threading.local()

    def ordered(self, exporter: Any, device: int) -> tuple[Any, Callable[[], None]]:
        cuda = self._cupy.cuda
        with cuda.Device(device):
            stream = self._stream(device)
            capsule = exporter.__dlpack__(stream=stream.ptr)
            event = cuda.Event(block=True, disable_timing=True)
            event.record(stream)
        return capsule, event.synchronize

    def adopted(self, capsule: Any, device: int) -> Any:
        with self._cupy.cuda.Device(device):
            return self._cupy.from_dlpack(dlpack.Exported(capsule, (dlpack.CUDA, device)))

    def on_host(self, exported: dlpack.Exported) -> Array:
        with self._on(exported):
            array: Array = self._cupy.asnumpy(self._cupy.from_dlpack(exported))
        return array

    def copied(self, exported: dlpack.Exported, device: int) -> Any:
        with self._on(exported):
            return self._cupy.from_dlpack(exported).copy()

    def placed(self, array: Array, device: int) -> Any:
        with self._cupy.cuda.Device(device):
            return self._cupy.array(array)

    def count(self) -> int:
        try:
            return int(self._cupy.cuda.runtime.getDeviceCount())
        except self._cupy.cuda.runtime.CUDARuntimeError:  # there is no driver
            return 0

    def is_sole(self, exporter: Any) -> bool:
        return False

    @contextlib.contextmanager
    def _on(self, exported: dlpack.Exported) -> Iterator[None]:
        with self._cupy.cuda.Device(exported.__dlpack_device__()[1]):
            yield

    def _stream(self, device: int) -> Any:
        streams = self._here.__dict__.setdefault("streams", {})
        if device not in streams:
            streams[device] = self._cupy.cuda.Stream(non_blocking=True)
        return streams[device]


_MAKERS: dict[str, Callable[[], Library]] = {"torch": _Torch, "cupy": _CuPy}
_libraries: dict[str, Library] = {}
_lock = threading.Lock()
