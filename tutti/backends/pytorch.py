"""PyTorch: torch.export packages (`model.pt2`) and TorchScript (`model.pt`), on the processor and on GPUs.

Inputs and outputs are found as Triton's backend finds them: by the index in a name that ends in `__INDEX`, otherwise
inputs by the names of forward's arguments, and outputs by their keys where forward returns a dict, else in order.
Honours the parameters `INTRA_OP_THREAD_COUNT`, `INTER_OP_THREAD_COUNT` and `INFERENCE_MODE`, and compiles a model that
asks for it (compiled.py). And `tutti.gpu_model_filename`: the file for GPUs, as one with 16 bits.
"""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tutti.backends import aot_packages, compile_options, compiled, joined, model_files, placement, verification
from tutti.backends.compile_options import Compilation
from tutti.backends.cuda_graphs import ModelGraphs
from tutti.backends.joined import JoinedBackend
from tutti.backends.on_device import DeviceBackend, Program
from tutti.backends.torch_modules import Module, order_of
from tutti.core.daemon_threads import Pool
from tutti.core.dtypes import Array
from tutti.core.errors import ConfigError
from tutti.core.types import Infer, OnDevice
from tutti.devices.cuda import empty_caches, loading
from tutti.devices.simulated import simulated_gpus
from tutti.repository.folders import ModelFolder
from tutti.repository.model_config import InstanceGroup, ModelConfig
from tutti.scheduling.interface import Backend, undone

_log = logging.getLogger(__name__)

EXPORTED = "model.pt2"
# One thread loads, for as long as the process lives: PyTorch 2.11 for CUDA crashes where there is no device and another
# thread loads a package after the first has ended.
_loader = Pool(1, "pytorch loads")


def load(folder: ModelFolder, version: int, infer: Infer) -> list[Backend]:
    """The weights once on each device; each instance has a CUDA stream of its own there."""
    config = folder.config
    for spec in (*config.inputs, *config.outputs):
        if spec.datatype == "BYTES":
            raise ConfigError(f"model '{config.name}': '{spec.name}': the pytorch backend has no BYTES tensors")
    _set_threads(config)
    loaded: list[Backend] = []
    modules: dict[str, Module] = {}
    compilations: dict[Path, Compilation | None] = {}
    graphs = ModelGraphs(folder, version)
    devices = [_device(config, group, number) for group, number in placement.instances(config)]
    with undone(loaded):
        for device in devices:
            if device not in modules:
                path = _file(folder, version, device)
                if path not in compilations:
                    compilations[path] = compile_options.wanted(config, path)
                compilation = compilations[path]
                if device != "cpu" and graphs.are_planned:
                    if compilation is not None:  # what is tried is what will serve
                        compiled.entry(config, compilation, path, _place(device))
                    graphs.try_on(device)
                modules[device] = _module(config, path, device, compilation, devices.count(device))
            make = _on_host if device == "cpu" else partial(_on_device, device, graphs)
            loaded.append(make(config, str(version), modules[device]))
    for device, module in modules.items():
        if device != "cpu" and module.nbytes:
            _log.info("model '%s' version %d: %.1f MiB on %s", config.name, version, module.nbytes / 2**20, device)
    return loaded


def _on_host(config: ModelConfig, version: str, module: Module) -> Backend:
    backend = TorchBackend(config, version, module)
    backend.joins = not joined.may_join(config) or joined.makes_rows(config, backend.run) is not False
    if not backend.joins:
        _log.warning("model '%s' makes other rows than the batch's: its requests are executed one by one", config.name)
    return backend


def _on_device(device: str, graphs: ModelGraphs, config: ModelConfig, version: str, module: Module) -> Backend:
    backend = DeviceBackend(config, version, device, _program(config, module))
    backend.holds(module, module.nbytes)
    graphs.add_to(backend)
    return backend


def program(folder: ModelFolder, version: int, device: str) -> Program:
    """The model on one GPU, compiled if it has been before."""
    config, path = folder.config, _file(folder, version, device)
    return _program(
        config,
        _module(config, path, device, compile_options.wanted(config, path, makes=False), 1),
    )


def _module(config: ModelConfig, path: Path, device: str, compilation: Compilation | None, runners: int) -> Module:
    """The model's callable on a device, for so many instances."""
    place = _place(device)
    forward = _forward(config, path, place, compilation, runners)
    module = Module(config, *forward[:2], place, writes_inputs=forward[2])
    if place != "cpu":
        with loading:  # no graph may be captured there meanwhile
            torch.cuda.synchronize(device)  # it loads on this thread's stream, and executes on another
    return module


def _program(config: ModelConfig, module: Module) -> Program:
    return (SimulatedTorchProgram if simulated_gpus() else TorchProgram)(config, module)


def _file(folder: ModelFolder, version: int, device: str) -> Path:
    """The configured file, by default `model.pt2` where there is one, else `model.pt`; on GPUs the variant for them."""
    if device != "cpu" and folder.config.gpu_filename:
        return model_files.version_file(folder, version, folder.config.gpu_filename)
    filename = folder.config.model_filename
    if filename in ("", "model.pt") and (folder.version_path(version) / EXPORTED).is_file():
        return folder.version_path(version) / EXPORTED
    return model_files.model_file(folder, version, "model.pt")


def _device(config: ModelConfig, group: InstanceGroup, number: int) -> str:
    has_gpus = torch.cuda.is_available() or simulated_gpus() > 0
    if group.kind == "gpu" and not has_gpus:
        raise ConfigError(f"model '{config.name}': instance_group.kind: KIND_GPU, but PyTorch finds no CUDA")
    return f"cuda:{number}" if group.kind != "cpu" and has_gpus else "cpu"


def _place(device: str) -> str:
    """Where PyTorch keeps what is on the device."""
    return "cpu" if simulated_gpus() else device


def _set_threads(config: ModelConfig) -> None:
    """They are the whole process's, in PyTorch."""
    intra = joined.whole_number(config, "INTRA_OP_THREAD_COUNT")
    inter = joined.whole_number(config, "INTER_OP_THREAD_COUNT")
    with loading:
        if intra:
            torch.set_num_threads(intra)
        if inter and inter != torch.get_num_interop_threads():
            try:
                torch.set_num_interop_threads(inter)
            except RuntimeError as error:  # only before the first use
                raise ConfigError(f"model '{config.name}': parameters.INTER_OP_THREAD_COUNT: {error}") from None


def _forward(
    config: ModelConfig, path: Path, device: str, compilation: Compilation | None, runners: int
) -> tuple[Callable[..., Any], list[str], bool]:
    """The model's callable on the device, the names of its arguments, and whether it may write to them.

    `runners` instances execute it.
    """
    if path.suffix != ".pt2":
        module = _loaded(config, path, lambda: _scripted(path, device))
        return module, [argument.name for argument in module.forward.schema.arguments[1:]], _writes_inputs(module)
    if compile_options.is_package(path):
        return *aot_packages.package(config, path, device, runners), True  # it does not tell
    # Without the lock: it may take minutes.
    folder = compiled.entry(config, compilation, path, device) if compilation is not None else None
    program = _loaded(config, path, lambda: compiled.exported(path, device))
    forward = None
    if compilation is not None and folder is not None:
        filling = fills(config, program)
        forward = compiled.verified(config, compilation, folder, program, device, filling, runners)
    # The guards are of the shapes that it was traced with: narrower than what it can do.
    return forward or program.module(check_guards=False), _arguments(program), _writes_anywhere(program)


def _writes_inputs(module: Any) -> bool:
    """Whether a TorchScript module may write to its arguments; true where that cannot be told."""
    try:
        graph = module.inlined_graph
        aliases = graph.alias_db()
        return any(aliases.has_writers(value) for value in list(graph.inputs())[1:])
    except Exception:
        return True


def _writes_anywhere(program: Any) -> bool:
    """Whether an exported program has operators that write in place: to its inputs, maybe."""
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    schemas = [getattr(node.target, "_schema", None) for graph in graphs for node in graph.nodes]
    is_written = bool(program.graph_signature.user_inputs_to_mutate)
    return is_written or any(schema is not None and schema.is_mutable for schema in schemas)


def _scripted(path: Path, device: str) -> Any:
    if device != "cpu":
        # By default fused kernels are compiled for each shape anew, and each batch may have its own.
        torch.jit.set_fusion_strategy([("DYNAMIC", 2)])
    return torch.jit.load(str(path), map_location=device).eval()


def _loaded(config: ModelConfig, path: Path, load: Callable[[], Any]) -> Any:
    try:
        with loading, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, which is its author's concern
            return _loader.submit(load).result()
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"model '{config.name}': PyTorch cannot load {path.name}: {reason}") from None


def _arguments(program: Any) -> list[str]:
    """The names of an exported program's arguments."""
    return [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]


def fills(config: ModelConfig, program: Any) -> list[verification.Fill]:
    """What to fill the arguments of an exported program with, where it is tried."""
    return verification.fills(config, order_of(config, _arguments(program)))


class TorchProgram:
    """A Program (on_device.py) over a module whose weights are on the device."""

    library = "PyTorch"

    def __init__(self, config: ModelConfig, module: Module) -> None:
        self._module = module
        module.begin_use()
        self.inputs = module.order

    def execute(self, inputs: Mapping[str, Any], names: Sequence[str]) -> Sequence[Any]:
        return self._module(inputs, names)

    def concatenate(self, arrays: Sequence[Any]) -> Any:
        return torch.cat(list(arrays))

    def adopt(self, tensor: OnDevice) -> Any:
        tensor.wait()
        return torch.from_dlpack(tensor)

    def close(self) -> None:
        """Give the weights back, with the last instance."""
        self._module.end_use()
        if torch.cuda.is_initialized():
            empty_caches()


class SimulatedTorchProgram(TorchProgram):
    """The same on a simulated device, whose arrays are numpy's."""

    def __init__(self, config: ModelConfig, module: Module) -> None:
        super().__init__(config, module)
        self._bfloat = _of_bfloat(config)

    def execute(self, inputs: Mapping[str, Any], names: Sequence[str]) -> Sequence[Any]:
        tensors = {name: _tensor(array, name in self._bfloat) for name, array in inputs.items()}
        return [_array(tensor) for tensor in super().execute(tensors, names)]

    def concatenate(self, arrays: Sequence[Any]) -> Any:
        return np.concatenate(arrays)

    def adopt(self, tensor: OnDevice) -> Any:
        return tensor.array()


class TorchBackend(JoinedBackend):
    """One instance on the processor."""

    library = "PyTorch"

    def __init__(self, config: ModelConfig, version: str, module: Module) -> None:
        super().__init__(config, version)
        self._module = module
        module.begin_use()
        self._bfloat = _of_bfloat(config)

    def run(self, names: Sequence[str], feed: Mapping[str, Array]) -> Sequence[Array]:
        outputs = self._module({name: _tensor(array, name in self._bfloat) for name, array in feed.items()}, names)
        return [_array(tensor) for tensor in outputs]

    def close(self) -> None:
        super().close()
        self._module.end_use()


def _of_bfloat(config: ModelConfig) -> frozenset[str]:
    """The tensors that are BF16, which numpy has not: there its bits stand for it."""
    return frozenset(spec.name for spec in config.inputs if spec.datatype == "BF16")


def _tensor(array: Array, is_bfloat: bool) -> Any:
    if not array.flags.writeable:  # a request's bytes cannot be written to, and are not
        array = _writeable(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if is_bfloat else torch.from_numpy(array)


def _array(tensor: Any) -> Array:
    is_bfloat = tensor.dtype == torch.bfloat16
    array: Array = tensor.view(torch.int16).numpy().view(np.uint16) if is_bfloat else tensor.numpy()
    return array


def _writeable(array: Array) -> Array:
    """The same memory as an array that may be written to: PyTorch warns of others, and knows none."""
    interface = {**array.__array_interface__, "data": (array.__array_interface__["data"][0], False)}
    return np.asarray(_Memory(interface, array))


class _Memory:
    """Another array's memory."""

    def __init__(self, interface: Mapping[str, Any], owner: Array) -> None:
        self.__array_interface__ = interface
        self._owner = owner
