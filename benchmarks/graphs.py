"""The ensembles of the comparisons: chains and branches of small models, a gate, and a step that may be left out.

dense_N: one layer with tanh, [64] -> [64]. quick and costly: emulated, sleep 0.1 and 1 ms a row. first and second:
emulated, sleep 20 ms + 0.2 ms a row and twice that.
"""

import textwrap
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.models import BenchModel
from tutti.ensembles.builder import Graph

WIDTH = 64
STEP = BenchModel("dense_0", (WIDTH,), WIDTH, 64, "onnxruntime")
CHAIN_3, CHAIN_6 = (BenchModel(f"chain_{n}", (WIDTH,), WIDTH, 64, "ensemble") for n in (3, 6))
FAN = BenchModel("fan", (WIDTH,), 3 * WIDTH, 64, "ensemble")
GATED, UNGATED = (BenchModel(name, (1,), 1, 64, "ensemble") for name in ("gated", "ungated"))
SHED, UNSHED = (BenchModel(name, (1,), 1, 64, "ensemble") for name in ("shed", "unshed"))

_SLEEPER = """
    import time

    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def execute(self, requests):
            given = [pb_utils.get_input_tensor_by_name(request, "x") for request in requests]
            time.sleep(FIXED_S + ROW_S * sum(tensor.shape()[0] for tensor in given))
            return [pb_utils.InferenceResponse([pb_utils.Tensor("y", tensor.as_numpy() * FACTOR)]) for tensor in given]
"""


def write(root: Path) -> Path:
    """A repository with all of them."""
    rng = np.random.default_rng(0)
    for number in range(6):
        weight = rng.normal(0, WIDTH**-0.5, (WIDTH, WIDTH)).astype(np.float32)
        nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Tanh", ["h"], ["y"])]
        _onnx(root, f"dense_{number}", ["x"], WIDTH, nodes, [numpy_helper.from_array(weight, "w")])
    _onnx(root, "fuse", list("abc"), 3 * WIDTH, [helper.make_node("Concat", list("abc"), ["y"], axis=1)], [])
    for name, fixed_s, row_s in (
        ("quick", 0.0, 0.0001), ("costly", 0.0, 0.001), ("first", 0.02, 0.0002), ("second", 0.04, 0.0004),
    ):  # fmt: skip
        _sleeper(root, name, fixed_s, row_s)
    for length in (3, 6):
        graph = Graph(f"chain_{length}", root, 64)
        tensor = graph.input("x", "FP32", [WIDTH])
        for number in range(length):
            tensor = graph.step(f"dense_{number}", x=tensor)["y"]
        graph.output("y", tensor)
        _ensemble(root, graph)
    fan = Graph("fan", root, 64)
    x = fan.input("x", "FP32", [WIDTH])
    branches = {name: fan.step(f"dense_{number}", x=x)["y"] for number, name in enumerate("abc")}
    fan.output("y", fan.step("fuse", branches)["y"])
    _ensemble(root, fan)
    for name in ("gated", "ungated"):
        gate = Graph(name, root, 64)
        score = gate.step("quick", x=gate.input("x", "FP32", [1]))["y"]
        gate.output("y", gate.step("costly", x=score, when=score > 0.5 if name == "gated" else None)["y"], default=0)
        _ensemble(root, gate)
    for name in ("shed", "unshed"):
        graph = Graph(name, root, 64)
        made = graph.step("first", x=graph.input("x", "FP32", [1]))["y"]
        if name == "shed":
            graph.output("first", made)
        graph.output("y", graph.step("second", x=made, optional=name == "shed")["y"], default=0)
        _ensemble(root, graph)
    return root


def _onnx(
    root: Path, name: str, inputs: list[str], outputs: int, nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto]
) -> None:
    folder = root / name / "1"
    folder.mkdir(parents=True)
    x = [helper.make_tensor_value_info(one, TensorProto.FLOAT, ["batch", WIDTH]) for one in inputs]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", outputs])
    graph = helper.make_graph(nodes, name, x, [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    shown = "".join(f'input {{ name: "{one}" data_type: TYPE_FP32 dims: {WIDTH} }}\n' for one in inputs)
    (folder.parent / "config.pbtxt").write_text(
        f'name: "{name}" backend: "onnxruntime" max_batch_size: 64\n{shown}'
        f'output {{ name: "y" data_type: TYPE_FP32 dims: {outputs} }}\ndynamic_batching {{ }}\n'
        'parameters { key: "intra_op_thread_count" value { string_value: "1" } }\n'
    )


def _sleeper(root: Path, name: str, fixed_s: float, row_s: float) -> None:
    folder = root / name / "1"
    folder.mkdir(parents=True)
    source = textwrap.dedent(_SLEEPER).lstrip()
    source = source.replace("FIXED_S", f"{fixed_s}").replace("ROW_S", f"{row_s:.4f}").replace("FACTOR", "1")
    (folder / "model.py").write_text(source)
    (folder.parent / "config.pbtxt").write_text(
        f'name: "{name}" backend: "python" max_batch_size: 64\ninput {{ name: "x" data_type: TYPE_FP32 dims: 1 }}\n'
        'output { name: "y" data_type: TYPE_FP32 dims: 1 }\ndynamic_batching { }\n'
    )


def _ensemble(root: Path, graph: Graph) -> None:
    folder = root / graph.name / "1"
    folder.mkdir(parents=True)
    (folder / ".keep").touch()
    (folder.parent / "config.pbtxt").write_text(graph.config())
