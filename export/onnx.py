"""PyTorch module -> ONNX file, and what the saved graph says about its own tensors.

Opset 20: from 23 on, attention becomes one operator whose ONNX Runtime CPU kernel fails on masks of one row.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch

from tutti import dtypes
from tutti.config import TensorSpec

OPSET = 20
BATCH = "batch"


def save(
    module: torch.nn.Module,
    path: Path,
    example: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
    axes: Mapping[str, Mapping[int, str]],
) -> None:
    """Trace `module(**example)` and save it. `axes` names the variable axes per input; examples need batch 2."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations say nothing about the model
        torch.onnx.export(
            module.eval(),
            kwargs=dict(example),
            f=str(path),
            dynamo=True,
            input_names=list(example),
            output_names=list(outputs),
            dynamic_shapes={name: dict(axes.get(name, {})) for name in example},
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )


def tensor_specs(path: Path) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of a saved graph, without the batch axis; a named axis is -1.

    Read from the file, since the exporter prunes what the graph never reads.
    """
    graph = onnx.load(str(path), load_external_data=False).graph
    return [_spec(value) for value in graph.input], [_spec(value) for value in graph.output]


def _spec(value: Any) -> TensorSpec:
    tensor = value.type.tensor_type
    datatype = "BYTES" if tensor.elem_type == onnx.TensorProto.STRING else _datatype(tensor.elem_type)
    dims = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)
    return TensorSpec(value.name, datatype, dims[1:])


def _datatype(element: int) -> str:
    if element == onnx.TensorProto.BFLOAT16:
        return "BF16"
    return dtypes.from_numpy(onnx.helper.tensor_dtype_to_np_dtype(element))
