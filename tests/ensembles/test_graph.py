"""Graphs: what a plan holds, and that every mistake is found at load with the step and tensor named."""

import pytest

from tutti.core.errors import ConfigError, NotFound
from tutti.ensembles import planner
from tutti.repository import config, model_config

MODELS = {
    "double": config.parse(
        'backend: "b" max_batch_size: 8 input { name: "a" data_type: TYPE_FP32 dims: -1 }'
        ' output { name: "b" data_type: TYPE_FP32 dims: -1 }',
        "double",
    ),
    "add": config.parse(
        'backend: "b" max_batch_size: 8 input { name: "l" data_type: TYPE_FP32 dims: 4 }'
        ' input { name: "r" data_type: TYPE_FP32 dims: 4 optional: true }'
        ' output { name: "s" data_type: TYPE_FP32 dims: 4 }',
        "add",
    ),
    "text": config.parse(
        'backend: "b" max_batch_size: 8 input { name: "t" data_type: TYPE_STRING dims: 1 }'
        ' output { name: "n" data_type: TYPE_INT32 dims: 1 }',
        "text",
    ),
    "stream": config.parse(
        'backend: "b" max_batch_size: 8 input { name: "a" data_type: TYPE_FP32 dims: 4 }'
        ' output { name: "b" data_type: TYPE_FP32 dims: 4 } model_transaction_policy { decoupled: true }',
        "stream",
    ),
    "unbatched": config.parse(
        'backend: "b" input { name: "a" data_type: TYPE_FP32 dims: -1 }'
        ' output { name: "b" data_type: TYPE_FP32 dims: -1 }',
        "unbatched",
    ),
    "three": config.parse(
        'backend: "b" input { name: "a" data_type: TYPE_FP32 dims: 3 }'
        ' output { name: "b" data_type: TYPE_FP32 dims: 4 }',
        "three",
    ),
}


def config_of(name: str, version: str) -> model_config.ModelConfig:
    if name not in MODELS:
        raise NotFound(f"unknown model '{name}'")
    return MODELS[name]


def step(model: str, inputs: dict[str, str], outputs: dict[str, str]) -> str:
    maps = [f'input_map {{ key: "{k}" value: "{v}" }}' for k, v in inputs.items()]
    maps += [f'output_map {{ key: "{k}" value: "{v}" }}' for k, v in outputs.items()]
    return f'step {{ model_name: "{model}" model_version: -1 {" ".join(maps)} }}'


def ensemble(*steps: str, output: str = "Y", kind: str = "TYPE_FP32", dims: str = "4") -> model_config.ModelConfig:
    return config.parse(
        f"""
        platform: "ensemble" max_batch_size: 8
        input {{ name: "X" data_type: TYPE_FP32 dims: 4 }}
        output {{ name: "{output}" data_type: {kind} dims: {dims} }}
        ensemble_scheduling {{ {" ".join(steps)} }}
        """,
        "e",
    )


def test_a_diamond() -> None:
    plan = planner.plan(
        ensemble(
            step("add", {"l": "U", "r": "V"}, {"s": "Y"}),
            step("double", {"a": "X"}, {"b": "U"}),
            step("double", {"a": "X"}, {"b": "V"}),
        ),
        config_of,
    )
    assert [sorted(s.needs) for s in plan.steps] == [[1, 2], [], []]
    assert plan.readers["X"] == (1, 2)
    assert plan.steps_for(()) == {0, 1, 2}
    assert plan.steps_for(("Y",)) == {0, 1, 2}


def test_only_the_steps_an_output_needs() -> None:
    plan = planner.plan(
        ensemble(
            step("double", {"a": "X"}, {"b": "Y"}),
            step("double", {"a": "Y"}, {"b": "Z"}),
        ),
        config_of,
    )
    assert plan.steps_for(("Y",)) == {0}


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ([], "expected at least one"),
        ([step("nope", {"a": "X"}, {"b": "Y"})], "step 'nope': its model is not available"),
        ([step("e", {"a": "X"}, {"b": "Y"})], "cannot use itself"),
        ([step("double", {}, {"b": "Y"})], "input 'a' of the model is not mapped"),
        ([step("double", {"a": "X", "z": "X"}, {"b": "Y"})], "'z': the model has inputs ['a']"),
        ([step("double", {"a": "X"}, {"z": "Y"})], "'z': the model has outputs ['b']"),
        ([step("double", {"a": "Q"}, {"b": "Y"})], "nothing makes ensemble tensor 'Q'"),
        ([step("double", {"a": "X"}, {"b": "Z"})], "output 'Y': no step makes it"),
        ([step("double", {"a": "X"}, {"b": "X"})], "'X' is made more than once"),
        ([step("double", {"a": "X"}, {"b": "Y"})] * 2, "'Y' is made more than once"),
        ([step("text", {"t": "X"}, {"n": "Y"})], "expected datatype BYTES, ensemble tensor 'X' is FP32"),
        ([step("three", {"a": "X"}, {"b": "Y"})], "expected shape [3], ensemble tensor 'X' has [-1, 4]"),
        (
            [
                step("double", {"a": "U"}, {"b": "V"}),
                step("double", {"a": "V"}, {"b": "U"}),
                step("double", {"a": "X"}, {"b": "Y"}),
            ],
            "cycle among ['double', 'double']",
        ),
    ],
)
def test_mistakes_are_found_at_load(made: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match="ensemble 'e'") as caught:
        planner.plan(ensemble(*made), config_of)
    assert says in str(caught.value)


def test_outputs_must_fit() -> None:
    made = step("double", {"a": "X"}, {"b": "Y"})
    with pytest.raises(ConfigError, match="configured as INT32, its step makes FP32"):
        planner.plan(ensemble(made, kind="TYPE_INT32"), config_of)
    with pytest.raises(ConfigError, match="configured with shape"):
        planner.plan(ensemble(made, dims="[ 4, 4 ]"), config_of)


def test_an_optional_input_may_stay_unmapped() -> None:
    plan = planner.plan(ensemble(step("add", {"l": "X"}, {"s": "Y"})), config_of)
    assert plan.steps[0].inputs == (("l", "X"),)
