"""A joined model on a device: its batches' inputs go straight from the requests into the device engine's pinned memory.

What computes is a Program. Outputs that every caller of a batch takes from the device stay there.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from tutti.backends import device_options
from tutti.backends.joined import JoinedModel, apart
from tutti.core import dtypes, rows
from tutti.core.dtypes import NUMPY, Array
from tutti.core.errors import DeviceLost, InferError, InvalidArgument, OutOfMemory
from tutti.core.types import Call, InferRequest, InferResponse, OnDevice, Shape, Tensor
from tutti.devices.interface import DeviceArray, Stream
from tutti.devices.jobs import Made, Part, Resident, Times
from tutti.devices.pipeline import Pipeline
from tutti.devices.process_engines import engine_of
from tutti.repository import ragged
from tutti.repository.model_config import ModelConfig
from tutti.scheduling.interface import Answers

# Requests of no more than this are joined in ordinary memory first: a copy costs less than numpy's words about it.
_SMALL_BYTES = 4096


class Program(Protocol):
    """A model's computation on one device. Called in the device's submitting thread, its stream the current one."""

    @property
    def library(self) -> str: ...

    @property
    def inputs(self) -> Sequence[str]:
        """The inputs it takes, in their order."""

    def execute(self, inputs: Mapping[str, DeviceArray], names: Sequence[str]) -> Sequence[DeviceArray]:
        """Submit the computation of the outputs `names`, which come in their configured datatypes."""

    def concatenate(self, arrays: Sequence[DeviceArray]) -> DeviceArray:
        """One array of the rows of all."""

    def adopt(self, tensor: OnDevice) -> DeviceArray:
        """Another library's tensor on this device, which is complete, without a copy."""

    def close(self) -> None:
        """Release what it holds on the device."""


class TensorOnDevice:
    """An output in a device's memory, complete: an OnDevice."""

    __slots__ = ("_read", "array_there", "device", "nbytes", "shape")

    def __init__(self, array: DeviceArray, device: str, read: Callable[[DeviceArray], Array]) -> None:
        self.array_there = array
        self.device = device
        self.shape: Shape = tuple(array.shape)
        self.nbytes = int(array.nbytes)
        self._read = read

    def wait(self) -> None:
        """It is complete."""

    def array(self) -> Array:
        return self._read(self.array_there)

    def part(self, start: int, stop: int) -> "TensorOnDevice":
        """Some of its rows, without a copy."""
        return TensorOnDevice(self.array_there[start:stop], self.device, self._read)

    def __dlpack__(self, **options: Any) -> Any:
        return self.array_there.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self.array_there.__dlpack_device__()
        return device


class DeviceBackend(JoinedModel):
    """One instance on `device`, as "cuda:0": it gives batches to the device's engine, several at a time."""

    runs_inline = False

    def __init__(self, config: ModelConfig, version: str, device: str, program: Program) -> None:
        super().__init__(config, version)
        self.kind = device.partition(":")[0]
        # It is also where its inputs may be.
        self.device = self.shares_device = device
        self.library = program.library
        self.program = program
        self.engine = engine_of(device)
        optimization = config.proto.optimization
        self.pipeline: Pipeline = self.engine.pipeline(
            config.name,
            device_options.weight(config),
            -(optimization.priority == 1),
            hang_ns=device_options.hang_ns(config),
            is_urgent=optimization.cuda.busy_wait_events,
        )
        self.pipeline.version = version

    def holds(self, owner: object, nbytes: int) -> None:
        """Let metrics tell of memory on the device, where it is known. What instances share is counted once."""
        if nbytes:
            self.pipeline.memory[id(owner)] = nbytes

    def batch(self, requests: Sequence[InferRequest]) -> "DeviceBatch":
        """What their execution needs, and how its outputs become their answers."""
        return DeviceBatch(self, requests)

    def execute(self, calls: Sequence[Call]) -> Answers:
        """A batch by itself, waited for, as warm-ups are; where it fails, only culprits fail."""
        requests = [call.request for call in calls]
        try:
            work = self.batch(requests)
            return execute_and_wait(self.pipeline, work, sum([call.rows for call in calls]))
        except (OutOfMemory, DeviceLost):
            raise
        except InferError as error:
            refusals = self.refusals(requests) if isinstance(error, InvalidArgument) else [None] * len(calls)
            return apart(calls, refusals, error, self.execute)

    def close(self) -> None:
        self.pipeline.close()
        self.engine.alone(self.program.close)


class DeviceBatch:
    """One batch: its inputs as parts, its launch, and its answers."""

    def __init__(self, backend: DeviceBackend, requests: Sequence[InferRequest]) -> None:
        self._backend = backend
        self._requests = requests
        self._names, self._is_alike = backend.wanted(requests)
        self._order: list[tuple[str, int]] = []
        first, *others = (request.device_outputs for request in requests)
        # A part of what stays would hold all of it; but rows of one batch go the same way. Parts of unequal shapes are
        # cut from host memory.
        self._staying = first.intersection(*others) if first and not backend.config.ragged else frozenset()

    def parts(self) -> list[Part]:
        """The inputs, in the program's order. Raises InferError for what must not reach the device."""
        config = self._backend.config
        extra = config.ragged.made(self._requests) if config.ragged else {}
        inputs = self._requests[0].inputs
        parts: list[Part] = []
        for name in self._backend.program.inputs:
            if name in extra:
                added = [_part_of(extra[name], dtypes.from_numpy(extra[name].dtype))]
            elif name in inputs:
                added = self._input(name)
            else:
                continue
            self._order.append((name, len(added)))
            parts += added
        return parts

    def launch(self, arrays: Sequence[DeviceArray], stream: Stream) -> Sequence[DeviceArray]:
        program = self._backend.program
        inputs: dict[str, DeviceArray] = {}
        position = 0
        for name, count in self._order:
            stretch = arrays[position : position + count]
            inputs[name] = stretch[0] if count == 1 else program.concatenate(stretch)
            position += count
        return program.execute(inputs, self._names)

    def stays(self, index: int) -> bool:
        return bool(self._staying) and self._names[index] in self._staying

    def answers(self, outputs: Sequence[Made]) -> Sequence[InferResponse]:
        """The calls' answers, in order."""
        tensors = [self._output(name, output) for name, output in zip(self._names, outputs, strict=True)]
        self._backend.check_outputs(self._requests, tensors)
        if not self._staying or len(self._requests) == 1:
            return self._backend.answers(self._requests, tensors, self._is_alike)
        return self._split(tensors)

    def failure(self, error: Exception) -> InferError:
        """The error as the first call's."""
        if isinstance(error, InferError):
            return type(error)(f"model '{self._backend.config.name}': {error.message}")
        return self._backend.failure(self._requests[0], error)

    def _input(self, name: str) -> list[Part]:
        config = self._backend.config
        tensors = [request.inputs[name] for request in self._requests]
        if name in config.ragged.inputs:
            flat = ragged.flattened(self._requests, name)
            config.bounds.check(name, flat)
            return [_part_of(flat, tensors[0].datatype)]
        if name not in config.bounds.ranges and all(self._is_there(tensor) for tensor in tensors):
            return [self._resident(tensor) for tensor in tensors]
        first = tensors[0]
        raws = [tensor.raw() for tensor in tensors]
        shape = first.shape
        if len(tensors) > 1:
            shape = (sum([tensor.shape[0] for tensor in tensors]), *first.shape[1:])
        size = math.prod(shape) * NUMPY[first.datatype].itemsize
        byte_size = sum([len(raw) for raw in raws])
        if byte_size != size:
            expected = f"expected {size} bytes for {first.datatype}{list(shape)}, got {byte_size}"
            raise InvalidArgument(f"input '{name}': {expected}")
        return [Part(first.datatype, shape, size, partial(self._write, name, first.datatype, shape, raws))]

    def _write(self, name: str, datatype: str, shape: Shape, raws: Sequence[Any], host: Array) -> None:
        """The rows of all requests, one after the other; what is out of range goes no further."""
        if len(host) < len(raws) * _SMALL_BYTES:
            host[:] = np.frombuffer(b"".join(raws), np.uint8)
        else:
            position = 0
            for raw in raws:
                size = len(raw)
                host[position : position + size] = np.frombuffer(raw, np.uint8)
                position += size
        if name in self._backend.config.bounds.ranges:
            self._backend.config.bounds.check(name, host.view(NUMPY[datatype]).reshape(shape))

    def _is_there(self, tensor: Tensor) -> bool:
        data: Any = tensor.data
        return getattr(data, "device", None) == self._backend.device and not isinstance(data, np.ndarray)

    def _resident(self, tensor: Tensor) -> Part:
        data: Any = tensor.data
        array = data.array_there if isinstance(data, TensorOnDevice) else self._backend.program.adopt(data)
        return Part(tensor.datatype, tensor.shape, resident=Resident(array.reshape(tensor.shape)))

    def _output(self, name: str, output: Made) -> Tensor:
        datatype = self._backend.datatype(name)
        shape = tuple(output.array.shape)
        if output.host is None:
            there = TensorOnDevice(output.array, self._backend.device, self._backend.engine.device.read)
            return Tensor(name, datatype, shape, there)
        return Tensor(name, datatype, shape, output.host.view(NUMPY[datatype]).reshape(shape))

    def _split(self, outputs: Sequence[Tensor]) -> list[InferResponse]:
        """Each request's rows of outputs some of which are on the device."""
        answers = []
        start = 0
        for request in self._requests:
            stop = start + next(iter(request.inputs.values())).shape[0]
            parts = [
                rows.part(output, start, stop)
                for output in outputs
                if not request.outputs or output.name in request.outputs
            ]
            answers.append(self._backend.response(parts))
            start = stop
        return answers


def _part_of(array: Array, datatype: str) -> Part:
    """An input that is one array in host memory."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def write(host: Array) -> None:
        host[:] = flat

    return Part(datatype, array.shape, flat.nbytes, write)


class DeviceWork(Protocol):
    """A batch on its way through a device; wrappers of backends wrap it."""

    def parts(self) -> list[Part]: ...
    def launch(self, arrays: Sequence[DeviceArray], stream: Stream) -> Sequence[DeviceArray]: ...
    def stays(self, index: int) -> bool: ...
    def answers(self, outputs: Sequence[Made]) -> Answers: ...
    def failure(self, error: Exception) -> InferError: ...


def execute_and_wait(pipeline: Pipeline, work: DeviceWork, count: int) -> Answers:
    """One batch through the pipeline, waited for. Raises what it fails with."""
    job = _WaitedFor(work, count)
    pipeline.submit(job, is_again=True)
    job.ended.wait()
    if job.error is not None:
        raise work.failure(job.error)
    return job.answers


class _WaitedFor:
    """The engine's job for `execute_and_wait`."""

    def __init__(self, work: DeviceWork, rows: int) -> None:
        self.rows = rows
        self.answers: Answers = ()
        self.error: Exception | None = None
        self.ended = threading.Event()
        self.stage = work.parts
        self.launch = work.launch
        self.stays = work.stays
        self._work = work

    def finish(self, outputs: Sequence[Made], times: Times) -> None:
        try:
            self.answers = self._work.answers(outputs)
        except Exception as error:
            self.error = error
        self.ended.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.ended.set()
