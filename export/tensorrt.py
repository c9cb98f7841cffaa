"""ONNX file -> TensorRT plan, with whichever of `tensorrt` and `tensorrt_rtx` is installed.

A plan fits only the TensorRT version that built it: build where it will be served. TensorRT-RTX builds without a GPU.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from export.errors import ExportError
from tutti.types import Shape

Profile = Mapping[str, tuple[Shape, Shape, Shape]]
"""Input name -> smallest, usual and largest shape, batch axis included."""

_MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
_WORKSPACE_BYTES = 2 << 30


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
        "--format tensorrt needs TensorRT, and neither 'tensorrt' nor 'tensorrt_rtx' is installed: "
        "pip install 'tutti[tensorrt]' for TensorRT-RTX, or run in NVIDIA's TensorRT or Triton container"
    )


def build(onnx_path: Path, plan_path: Path, profile: Profile, compute_capability: str = "") -> str:
    """Build and save a plan; returns the library's name and version.

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
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"TensorRT could not build a plan from {onnx_path.name}")
    plan_path.write_bytes(bytes(plan))
    return f"{trt.__name__} {trt.__version__}"


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
