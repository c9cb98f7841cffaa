"""Outputs that are not what is configured: no caller gets rows that are not its own, and each is told why."""

import warnings
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper

from tests.models import Repository
from tests.serving import engine_over, infer
from tutti.core.errors import Internal
from tutti.core.types import InferRequest, InferResponse, Tensor
from tutti.serving.engine import Engine


def things(first_axis: str) -> bytes:
    """[row, column] of each element that is not zero, the rows of all pictures together."""
    nodes = [helper.make_node("NonZero", ["x"], ["n"]), helper.make_node("Transpose", ["n"], ["y"], perm=[1, 0])]
    x = helper.make_tensor_value_info("x", T.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", T.INT64, [first_axis, 2])
    made = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    )
    onnx.checker.check_model(made)
    return bytes(made.SerializeToString())


CONFIG = """
    backend: "onnxruntime" max_batch_size: 4
    input { name: "x" data_type: TYPE_FP32 dims: 4 }
    output { name: "y" data_type: TYPE_INT64 dims: %s }
    dynamic_batching { preferred_batch_size: 4 max_queue_delay_microseconds: 500000 }
"""
GRAPH = """
    platform: "ensemble" max_batch_size: 4
    input { name: "x" data_type: TYPE_FP32 dims: 4 }
    output { name: "y" data_type: TYPE_INT64 dims: 2 }
    ensemble_scheduling { step { model_name: "m" model_version: -1
        input_map { key: "x" value: "x" } output_map { key: "y" value: "y" } } }
"""
# With 0, 1, 1 and 2 things: as many together as there are pictures.
PICTURES = ([0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0])


def ask(engine: Engine, name: str, pictures: Sequence[Sequence[float]] = PICTURES) -> list[object]:
    requests = [
        InferRequest(name, {"x": Tensor.of("x", np.array([p], np.float32))}, signature="alike") for p in pictures
    ]
    return list(infer(engine, requests))


@pytest.mark.parametrize("first_axis", ["k", "n"])
@pytest.mark.parametrize("name", ["m", "e"])
def test_rows_that_are_not_the_batch_reach_nobody_else(repository: Repository, first_axis: str, name: str) -> None:
    """The axis may be called the batch's, as exporters do, and the counts may add up to the batch."""
    repository.add("m", CONFIG % 2, {"model.onnx": things(first_axis)})
    repository.add("e", GRAPH, {})
    with engine_over(repository.root) as engine:
        answers = ask(engine, name)
    for picture, answer in zip(PICTURES, answers, strict=True):
        if sum(picture) == 1:
            assert isinstance(answer, InferResponse)
            assert answer.tensor("y").array().tolist() == [[0, picture.index(1)]]
        else:
            assert isinstance(answer, Internal)
            assert f"output 'y': expected 1 rows, as many as the batch, got shape [{sum(picture)}, 2]" in str(answer)


def test_sizes_that_no_graph_tells_are_checked_in_its_answers(repository: Repository) -> None:
    """Configured as [ 3 ], and the graph says that it varies: what comes are 2."""
    nodes = [helper.make_node("Compress", ["x", "which"], ["y"], axis=1)]
    x = helper.make_tensor_value_info("x", T.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", T.FLOAT, ["n", "k"])
    which = helper.make_tensor("which", T.BOOL, [4], [True, False, True, False])
    made = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], [which]), opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    )
    config = (CONFIG % 3).replace("TYPE_INT64", "TYPE_FP32")
    repository.add("m", config, {"model.onnx": made.SerializeToString()})
    with engine_over(repository.root) as engine:
        answers = ask(engine, "m") if engine.versions("m") else [Internal(" ".join(engine.failures()))]
    for answer in answers:
        assert isinstance(answer, Internal)
        assert "output 'y': configured with" in str(answer)


def test_a_module_whose_rows_are_not_the_batch_is_asked_one_by_one(repository: Repository) -> None:
    torch = pytest.importorskip("torch")

    class Things(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x):  # type: ignore[no-untyped-def]
            return x.nonzero()

    path = repository.root.parent / "things.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and served
        torch.jit.script(Things()).save(str(path))
    config = (CONFIG % 2).replace("onnxruntime", "pytorch").replace('"y"', '"y__0"').replace('"x"', '"x__0"')
    repository.add("m", config, {"model.pt": path.read_bytes()})
    requests = [InferRequest("m", {"x__0": Tensor.of("x__0", np.array([p], np.float32))}) for p in PICTURES]
    with engine_over(repository.root) as engine:
        answers = infer(engine, requests)
    assert [isinstance(answer, InferResponse) for answer in answers] == [False, True, True, False]
