"""TensorRT plans (`model.plan`), executed by TensorRT's own runtime on a stream and in buffers of each instance.

PyTorch holds the device's memory and streams. With `optimization { cuda { graphs: true } }` an execution of shapes
that were seen before is replayed as a CUDA graph. A plan fits only the TensorRT version that built it, and its profiles
bound the shapes: both are checked when it loads.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tutti import backends
from tutti.backends.joined import JoinedBackend
from tutti.config import ModelConfig
from tutti.dtypes import NUMPY, Array
from tutti.errors import ConfigError, InvalidArgument, OutOfMemory
from tutti.repository import ModelFolder
from tutti.scheduler import Backend
from tutti.types import Infer

_MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
MAX_GRAPHS = 16
_DATATYPES = {
    "BOOL": "BOOL", "INT8": "INT8", "UINT8": "UINT8", "INT32": "INT32", "INT64": "INT64", "HALF": "FP16",
    "BF16": "BF16", "FLOAT": "FP32",
}  # fmt: skip


def load(folder: ModelFolder, version: int, infer: Infer) -> list[Backend]:
    """One engine for each GPU, one execution context for each instance."""
    config = folder.config
    path = backends.model_file(folder, version, "model.plan")
    trt = _module(config)
    if any(group.kind == "cpu" for group in config.instance_groups):
        raise ConfigError(f"model '{config.name}': instance_group.kind: a TensorRT plan executes on GPUs only")
    if not torch.cuda.is_available():
        raise ConfigError(f"model '{config.name}': a TensorRT plan needs a GPU, and there is none")
    plan = path.read_bytes()
    engines: dict[int, Any] = {}
    loaded: list[Backend] = []
    for _, number in backends.instances(config):
        if number not in engines:
            with torch.cuda.device(number):
                runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
                engine = runtime.deserialize_cuda_engine(plan)
            if engine is None:
                what = f"was built by another version of TensorRT than {trt.__version__}, or for another GPU"
                raise ConfigError(f"model '{config.name}': {path.name} {what}")
            check(config, engine, trt)
            engines[number] = (engine, runtime)  # an engine does not keep its runtime
        loaded.append(TensorRtBackend(config, str(version), engines[number], trt, number))
    return loaded


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


class TensorRtBackend(JoinedBackend):
    """One execution context, with a stream and buffers of its own."""

    library = "TensorRT"

    def __init__(self, config: ModelConfig, version: str, engine: tuple[Any, Any], trt: Any, number: int) -> None:
        super().__init__(config, version, f"cuda:{number}")
        self._engine, self._runtime = engine
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise ConfigError(f"model '{config.name}': TensorRT has no memory for an execution context")
        self._stream = torch.cuda.Stream(self.device)
        self._inputs = tuple(spec.name for spec in config.inputs)
        self._host: dict[str, Any] = {}
        self._there: dict[str, Any] = {}
        self._graphs: dict[tuple[tuple[int, ...], ...], Any] | None = (
            {} if config.proto.optimization.cuda.graphs else None
        )
        self._profile = _Profile(self._engine, self._inputs)

    def run(self, names: Sequence[str], feed: Mapping[str, Array]) -> Sequence[Array]:
        self._profile.check({name: array.shape for name, array in feed.items()})
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
                for name, array in feed.items():
                    self._put(name, array)
                self._execute_there(tuple(feed[name].shape for name in self._inputs))
                back = {name: self._pinned(name, self._there[name]) for name in names}
            self._stream.synchronize()
        except torch.cuda.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise OutOfMemory(f"TensorRT has no memory left on {self.device}: {error}") from None
        return [
            back[name].view(NUMPY[self._datatypes[name]]).reshape(tuple(self._shape(name))).copy() for name in names
        ]

    def _shape(self, name: str) -> Sequence[int]:
        return tuple(self._context.get_tensor_shape(name))

    def _put(self, name: str, array: Array) -> None:
        """Through pinned memory to the device; both buffers stay for the next batch, as CUDA graphs need them to."""
        size = array.nbytes
        host = self._host.get(name)
        if host is None or host.numel() < size:
            host = self._host[name] = torch.empty(max(size, 1), dtype=torch.uint8, pin_memory=True)
            self._reserve(name, size)
        host.numpy()[:size] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._there[name][:size].copy_(host[:size], non_blocking=True)
        self._context.set_input_shape(name, array.shape)

    def _reserve(self, name: str, size: int) -> None:
        there = self._there.get(name)
        if there is None or there.numel() < size:
            self._there[name] = torch.empty(max(size, 1), dtype=torch.uint8, device=self.device)
            if self._graphs is not None:
                self._graphs.clear()  # they point to what was there before
        self._context.set_tensor_address(name, self._there[name].data_ptr())

    def _execute_there(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        for name, datatype in self._datatypes.items():
            self._reserve(name, int(np.prod(self._shape(name))) * NUMPY[datatype].itemsize)
        if self._graphs is None:
            self._enqueue()
            return
        graph = self._graphs.get(shapes)
        if graph is None:
            self._enqueue()  # TensorRT prepares itself for new shapes, which cannot be captured
            if len(self._graphs) < MAX_GRAPHS:
                self._stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=self._stream):
                    self._enqueue()
                self._graphs[shapes] = graph
            return
        graph.replay()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise RuntimeError("the execution could not be enqueued")

    def _pinned(self, name: str, there: Any) -> Array:
        size = int(np.prod(self._shape(name))) * NUMPY[self._datatypes[name]].itemsize
        host = torch.empty(max(size, 1), dtype=torch.uint8, pin_memory=True)
        host[:size].copy_(there[:size], non_blocking=True)
        array: Array = host.numpy()[:size]
        return array


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
