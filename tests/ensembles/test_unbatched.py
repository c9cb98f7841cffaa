"""Ensembles without a batch of their own over models with one: as in Triton, a first axis is the models' affair."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.models import Repository
from tests.serving import Gather, engine_over, infer
from tutti.core.errors import InferError
from tutti.core.types import Call, InferRequest, InferResponse, Tensor, settle
from tutti.ensembles import planner
from tutti.ensembles.placed import executor_of
from tutti.observing.statistics import ModelStatistics
from tutti.repository import config

MODEL = """
    backend: "python" max_batch_size: %d
    input { name: "x" data_type: TYPE_FP32 dims: %s } output { name: "y" data_type: TYPE_FP32 dims: %s }
    parameters { key: "tutti.isolate" value { string_value: "no" } }
"""
GRAPH = """
    platform: "ensemble" max_batch_size: %d
    input { name: "x" data_type: TYPE_FP32 dims: %s } output { name: "y" data_type: TYPE_FP32 dims: %s }
    ensemble_scheduling { step [ %s ] }
"""


def add(repository: Repository, name: str, size: int, dims: str, made: str, value: str) -> None:
    body = f"""
    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", {value})])
    """
    repository.add_python(name, MODEL % (size, dims, made), body)


def add_graph(repository: Repository, name: str, dims: str, made: str, *models: str, size: int = 0) -> None:
    tensors = ["x", *(f"t{at}" for at in range(len(models) - 1)), "y"]
    steps = ", ".join(
        f'{{ model_name: "{model}" model_version: -1 input_map {{ key: "x" value: "{tensors[at]}" }} '
        f'output_map {{ key: "y" value: "{tensors[at + 1]}" }} }}'
        for at, model in enumerate(models)
    )
    repository.add(name, GRAPH % (size, dims, made, steps), {})


def request(name: str, *rows: object) -> InferRequest:
    return InferRequest(name, {"x": Tensor.of("x", np.array(rows, np.float32))})


def made(answer: object) -> list[object]:
    assert isinstance(answer, InferResponse), answer
    values: list[object] = answer.tensor("y").array().tolist()
    return values


def test_a_step_takes_as_many_rows_as_the_one_before_made(repository: Repository) -> None:
    """A detector's crops, classified as one batch; together with other requests, too."""
    crops = "np.stack([np.full(2, k, np.float32) for k in range(int(x[0]))])"
    add(repository, "detector", 0, "1", "[ -1, 2 ]", crops)
    add(repository, "classifier", 4, "2", "1", "x.sum(1, keepdims=True)")
    add_graph(repository, "crops", "1", "[ -1, 1 ]", "detector", "classifier")
    with engine_over(repository.root) as engine:
        assert made(infer(engine, [request("crops", 3)])[0]) == [[0], [2], [4]]
        answers = infer(engine, [request("crops", n) for n in (1, 2, 4)])
        assert [len(made(answer)) for answer in answers] == [1, 2, 4]
        (too_many,) = infer(engine, [request("crops", 5)])
    assert isinstance(too_many, InferError)
    assert "inference request batch-size must be <= 4 for 'classifier', and at least 1, got 5" in str(too_many)


def test_steps_with_and_without_a_batch_take_turns(repository: Repository) -> None:
    add(repository, "widen", 16, "1", "3", "np.repeat(x, 3, axis=1)")
    add(repository, "whole", 0, "[ -1, 3 ]", "[ -1, 3 ]", "x + 1")
    add(repository, "twice", 16, "3", "3", "x * 2")
    add_graph(repository, "chain", "[ -1, 1 ]", "[ -1, 3 ]", "widen", "whole", "twice")
    with engine_over(repository.root) as engine:
        answers = infer(engine, [request("chain", [1], [2]), request("chain", [5])])
    assert [made(answer) for answer in answers] == [[[4, 4, 4], [6, 6, 6]], [[12, 12, 12]]]


def add_pair(repository: Repository) -> None:
    """A model with a batch and one without, of the same dims."""
    add(repository, "batched", 8, "[ -1 ]", "[ -1 ]", "x + len(x.shape)")
    add(repository, "single", 0, "[ -1 ]", "[ -1 ]", "x + 10 * len(x.shape)")


def test_a_tensor_of_a_models_own_dims_is_one_row_of_its_batch(repository: Repository) -> None:
    """Every order of a model with a batch, which sees two dimensions here, and one without, which sees one."""
    add_pair(repository)
    for first, second in (("batched", "batched"), ("batched", "single"), ("single", "batched"), ("single", "single")):
        add_graph(repository, f"{first}_{second}", "2", "2", first, second)
    with engine_over(repository.root) as engine:
        for name, expected in (
            ("batched_batched", 4), ("batched_single", 12), ("single_batched", 12), ("single_single", 20)
        ):  # fmt: skip
            assert made(infer(engine, [request(name, 0, 1)])[0]) == [expected, expected + 1], name
            together = infer(engine, [request(name, 0, 1), request(name, 5, 6)])
            assert [made(answer) for answer in together] == [[expected, expected + 1], [expected + 5, expected + 6]]


def test_one_row_of_a_batch_goes_to_a_model_without_one(repository: Repository) -> None:
    """Several rows do not, and are told; alone, together, and in every order of steps."""
    add_pair(repository)
    add_graph(repository, "batched_single", "2", "2", "batched", "single", size=8)
    add_graph(repository, "single_batched", "2", "2", "single", "batched", size=8)
    add_graph(repository, "single_single", "2", "2", "single", "single", size=8)
    with engine_over(repository.root) as engine:
        for name, expected in (("batched_single", 12), ("single_batched", 12), ("single_single", 20)):
            assert made(infer(engine, [request(name, [0, 1])])[0]) == [[expected, expected + 1]], name
            first, several, last = infer(
                engine, [request(name, [0, 1]), request(name, [0, 1], [2, 3]), request(name, [5, 6])]
            )
            assert made(first) == [[expected, expected + 1]]
            assert made(last) == [[expected + 5, expected + 6]]
            assert isinstance(several, InferError)
            assert "unexpected shape for input 'x' for model 'single'" in str(several)


def test_a_model_without_a_batch_gives_one_row_only(repository: Repository) -> None:
    """It takes the batch as a tensor, and what it gives has no batch: it cannot be several requests' rows."""
    add(repository, "largest", 0, "[ -1, 2 ]", "2", "x.max(0)")
    add(repository, "batched", 8, "[ -1 ]", "[ -1 ]", "x + 1")
    add_graph(repository, "best", "2", "2", "largest", "batched", size=8)
    with engine_over(repository.root) as engine:
        one, several = infer(engine, [request("best", [1, 2]), request("best", [1, 2], [3, 0])])
    assert made(one) == [[2, 3]]
    assert "in ensemble 'best', step 'largest': the model has no batch, and gives one row: the request has 2" in str(
        several
    )


def test_a_row_goes_through_a_decoupled_model_without_a_batch(repository: Repository) -> None:
    """Each of its answers comes back as a row."""
    add_pair(repository)
    decoupled = MODEL.replace('backend: "python"', 'model_transaction_policy { decoupled: true } backend: "python"')
    body = """
    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
    sender = request.get_response_sender()
    for at in range(2):
        sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("y", x + 10 * len(x.shape) + at)]))
    sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
    """
    repository.add_python("stream", decoupled % (0, "[ -1 ]", "[ -1 ]"), body)
    model = repository.root / "stream" / "1" / "model.py"
    model.write_text(
        model.read_text().replace(
            "return [self.answer(request) for request in requests]", "[self.answer(request) for request in requests]"
        )
    )
    add_graph(repository, "twice", "2", "2", "stream", "batched", size=8)
    with engine_over(repository.root) as engine:
        answers: list[InferResponse] = []
        gather = Gather(1)
        engine([Call(request("twice", [0, 1]), gather, None, answers.append)])
        gather.wait()
    assert [made(answer) for answer in answers] == [[[12, 13]], [[13, 14]]]


class Lost:
    """What was on a device that has failed."""

    nbytes = 8

    def array(self) -> Any:
        raise RuntimeError("the device has failed")


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("where", ["input", "output"])
@pytest.mark.parametrize("is_decoupled", [False, True])
def test_a_tensor_whose_axis_cannot_be_changed_is_answered(is_decoupled: bool, where: str, count: int) -> None:
    """Alone, among others, and in a graph with a decoupled step."""
    policy = "model_transaction_policy { decoupled: true }" if is_decoupled else ""
    single = config.parse(MODEL % (0, "2", "2") + policy, "single")
    step = 'model_name: "single" model_version: -1 input_map { key: "x" value: "x" } output_map { key: "y" value: "y" }'
    plan = planner.plan(config.parse(GRAPH % (8, "2", "2", f"{{ {step} }}"), "graph"), lambda *_: single)
    assert plan.steps[0].axes_in and plan.steps[0].axes_out
    lost = {where: Lost()}

    def serve(calls: Sequence[Call]) -> None:
        for call in calls:
            call.answer = InferResponse("single", "1", [Tensor("y", "FP32", (2,), lost.get("output", bytes(8)))])  # type: ignore[arg-type]
        settle(calls)

    x = Tensor("x", "FP32", (1, 2), lost.get("input", bytes(8)))  # type: ignore[arg-type]
    calls = [Call(InferRequest("graph", {"x": x}), Gather(1), None, lambda _: None) for _ in range(count)]
    executor_of(plan, "1", serve, ModelStatistics())(calls)
    for call in calls:
        assert isinstance(call.sink, Gather)
        call.sink.wait()
        assert isinstance(call.answer, InferError)
        assert "in ensemble 'graph', step 'single'" in call.answer.message
        assert "the device has failed" in call.answer.message
