"""What a model gets it may write to: nobody else reads what it has written."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models import Repository
from tests.serving import engine_over, infer
from tutti.core.types import InferRequest, InferResponse, Tensor

PLAIN = """
    backend: "%s" max_batch_size: %d
    input { name: "x" data_type: TYPE_FP32 dims: [ -1 ] } output { name: "y" data_type: TYPE_FP32 dims: [ -1 ] }
"""
IN_PLACE = """
x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
x *= 2
again = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
return pb_utils.InferenceResponse([pb_utils.Tensor("y", again)])
"""
# Lets the other step write first.
LATER = """
import time
time.sleep(0.01)
return pb_utils.InferenceResponse([pb_utils.Tensor("y", request.inputs()[0].as_numpy() + 0)])
"""
STEP = '{ model_name: "%s" model_version: -1 input_map { key: "x" value: "%s" } output_map { key: "y" value: "%s" } }'


def ensemble(size: int, *steps: str, outputs: str = "ab") -> str:
    made = "".join(f'output {{ name: "{name}" data_type: TYPE_FP32 dims: [ -1 ] }} ' for name in outputs)
    head = f'platform: "ensemble" max_batch_size: {size} input {{ name: "in" data_type: TYPE_FP32 dims: [ -1 ] }} '
    return f"{head}{made} ensemble_scheduling {{ step [ {', '.join(steps)} ] }}"


def given(at: int, size: int, is_raw: bool) -> Tensor:
    array = np.arange(at, at + 3, dtype=np.float32)
    array = array[np.newaxis] if size else array
    return Tensor("in", "FP32", array.shape, array.tobytes()) if is_raw else Tensor.of("in", array)


def wrote(engine: Any, size: int, is_raw: bool) -> None:
    """Ask for a = 2x by a model that writes in place, and b = x."""
    requests = [InferRequest("both", {"in": given(at, size, is_raw)}) for at in range(8)]
    for at, answer in enumerate(infer(engine, requests)):
        assert isinstance(answer, InferResponse), answer
        assert answer.tensor("a").array().reshape(-1).tolist() == [2 * at, 2 * at + 2, 2 * at + 4]
        assert answer.tensor("b").array().reshape(-1).tolist() == [at, at + 1, at + 2]
        kept = requests[at].inputs["in"].array().reshape(-1)
        assert kept.tolist() == [at, at + 1, at + 2]


@pytest.mark.parametrize("is_raw", [True, False])
@pytest.mark.parametrize("size", [0, 4])
def test_a_step_that_writes_in_place_changes_nobody_elses_input(
    repository: Repository, size: int, is_raw: bool
) -> None:
    repository.add_python("double", PLAIN % ("python", size), IN_PLACE)
    repository.add_python("same", PLAIN % ("python", size), LATER)
    repository.add("both", ensemble(size, STEP % ("double", "in", "a"), STEP % ("same", "in", "b")), {})
    with engine_over(repository.root) as engine:
        wrote(engine, size, is_raw)


def test_a_step_that_writes_in_place_does_not_change_an_output_of_the_graph(repository: Repository) -> None:
    """`b` goes to the caller and to a step that doubles it."""
    repository.add_python("double", PLAIN % ("python", 4), IN_PLACE)
    repository.add_python("same", PLAIN % ("python", 4), LATER)
    repository.add("both", ensemble(4, STEP % ("same", "in", "b"), STEP % ("double", "b", "a")), {})
    with engine_over(repository.root) as engine:
        wrote(engine, 4, is_raw=False)


def test_what_a_model_asks_another_for_is_not_changed_by_it(repository: Repository) -> None:
    repository.add_python("double", PLAIN % ("python", 0), IN_PLACE)
    repository.add_python(
        "asks",
        PLAIN % ("python", 0),
        """
        x = np.ones(3, np.float32)
        inner = pb_utils.InferenceRequest(
            model_name="double", inputs=[pb_utils.Tensor("x", x)], requested_output_names=["y"])
        answer = pb_utils.get_output_tensor_by_name(inner.exec(), "y").as_numpy()
        answer += 10  # an answer, too, is the model's own
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", np.concatenate([x, answer]))])
        """,
    )
    with engine_over(repository.root) as engine:
        (answer,) = infer(engine, [InferRequest("asks", {"x": Tensor.of("x", np.zeros(1, np.float32))})])
    assert isinstance(answer, InferResponse), answer
    assert answer.tensor("y").array().tolist() == [1, 1, 1, 12, 12, 12]


def torch_file(kind: str, path: Path) -> None:
    """A module that doubles its input in place, through a view."""
    torch = pytest.importorskip("torch")

    class Doubles(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x):  # type: ignore[no-untyped-def]
            x.view(-1).mul_(2)
            return x + 0

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and served
        if kind == "model.pt":
            torch.jit.script(Doubles()).save(str(path))
        else:
            axes = {0: torch.export.Dim("n", min=1, max=64)}
            torch.export.save(torch.export.export(Doubles(), (torch.ones(2, 3),), dynamic_shapes=(axes,)), path)


@pytest.mark.parametrize("kind", ["model.pt", "model.pt2"])
def test_a_module_that_writes_in_place_changes_nobody_elses_input(
    repository: Repository, kind: str, tmp_path: Path
) -> None:
    torch_file(kind, tmp_path / kind)
    config = (PLAIN % ("pytorch", 4)).replace("[ -1 ]", "[ 3 ]")
    repository.add("double", config, {kind: (tmp_path / kind).read_bytes()})
    repository.add_python("same", PLAIN % ("python", 4), LATER)
    repository.add("both", ensemble(4, STEP % ("double", "in", "a"), STEP % ("same", "in", "b")), {})
    with engine_over(repository.root) as engine:
        for is_raw in (True, False):
            wrote(engine, 4, is_raw)
