"""Ensembles over real models: answers, isolation of failures, and random graphs against a slow oracle."""

import random
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from tests.models import IN_PROCESS, Repository
from tests.serving import Gather, engine_over, infer
from tutti import ensembles
from tutti.core.errors import Cancelled, InferError, InvalidArgument, NotFound
from tutti.core.types import Call, InferRequest, InferResponse, Tensor, settle
from tutti.ensembles import graph, planner
from tutti.ensembles.executor import EnsembleExecutor
from tutti.observing.statistics import ModelStatistics
from tutti.repository import config, model_config

assert ensembles.load  # type: ignore[truthy-function]

CHAIN = """
    platform: "ensemble" max_batch_size: 8
    input { name: "X" data_type: TYPE_FP32 dims: 4 }
    output { name: "MIDDLE" data_type: TYPE_FP32 dims: 4 }
    output { name: "Y" data_type: TYPE_FP32 dims: 4 }
    ensemble_scheduling {
      step {
        model_name: "check" model_version: -1
        input_map { key: "x" value: "MIDDLE" } output_map { key: "y" value: "Y" }
      }
      step {
        model_name: "add_one" model_version: -1
        input_map { key: "x" value: "X" } output_map { key: "y" value: "MIDDLE" }
      }
    }
"""
REFUSE_NEGATIVE = """
    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
    if (x < 0).any():
        error = pb_utils.TritonError("input 'x' is negative", pb_utils.TritonError.INVALID_ARG)
        return pb_utils.InferenceResponse([], error)
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", x * 10)])
"""
FOUR = (
    """
    backend: "python" max_batch_size: 8
    input { name: "x" data_type: TYPE_FP32 dims: 4 }
    output { name: "y" data_type: TYPE_FP32 dims: 4 }
    dynamic_batching {}
"""
    + IN_PROCESS
)


def ask(value: float, rows: int = 1, outputs: tuple[str, ...] = ()) -> InferRequest:
    return InferRequest("chain", {"X": Tensor.of("X", np.full((rows, 4), value, np.float32))}, outputs=outputs)


@pytest.fixture
def chain(repository: Repository) -> Repository:
    repository.add_onnx()
    repository.add_python("check", FOUR, REFUSE_NEGATIVE)
    repository.add("chain", CHAIN, {".keep": ""})
    return repository


def test_a_chain_answers_with_all_its_outputs_or_those_asked_for(chain: Repository) -> None:
    with engine_over(chain.root) as engine:
        every, one = infer(engine, [ask(1.0, 3), ask(2.0, outputs=("MIDDLE",))])
        assert isinstance(every, InferResponse)
        assert [(o.name, o.shape, o.array()[0, 0]) for o in every.outputs] == [("MIDDLE", (3, 4), 2), ("Y", (3, 4), 20)]
        assert isinstance(one, InferResponse)
        assert [(o.name, o.array()[0, 0]) for o in one.outputs] == [("MIDDLE", 3)]
        assert engine.model("check").statistics.counts.success.count == 1


def test_a_failing_step_fails_its_own_request_and_says_where(chain: Repository) -> None:
    with engine_over(chain.root) as engine:
        good, bad, other = infer(engine, [ask(1.0), ask(-9.0), ask(4.0)])
        assert isinstance(bad, InvalidArgument)
        assert bad.message == "in ensemble 'chain', step 'check': input 'x' is negative"
        assert isinstance(good, InferResponse)
        assert isinstance(other, InferResponse)
        assert other.tensor("Y").array()[0, 0] == 50
        counts = engine.model("chain").statistics.counts
        assert (counts.success.count, counts.fail.count) == (2, 1)


def test_a_cancelled_call_starts_no_further_step(chain: Repository) -> None:
    with engine_over(chain.root) as engine:
        gather = Gather(1)
        call = Call(ask(1.0), gather)
        call.is_cancelled = True
        engine([call])
        gather.wait()
        assert isinstance(call.answer, Cancelled)
        assert engine.model("add_one").statistics.counts.executions == 0


def test_a_step_whose_model_is_gone_fails_the_request(chain: Repository) -> None:
    with engine_over(chain.root) as engine:
        del engine._newest["check"]
        (answer,) = infer(engine, [ask(1.0)])
        assert isinstance(answer, NotFound)
        assert "step 'check'" in answer.message


def test_a_sentence_of_tritons_own_begins_as_in_triton(repository: Repository) -> None:
    """Alone, in a batch of calls, and through a nested ensemble: the model is named in it."""
    repository.add_python("check", FOUR.replace("dynamic_batching {}", "sequence_batching {}"), REFUSE_NEGATIVE)
    repository.add_onnx()
    repository.add("chain", CHAIN, {".keep": ""})
    text = CHAIN.replace('"check"', '"chain"').replace('key: "x" value: "MIDDLE"', 'key: "X" value: "MIDDLE"')
    repository.add("nested", text.replace('key: "y" value: "Y"', 'key: "Y" value: "Y"'), {".keep": ""})
    says = "inference request to model 'check' must specify a non-zero or non-empty correlation ID"
    with engine_over(repository.root) as engine:
        nested = ask(1.0)
        nested.model_name = "nested"
        answers = infer(engine, [ask(1.0)]) + infer(engine, [ask(2.0), ask(3.0)]) + infer(engine, [nested])
    told = [answer.message for answer in answers if isinstance(answer, InvalidArgument)]
    assert [message.partition(says)[0] for message in told] == [
        *["in ensemble 'chain', "] * 3,
        "in ensemble 'nested', step 'chain': in ensemble 'chain', ",
    ]


def test_a_nested_ensemble(chain: Repository) -> None:
    text = CHAIN.replace('"check"', '"chain"').replace('key: "x" value: "MIDDLE"', 'key: "X" value: "MIDDLE"')
    chain.add("nested", text.replace('key: "y" value: "Y"', 'key: "Y" value: "Y"'), {".keep": ""})
    with engine_over(chain.root) as engine:
        assert not engine.failures()
        request = ask(1.0)
        request.model_name = "nested"
        (answer,) = infer(engine, [request])
        assert isinstance(answer, InferResponse)
        assert answer.tensor("Y").array()[0, 0] == 30


def test_a_broken_graph_is_not_served(chain: Repository) -> None:
    path = chain.root / "chain" / "config.pbtxt"
    path.write_text(path.read_text().replace('"add_one"', '"missing"'))
    with engine_over(chain.root) as engine:
        assert "step 'missing'" in engine.failures()[0]


# Random graphs: each model adds up its inputs, times a factor; a row whose sum passes a limit fails.
WIDTH = 3
LIMIT = 60.0


class Summer:
    """An Infer: output = factor * sum of inputs, from another thread, in random groups."""

    def __init__(self, factor: float, seed: int) -> None:
        self.factor = factor
        self.random = random.Random(seed)

    def compute(self, inputs: Sequence[np.ndarray]) -> np.ndarray:
        total = np.sum(inputs, axis=0, dtype=np.float64).astype(np.float32)
        if np.abs(total).max() > LIMIT:
            raise InvalidArgument("too much")
        return total * np.float32(self.factor)  # type: ignore[return-value]

    def __call__(self, calls: Sequence[Call]) -> None:
        threading.Thread(target=self._run, args=(list(calls),)).start()

    def _run(self, calls: list[Call]) -> None:
        self.random.shuffle(calls)
        while calls:
            group = [calls.pop() for _ in range(self.random.randint(1, len(calls)))]
            for call in group:
                try:
                    y = self.compute([tensor.array() for tensor in call.request.inputs.values()])
                    call.answer = InferResponse("m", "1", [Tensor.of("y", y)])
                except InferError as error:
                    call.answer = error
            settle(group)


def random_ensemble(
    rng: random.Random,
) -> tuple[model_config.ModelConfig, dict[str, model_config.ModelConfig], dict[str, Summer]]:
    """Up to seven steps, each reading up to three earlier tensors, in shuffled order."""
    tensors, steps, models, summers = ["X"], [], {}, {}
    for index in range(rng.randint(1, 7)):
        reads = rng.sample(tensors, rng.randint(1, min(3, len(tensors))))
        name = f"m{index}"
        inputs = "".join(f'input {{ name: "i{k}" data_type: TYPE_FP32 dims: {WIDTH} }}' for k in range(len(reads)))
        text = f'backend: "b" max_batch_size: 8 {inputs} output {{ name: "y" data_type: TYPE_FP32 dims: {WIDTH} }}'
        models[name] = config.parse(text, name)
        summers[name] = Summer(rng.choice([0.5, 1.0, 2.0, -1.0]), rng.randint(0, 9999))
        maps = "".join(f'input_map {{ key: "i{k}" value: "{read}" }}' for k, read in enumerate(reads))
        steps.append(
            f'step {{ model_name: "{name}" model_version: -1 {maps} output_map {{ key: "y" value: "T{index}" }} }}'
        )
        tensors.append(f"T{index}")
    shown = rng.sample(tensors[1:], rng.randint(1, len(tensors) - 1))
    rng.shuffle(steps)
    outputs = "".join(f'output {{ name: "{name}" data_type: TYPE_FP32 dims: {WIDTH} }}' for name in shown)
    text = f"""platform: "ensemble" max_batch_size: 8 input {{ name: "X" data_type: TYPE_FP32 dims: {WIDTH} }}
        {outputs} ensemble_scheduling {{ {" ".join(steps)} }}"""
    return config.parse(text, "e"), models, summers


def oracle(plan: graph.Plan, summers: dict[str, Summer], x: np.ndarray) -> dict[str, np.ndarray] | None:
    """One request, step by step; None when a step that the outputs need refuses."""
    known = {"X": x}
    needed = plan.steps_for(())
    while len([i for i in needed if plan.steps[i].outputs[0][1] not in known]):
        for index in needed:
            step = plan.steps[index]
            if all(name in known for _, name in step.inputs):
                try:
                    known[step.outputs[0][1]] = summers[step.model_name].compute([known[n] for _, n in step.inputs])
                except InferError:
                    return None
    return {name: known[name] for name in plan.outputs}


@pytest.mark.parametrize("seed", range(120))
def test_random_graphs_agree_with_the_oracle(seed: int) -> None:
    rng = random.Random(seed)
    made, models, summers = random_ensemble(rng)
    plan = planner.plan(made, lambda name, _: models[name])
    statistics = ModelStatistics()

    def serve(calls: Sequence[Call]) -> None:
        for name in {call.request.model_name for call in calls}:
            summers[name]([call for call in calls if call.request.model_name == name])

    executor = EnsembleExecutor(plan, "1", serve, statistics)
    rows = [np.random.default_rng(seed + i).normal(0, 10, (1, WIDTH)).astype(np.float32) for i in range(20)]
    answers = infer(executor, [InferRequest("e", {"X": Tensor.of("X", row)}) for row in rows])
    for row, answer in zip(rows, answers, strict=True):
        expected = oracle(plan, summers, row)
        if expected is None:
            assert isinstance(answer, InvalidArgument)
        else:
            assert isinstance(answer, InferResponse)
            assert [o.name for o in answer.outputs] == list(plan.outputs)
            for output in answer.outputs:
                np.testing.assert_array_equal(output.array(), expected[output.name])
    assert statistics.counts.success.count + statistics.counts.fail.count == len(rows)


def test_merged_requests_that_fail_are_tried_one_by_one_whatever_rows_they_have() -> None:
    one = "data_type: TYPE_FP32 dims: 1"
    text = f'backend: "onnxruntime" max_batch_size: 8 dynamic_batching {{}} output {{ name: "y" {one} }}'
    models = {
        "negate": config.parse(f'{text} input {{ name: "x" {one} }}', "negate"),
        "add": config.parse(f'{text} input {{ name: "x" {one} }} input {{ name: "m" {one} optional: true }}', "add"),
    }
    made = config.parse(
        f"""platform: "ensemble" max_batch_size: 8 input {{ name: "X" {one} }} output {{ name: "Y" {one} }}
        parameters {{ key: "tutti.when.M" value {{ string_value: "X > 0" }} }} ensemble_scheduling {{
        step {{ model_name: "negate" input_map {{ key: "x" value: "X" }} output_map {{ key: "y" value: "M" }} }}
        step {{ model_name: "add" input_map {{ key: "x" value: "X" }} input_map {{ key: "m" value: "M" }}
                output_map {{ key: "y" value: "Y" }} }} }}""",
        "e",
    )
    tried: list[int] = []

    def serve(calls: Sequence[Call]) -> None:
        for call in calls:
            x, *more = [tensor.array() for tensor in call.request.inputs.values()]
            if call.request.model_name == "add":
                tried.append(len(x))
                if call.requests > 1:
                    call.answer = InvalidArgument("one of them is to blame")
                    continue
            call.answer = InferResponse("m", "1", [Tensor.of("y", x + more[0] if more else -x)])
        settle(calls[::-1])

    executor = EnsembleExecutor(planner.plan(made, lambda name, _: models[name]), "1", serve, ModelStatistics())

    def counted(calls: Sequence[Call]) -> None:
        for call in calls:
            call.rows = len(call.request.inputs["X"].array())
        executor(calls)

    rows = [np.array([[1], [2], [-3], [-4]], np.float32), np.array([[5], [6], [-7], [-8]], np.float32)]
    answers = infer(counted, [InferRequest("e", {"X": Tensor.of("X", x)}) for x in rows])
    assert tried == [4, 4, 2, 2, 2, 2], "rows with the optional input and rows without, together and then apart"
    for answer, expected in zip(answers, ([0, 0, 3, 4], [0, 0, 7, 8]), strict=True):
        assert isinstance(answer, InferResponse), answer
        assert answer.tensor("Y").array().ravel().tolist() == expected


def test_a_step_that_fails_while_another_is_started_with_it_ends_the_request_alone(repository: Repository) -> None:
    repository.add_onnx()
    both = """
        platform: "ensemble" max_batch_size: 8
        input { name: "X" data_type: TYPE_FP32 dims: 4 }
        output { name: "Y" data_type: TYPE_FP32 dims: 4 } output { name: "Z" data_type: TYPE_FP32 dims: 4 }
        ensemble_scheduling {
          step { model_name: "add_one" model_version: -1
                 input_map { key: "x" value: "X" } output_map { key: "y" value: "A" } }
          step { model_name: "add_one" model_version: -1
                 input_map { key: "x" value: "A" } output_map { key: "y" value: "Y" } }
          step { model_name: "add_one" model_version: -1
                 input_map { key: "x" value: "A" } output_map { key: "y" value: "Z" } }
        }
    """
    repository.add("both", both, {})
    with engine_over(repository.root) as engine:
        plan = planner.plan(engine.model("both").config, lambda name, version: engine.model(name).config)
    asked: list[Call] = []

    def serve(calls: Sequence[Call]) -> None:
        asked.extend(calls)
        x = calls[0].request.inputs["x"]
        is_first = len(asked) == 1
        calls[0].answer = InferResponse("add_one", "1", [Tensor("y", "FP32", x.shape, x.data)])
        if not is_first:
            calls[0].answer = InvalidArgument("no")
        other = threading.Thread(target=settle, args=(calls,))  # as an instance's thread does, at once
        other.start()
        other.join()

    executor = EnsembleExecutor(plan, "1", serve, ModelStatistics())
    (answer,) = infer(executor, [InferRequest("both", {"X": Tensor.of("X", np.ones((1, 4), np.float32))})])
    assert isinstance(answer, InvalidArgument)
    assert len(asked) == 2
