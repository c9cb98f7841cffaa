"""An ONNX graph beside its configuration: what does not fit is refused at load, what is missing is completed."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from tests.models import Repository
from tests.serving import engine_over, infer
from tutti.backends import model_files
from tutti.backends.completion import open_model
from tutti.core.errors import ConfigError
from tutti.core.types import InferRequest, InferResponse, Tensor

X = helper.make_tensor_value_info("x", T.FLOAT, ["n", 4])
Y = helper.make_tensor_value_info("y", T.FLOAT, ["n", 4])


def graph(nodes: list[onnx.NodeProto], inputs: list, outputs: list, weights: tuple = ()) -> onnx.ModelProto:  # type: ignore[type-arg]
    made = helper.make_graph(nodes, "g", inputs, outputs, list(weights))
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def add(first: str = "x", second: str = "b") -> onnx.NodeProto:
    return helper.make_node("Add", [first, second], ["y"])


def value(name: str, *dims: object, datatype: int = T.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, datatype, list(dims))


PLAIN = graph([helper.make_node("Neg", ["x"], ["y"])], [X], [Y])
FIXED_ROWS = graph([helper.make_node("Neg", ["x"], ["y"])], [value("x", 1, 4)], [value("y", 1, 4)])
TWO = graph([add()], [X, value("b", "n", 4)], [Y])
SCALAR = graph([add()], [value("x", 4), value("b")], [value("y", 4)])
CONFIG = (
    "input { name: 'x' data_type: TYPE_FP32 dims: 4 } output { name: 'y' data_type: TYPE_FP32 dims: 4 } "
    "max_batch_size: 4"
)
SECOND = " input { name: 'b' data_type: TYPE_FP32 dims: 4 }"


def reason(repository: Repository, model: onnx.ModelProto, config: str) -> str:
    """Why the model is not loaded; "" where it is."""
    repository.add("m", f'backend: "onnxruntime" {config}', {"model.onnx": model.SerializeToString()})
    with engine_over(repository.root) as engine:
        return " ".join(engine.failures())


@pytest.mark.parametrize(
    ("model", "old", "new", "says"),
    [
        (PLAIN, "", "", ""),
        (PLAIN, "dims: 4 } output", "dims: 5 } output", r"input 'x': configured with shape \[-1, 5\].* has \[-1, 4\]"),
        (PLAIN, "dims: 4 } output", "dims: -1 } output", r"input 'x': configured with shape \[-1, -1\]"),
        (PLAIN, "dims: 4 } max", "dims: 512 } max", r"output 'y': configured with shape \[-1, 512\].* has \[-1, 4\]"),
        (PLAIN, "dims: 4 } max", "dims: [ 4, 1 ] } max", r"output 'y': configured with shape \[-1, 4, 1\]"),
        (PLAIN, "dims: 4 } max", "dims: [ 2, 2 ] reshape { shape: 4 } } max", ""),
        (PLAIN, "max_batch_size: 4", "", r"input 'x': configured with shape \[4\], the graph has \[-1, 4\]"),
        (PLAIN, "TYPE_FP32 dims: 4 } output", "TYPE_FP16 dims: 4 } output", "configured as FP16, the graph has FP32"),
        (PLAIN, "max_batch_size: 4", "max_batch_size: 4" + SECOND, r"input 'b': the graph has \['x'\]"),
        (PLAIN, "name: 'y'", "name: 'z'", r"output 'z': the graph has \['y'\]"),
        (FIXED_ROWS, "", "", r"input 'x': max_batch_size is 4: expected a variable first axis .* has \[1, 4\]"),
        (TWO, "", "", r"input: the graph also needs \['b'\]"),
        (TWO, "max_batch_size: 4", "max_batch_size: 4" + SECOND, ""),
        (
            TWO,
            "max_batch_size: 4",
            "max_batch_size: 4" + SECOND.replace("dims", "optional: true dims"),
            "input 'b': is optional, but the graph has no default for it",
        ),
        (SCALAR, "max_batch_size: 4", SECOND, r"input 'b': is a scalar in the graph: expected dims of 1, got \[4\]"),
        (SCALAR, "max_batch_size: 4", SECOND.replace("dims: 4", "dims: 1"), ""),
        (
            PLAIN,
            "max_batch_size: 4",
            "max_batch_size: 4 sequence_batching { control_input { name: 'start' control { "
            "kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } } }",
            "sequence_batching 'start': the graph has",
        ),
    ],
)
def test_what_does_not_fit_the_graph_is_refused_at_load(
    repository: Repository, model: onnx.ModelProto, old: str, new: str, says: str
) -> None:
    told = reason(repository, model, CONFIG.replace(old, new, 1) if old else CONFIG)
    assert re.search(says, told) if says else not told, told


def test_an_input_that_the_graph_has_a_value_for_may_be_configured_as_optional(repository: Repository) -> None:
    """ONNX: an initializer that is also an input is its default."""
    weight = numpy_helper.from_array(np.full(4, 10, np.float32), "b")
    model = graph([add()], [value("x", 4), value("b", 4)], [value("y", 4)], (weight,))
    repository.add(
        "m",
        'backend: "onnxruntime" ' + CONFIG.replace("max_batch_size: 4", SECOND.replace("dims", "optional: true dims")),
        {"model.onnx": model.SerializeToString()},
    )
    x, b = np.ones(4, np.float32), np.full(4, 2, np.float32)
    with engine_over(repository.root) as engine:
        without, given = infer(
            engine,
            [
                InferRequest("m", {"x": Tensor.of("x", x)}),
                InferRequest("m", {"x": Tensor.of("x", x), "b": Tensor.of("b", b)}),
            ],
        )
    assert isinstance(without, InferResponse) and without.tensor("y").array().tolist() == [11] * 4
    assert isinstance(given, InferResponse) and given.tensor("y").array().tolist() == [3] * 4


def test_what_has_no_axes_but_the_batch_is_completed_as_one_wide(repository: Repository) -> None:
    """As Triton's AutoCompleteIO: dims [ 1 ], and where there is a batch an empty reshape."""
    label = graph(
        [helper.make_node("ArgMax", ["x"], ["y"], axis=1, keepdims=0)], [X], [value("y", "n", datatype=T.INT64)]
    )
    total = graph(
        [helper.make_node("Mul", ["x", "b"], ["z"]), helper.make_node("ReduceSum", ["z"], ["y"], keepdims=0)],
        [value("x", 4), value("b")],
        [value("y")],
    )
    for name, model in (("label", label), ("total", total)):
        repository.add(name, "", {"model.onnx": model.SerializeToString()})
        (repository.root / name / "config.pbtxt").unlink()
    rows = np.array([[1, 2, 3, 0], [9, 1, 1, 1]], np.float32)
    with engine_over(repository.root) as engine:
        spec = engine.model("label").config.outputs[0]
        assert (spec.dims, spec.reshape) == ((1,), ())
        assert engine.model("total").config.inputs[1].dims == (1,)
        labels, sums = infer(
            engine,
            [
                InferRequest("label", {"x": Tensor.of("x", rows)}),
                InferRequest("total", {"x": Tensor.of("x", rows[0]), "b": Tensor.of("b", np.array([2], np.float32))}),
            ],
        )
    assert isinstance(labels, InferResponse) and labels.tensor("y").array().tolist() == [[2], [0]]
    assert isinstance(sums, InferResponse) and sums.tensor("y").shape == (1,)
    assert sums.tensor("y").array().tolist() == [12]


@pytest.mark.parametrize("config", [CONFIG, ""])
def test_a_model_may_be_a_folder_with_its_weights_beside_it(repository: Repository, config: str) -> None:
    """Triton's layout for weights in other files: the folder 1/model.onnx with model.onnx in it."""
    weight = numpy_helper.from_array(np.arange(4, dtype=np.float32), "b")
    model = graph([add()], [X], [Y], (weight,))
    repository.add("m", f'backend: "onnxruntime" {config}', {})
    folder = repository.root / "m" / "1" / "model.onnx"
    folder.mkdir()
    onnx.save_model(
        model, str(folder / "model.onnx"), save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    if not config:
        (repository.root / "m" / "config.pbtxt").unlink()
    with engine_over(repository.root) as engine:
        (answer,) = infer(engine, [InferRequest("m", {"x": Tensor.of("x", np.zeros((1, 4), np.float32))})])
    assert isinstance(answer, InferResponse) and answer.tensor("y").array().tolist() == [[0, 1, 2, 3]]


def test_a_folder_without_the_model_is_named(repository: Repository, tmp_path: Path) -> None:
    repository.add("m", f'backend: "onnxruntime" {CONFIG}', {})
    (repository.root / "m" / "1" / "model.onnx").mkdir()
    with pytest.raises(ConfigError, match=r"version 1 has no file 'model.onnx'"):
        model_files.model_file(open_model(repository.root, "m"), 1, "model.onnx")
