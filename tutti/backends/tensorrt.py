"""TensorRT plans (`model.plan`), executed by TensorRT's own runtime in a context of each instance.

PyTorch holds the device's memory and streams. A plan fits only the TensorRT version that built it, and its profiles
bound the shapes: both are checked when it loads.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tutti.backends import model_files, placement
from tutti.backends.cuda_graphs import ModelGraphs
from tutti.backends.on_device import DeviceBackend, Program
from tutti.core.errors import ConfigError, InvalidArgument
from tutti.core.types import Infer, OnDevice
from tutti.devices.cuda import TORCH, loading
from tutti.repository.folders import ModelFolder
from tutti.repository.model_config import ModelConfig
from tutti.scheduling.interface import Backend, undone

_MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
_ALIGNMENT = 256
_DATATYPES = {
    "BOOL": "BOOL", "INT8": "INT8", "UINT8": "UINT8", "INT32": "INT32", "INT64": "INT64", "HALF": "FP16",
    "BF16": "BF16", "FLOAT": "FP32",
}  # fmt: skip


def load(folder: ModelFolder, version: int, infer: Infer) -> list[Backend]:
    """One engine for each GPU, one execution context for each instance."""
    config = folder.config
    path = model_files.model_file(folder, version, "model.plan")
    trt = _module(config)
    if any(group.kind == "cpu" for group in config.instance_groups):
        raise ConfigError(f"model '{config.name}': instance_group.kind: a TensorRT plan executes on GPUs only")
    if not torch.cuda.is_available():
        raise ConfigError(f"model '{config.name}': a TensorRT plan needs a GPU, and there is none")
    engines: dict[int, Any] = {}
    loaded: list[Backend] = []
    graphs = ModelGraphs(folder, version)
    with undone(loaded):
        for _, number in placement.instances(config):
            if number not in engines:
                graphs.try_on(f"cuda:{number}")
                engines[number] = _engine(config, path, trt, number)
            executing = TensorRtProgram(config, engines[number], trt, number)
            backend = DeviceBackend(config, str(version), f"cuda:{number}", executing)
            loaded.append(backend)
            graphs.add_to(backend)
    return loaded


def program(folder: ModelFolder, version: int, device: str) -> Program:
    """The plan on one GPU."""
    config, trt, number = folder.config, _module(folder.config), int(device.partition(":")[2])
    engine = _engine(config, model_files.model_file(folder, version, "model.plan"), trt, number)
    return TensorRtProgram(config, engine, trt, number)


def _engine(config: ModelConfig, path: Path, trt: Any, number: int) -> tuple[Any, Any]:
    """The plan's engine, and its runtime, which it does not keep. Raises ConfigError for a plan that does not fit."""
    with loading, torch.cuda.device(number):
        runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        reason = f"was built by another version of TensorRT than {trt.__version__}, or for another GPU"
        raise ConfigError(f"model '{config.name}': {path.name} {reason}")
    check(config, engine, trt)
    return engine, runtime


def _module(config: ModelConfig) -> Any:
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ConfigError(
        f"model '{config.name}': backend: 'tensorrt' needs TensorRT, and none of {', '.join(_MODULES)} is installed"
    )


def check(config: ModelConfig, engine: Any, trt: Any) -> None:
    """Compare the plan's tensors, datatypes and profile with the configuration.

    Raises ConfigError naming the tensor.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    for kind, specs, mode in (
        ("input", config.inputs, trt.TensorIOMode.INPUT),
        ("output", config.outputs, trt.TensorIOMode.OUTPUT),
    ):
        in_plan = [name for name in names if engine.get_tensor_mode(name) == mode]
        for spec in specs:
            where = f"model '{config.name}': {kind} '{spec.name}'"
            if spec.name not in in_plan:
                raise ConfigError(f"{where}: the plan has {sorted(in_plan)}")
            datatype = _DATATYPES.get(engine.get_tensor_dtype(spec.name).name, "?")
            if datatype != spec.datatype:
                raise ConfigError(f"{where}: configured as {spec.datatype}, the plan has {datatype}")
            if kind == "input" and config.is_batched:
                largest = engine.get_tensor_profile_shape(spec.name, 0)[2][0]
                if largest < config.max_batch_size:
                    raise ConfigError(
                        f"{where}: max_batch_size is {config.max_batch_size}, the plan's profile ends at {largest}"
                    )
        missing = set(in_plan) - {spec.name for spec in specs} if kind == "input" else set()
        if missing:
            raise ConfigError(f"model '{config.name}': input: the plan also needs {sorted(missing)}")


class TensorRtProgram:
    """A Program (on_device.py): one execution context, on the stream that is current."""

    library = "TensorRT"

    def __init__(self, config: ModelConfig, engine: tuple[Any, Any], trt: Any, number: int) -> None:
        self._engine, self._runtime = engine
        self._trt = trt
        self._device = f"cuda:{number}"
        self.inputs = tuple(spec.name for spec in config.inputs)
        self._datatypes = {spec.name: spec.datatype for spec in config.outputs}
        self._profile = _Profile(self._engine, self.inputs)
        with loading, torch.cuda.device(number):
            self._context = self._engine.create_execution_context()
            torch.cuda.synchronize()  # what this thread's stream has begun, others execute with
        if self._context is None:
            raise ConfigError(f"model '{config.name}': TensorRT has no memory for an execution context")

    def execute(self, inputs: Mapping[str, Any], names: Sequence[str]) -> Sequence[Any]:
        self._profile.check({name: tuple(tensor.shape) for name, tensor in inputs.items()})
        inputs = {name: _aligned(tensor) for name, tensor in inputs.items()}
        for name, tensor in inputs.items():
            self._context.set_input_shape(name, tuple(tensor.shape))
            self._context.set_tensor_address(name, tensor.data_ptr())
        outputs = {name: self._output(name) for name in self._datatypes}
        if not self._context.execute_async_v3(torch.cuda.current_stream(self._device).cuda_stream):
            raise RuntimeError("the execution could not be enqueued")
        return [output() for output in (outputs[name] for name in names)]

    def concatenate(self, arrays: Sequence[Any]) -> Any:
        return torch.cat(list(arrays))

    def adopt(self, tensor: OnDevice) -> Any:
        tensor.wait()
        return torch.from_dlpack(tensor)

    def close(self) -> None:
        del self._context, self._engine, self._runtime

    def _output(self, name: str) -> Callable[[], Any]:
        """Have the context write an output to memory of PyTorch's; returns what gives the tensor afterwards."""
        shape = tuple(self._context.get_tensor_shape(name))
        dtype = TORCH[self._datatypes[name]]
        if all(length >= 0 for length in shape):
            tensor = torch.empty(shape, dtype=dtype, device=self._device)
            self._context.set_tensor_address(name, tensor.data_ptr())
            return lambda: tensor
        allocator = _allocator(self._trt)(self._device)
        self._context.set_output_allocator(name, allocator)
        return lambda: allocator.tensor(dtype)


def _aligned(tensor: Any) -> Any:
    """The tensor as TensorRT takes it: rows of another model's output may begin anywhere in its memory."""
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 and tensor.is_contiguous() else tensor.clone().contiguous()


def _allocator(trt: Any) -> Any:
    """The class that gives TensorRT memory for an output whose shape is known only when it is executed."""

    class Allocator(trt.IOutputAllocator):
        def __init__(self, device: str) -> None:
            super().__init__()
            self._device = device
            self._memory: Any = None
            self._shape: tuple[int, ...] = ()

        def reallocate_output_async(self, name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            self._memory = torch.empty(max(size, 1), dtype=torch.uint8, device=self._device)
            return int(self._memory.data_ptr())

        def notify_shape(self, name: str, shape: Any) -> None:
            self._shape = tuple(shape)

        def tensor(self, dtype: Any) -> Any:
            size = dtype.itemsize * int(np.prod(self._shape))
            return self._memory[:size].view(dtype).view(self._shape)

    return Allocator


class _Profile:
    """What shapes a plan takes."""

    def __init__(self, engine: Any, inputs: Sequence[str]) -> None:
        self._bounds = {}
        for name in inputs:
            low, _, high = engine.get_tensor_profile_shape(name, 0)
            self._bounds[name] = (tuple(low), tuple(high))

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises InvalidArgument for a shape outside of the profile."""
        for name, shape in shapes.items():
            low, high = self._bounds[name]
            if len(shape) != len(low) or not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
                bounds = f"{list(low)} to {list(high)}"
                raise InvalidArgument(f"input '{name}': the plan takes shapes from {bounds}, got {list(shape)}")
