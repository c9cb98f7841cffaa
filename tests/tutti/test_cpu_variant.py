"""A variant of a model for CPUs: executed there, and only when it does what the model does."""

import re

import numpy as np
import pytest

from tests.models import Repository, onnx_add_one
from tests.serving import engine_over, infer
from tutti.core.types import InferRequest, InferResponse, Tensor

CONFIG = """
    backend: "onnxruntime" max_batch_size: 8
    input {{ name: "x" data_type: TYPE_FP32 dims: 4 }} output {{ name: "y" data_type: TYPE_FP32 dims: 4 }}
    parameters {{ key: "tutti.cpu_model_filename" value {{ string_value: "{file}" }} }}
    {more}
"""


def add(repository: Repository, amount: float, file: str = "model.int8.onnx", more: str = "") -> None:
    files: dict[str, str | bytes] = {"model.onnx": onnx_add_one(), "model.int8.onnx": onnx_add_one(amount=amount)}
    repository.add("m", CONFIG.format(file=file, more=more), files)


@pytest.mark.parametrize("kind", ["", "instance_group { kind: KIND_GPU }", "instance_group { kind: KIND_CPU }"])
def test_it_is_executed_without_a_gpu(repository: Repository, kind: str) -> None:
    add(repository, 1.01, more=kind)
    with engine_over(repository.root) as engine:
        assert not engine.failures()
        (answer,) = infer(engine, [InferRequest("m", {"x": Tensor.of("x", np.zeros((1, 4), np.float32))})])
        assert isinstance(answer, InferResponse)
        np.testing.assert_allclose(answer.outputs[0].array(), 1.01)


@pytest.mark.parametrize(
    ("amount", "file", "more", "says"),
    [
        (2.0, "model.int8.onnx", "", r"'model.int8.onnx' differs in output 'y' by \d+.\d% of its range, more than"),
        (float("nan"), "model.int8.onnx", "", "differs in output 'y'"),
        (1.01, "missing.onnx", "", "version 1 has no file 'missing.onnx'"),
        (1.01, "../../secret.onnx", "", "has no file"),
        (
            1.01,
            "model.int8.onnx",
            'parameters { key: "tutti.cpu_tolerance" value { string_value: "0.0001" } }',
            r"more than tutti.cpu_tolerance allows \(0.0%\)",
        ),
        (
            1.01,
            "model.int8.onnx",
            'parameters { key: "tutti.cpu_tolerance" value { string_value: "x" } }',
            "tutti.cpu_tolerance: expected a number",
        ),
    ],
)
def test_one_that_is_not_the_model_is_refused(
    repository: Repository, amount: float, file: str, more: str, says: str
) -> None:
    add(repository, amount, file, more)
    with engine_over(repository.root) as engine:
        (failure,) = engine.failures()
        assert re.search(says, failure), failure
