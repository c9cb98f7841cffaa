"""What python models give that is not what they are configured to give: outputs left out, and other datatypes."""

from collections.abc import Sequence

import numpy as np
import pytest

from tests.models import Repository
from tests.serving import engine_over, infer
from tutti.core.errors import InferError
from tutti.core.types import Answer, InferRequest, Tensor

# "a" and "b" become "p" and "q", one of which may be left out, and "p" of another datatype.
MAPS = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse([self.made(tensor) for tensor in r.inputs()]) for r in requests]

    def made(self, tensor):
        values = tensor.as_numpy()
        name = {"a": "p", "b": "q"}[tensor.name()]
        return pb_utils.Tensor(name, values.astype(np.int64) if (values > 2**20).any() else values)
"""
TENSORS = """
    input {{ name: "a" data_type: TYPE_INT32 dims: 1 {optional} }}
    input {{ name: "b" data_type: TYPE_INT32 dims: 1 {optional} }}
    output {{ name: "p" data_type: TYPE_INT32 dims: 1 }}
    output {{ name: "q" data_type: TYPE_INT32 dims: 1 }}
"""
OPTIONAL, STRICT = TENSORS.format(optional="optional: true"), TENSORS.format(optional="")
STEP = """
    step {{ model_name: "{model}" model_version: -1 input_map {{ key: "a" value: "{a}" }} input_map {{ key: "b" value: "{b}" }}
            output_map {{ key: "p" value: "{p}" }} output_map {{ key: "q" value: "{q}" }} }}
"""  # noqa: E501


def fill(repository: Repository, second: str = "loose", inputs: str = OPTIONAL) -> None:
    for name in {"loose", second}:
        tensors = STRICT if name == "strict" else OPTIONAL
        repository.add(name, f'backend: "python" max_batch_size: 4 {tensors}', {"model.py": MAPS})
    steps = STEP.format(model="loose", a="a", b="b", p="u", q="v") + STEP.format(
        model=second, a="u", b="v", p="p", q="q"
    )
    repository.add("chain", f'platform: "ensemble" max_batch_size: 4 {inputs} ensemble_scheduling {{ {steps} }}', {})


def ask(outputs: Sequence[str] = (), **values: int) -> InferRequest:
    tensors = {name: Tensor.of(name, np.array([[value]], np.int32)) for name, value in values.items()}
    return InferRequest("chain", tensors, outputs=tuple(outputs))


def shown(answer: Answer) -> object:
    if isinstance(answer, InferError):
        return answer.message
    return {tensor.name: (tensor.datatype, tensor.array().tolist()) for tensor in answer.outputs}


def int32(value: int) -> tuple[str, list[list[int]]]:
    return ("INT32", [[value]])


@pytest.mark.parametrize("together", [1, 3])
def test_what_no_step_requires_may_be_lacking(repository: Repository, together: int) -> None:
    fill(repository)
    with engine_over(repository.root) as engine:
        for sent, expected in (
            (ask(a=1), {"p": int32(1)}),
            (ask(b=2), {"q": int32(2)}),
            (ask(["p"], a=1), {"p": int32(1)}),
            (ask(["q"], a=1), {}),
            (ask(a=1, b=2), {"p": int32(1), "q": int32(2)}),
        ):
            assert [shown(answer) for answer in infer(engine, [sent] * together)] == [expected] * together


UNBATCHED = """
    platform: "ensemble"
    input { name: "a" data_type: TYPE_INT32 dims: 1 optional: true }
    input { name: "b" data_type: TYPE_INT32 dims: 1 optional: true }
    output { name: "first" data_type: TYPE_INT32 dims: 2 }
    output { name: "second" data_type: TYPE_INT32 dims: 2 }
    ensemble_scheduling {
      step { model_name: "told" model_version: -1
             input_map { key: "a" value: "a" } output_map { key: "seen" value: "first" } }
      step { model_name: "told" model_version: -1
             input_map { key: "b" value: "b" } output_map { key: "seen" value: "second" } }
    }
"""
TOLD = """
    backend: "python"
    input { name: "a" data_type: TYPE_INT32 dims: 1 optional: true }
    input { name: "b" data_type: TYPE_INT32 dims: 1 optional: true }
    output { name: "seen" data_type: TYPE_INT32 dims: 2 }
"""
NESTED = """
    platform: "ensemble"
    input { name: "a" data_type: TYPE_INT32 dims: 1 optional: true }
    output { name: "first" data_type: TYPE_INT32 dims: 2 }
    ensemble_scheduling { step { model_name: "chain" model_version: -1
      input_map { key: "a" value: "a" } output_map { key: "first" value: "first" } } }
"""


@pytest.mark.parametrize("together", [1, 3])
def test_a_step_runs_though_callers_leave_out_all_that_it_may_take(repository: Repository, together: int) -> None:
    """As a stock Triton does it where there is no batch axis: -1 stands for what the step was not given."""
    seen = """
        given = [pb_utils.get_input_tensor_by_name(request, name) for name in "ab"]
        values = np.array([-1 if tensor is None else tensor.as_numpy()[0] for tensor in given], np.int32)
        return pb_utils.InferenceResponse([pb_utils.Tensor("seen", values)])
    """
    repository.add_python("told", TOLD, seen)
    repository.add("chain", UNBATCHED, {})
    repository.add("outer", NESTED, {})
    with engine_over(repository.root) as engine:
        for sent, first, second in (((), -1, -1), ("a", 1, -1), ("b", -1, 2), ("ab", 1, 2)):
            inputs = {n: Tensor.of(n, np.array([{"a": 1, "b": 2}[n]], np.int32)) for n in sent}
            answers = infer(engine, [InferRequest("chain", dict(inputs)) for _ in range(together)])
            told = {"first": ("INT32", [first, -1]), "second": ("INT32", [-1, second])}
            assert [shown(answer) for answer in answers] == [told] * together
        (answer,) = infer(engine, [InferRequest("outer", {})])
        assert shown(answer) == {"first": ("INT32", [-1, -1])}


def test_what_a_step_requires_may_not_be_lacking(repository: Repository) -> None:
    fill(repository, "strict")
    with engine_over(repository.root) as engine:
        lacking, whole = infer(engine, [ask(a=1), ask(a=1, b=2)])
        assert "step 'loose': output 'q': the model's answer lacks it" in str(shown(lacking))
        assert shown(whole) == {"p": int32(1), "q": int32(2)}


def test_an_ensembles_requests_are_its_executions(repository: Repository) -> None:
    fill(repository)
    with engine_over(repository.root) as engine:
        infer(engine, [ask(a=1, b=1)])
        infer(engine, [ask(a=1, b=1)] * 3)
        two = ask()
        two.inputs = {name: Tensor.of(name, np.ones((2, 1), np.int32)) for name in "ab"}
        infer(engine, [two, ask(a=1)])
        counts = engine.model("chain").statistics.counts
    assert (counts.executions, counts.inferences, counts.success.count) == (6, 7, 6)
    assert {size: [times.count for times in stages] for size, stages in counts.batches.items()} == {
        1: [5, 5, 5], 2: [1, 1, 1],
    }  # fmt: skip
    assert counts.queue.count == counts.compute_infer.count == counts.compute_output.count == 6
    assert 0 < counts.compute_infer.ns == counts.success.ns


@pytest.mark.parametrize("together", [1, 3])
def test_another_datatype_is_the_next_steps_to_refuse_each_time(repository: Repository, together: int) -> None:
    fill(repository)
    big = 2**21
    with engine_over(repository.root) as engine:
        for _ in range(2):
            good = infer(engine, [ask(a=1, b=2)] * together)
            assert [shown(answer) for answer in good] == [{"p": int32(1), "q": int32(2)}] * together
            for answer in infer(engine, [ask(a=big, b=2)] * together):
                assert "data-type is 'INT64', but model 'loose' expects 'INT32'" in str(shown(answer))


def test_another_datatype_of_the_last_step_passes(repository: Repository) -> None:
    fill(repository)
    last = STEP.format(model="loose", a="a", b="b", p="p", q="q")
    repository.add("last", f'platform: "ensemble" max_batch_size: 4 {OPTIONAL} ensemble_scheduling {{ {last} }}', {})
    big = 2**21
    with engine_over(repository.root) as engine:
        sent = [ask(a=1, b=2), ask(a=big, b=3), ask(a=big), ask(a=4)]
        for one in sent:
            one.model_name = "last"
        alone = [shown(infer(engine, [one])[0]) for one in sent]
        assert alone == [
            {"p": int32(1), "q": int32(2)},
            {"p": ("INT64", [[big]]), "q": int32(3)},
            {"p": ("INT64", [[big]])},
            {"p": int32(4)},
        ]
        assert [shown(answer) for answer in infer(engine, sent)] == alone
