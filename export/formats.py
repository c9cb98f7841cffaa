"""Which form of a verified ONNX graph is published."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from export import tensorrt
from export.tensorrt import Profile


@dataclass(frozen=True, slots=True)
class Format:
    """`compute_capability` ("SM89") is for TensorRT plans built where the serving GPU is not."""

    name: Literal["onnx", "tensorrt"] = "onnx"
    compute_capability: str = ""


def model_files(format: Format, onnx_path: Path, profile: Profile) -> tuple[str, dict[str, Path]]:
    """(backend, version folder's files) of a graph in the wanted format."""
    if format.name == "onnx":
        return "onnxruntime", {"model.onnx": onnx_path}
    plan = onnx_path.with_suffix(".plan")
    tensorrt.build(onnx_path, plan, profile, format.compute_capability)
    return "tensorrt", {"model.plan": plan}
