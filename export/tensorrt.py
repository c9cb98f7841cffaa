"""ONNX file -> TensorRT plan, with whichever of `tensorrt` and `tensorrt_rtx` is installed, and what is in it.

A plan fits only the TensorRT version that built it: build where it will be served. TensorRT-RTX builds without a GPU.
Networks are strongly typed: a plan computes in the datatypes of the ONNX file, which are looked at in the network.
"""

import importlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tutti.core import extras
from tutti.export.errors import ExportError
from tutti.export.graphs import Profile

_MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
_WORKSPACE_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Built:
    """A plan: who built it, and how many of its layers compute in which datatype."""

    library: str
    datatypes: dict[str, int]

    @property
    def main(self) -> str:
        """The datatype of most layers that compute."""
        return max(self.datatypes, key=lambda name: self.datatypes[name]) if self.datatypes else ""


def load_library() -> ModuleType:
    """The TensorRT module that is there. Raises ExportError naming what to install when none is."""
    for name in _MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        if hasattr(module, "Builder"):
            return module
    raise ExportError(
        "TensorRT plans need TensorRT, and neither 'tensorrt' nor 'tensorrt_rtx' is installed: "
        f"{extras.install('tensorrt')} for TensorRT-RTX, or run in NVIDIA's TensorRT or Triton container"
    )


def build(onnx_path: Path, plan_path: Path, profile: Profile, compute_capability: str = "") -> Built:
    """Build and save a plan.

    `compute_capability` ("SM89") is for building without the GPU that will serve, which TensorRT-RTX can do.
    Raises ExportError with the parser's or the builder's reason.
    """
    trt = load_library()
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx_path.read_bytes()):
        errors = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise ExportError(f"TensorRT cannot parse {onnx_path.name}: {errors}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _WORKSPACE_BYTES)
    config.add_optimization_profile(_profile(builder, network, profile))
    if compute_capability:
        _target(trt, config, compute_capability)
    datatypes = _datatypes(trt, network)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"TensorRT could not build a plan from {onnx_path.name}")
    plan_path.write_bytes(bytes(plan))
    return Built(f"{trt.__name__} {trt.__version__}", datatypes)


def _datatypes(trt: Any, network: Any) -> dict[str, int]:
    """Of the matrix products and convolutions, by their outputs: a strongly typed network has no others."""
    computing = {trt.LayerType.MATRIX_MULTIPLY, trt.LayerType.CONVOLUTION, trt.LayerType.EINSUM}
    if hasattr(trt.LayerType, "ATTENTION"):
        computing.add(trt.LayerType.ATTENTION)
    layers: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type in computing:
            layers[str(layer.get_output(0).dtype).rpartition(".")[2]] += 1
    return dict(layers)


def _profile(builder: Any, network: Any, profile: Profile) -> Any:
    optimization = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        if name not in profile:
            raise ExportError(f"no optimization profile for input '{name}'")
        optimization.set_shape(name, *profile[name])
    return optimization


def _target(trt: Any, config: Any, capability: str) -> None:
    if not hasattr(trt, "ComputeCapability"):
        raise ExportError("--compute-capability needs TensorRT-RTX; 'tensorrt' builds for the GPU that is present")
    known = trt.ComputeCapability.__members__
    if capability not in known:
        raise ExportError(f"--compute-capability: expected one of {', '.join(known)}, got '{capability}'")
    config.num_compute_capabilities = 1
    config.set_compute_capability(known[capability], 0)
