"""PyTorch: torch.export packages (`model.pt2`) and TorchScript (`model.pt`), on the processor and on GPUs.

Inputs and outputs are found as Triton's backend finds them: by the index in a name that ends in `__INDEX`, otherwise
inputs by the names of forward's arguments, and outputs by their keys where forward returns a dict, else in order.
Honours the parameters `INTRA_OP_THREAD_COUNT`, `INTER_OP_THREAD_COUNT` and `INFERENCE_MODE`.
"""

import re
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tutti import backends
from tutti.backends import joined
from tutti.backends.joined import JoinedBackend
from tutti.config import InstanceGroup, ModelConfig
from tutti.dtypes import Array
from tutti.errors import ConfigError, Internal, OutOfMemory
from tutti.repository import ModelFolder
from tutti.scheduler import Backend
from tutti.types import Infer

EXPORTED = "model.pt2"
_INDEX = re.compile(r".*__(\d+)")
_loading = threading.Lock()


def load(folder: ModelFolder, version: int, infer: Infer) -> list[Backend]:
    """The weights once on each device; each instance has a CUDA stream of its own there."""
    config = folder.config
    for spec in (*config.inputs, *config.outputs):
        if spec.datatype == "BYTES":
            raise ConfigError(f"model '{config.name}': '{spec.name}': the pytorch backend has no BYTES tensors")
    path = _file(folder, version)
    _set_threads(config)
    loaded: list[Backend] = []
    forwards: dict[str, tuple[Callable[..., Any], list[str]]] = {}
    for group, number in backends.instances(config, torch.cuda.is_available()):
        device = _device(config, group, number)
        if device not in forwards:
            forwards[device] = _forward(config, path, device)
        forward, arguments = forwards[device]
        loaded.append(TorchBackend(config, str(version), forward, _order(config, arguments), device))
    return loaded


def _file(folder: ModelFolder, version: int) -> Path:
    """The configured file, by default `model.pt2` where there is one, else `model.pt`."""
    given = folder.config.model_filename
    if given in ("", "model.pt") and (folder.version_path(version) / EXPORTED).is_file():
        return folder.version_path(version) / EXPORTED
    return backends.model_file(folder, version, "model.pt")


def _device(config: ModelConfig, group: InstanceGroup, number: int) -> str:
    has_cuda = torch.cuda.is_available()
    if group.kind == "gpu" and not has_cuda:
        raise ConfigError(f"model '{config.name}': instance_group.kind: KIND_GPU, but PyTorch finds no CUDA")
    return f"cuda:{number}" if group.kind != "cpu" and has_cuda else "cpu"


def _set_threads(config: ModelConfig) -> None:
    """They are the whole process's, in PyTorch."""
    intra = joined.whole_number(config, "INTRA_OP_THREAD_COUNT")
    inter = joined.whole_number(config, "INTER_OP_THREAD_COUNT")
    with _loading:
        if intra:
            torch.set_num_threads(intra)
        if inter and inter != torch.get_num_interop_threads():
            try:
                torch.set_num_interop_threads(inter)
            except RuntimeError as error:  # only before the first use
                raise ConfigError(f"model '{config.name}': parameters.INTER_OP_THREAD_COUNT: {error}") from None


def _forward(config: ModelConfig, path: Path, device: str) -> tuple[Callable[..., Any], list[str]]:
    """The model's callable on the device, and the names of its arguments."""
    try:
        with _loading, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, which is its author's concern
            if path.suffix == ".pt2":
                exported = torch.export.load(str(path))
                names = [
                    spec.arg.name for spec in exported.graph_signature.input_specs if spec.kind.name == "USER_INPUT"
                ]
                if device != "cpu":
                    from torch.export.passes import move_to_device_pass

                    exported = move_to_device_pass(exported, device)
                # Its guards are of the shapes that it was traced with: narrower than what it can do.
                return exported.module(check_guards=False), names
            module = torch.jit.load(str(path), map_location=device).eval()
            return module, [one.name for one in module.forward.schema.arguments[1:]]
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"model '{config.name}': PyTorch cannot load {path.name}: {reason}") from None


def _order(config: ModelConfig, arguments: Sequence[str]) -> list[str]:
    """The inputs in the order of forward's arguments. Raises ConfigError naming an input that has no place."""
    names = [spec.name for spec in config.inputs]
    indexed = {int(found[1]): name for name in names if (found := _INDEX.fullmatch(name))}
    if len(indexed) == len(names):
        if sorted(indexed) != list(range(len(names))):
            raise ConfigError(f"model '{config.name}': input: expected __0 to __{len(names) - 1}, got {names}")
        ordered = [indexed[index] for index in range(len(names))]
    elif set(names) <= set(arguments):
        ordered = [name for name in arguments if name in names]
    else:
        ordered = names
    if len(ordered) > len(arguments):
        raise ConfigError(f"model '{config.name}': input: forward takes {list(arguments)}, configured are {names}")
    return ordered


class TorchBackend(JoinedBackend):
    """One instance over a module."""

    library = "PyTorch"

    def __init__(
        self, config: ModelConfig, version: str, forward: Callable[..., Any], order: Sequence[str], device: str
    ) -> None:
        super().__init__(config, version, device)
        self._forward = forward
        self._order = order
        self._bfloat = {spec.name for spec in (*config.inputs, *config.outputs) if spec.datatype == "BF16"}
        self._stream = torch.cuda.Stream(device) if device != "cpu" else None
        self._mode = (
            torch.inference_mode if config.parameters.get("INFERENCE_MODE", "true") == "true" else torch.no_grad
        )

    def run(self, names: Sequence[str], feed: Mapping[str, Array]) -> Sequence[Array]:
        given = [self._tensor(name, feed[name]) for name in self._order if name in feed]
        try:
            with self._mode():
                if self._stream is None:
                    made = self._named(self._forward(*given))
                    return [self._array(name, made[name]) for name in names]
                return self._run_on_gpu(given, names)
        except torch.cuda.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise OutOfMemory(f"PyTorch has no memory left on {self.device}: {error}") from None

    def _run_on_gpu(self, given: Sequence[Any], names: Sequence[str]) -> list[Array]:
        """Copies go through pinned memory, on the stream of the execution; one wait for all of it."""
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            there = [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in given]
            made = self._named(self._forward(*there))
            back = {name: made[name].to("cpu", non_blocking=True) for name in names}
        self._stream.synchronize()
        return [self._array(name, back[name]) for name in names]

    def _tensor(self, name: str, array: Array) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a request's bytes cannot be written to, and are not
            if name in self._bfloat:
                return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            return torch.from_numpy(array)

    def _array(self, name: str, tensor: Any) -> Array:
        tensor = tensor.detach().contiguous()
        array: Array = (
            tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
        )
        return array

    def _named(self, made: Any) -> dict[str, Any]:
        """The outputs by name."""
        names = list(self._datatypes)
        if isinstance(made, Mapping):
            missing = [name for name in names if name not in made]
            if missing:
                raise Internal(f"forward returned {sorted(map(str, made))}, not '{missing[0]}'")
            return dict(made)
        tensors = list(made) if isinstance(made, tuple | list) else [made]
        found = {}
        for position, name in enumerate(names):
            indexed = _INDEX.fullmatch(name)
            index = int(indexed[1]) if indexed else position
            if index >= len(tensors) or not isinstance(tensors[index], torch.Tensor):
                raise Internal(f"forward returned {len(tensors)} values, none is a tensor for output '{name}'")
            found[name] = tensors[index]
        return found
