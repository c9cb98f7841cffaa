"""Where a graph is cut when its models live in different places."""

import pickle

import numpy as np
import pytest

from tests.serving import infer
from tutti.core.types import Call, Infer, InferRequest, InferResponse, Tensor, settle
from tutti.ensembles import graph, planner
from tutti.ensembles.placed import PlacedExecutor, executor_of_segment
from tutti.ensembles.segments import Cut, cut
from tutti.observing.statistics import ModelStatistics
from tutti.repository import config, model_config

SPEC = "data_type: TYPE_FP32 dims: 2"


def model(name: str) -> model_config.ModelConfig:
    backend = "python" if name.startswith("py") else "onnxruntime"
    return config.parse(
        f'backend: "{backend}" max_batch_size: 8 dynamic_batching {{}} input {{ name: "x" {SPEC} }} '
        f'input {{ name: "z" {SPEC} optional: true }} output {{ name: "y" {SPEC} }}',
        name,
    )


def plan_of(*steps: str, outputs: str, extra: dict[str, str] | None = None) -> graph.Plan:
    """Steps as "model: X Z -> Y"."""
    made = ""
    for step in steps:
        name, _, maps = step.partition(": ")
        reads, _, out = maps.partition(" -> ")
        given = "".join(f'input_map {{ key: "{k}" value: "{v}" }}' for k, v in zip("xz", reads.split(), strict=False))
        out_map = f'output_map {{ key: "y" value: "{out}" }}'
        made += f'step {{ model_name: "{name}" model_version: -1 {given} {out_map} }} '
    inputs = f'input {{ name: "X" {SPEC} }} input {{ name: "W" {SPEC} optional: true }}'
    shown = "".join(f'output {{ name: "{name}" {SPEC} }}' for name in outputs.split())
    parameters = "".join(
        f'parameters {{ key: "tutti.{k}" value {{ string_value: "{v}" }} }}' for k, v in (extra or {}).items()
    )
    text = f'platform: "ensemble" max_batch_size: 8 {inputs} {shown} {parameters} ensemble_scheduling {{ {made} }}'
    return planner.plan(config.parse(text, "e"), lambda name, _: model(name))


def place_of(step: graph.Step) -> str | None:
    """By the first letter: g for GPUs, c and p for CPUs, n for nowhere."""
    return {"g": "gpu", "c": "cpu", "p": "cpu", "n": None}[step.model_name[0]]


def names(made: Cut) -> list[list[str]]:
    return sorted([step.model_name for step in segment.steps] for segment in made.segments.values())


def test_a_chain_is_cut_where_the_place_changes() -> None:
    plan = plan_of("c1: X -> A", "c2: A -> B", "g1: B -> C", "g2: C -> D", "c3: D -> E", outputs="E B")
    made = cut(plan, place_of)
    assert names(made) == [["c1", "c2"], ["g1", "g2"]]
    assert len(made.plan.steps) == 3
    first, second, last = made.plan.steps
    assert (first.inputs, first.outputs) == ((("X", "X"),), (("B", "B"),))
    assert second.needs == {first.index}
    assert last.model_name == "c3"
    assert made.places == {first.model_name: "cpu", second.model_name: "gpu"}
    assert all(step.is_merged and step.max_rows == 8 for step in made.plan.steps)


def test_a_way_through_another_place_keeps_steps_apart() -> None:
    plan = plan_of("g1: X -> A", "c1: A -> B", "g2: A B -> C", outputs="C")
    assert names(cut(plan, place_of)) == []


def test_branches_that_share_no_tensor_stay_apart() -> None:
    plan = plan_of("c1: X -> A", "g1: A -> B", "g2: B -> C", "g3: A -> D", "g4: D -> E", outputs="C E")
    assert names(cut(plan, place_of)) == [["g1", "g2"], ["g3", "g4"]]


def test_a_condition_goes_with_the_steps_it_is_for() -> None:
    extra = {"when.B": "A[0] > 0", "default.C": "0"}
    plan = plan_of("c1: X -> A", "g0: A -> G", "g1: G -> B", "g2: B -> C", outputs="C G", extra=extra)
    made = cut(plan, place_of)
    assert names(made) == [["g1", "g2"]], "g0 runs for all rows"
    (segment,) = [step for step in made.plan.steps if step.is_segment]
    assert segment.when is not None
    assert segment.when.text == "A[0] > 0"
    (inner,) = made.segments.values()
    assert not any(step.when for step in inner.steps)


@pytest.mark.parametrize("extra", [{"optional.B": "true"}, {"when.B": "A[0] > 0", "default.B": "0"}])
def test_what_may_be_left_out_stands_alone(extra: dict[str, str]) -> None:
    extra = {"default.B": "0", **extra}
    plan = plan_of("g0: X -> A", "g1: A -> B", "g2: B -> C", outputs="C", extra=extra)
    assert ["g0", "g1"] not in names(cut(plan, place_of))
    assert names(cut(plan, place_of)) == []


def test_models_that_are_nowhere_and_unneeded_steps() -> None:
    plan = plan_of("n1: X -> A", "n2: A -> B", "g1: B -> C", "g2: C -> D", "g3: D -> Z", outputs="D")
    made = cut(plan, place_of)
    assert names(made) == [["g1", "g2"]]
    assert len(made.plan.steps) == 3


def test_a_segment_of_which_one_model_joins_no_requests_takes_them_one_by_one() -> None:
    plan = plan_of("c1: X -> A", "py: A -> B", "g1: B -> C", outputs="C")
    (segment,) = [step for step in cut(plan, place_of).plan.steps if step.is_segment]
    assert not segment.is_merged


def test_equal_graphs_have_segments_of_equal_names() -> None:
    steps = ("c1: X -> A", "g1: A -> B", "g2: B -> C")
    first, again = (cut(plan_of(*steps, outputs="C"), place_of).segments for _ in range(2))
    other = cut(plan_of(*steps, outputs="C B"), place_of).segments
    assert list(first) == list(again)
    assert list(first) != list(other)


def test_a_request_for_some_outputs_executes_no_more_than_they_need() -> None:
    plan = plan_of("c1: X -> A", "g1: A -> B", "g2: B -> C", outputs="B C")
    seen: list[str] = []

    def models(calls: list[Call]) -> None:
        for call in calls:
            seen.append(call.request.model_name)
            array = call.request.inputs["x"].array() + 1
            call.answer = InferResponse("m", "1", [Tensor.of("y", array)])
        settle(calls)

    def serve(step: graph.Step, segment: graph.Plan, place: object) -> Infer:
        assert place == "gpu"
        return executor_of_segment(pickle.loads(pickle.dumps(segment)), models)

    made = PlacedExecutor(plan, "1", models, ModelStatistics(), place_of, serve)
    x = {"X": Tensor.of("X", np.zeros((1, 2), np.float32))}
    whole, some = infer(made, [InferRequest("e", x), InferRequest("e", x, outputs=("B",))])
    assert isinstance(whole, InferResponse)
    assert isinstance(some, InferResponse)
    assert [(one.name, one.array()[0, 0]) for one in whole.outputs] == [("B", 2), ("C", 3)]
    assert [(one.name, one.array()[0, 0]) for one in some.outputs] == [("B", 2)]
    assert sorted(seen) == ["c1", "c1", "g1", "g1", "g2"]
