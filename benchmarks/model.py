"""The small model of the comparisons: three dense layers, [batch, 384] -> [batch, 10] FP32, seeded weights."""

import itertools
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTHS = (384, 64, 64, 10)
CONFIG = """name: "mlp"
backend: "onnxruntime"
max_batch_size: 64
input { name: "x" data_type: TYPE_FP32 dims: 384 }
output { name: "y" data_type: TYPE_FP32 dims: 10 }
dynamic_batching { }
parameters { key: "intra_op_thread_count" value { string_value: "1" } }
"""


def write_repository(root: Path) -> Path:
    """A repository with the one model; returns the model file."""
    folder = root / "mlp" / "1"
    folder.mkdir(parents=True)
    (root / "mlp" / "config.pbtxt").write_text(CONFIG)
    rng = np.random.default_rng(0)
    nodes, weights, name = [], [], "x"
    for index, (inside, outside) in enumerate(itertools.pairwise(WIDTHS)):
        weight = rng.normal(0, inside**-0.5, (inside, outside)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{index}"))
        last = index == len(WIDTHS) - 2
        nodes.append(helper.make_node("MatMul", [name, f"w{index}"], ["y" if last else f"h{index}"]))
        name = f"h{index}"
        if not last:
            nodes.append(helper.make_node("Relu", [name], [f"r{index}"]))
            name = f"r{index}"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTHS[0]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDTHS[-1]])
    graph = helper.make_graph(nodes, "mlp", [x], [y], weights)
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path
