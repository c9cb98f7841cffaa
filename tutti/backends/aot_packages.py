"""AOTInductor packages: libraries without Python that PyTorch has compiled, by us or by whoever made the model."""

import json
import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tutti.backends import compiler
from tutti.backends.compile_options import PARAMETER
from tutti.core.errors import ConfigError
from tutti.devices.cuda import loading
from tutti.repository.model_config import ModelConfig

_log = logging.getLogger(__name__)

# What GPU code takes for granted of where its inputs begin.
_ALIGNMENT = 16


class Package:
    """An AOTInductor package. `forward(*tensors)` gives what the model's own forward would.

    On a GPU a single thread submits, and no batch waits for the one before: the package does no waiting of its own,
    and can be captured in a graph. It holds the interpreter's lock while it executes, on a processor for all of it.
    """

    def __init__(self, path: Path, device: str, runners: int) -> None:
        is_cuda = device.startswith("cuda")
        index = int(device.partition(":")[2]) if is_cuda else -1
        # What torch._inductor.package.load_package does, without importing the compiler for it.
        load = torch._C._aoti.AOTIModelPackageLoader
        self._loader = load(str(path), "model", is_cuda, 1 if is_cuda else max(1, runners), index)
        self._run = self._loader.boxed_run
        inputs, outputs = self._loader.get_call_spec()
        self.arguments = _arguments(json.loads(inputs)[1])
        self._outputs = pytree.treespec_loads(outputs)
        self._is_cuda = is_cuda

    def __call__(self, *tensors: Any) -> Any:
        if len(tensors) != len(self.arguments):
            raise TypeError(f"the package takes {len(self.arguments)} tensors, got {len(tensors)}")
        arguments = [_aligned(tensor) for tensor in tensors] if self._is_cuda else list(tensors)
        return pytree.tree_unflatten(self._run(arguments), self._outputs)


def _aligned(tensor: Any) -> Any:
    """A row of a larger tensor may begin where GPU code would fault."""
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def _arguments(spec: Any) -> list[str]:
    """Names for the tensors of a serialized tree of (args, kwargs): numbers, and what has a name."""
    positional, named = spec["children_spec"]
    names = [str(number) for number in range(_leaves(positional))]
    for name, child in zip(json.loads(named["context"]), named["children_spec"], strict=True):
        count = _leaves(child)
        names += [name] if count == 1 else [f"{name}.{number}" for number in range(count)]
    return names


def _leaves(spec: Any) -> int:
    return 1 if spec["type"] is None else sum(map(_leaves, spec["children_spec"]))


def package(config: ModelConfig, path: Path, device: str, runners: int) -> tuple[Callable[..., Any], list[str]]:
    """A user's package, and names of its arguments. Raises ConfigError when it is not for the device."""
    if PARAMETER in config.parameters:
        _log.warning(
            "model '%s': %s is an AOTInductor package already: parameters.%s changes nothing",
            config.name, path.name, PARAMETER,
        )  # fmt: skip
    _check_target(config, path, device)
    try:
        with loading:
            loaded = Package(path, device, runners)
    except Exception as error:
        reason = f"PyTorch cannot load the AOTInductor package {path.name}: {compiler.one_line(error)}"
        raise ConfigError(f"model '{config.name}': {reason}") from None
    return loaded, loaded.arguments


def _check_target(config: ModelConfig, path: Path, device: str) -> None:
    """A package on a device that it is not for would not say so, but crash."""
    kind = device.partition(":")[0]
    capability = "".join(map(str, torch.cuda.get_device_capability(device))) if kind == "cuda" else ""
    for told in _metadata(path):
        made_for, capability_made_for = told.get("AOTI_DEVICE_KEY", kind), told.get("AOTI_COMPUTE_CAPABILITY", "")
        is_other_gpu = capability and capability_made_for and capability_made_for != capability
        if made_for == kind and not is_other_gpu:
            continue
        target = f"{path.name} is an AOTInductor package for {made_for} {capability_made_for}".strip()
        raise ConfigError(f"model '{config.name}': {target}, not for {kind} {capability}".strip())


def _metadata(path: Path) -> list[dict[str, str]]:
    """What the libraries of a package say that they are for."""
    with zipfile.ZipFile(path) as archive:
        told = [json.loads(archive.read(name)) for name in archive.namelist() if name.endswith("_metadata.json")]
    return [metadata for metadata in told if isinstance(metadata, dict)]
