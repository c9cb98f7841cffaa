"""MiniLM and small graphs as ONNX, made where they are served."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import models, repository
from benchmarks.gpu.models import Spec


def export(spec: Spec, precision: str, path: Path) -> None:
    """By torch's exporter, with a batch axis of any size."""
    inputs = tuple(models.as_tensors(spec.draw(2)))
    names = [one.name for one in spec.inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            models.build(spec, precision), inputs, str(path), input_names=names, output_names=[spec.output],
            dynamo=True, opset_version=20, external_data=False, verbose=False,
            dynamic_shapes=tuple({0: torch.export.Dim("batch")} for _ in names),
        )  # fmt: skip


def add_spec(
    root: Path, spec: Spec, precision: str, device: str, work: Path, is_short: bool, most: int, extra: str = ""
) -> str:
    """The model under "NAME_onnx_PRECISION", which is returned."""
    name = f"{spec.name}_onnx_{precision}"
    folder = repository.add(root, name, repository.config(spec, precision, device, most, extra, backend="onnxruntime"))
    path = repository.kept(work / "packages", f"{name}{'-short' if is_short else ''}", "onnx")
    if not path.exists():
        export(spec, precision, path)
    os.link(path, folder / "model.onnx")  # a server may refuse a link that leads out of the repository
    return name


def add_increment(root: Path, name: str, width: int) -> None:
    """y = x + 1 on the processor."""
    import onnx
    from onnx import TensorProto, helper

    def info(tensor: str) -> Any:
        return helper.make_tensor_value_info(tensor, TensorProto.FLOAT, ["batch", width])

    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    graph = helper.make_graph([helper.make_node("Add", ["x", "one"], ["y"])], name, [info("x")], [info("y")], [one])
    folder = repository.add(root, name, repository.floats("onnxruntime", "cpu", width, width))
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), folder / "model.onnx"
    )
