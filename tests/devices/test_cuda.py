"""The CUDA device's own code over a PyTorch whose GPU is this processor: what it calls, where, and in which order.

The work is done as soon as it is submitted, so that nothing here tells whether it waits for what it must wait for.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tutti.core.dtypes import NUMPY, Array
from tutti.core.errors import DeviceLost
from tutti.devices.engine import DeviceEngine
from tutti.devices.health import DeviceHealth
from tutti.devices.jobs import Made, Part, Times

torch = pytest.importorskip("torch")
from tutti.devices import cuda  # noqa: E402  (it needs PyTorch)

NUMBER = 3


class Gpu:
    """What of torch.cuda the device uses. A thread that uses device 3 without having chosen it is an error."""

    def __init__(self) -> None:
        self.here = threading.local()
        self.allocated: list[Any] = []
        self.freed = 0
        self.fault: Exception | None = None
        self.Event = lambda **options: Event(self)
        self.Stream = self._stream
        self.cuda = self

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, size: int, dtype: Any, device: str = "cpu", pin_memory: bool = False) -> Any:
        self.check()
        if device != "cpu":
            self.allocated.append(self.current_stream())
        return torch.empty(size, dtype=dtype)

    def _stream(self, device: str, priority: int = 0) -> "Stream":
        self.check()
        return Stream(self)

    def set_device(self, number: int) -> None:
        self.here.number = number

    def current_stream(self, device: Any = None) -> Any:
        return getattr(self.here, "stream", None) or Stream(self)

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before = getattr(self.here, "stream", None)
        self.here.stream = stream
        try:
            yield
        finally:
            self.here.stream = before

    def synchronize(self, number: int) -> None:
        self.check()

    def empty_cache(self) -> None:
        self.freed += 1

    def check(self) -> None:
        assert getattr(self.here, "number", 0) == NUMBER, f"{threading.current_thread().name} begins device 0"
        if self.fault is not None:
            raise self.fault


class Stream(SimpleNamespace):
    def __init__(self, gpu: Gpu) -> None:
        super().__init__(gpu=gpu)

    __hash__ = object.__hash__  # type: ignore[assignment]

    def wait_event(self, event: "Event") -> None:
        assert event.reached_ns, "nothing was recorded"

    def query(self) -> bool:
        self.gpu.check()
        return True


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.reached_ns = 0

    def record(self, stream: Any) -> None:
        self._gpu.check()
        self.reached_ns = time.monotonic_ns()

    def query(self) -> bool:
        self._gpu.check()
        return True

    def synchronize(self) -> None:
        self._gpu.check()

    def elapsed_time(self, end: "Event") -> float:
        assert self.reached_ns and end.reached_ns, "both events must be recorded"
        return (end.reached_ns - self.reached_ns) / 1e6


class TensorJob:
    """Gives `array` to `forward` and keeps what comes out, in host memory."""

    def __init__(self, array: Array, forward: Callable[[Any], Sequence[Any]], stays_there: bool = False) -> None:
        self.rows = 1
        self.ended = threading.Event()
        self.outputs: list[Array] = []
        self.made: Sequence[Made] = ()
        self.error: Exception | None = None
        self._array = array
        self._forward = forward
        self._stays_there = stays_there

    def stage(self) -> Sequence[Part]:
        datatype = next(name for name, dtype in NUMPY.items() if dtype == self._array.dtype)
        return [Part(datatype, self._array.shape, self._array.nbytes, self._write)]

    def _write(self, host: Array) -> None:
        host[:] = np.ascontiguousarray(self._array).reshape(-1).view(np.uint8)

    def launch(self, inputs: Sequence[Any], stream: Any) -> Sequence[Any]:
        return self._forward(inputs[0])

    def stays(self, index: int) -> bool:
        return self._stays_there

    def finish(self, outputs: Sequence[Made], times: Times) -> None:
        self.made = outputs
        self.outputs = [
            output.host.view(self._array.dtype).reshape(tuple(output.array.shape))
            for output in outputs
            if output.host is not None
        ]
        self.ended.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.ended.set()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(cuda, "torch", gpu)
    return gpu


@pytest.fixture
def engine(gpu: Gpu) -> Iterator[DeviceEngine]:
    engine = DeviceEngine(cuda.CudaDevice(NUMBER), DeviceHealth())
    yield engine
    engine.close()


def run(engine: DeviceEngine, *jobs: TensorJob) -> None:
    pipeline = engine.pipeline("model")
    for job in jobs:
        pipeline.submit(job, is_again=True)
    for job in jobs:
        assert job.ended.wait(timeout=30)
    pipeline.close()


@pytest.mark.parametrize("datatype", [name for name in NUMPY if name not in ("BYTES", "BF16")])
@pytest.mark.parametrize("shape", [(2, 3), (1,), (), (0, 3), (5, 0)])
def test_tensors_of_every_form_go_there_and_back(engine: DeviceEngine, datatype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(int(np.prod(shape))).astype(NUMPY[datatype]).reshape(shape)
    job = TensorJob(array, lambda tensor: [tensor, tensor.mT if tensor.ndim == 2 else tensor])
    run(engine, job)
    assert job.error is None
    same, turned = job.outputs
    assert same.shape == shape and np.array_equal(same, array)
    assert np.array_equal(turned, array.T)


def test_memory_of_inputs_comes_from_a_stream_that_executes_nothing(engine: DeviceEngine, gpu: Gpu) -> None:
    used: list[Any] = []

    def forward(tensor: Any) -> Sequence[Any]:
        used.append(gpu.current_stream())
        return [tensor + 1]

    run(engine, *(TensorJob(np.ones(size, np.float32), forward) for size in (10, 10_000, 1_000_000)))
    assert len(gpu.allocated) >= 3 and len(set(gpu.allocated)) == 1
    assert not set(gpu.allocated) & set(used)


def test_an_output_that_stays_is_apart_from_the_inputs_memory(engine: DeviceEngine) -> None:
    jobs = [TensorJob(np.full(4, n, np.int64), lambda tensor: [tensor[1:]], stays_there=True) for n in range(8)]
    for job in jobs:
        run(engine, job)
    assert [job.made[0].array.tolist() for job in jobs] == [[n] * 3 for n in range(8)]


def test_a_device_that_does_not_begin_says_why(gpu: Gpu) -> None:
    gpu.fault = RuntimeError("CUDA unknown error")
    with pytest.raises(RuntimeError, match="CUDA unknown error"):
        cuda.CudaDevice(NUMBER)


def test_a_lost_device_answers_everybody(engine: DeviceEngine, gpu: Gpu) -> None:
    def forward(tensor: Any) -> Sequence[Any]:
        gpu.fault = RuntimeError("CUDA error: device-side assert triggered")
        raise gpu.fault

    first, second = TensorJob(np.ones(1), forward), TensorJob(np.ones(1), lambda tensor: [tensor])
    run(engine, first, second)
    for job in (first, second):
        assert isinstance(job.error, DeviceLost) and "device-side assert" in job.error.message
    gpu.fault = None


class Pending:
    """An event that is reached after so many looks, and tells who has waited for it."""

    def __init__(self, looks: float, on_look: Callable[[], None] = lambda: None) -> None:
        self.reached_ns = 1
        self._looks = looks
        self._on_look = on_look

    def query(self) -> bool:
        self._on_look()
        self._looks -= 1
        return self._looks < 0

    def synchronize(self) -> None: ...


class Told:
    """A notice that keeps who has called it, and with what."""

    def __init__(self) -> None:
        self.by: list[str] = []
        self.error: Exception | None = None
        self.called = threading.Event()

    def __call__(self, error: Exception | None) -> None:
        self.by.append(threading.current_thread().name)
        self.error = error
        self.called.set()


HOUR_NS = 3_600_000_000_000


def lingered(device: cuda.CudaDevice, event: Any, most_ns: int = HOUR_NS) -> Told:
    told = Told()
    stream = device.stream()
    device.call(lambda: device.linger(event, stream, most_ns, told))
    assert told.called.wait(timeout=30)
    return told


@pytest.fixture
def device(gpu: Gpu) -> Iterator[cuda.CudaDevice]:
    gpu.set_device(NUMBER)
    device = cuda.CudaDevice(NUMBER)
    yield device
    device.close()


def test_what_is_under_way_alone_is_waited_for_by_who_submitted_it(device: cuda.CudaDevice) -> None:
    assert lingered(device, Pending(looks=5)).by == [f"cuda:{NUMBER} submits"]


def test_another_thread_waits_where_more_is_posted_or_it_takes_long(device: cuda.CudaDevice) -> None:
    posted: list[int] = []
    looks = iter(range(1000))
    event = Pending(float("inf"), lambda: device.post(lambda: posted.append(1)) if next(looks) == 3 else None)
    for told in (lingered(device, event), lingered(device, Pending(float("inf")), most_ns=0)):
        assert len(told.by) == 1 and "waits" in told.by[0] and told.error is None
    device.call(lambda: None)
    assert posted == [1]


def test_an_event_that_fails_meanwhile_is_told(device: cuda.CudaDevice) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    assert "launch failure" in str(lingered(device, Pending(0, fail)).error)
