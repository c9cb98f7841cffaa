"""Variable lengths in one batch: what models see padded, what clients get as if they had been alone."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.models import Repository
from tests.serving import engine_over, infer
from tutti.core.errors import ConfigError, InferError
from tutti.core.types import InferRequest, InferResponse, Tensor
from tutti.repository import config

CONFIG = """
backend: "onnxruntime" max_batch_size: 16
input {{ name: "x" data_type: TYPE_FP32 dims: -1 }}
input {{ name: "n" data_type: TYPE_INT64 dims: 1 optional: true }}
input {{ name: "m" data_type: TYPE_FP32 dims: -1 optional: true }}
output {{ name: "mean" data_type: TYPE_FP32 dims: 1 }}
output {{ name: "double" data_type: TYPE_FP32 dims: -1 }}
dynamic_batching {{ max_queue_delay_microseconds: 20000 }}
{parameters}
"""
PARAMETERS = {
    "tutti.buckets.x": "16, 4, 8",
    "tutti.pad_value.x": "7",
    "tutti.lengths.x": "n",
    "tutti.mask.x": "m",
    "tutti.unpad.double": "x",
}


def text_of(parameters: dict[str, str]) -> str:
    shown = "".join(f'parameters {{ key: "{k}" value {{ string_value: "{v}" }} }}\n' for k, v in parameters.items())
    return CONFIG.format(parameters=shown)


def masked_mean() -> onnx.ModelProto:
    """mean = sum(x * m) / n, double = 2 x: wrong if padding counts."""
    nodes = [
        helper.make_node("Mul", ["x", "m"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "axes"], ["sum"], keepdims=1),
        helper.make_node("Cast", ["n"], ["count"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["sum", "count"], ["mean"]),
        helper.make_node("Add", ["x", "x"], ["double"]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "time"]),
        helper.make_tensor_value_info("n", TensorProto.INT64, ["batch", 1]),
        helper.make_tensor_value_info("m", TensorProto.FLOAT, ["batch", "time"]),
    ]
    outputs = [
        helper.make_tensor_value_info("mean", TensorProto.FLOAT, ["batch", 1]),
        helper.make_tensor_value_info("double", TensorProto.FLOAT, ["batch", "time"]),
    ]
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    graph = helper.make_graph(nodes, "masked", inputs, outputs, [axes])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def test_mixed_lengths_share_batches_and_each_is_answered_as_if_alone(repository: Repository) -> None:
    repository.add("masked", text_of(PARAMETERS), {"model.onnx": masked_mean().SerializeToString()})
    rng = np.random.default_rng(0)
    clips = [rng.normal(size=(rng.integers(1, 3), n)).astype(np.float32) for n in (1, 3, 4, 5, 7, 8, 9, 16, 20, 20)]
    with engine_over(repository.root) as engine:
        answers = infer(engine, [InferRequest("masked", {"x": Tensor.of("x", clip)}) for clip in clips])
        executions = engine.model("masked", "").statistics.counts.executions
    for clip, answer in zip(clips, answers, strict=True):
        assert isinstance(answer, InferResponse), answer
        np.testing.assert_allclose(answer.tensor("mean").array(), clip.mean(axis=1, keepdims=True), rtol=1e-5)
        np.testing.assert_array_equal(answer.tensor("double").array(), clip + clip)
    assert executions == 4, "a batch for each bucket, and one for what none holds"


def test_a_mask_that_a_client_sends_is_padded_with_its_input(repository: Repository) -> None:
    repository.add("masked", text_of(PARAMETERS), {"model.onnx": masked_mean().SerializeToString()})
    x, m = np.float32([[1, 2, 9]]), np.float32([[1, 1, 0]])
    with engine_over(repository.root) as engine:
        inputs = {"x": Tensor.of("x", x), "m": Tensor.of("m", m), "n": Tensor.of("n", np.int64([[2]]))}
        (answer,) = infer(engine, [InferRequest("masked", inputs)])
    assert isinstance(answer, InferResponse), answer
    assert answer.tensor("mean").array().tolist() == [[1.5]]
    assert answer.tensor("double").array().tolist() == [[2, 4, 18]]


def test_python_models_get_padded_inputs(repository: Repository) -> None:
    repository.add_python(
        "sizes",
        """
        backend: "python" max_batch_size: 8
        input { name: "x" data_type: TYPE_INT32 dims: [ -1, 2 ] }
        output { name: "shape" data_type: TYPE_INT64 dims: 3 }
        dynamic_batching { max_queue_delay_microseconds: 20000 }
        parameters { key: "tutti.buckets.x" value { string_value: "4" } }
        parameters { key: "tutti.pad_value.x" value { string_value: "-1" } }
        """,
        """
        x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
        assert (x[:, 3] == -1).all()
        return pb_utils.InferenceResponse([pb_utils.Tensor("shape", np.array([x.shape], np.int64))])
        """,
    )
    with engine_over(repository.root) as engine:
        requests = [InferRequest("sizes", {"x": Tensor.of("x", np.ones((1, n, 2), np.int32))}) for n in (1, 2, 3)]
        answers = infer(engine, requests)
        assert engine.model("sizes", "").statistics.counts.executions == 1
    for answer in answers:
        assert not isinstance(answer, InferError), answer
        assert answer.tensor("shape").array().tolist() == [[1, 4, 2]]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tutti.buckets.z": "4"}, "the model has no input 'z'"),
        ({"tutti.buckets.x": "4, big"}, "expected sizes of at least 1"),
        ({"tutti.buckets.x": "0"}, "expected sizes of at least 1"),
        ({"tutti.buckets.n": "4"}, "expected numbers with one variable dimension"),
        ({"tutti.pad_value.x": "seven"}, "expected a number, got 'seven'"),
        ({"tutti.pad_value.m": "0"}, "needs tutti.buckets.m"),
        ({"tutti.lengths.x": "x"}, "expected an optional input of numbers, got 'x'"),
        ({"tutti.lengths.x": "m"}, "input 'm' has dims"),
        ({"tutti.mask.x": "n"}, "input 'n' has dims"),
        ({"tutti.unpad.mean": "x"}, "expected an output with one variable dimension"),
        ({"tutti.unpad.double": "n"}, "expected INPUT or INPUT/N of a padded input"),
        ({"tutti.unpad.double": "x/0"}, "expected INPUT or INPUT/N"),
    ],
)
def test_mistakes_are_told(changes: dict[str, str], why: str) -> None:
    with pytest.raises(ConfigError, match=r"model 'm': parameters\.tutti\.") as told:
        config.parse(text_of({**PARAMETERS, **changes}), "m")
    assert why in str(told.value)


def test_a_batch_can_be_padded_again_in_parts() -> None:
    """As where it has failed: what the requests hold stays as it came."""
    padding = config.parse(text_of(PARAMETERS), "m").padding
    given = [InferRequest("m", {"x": Tensor.of("x", np.ones((1, n), np.float32))}) for n in (5, 7)]
    for part in (given, given[:1], given[1:]):
        copies = [InferRequest("m", dict(request.inputs)) for request in part]
        lengths = padding.pad(copies, is_batched=True)
        assert [own["x"] for own in lengths] == [request.inputs["x"].shape[1] for request in part]
        assert {copy.inputs["x"].shape for copy in copies} == {(1, 8)}
    assert [request.inputs["x"].shape for request in given] == [(1, 5), (1, 7)]
