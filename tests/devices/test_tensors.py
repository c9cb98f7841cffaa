"""Tensors on a GPU, over a fake library; with a real GPU, over PyTorch and CuPy."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.devices.fakes import CudaArray, FakeLibrary
from tutti.core.errors import Unsupported
from tutti.core.types import OnDevice, Tensor
from tutti.devices import dlpack, tensors
from tutti.devices.tensors import DeviceTensor


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    library = FakeLibrary()
    monkeypatch.setattr(tensors, "library_for", lambda exporter: library)
    return library


def test_an_object_is_kept_and_waited_for_only_when_it_is_wanted(library: FakeLibrary) -> None:
    exporter = CudaArray(np.arange(6, dtype=np.float32).reshape(2, 3), number=1)
    tensor: OnDevice = DeviceTensor.of(exporter)
    assert (tensor.shape, tensor.nbytes, tensor.device) == ((2, 3), 24, "cuda:1")
    assert tensor.__dlpack_device__() == (dlpack.CUDA, 1)
    assert exporter.streams == [FakeLibrary.STREAM]  # it is told of a stream, and not waited for
    assert library.log == []
    np.testing.assert_array_equal(tensor.array(), exporter.memory)
    assert library.log == ["waited", "to host"]
    capsule = tensor.__dlpack__(stream=1, max_version=(1, 0))
    assert dlpack.describe(capsule) == dlpack.Description(dlpack.CUDA, 1, "FP32", (2, 3))
    assert library.log == ["waited", "to host"]  # once


def test_a_capsule_is_adopted(library: FakeLibrary) -> None:
    exporter = CudaArray(np.arange(3, dtype=np.int64))
    tensor = DeviceTensor.of_capsule(exporter.__dlpack__())
    assert tensor.datatype == "INT64"
    for _ in range(2):  # it is exported any number of times
        assert dlpack.describe(tensor.__dlpack__()).shape == (3,)
        assert tensor.array().tolist() == [0, 1, 2]


@pytest.mark.parametrize("is_capsule", [True, False])
def test_bf16_has_its_name_on_a_device_and_its_bits_on_the_host(library: FakeLibrary, is_capsule: bool) -> None:
    exporter = CudaArray(np.array([0x3F80, 0x4000], np.uint16), datatype="BF16")
    tensor = DeviceTensor.of_capsule(exporter.__dlpack__()) if is_capsule else DeviceTensor.of(exporter)
    assert (tensor.datatype, tensor.nbytes) == ("BF16", 4)
    assert dlpack.describe(tensor.__dlpack__()).datatype == "BF16"
    assert tensor.array().tolist() == [0x3F80, 0x4000]
    lasting = tensor.lasting()
    assert dlpack.describe(lasting.__dlpack__()).datatype == "BF16"


def test_a_failure_is_told_each_time_until_there_is_none(library: FakeLibrary) -> None:
    tensor = DeviceTensor.of(CudaArray(np.zeros(2)))
    library.error = RuntimeError("CUDA error: device-side assert triggered")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="device-side assert"):
            tensor.array()
    library.error = None
    assert tensor.array().tolist() == [0.0, 0.0]


def test_what_others_refer_to_is_copied_before_it_is_kept(library: FakeLibrary) -> None:
    library.sole = True
    exporter = CudaArray(np.zeros(2))
    tensor = DeviceTensor.of(exporter)
    kept = tensor.lasting()
    exporter.memory[:] = 5  # by `exporter`, a model reaches the memory
    assert kept is not tensor
    assert kept.array().tolist() == [0.0, 0.0]
    assert "copied" in library.log


def test_what_nobody_else_refers_to_is_kept_as_it_is(library: FakeLibrary) -> None:
    tensor = DeviceTensor.of(CudaArray(np.zeros(2)))
    assert tensor.lasting() is not tensor  # the library cannot tell what refers to the memory
    library.sole, library.log = True, []
    assert tensor.lasting() is tensor
    assert "copied" not in library.log


def test_exports_that_cannot_be_are_refused(library: FakeLibrary) -> None:
    tensor = DeviceTensor.of(CudaArray(np.zeros(2)))
    with pytest.raises(BufferError, match="cuda:0"):
        tensor.__dlpack__(copy=True)
    with pytest.raises(BufferError, match="cuda:0"):
        tensor.__dlpack__(dl_device=(dlpack.CPU, 0))


def test_host_memory_is_placed_on_a_device(library: FakeLibrary) -> None:
    tensor = DeviceTensor.of_array(np.array([0x3F80], np.uint16), "BF16", 1)
    assert (tensor.device, tensor.datatype) == ("cuda:1", "BF16")
    assert dlpack.describe(tensor.__dlpack__()).datatype == "BF16"


def test_a_tensor_of_the_server_becomes_an_array_where_it_is_wanted(library: FakeLibrary) -> None:
    tensor = Tensor("x", "FP32", (2, 1), DeviceTensor.of(CudaArray(np.ones((2, 1), np.float32))))
    assert bytes(tensor.raw()) == np.ones(2, np.float32).tobytes()
    assert isinstance(tensor.data, np.ndarray)
    assert tensor.array() is tensor.data
    assert library.log.count("to host") == 1


def test_without_torch_and_cupy_it_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_NAMES", ("no_such_torch",))
    with pytest.raises(Unsupported, match="needs PyTorch"):
        DeviceTensor.of(CudaArray(np.zeros(1)))
    assert tensors.gpus() == 0
    assert tensors.failure(0) == ""


def test_the_exporters_own_library_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def makers(name: str) -> Any:
        return lambda: order.append(name) or name

    monkeypatch.setattr(tensors, "_libraries", {})
    monkeypatch.setattr(tensors, "_NAMES", ("json", "csv"))
    monkeypatch.setattr(tensors, "_MAKERS", {name: makers(name) for name in ("json", "csv")})
    monkeypatch.setitem(sys.modules, "csv", sys)
    monkeypatch.setitem(sys.modules, "json", sys)
    of_csv = type("Reader", (), {"__module__": "csv.reader"})()
    assert tensors.library_for(of_csv) == "csv"
    assert tensors.library_for(None) == "json"
    assert order == ["csv", "json"]


def test_a_device_is_asked_what_is_the_matter(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")  # a process that has no such library uses no GPU
    assert tensors.failure(0) == ""

    def placed(array: Any, device: int) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(library, "placed", placed)
    assert "illegal memory access" in tensors.failure(0)


def test_torch_tells_who_else_refers_to_memory() -> None:
    torch = pytest.importorskip("torch")
    library = tensors._Torch()
    alone = torch.zeros(4)
    assert library.is_sole(alone)
    part = alone[:2]
    assert not library.is_sole(part)
    assert not library.is_sole(alone)
    del part
    assert library.is_sole(alone)
    shared = alone.detach()
    assert not library.is_sole(shared)
    assert not library.is_sole(CudaArray(np.zeros(1)))


def test_torch_copies_host_memory_that_is_exported() -> None:
    """What PyTorch does with a capsule, without a GPU: the same calls, on the CPU."""
    torch = pytest.importorskip("torch")
    library = tensors._Torch()
    source = torch.arange(4, dtype=torch.float32)
    exported = dlpack.Exported(source.__dlpack__(), (dlpack.CPU, 0))
    assert library.on_host(exported).tolist() == [0.0, 1.0, 2.0, 3.0]
    copy = library.copied(dlpack.Exported(source.__dlpack__(), (dlpack.CPU, 0)), 0)
    assert copy.data_ptr() != source.data_ptr()
    adopted = library.adopted(source.__dlpack__(), 0)
    assert adopted.data_ptr() == source.data_ptr()


class FakeCuda:
    """What torch.cuda and cupy.cuda offer of what is used here, by both of their names; `log` is what was done."""

    def __init__(self) -> None:
        self.log: list[str] = []
        cuda = self

        class Stream:
            count = 0

            def __init__(self, device: int = 0, non_blocking: bool = False) -> None:
                Stream.count += 1
                self.cuda_stream = self.ptr = 100 + Stream.count

        class Event:
            def __init__(self, blocking: bool = False, block: bool = False, disable_timing: bool = True) -> None:
                assert blocking or block, "who waits would spin"

            def record(self, stream: Stream) -> None:
                cuda.log.append(f"record on {stream.ptr}")

            def synchronize(self) -> None:
                cuda.log.append("synchronize")

        self.Stream, self.Event = Stream, Event

    @contextlib.contextmanager
    def device(self, number: int) -> Iterator[None]:
        self.log.append(f"device {number}")
        yield
        self.log.append("device of before")

    Device = device


def fake_library(name: str) -> tuple[Any, FakeCuda]:
    """tensors' own Library over a fake torch or cupy."""
    library = tensors._MAKERS[name].__new__(tensors._MAKERS[name])  # type: ignore[arg-type, call-arg, type-var]
    cuda = FakeCuda()
    library._here = threading.local()
    setattr(library, f"_{name}", SimpleNamespace(cuda=cuda))
    return library, cuda


@pytest.mark.parametrize("name", ["torch", "cupy"])
def test_a_stream_gets_behind_the_work_of_the_thread(name: str) -> None:
    library, cuda = fake_library(name)
    exporter = CudaArray(np.zeros(2), number=1)
    capsule, wait = library.ordered(exporter, 1)
    assert dlpack.describe(capsule).device_id == 1
    assert exporter.streams == [101]
    assert cuda.log == ["device 1", "record on 101", "device of before"]
    wait()
    assert cuda.log[-1] == "synchronize"
    library.ordered(exporter, 1)
    thread = threading.Thread(target=library.ordered, args=(exporter, 1))
    thread.start()
    thread.join()
    assert exporter.streams == [101, 101, 102]  # a stream for each thread


@pytest.fixture(params=["torch", "cupy"])
def gpu(request: pytest.FixtureRequest) -> Any:
    """A library that finds a GPU, as (module, Library)."""
    module = pytest.importorskip(request.param)
    library = tensors._MAKERS[request.param]()
    if not library.count():
        pytest.skip("there is no GPU")
    return module, library


@pytest.mark.gpu
def test_a_real_tensor_is_complete_for_whoever_reads_it(gpu: Any) -> None:
    module, library = gpu
    is_torch = module.__name__ == "torch"
    side = module.cuda.Stream() if is_torch else module.cuda.Stream(non_blocking=True)
    with module.cuda.stream(side) if is_torch else side:
        big = module.ones((4096, 4096), device="cuda") if is_torch else module.ones((4096, 4096), dtype="float32")
        for _ in range(20):
            big = big @ big / 4096
        tensor = DeviceTensor(big, library)
    array = tensor.array()
    assert array.shape == (4096, 4096)
    assert np.all(array == 1.0)
    consumer = module.from_dlpack(tensor)
    assert float(consumer.sum()) == 4096.0 * 4096


@pytest.mark.gpu
def test_real_memory_is_kept_or_copied(gpu: Any) -> None:
    module, library = gpu
    is_torch = module.__name__ == "torch"
    make = (lambda: module.zeros(4, device="cuda")) if is_torch else (lambda: module.zeros(4, dtype="float32"))
    own = DeviceTensor(make(), library)
    assert (own.lasting() is own) is is_torch
    kept_by_model = make()
    lasting = DeviceTensor(kept_by_model, library).lasting()
    kept_by_model += 5
    assert lasting.array().tolist() == [0.0, 0.0, 0.0, 0.0]
    capsule = DeviceTensor(make(), library).__dlpack__()
    adopted = DeviceTensor(library.adopted(capsule, 0), library)
    assert adopted.array().tolist() == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.gpu
@pytest.mark.parametrize("datatype", ["BF16", "BOOL", "INT64", "UINT16", "FP16"])
@pytest.mark.parametrize("shape", [(2, 3), (), (0, 4)])
def test_real_placed_memory_comes_back(gpu: Any, datatype: str, shape: Any) -> None:
    _, library = gpu
    array = np.arange(int(np.prod(shape))).reshape(shape).astype(dlpack.NUMPY[datatype])
    exporter = library.placed(array, 0)
    tensor = DeviceTensor(exporter, library, datatype)
    assert dlpack.describe(tensor.__dlpack__()) == dlpack.Description(dlpack.CUDA, 0, datatype, shape)
    np.testing.assert_array_equal(tensor.array(), array)
    np.testing.assert_array_equal(tensor.lasting().array(), array)


@pytest.mark.gpu
def test_a_real_gpu_that_works_says_nothing(gpu: Any) -> None:
    assert tensors.failure(0) == ""
