"""The recipe of CONTRIBUTING.md for a graph operator: the spread of a row's numbers, in conditions and in Python."""

from pathlib import Path

import numpy as np
import pytest

from tests.models import Repository
from tests.serving import engine_over, infer
from tutti.core.errors import ConfigError
from tutti.core.types import InferRequest, InferResponse, Tensor
from tutti.ensembles import conditions, functions
from tutti.ensembles.builder import Graph
from tutti.ensembles.functions import Function

SPREAD = Function("spread", lambda elements: elements.max(axis=1) - elements.min(axis=1))


@pytest.fixture(autouse=True)
def spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(functions.FUNCTIONS, SPREAD.name, SPREAD)


def test_a_condition_has_it() -> None:
    condition = conditions.parse("spread(X) > 1", {"X": ("FP32", (3,))})
    rows = np.array([[1, 2, 3], [1, 1, 1]], np.float32)
    assert condition.holds({"X": conditions.Column(rows)}, 2).tolist() == [True, False]
    empty = conditions.parse("spread(X) >= 0", {"X": ("FP32", (-1,))})
    assert empty.holds({"X": conditions.Column(rows[:, :0])}, 2).tolist() == [False, False], "of nothing there is none"
    with pytest.raises(conditions.ConditionError, match=r"spread\(T\): expected numbers, the tensor has text"):
        conditions.parse("spread(T) > 1", {"T": ("BYTES", (1,))})


def test_a_graph_in_python_has_it_and_serves_by_it(repository: Repository) -> None:
    repository.add_onnx()
    graph = Graph("varied", repository.root, 8)
    x = graph.input("X", "FP32", [4])
    with graph.where(x.of("spread") > 1):
        y = graph.step("add_one", x=x)["y"]
    graph.output("Y", y, default=-1)
    (Path(repository.root) / "varied" / "1").mkdir(parents=True)
    (Path(repository.root) / "varied" / "config.pbtxt").write_text(graph.config())
    with pytest.raises(ConfigError, match="no function 'spred', there are max, min"):
        x.of("spred")
    rows = np.array([[1, 2, 3, 4], [1, 1, 1, 1]], np.float32)
    with engine_over(repository.root) as engine:
        (answer,) = infer(engine, [InferRequest("varied", {"X": Tensor.of("X", rows)})])
    assert isinstance(answer, InferResponse), answer
    assert answer.outputs[0].array().tolist() == [[2, 3, 4, 5], [-1, -1, -1, -1]]
