"""The models of the comparisons, with seeded weights: each takes one FP32 input "x" and gives one output "y".

mlp: three dense layers, [384] -> [10]. accelerator: emulated, sleeps 2 ms + 0.02 ms a row. cnn: convolutions that keep
both cores busy, an instance on each, [3, 64, 64] -> [10]. image: the mean of 600 kB. audio: the mean of 2 MB. clips:
the accelerator, for clips of 1 to 30 s, 0.1 ms a second of audio in the batch, padded or not.
"""

import itertools
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_WIDTHS = (384, 64, 64, 10)


@dataclass(frozen=True, slots=True)
class BenchModel:
    """A model and what its requests carry: one item of `shape`."""

    name: str
    shape: tuple[int, ...]
    outputs: int
    max_batch_size: int
    backend: str
    extra: str = ""

    @property
    def item_bytes(self) -> int:
        return math.prod(self.shape) * 4

    def config(self) -> str:
        return (
            f'name: "{self.name}" backend: "{self.backend}" max_batch_size: {self.max_batch_size}\n'
            f'input {{ name: "x" data_type: TYPE_FP32 dims: {list(self.shape)} }}\n'
            f'output {{ name: "y" data_type: TYPE_FP32 dims: {self.outputs} }}\n'
            f"dynamic_batching {{ }}\n{self.extra}"
        )


def _threads(count: int) -> str:
    return f'parameters {{ key: "intra_op_thread_count" value {{ string_value: "{count}" }} }}\n'


MLP = BenchModel("mlp", (384,), 10, 64, "onnxruntime", _threads(1))
# A stand-in for a device, in the server's process as that would be.
_IN_SERVER = 'parameters { key: "tutti.isolate" value { string_value: "no" } }\n'
ACCELERATOR = BenchModel("accelerator", (384,), 10, 64, "python", _IN_SERVER)
# The accelerator, ten times slower: two cores can offer it twice what it can do.
SLOW_ACCELERATOR = BenchModel("slow_accelerator", (384,), 10, 64, "python", _IN_SERVER)
CNN = BenchModel("cnn", (3, 64, 64), 10, 4, "onnxruntime", _threads(1) + "instance_group { count: 2 kind: KIND_CPU }\n")
IMAGE = BenchModel("image", (3, 224, 224), 3, 8, "onnxruntime", _threads(1))
AUDIO = BenchModel("audio", (500_000,), 1, 8, "onnxruntime", _threads(1))

# Clips of 1 to 30 s at 100 values a second; their lengths fall into four buckets, or each is a batch of its own.
CLIP_RATE = 100
_CLIP_EXTRA = """parameters { key: "tutti.buckets.x" value { string_value: "500, 1000, 2000, 3000" } }
parameters { key: "tutti.lengths.x" value { string_value: "n" } }
input { name: "n" data_type: TYPE_INT64 dims: 1 optional: true }
"""
CLIPS = BenchModel("clips", (-1,), 1, 16, "python", _CLIP_EXTRA)
CLIPS_ALONE = BenchModel("clips_alone", (-1,), 1, 16, "python", _CLIP_EXTRA.split("\n", 1)[1].split("\n", 1)[1])

_CLIP_MODEL = """
    import time

    import numpy as np
    import triton_python_backend_utils as pb_utils


    def mean(request):
        x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
        n = pb_utils.get_input_tensor_by_name(request, "n")
        length = x.shape[1] if n is None else int(n.as_numpy()[0, 0])
        return x.shape[1], x[:, :length].mean(axis=1, keepdims=True)


    class TritonPythonModel:
        def execute(self, requests):
            sizes, means = zip(*map(mean, requests))
            time.sleep(0.002 + 0.0001 * max(sizes) / 100)
            return [pb_utils.InferenceResponse([pb_utils.Tensor("y", one)]) for one in means]
"""

_ACCELERATOR = """
    import time

    import numpy as np
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def execute(self, requests):
            rows = sum(pb_utils.get_input_tensor_by_name(request, "x").shape()[0] for request in requests)
            time.sleep(FIXED_S + ROW_S * rows)
            return [
                pb_utils.InferenceResponse([pb_utils.Tensor("y", np.zeros((1, 10), np.float32))]) for _ in requests
            ]
"""


def write_repository(root: Path, *models: BenchModel) -> Path:
    """A repository with `models`; returns the file of the first one."""
    files = [_write(root, model) for model in models]
    return files[0]


def _write(root: Path, model: BenchModel) -> Path:
    folder = root / model.name / "1"
    folder.mkdir(parents=True)
    (root / model.name / "config.pbtxt").write_text(model.config())
    if model in (CLIPS, CLIPS_ALONE):
        path = folder / "model.py"
        path.write_text(textwrap.dedent(_CLIP_MODEL).lstrip())
        return path
    if model.backend == "python":
        path = folder / "model.py"
        fixed_s, row_s = (0.02, 0.0002) if model is SLOW_ACCELERATOR else (0.002, 0.00002)
        source = textwrap.dedent(_ACCELERATOR).lstrip()
        path.write_text(source.replace("FIXED_S", str(fixed_s)).replace("ROW_S", f"{row_s:.5f}"))
        return path
    path = folder / "model.onnx"
    nodes, weights = {MLP: _mlp, CNN: _cnn}[model]() if model in (MLP, CNN) else _mean(model)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *model.shape])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", model.outputs])
    graph = helper.make_graph(nodes, model.name, [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def _mlp() -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    rng = np.random.default_rng(0)
    nodes, weights, name = [], [], "x"
    for index, (inside, outside) in enumerate(itertools.pairwise(_WIDTHS)):
        weight = rng.normal(0, inside**-0.5, (inside, outside)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{index}"))
        last = index == len(_WIDTHS) - 2
        nodes.append(helper.make_node("MatMul", [name, f"w{index}"], ["y" if last else f"h{index}"]))
        name = f"h{index}"
        if not last:
            nodes.append(helper.make_node("Relu", [name], [f"r{index}"]))
            name = f"r{index}"
    return nodes, weights


def _cnn() -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    rng = np.random.default_rng(0)
    nodes, weights, name, inside = [], [], "x", 3
    for index in range(5):
        outside = 10 if index == 4 else 64
        weight = rng.normal(0, (inside * 9) ** -0.5, (outside, inside, 3, 3)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{index}"))
        nodes.append(helper.make_node("Conv", [name, f"w{index}"], [f"c{index}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"]))
        name, inside = f"r{index}", outside
    nodes.append(helper.make_node("GlobalAveragePool", [name], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["y"]))
    return nodes, weights


def _mean(model: BenchModel) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """The mean over all axes but the batch's and, of an image, the channels'."""
    axes = list(range(2, len(model.shape) + 1)) or [1]
    weights = [numpy_helper.from_array(np.array(axes, np.int64), "axes")]
    keeps = 0 if len(model.shape) > 1 else 1
    return [helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=keeps)], weights
