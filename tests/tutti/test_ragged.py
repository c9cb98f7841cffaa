"""Triton's ragged batches: unequal shapes in one execution, batch inputs by the protocol's own examples."""

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.models import Repository, _serialized
from tests.serving import engine_over, infer
from tutti.core.errors import ConfigError, InferError
from tutti.core.types import InferRequest, InferResponse, Tensor
from tutti.repository import config, ragged
from tutti.repository.ragged import BatchInput

CONFIG = """
backend: "onnxruntime" max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: -1 allow_ragged_batch: true }
output { name: "last" data_type: TYPE_FP32 dims: 1 }
output { name: "double" data_type: TYPE_FP32 dims: -1 }
batch_input {
  kind: BATCH_ACCUMULATED_ELEMENT_COUNT target_name: "ends" data_type: TYPE_INT32 source_input: "x"
}
batch_output { target_name: "double" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "x" }
dynamic_batching { max_queue_delay_microseconds: 20000 }
"""


def onnx_last() -> bytes:
    """last = each request's last element, [requests, 1]; double = 2 x, [elements]."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["elements"])
    ends = helper.make_tensor_value_info("ends", TensorProto.INT32, ["requests"])
    last = helper.make_tensor_value_info("last", TensorProto.FLOAT, ["requests", 1])
    double = helper.make_tensor_value_info("double", TensorProto.FLOAT, ["elements"])
    constants = [helper.make_tensor("one", TensorProto.INT32, [1], [1]), helper.make_tensor("axis", 7, [1], [1])]
    nodes = [
        helper.make_node("Sub", ["ends", "one"], ["at"]),
        helper.make_node("Gather", ["x", "at"], ["flat"]),
        helper.make_node("Unsqueeze", ["flat", "axis"], ["last"]),
        helper.make_node("Add", ["x", "x"], ["double"]),
    ]
    return _serialized(helper.make_graph(nodes, "last", [x, ends], [last, double], constants))


def test_unequal_shapes_execute_once_and_each_gets_its_own(repository: Repository) -> None:
    repository.add("ragged", CONFIG, {"model.onnx": onnx_last()})
    inputs = [np.arange(n, dtype=np.float32)[np.newaxis] + 100 * n for n in (3, 1, 7, 3)]
    with engine_over(repository.root) as engine:
        answers = infer(engine, [InferRequest("ragged", {"x": Tensor.of("x", x)}) for x in inputs])
        assert engine.model("ragged", "").statistics.counts.executions == 1
    for x, answer in zip(inputs, answers, strict=True):
        assert isinstance(answer, InferResponse), answer
        assert answer.tensor("last").array().tolist() == [[x[0, -1]]]
        assert answer.tensor("double").array().tolist() == (x + x).tolist()


def test_python_models_get_requests_of_unequal_shape_together(repository: Repository) -> None:
    repository.add_python(
        "sizes",
        """
        backend: "python" max_batch_size: 8
        input { name: "x" data_type: TYPE_FP32 dims: [ -1, -1 ] allow_ragged_batch: true }
        output { name: "shape" data_type: TYPE_INT64 dims: 3 }
        dynamic_batching { max_queue_delay_microseconds: 20000 }
        """,
        """
        x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
        return pb_utils.InferenceResponse([pb_utils.Tensor("shape", np.array([x.shape], np.int64))])
        """,
    )
    shapes = [(1, 2, 3), (1, 5, 1), (1, 2, 3)]
    with engine_over(repository.root) as engine:
        answers = infer(engine, [InferRequest("sizes", {"x": Tensor.of("x", np.ones(s, np.float32))}) for s in shapes])
        assert engine.model("sizes", "").statistics.counts.executions == 1
    for shape, answer in zip(shapes, answers, strict=True):
        assert not isinstance(answer, InferError)
        assert answer.tensor("shape").array().tolist() == [list(shape)]


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("BATCH_ELEMENT_COUNT", [6, 4]),
        ("BATCH_ACCUMULATED_ELEMENT_COUNT", [6, 10]),
        ("BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO", [0, 6, 10]),
        ("BATCH_MAX_ELEMENT_COUNT_AS_SHAPE", [0] * 6),
        ("BATCH_ITEM_SHAPE", [[3, 1], [3, 1], [2, 2]]),
        ("BATCH_ITEM_SHAPE_FLATTEN", [3, 1, 3, 1, 2, 2]),
    ],
)
def test_batch_inputs_are_those_of_the_protocol(kind: ragged.Kind, values: list[object]) -> None:
    requests = [
        InferRequest("m", {"x": Tensor.of("x", np.zeros(shape, np.float32))}) for shape in ((2, 3, 1), (1, 2, 2))
    ]
    made = ragged.Ragged(batch_inputs=(BatchInput(kind, ("a", "b"), "INT32", "x"),)).made(requests)
    assert made["a"].tolist() == made["b"].tolist() == values
    assert made["a"].dtype == np.int32


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('source_input: "x"', 'source_input: "z"', r"batch_input\[0\].source_input: expected one input, got \['z'\]"),
        ("TYPE_INT32 source", "TYPE_INT64 source", r"batch_input\[0\].data_type: expected TYPE_INT32 or TYPE_FP32"),
        ('target_name: "double"', 'target_name: "z"', r"batch_output\[0\].target_name: the model has no output 'z'"),
        ('backend: "onnxruntime"', 'backend: "python"', "only backends that join a batch"),
    ],
)
def test_mistakes_are_told(old: str, new: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        config.parse(CONFIG.replace(old, new, 1), "m")
