"""Decoupled steps: each of their answers goes on by itself, in order, and not too many at a time."""

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from tests.models import Repository
from tests.serving import Gather, engine_over, wait_until
from tutti.core.errors import Cancelled, ConfigError, InferError, Internal, Unsupported
from tutti.core.types import Call, InferRequest, InferResponse, Tensor
from tutti.ensembles import graph, planner
from tutti.ensembles.streams import StreamExecutor
from tutti.observing.statistics import ModelStatistics
from tutti.repository import config
from tutti.repository.model_config import ModelConfig

ONE = "data_type: TYPE_INT32 dims: 1"
MODELS = {
    # Answers n times: n*10, n*10+1, ...
    "count": f'input {{ name: "x" {ONE} }} output {{ name: "y" {ONE} }} model_transaction_policy {{ decoupled: true }}',
    "count_too": f'input {{ name: "x" {ONE} }} output {{ name: "y" {ONE} }} '
    "model_transaction_policy { decoupled: true }",
    "half": f'input {{ name: "x" {ONE} }} output {{ name: "y" {ONE} }}',
    "add": f'input {{ name: "a" {ONE} }} input {{ name: "b" {ONE} }} output {{ name: "y" {ONE} }}',
}


def configs(extra: dict[str, str] | None = None) -> dict[str, ModelConfig]:
    texts = {**{name: f'backend: "python" {text}' for name, text in MODELS.items()}, **(extra or {})}
    return {name: config.parse(text, name) for name, text in texts.items()}


def step(model: str, out: str, **inputs: str) -> str:
    maps = " ".join(f'input_map {{ key: "{key}" value: "{value}" }}' for key, value in inputs.items())
    return f'step {{ model_name: "{model}" model_version: -1 {maps} output_map {{ key: "y" value: "{out}" }} }}'


def ensemble(steps: Sequence[str], outputs: str = "OUT", limit: int = 0, extra: str = "", inputs: str = "X") -> str:
    given = " ".join(f'input {{ name: "{name}" {ONE} }}' for name in inputs.split())
    made = " ".join(f'output {{ name: "{name}" {ONE} }}' for name in outputs.split())
    held = f"max_inflight_requests: {limit}" if limit else ""
    return f'platform: "ensemble" {given} {made} {extra} ensemble_scheduling {{ {held} {" ".join(steps)} }}'


def parameter(key: str, text: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{text}" }} }} '


def plan_of(text: str, nested: dict[str, str] | None = None) -> graph.Plan:
    known = configs(nested)
    return planner.plan(config.parse(text, "stream"), lambda name, _: known[name])


def value(tensor: Tensor) -> int:
    return int(tensor.array().reshape(-1)[0])


def counted(number: int) -> list[int]:
    return [number * 10 + i for i in range(number % 4)]


class Models:
    """An Infer over MODELS, each call in a thread of its own after a random while; -1 makes them fail."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.threads: list[threading.Thread] = []

    def __call__(self, calls: Sequence[Call]) -> None:
        for call in calls:
            pause = self._random.random() * 0.004
            thread = threading.Thread(target=self._answer, args=(call, pause), daemon=True)
            self.threads.append(thread)
            thread.start()

    def _answer(self, call: Call, pause: float) -> None:
        threading.Event().wait(pause)
        name = call.request.model_name
        given = [value(tensor) for tensor in call.request.inputs.values()]
        if -1 in given:
            call.finish(Internal("minus one"))
            return
        made = counted(given[0]) if name.startswith("count") else [given[0] // 2 if name == "half" else sum(given)]
        answers = [InferResponse(name, "1", [Tensor.of("y", np.array([one], np.int32))]) for one in made]
        if not name.startswith("count"):
            call.finish(answers[0])
            return
        last_with_end = self._random.random() < 0.5 and answers
        assert call.emit is not None
        for answer in answers[:-1] if last_with_end else answers:
            call.emit(answer)
        call.finish(answers[-1] if last_with_end else InferResponse(name, "1", [], is_null=True))


def run(executor: StreamExecutor, *given: int, names: str = "X", outputs: tuple[str, ...] = ()) -> list[Any]:
    """The answers to one request: outputs by name, and at the end True, or the error."""
    gather, got = Gather(1), []
    inputs = {name: Tensor.of(name, np.array([one], np.int32)) for name, one in zip(names.split(), given, strict=True)}
    call = Call(InferRequest("stream", inputs, outputs=outputs), gather)
    call.emit = lambda answer: got.append({tensor.name: value(tensor) for tensor in answer.outputs})
    executor([call])
    gather.wait()
    if isinstance(call.answer, InferError):
        return [*got, call.answer.message]
    assert isinstance(call.answer, InferResponse)
    assert call.answer.is_null
    return [*got, True]


def executor_of(text: str, infer: Callable[[Sequence[Call]], None]) -> StreamExecutor:
    return StreamExecutor(plan_of(text), "1", infer, ModelStatistics())


@pytest.mark.parametrize("seed", range(60))
def test_random_chains_answer_as_a_loop_does(seed: int) -> None:
    rng = random.Random(seed)
    steps, kinds, tensor = [], [], "X"
    for index in range(rng.randint(1, 5)):
        kind = rng.choice(["count", "count_too", "half", "add"]) if index else "count"
        made = f"T{index}"
        taken = {"a": tensor, "b": tensor} if kind == "add" else {"x": tensor}
        steps.append(step(kind, made, **taken))
        kinds.append(kind)
        tensor = made
    text = ensemble(rng.sample(steps, len(steps)), tensor, limit=rng.choice([0, 1, 2]))
    models = Models(seed)
    executor = executor_of(text, models)
    for number in (0, 1, 3, 7):
        expected = [number]
        for kind in kinds:
            if kind.startswith("count"):
                expected = [one for number in expected for one in counted(number)]
            else:
                expected = [one // 2 if kind == "half" else one * 2 for one in expected]
        assert run(executor, number) == [*({tensor: one} for one in expected), True]
    for thread in models.threads:
        thread.join(5)
        assert not thread.is_alive()


def test_what_came_before_an_error_arrives_and_nothing_after_it() -> None:
    class Failing(Models):
        def _answer(self, call: Call, pause: float) -> None:
            if call.request.model_name == "half" and value(call.request.inputs["x"]) == 31:
                call.finish(Internal("no halves of 31"))
            else:
                super()._answer(call, pause)

    executor = executor_of(ensemble([step("count", "M", x="X"), step("half", "OUT", x="M")]), Failing(1))
    assert run(executor, 3) == [{"OUT": 15}, "in ensemble 'stream', step 'half': no halves of 31"]
    assert run(executor, -1) == ["in ensemble 'stream', step 'count': minus one"]
    counts = executor.statistics.counts
    assert (counts.success.count, counts.fail.count) == (0, 2)


def test_outputs_of_the_same_answer_come_together_and_as_asked_for() -> None:
    text = ensemble([step("count", "M", x="X"), step("half", "OUT", x="M")], "OUT M")
    executor = executor_of(text, Models(2))
    assert run(executor, 2) == [{"OUT": 10, "M": 20}, {"OUT": 10, "M": 21}, True]
    assert run(executor, 2, outputs=("M",)) == [{"M": 20}, {"M": 21}, True]


def test_steps_before_the_decoupled_one_run_once() -> None:
    text = ensemble([step("add", "S", a="X", b="Z"), step("count", "OUT", x="S")], inputs="X Z")
    models = Models(3)
    executor = executor_of(text, models)
    assert run(executor, 2, 1, names="X Z") == [{"OUT": 30}, {"OUT": 31}, {"OUT": 32}, True]
    assert len(models.threads) == 2


class Held:
    """`count` sends 20 answers from a thread; calls of `half` are kept until released."""

    def __init__(self) -> None:
        self.sent = 0
        self.halves: list[Call] = []
        self.threads: list[threading.Thread] = []

    def __call__(self, calls: Sequence[Call]) -> None:
        for call in calls:
            if call.request.model_name == "half":
                self.halves.append(call)
            else:
                self.threads.append(threading.Thread(target=self._send, args=(call,), daemon=True))
                self.threads[-1].start()

    def _send(self, call: Call) -> None:
        for number in range(20):
            assert call.emit is not None
            call.emit(InferResponse("count", "1", [Tensor.of("y", np.array([number], np.int32))]))
            self.sent += 1
        call.finish(InferResponse("count", "1", [], is_null=True))

    def release(self) -> None:
        call = self.halves.pop(0)
        call.finish(InferResponse("half", "1", [Tensor.of("y", call.request.inputs["x"].array() // 2)]))


def test_no_more_answers_are_on_their_way_than_max_inflight_requests() -> None:
    models, gather, got = Held(), Gather(1), []
    executor = executor_of(ensemble([step("count", "M", x="X"), step("half", "OUT", x="M")], limit=3), models)
    call = Call(InferRequest("stream", {"X": Tensor.of("X", np.array([1], np.int32))}), gather)
    call.emit = lambda answer: got.append(value(answer.outputs[0]))
    executor([call])
    for done in range(20):
        wait_until(lambda done=done: len(models.halves) == min(3, 20 - done))  # type: ignore[misc]
        assert models.sent <= done + 3
        models.release()
    gather.wait()
    assert got == [number // 2 for number in range(20)]


def test_a_caller_that_goes_sets_a_waiting_step_free() -> None:
    models, gather = Held(), Gather(1)
    executor = executor_of(ensemble([step("count", "M", x="X"), step("half", "OUT", x="M")], limit=2), models)
    call = Call(InferRequest("stream", {"X": Tensor.of("X", np.array([1], np.int32))}), gather)
    call.emit = lambda answer: None
    executor([call])
    wait_until(lambda: len(models.halves) == 2)
    call.is_cancelled = True
    wait_until(lambda: models.sent == 20)
    models.release()
    models.release()
    gather.wait()
    assert isinstance(call.answer, Cancelled)
    assert not models.halves


def test_a_step_is_not_held_back_by_answers_that_need_its_own_model() -> None:
    twice = ensemble([step("count", "M", x="X"), step("count", "OUT", x="M")], limit=1)
    assert [one.max_inflight for one in plan_of(twice).steps] == [0, 1]
    inner = ensemble([step("count", "OUT", x="X")])
    text = ensemble([step("count", "M", x="X"), step("inner", "OUT", X="M").replace('"y"', '"OUT"')], limit=1)
    assert plan_of(text, {"inner": inner}).steps[0].max_inflight == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            ensemble([step("count", "M", x="X"), step("add", "OUT", a="M", b="X")]),
            "step 1 'add': takes tensors of different decoupled steps: 'M' of step 0 'count', 'X' of the request",
        ),
        (
            ensemble([step("count", "M", x="X"), step("count", "N", x="X"), step("add", "OUT", a="M", b="N")]),
            "step 2 'add': takes tensors of different decoupled steps: 'M' of step 0 'count', 'N' of step 1 'count'",
        ),
        (
            ensemble([step("count", "M", x="X"), step("half", "N", x="X")], "M N"),
            "output: the ensemble has tensors of different decoupled steps: 'M' of step 0 'count', 'N' of the request",
        ),
        (
            ensemble([step("count", "OUT", x="X")], extra=parameter("tutti.when.OUT", "X > 0")),
            "step 0 'count' tutti.when: the step is decoupled",
        ),
    ],
)  # fmt: skip
def test_what_cannot_meet_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plan_of(text)
    assert str(refused.value) == f"ensemble 'stream': {says}"


SENDS = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            for number in range(int(x.reshape(-1)[0])):
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("y", np.full(x.shape, number, np.int32))]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


def test_in_an_engine_with_rows_conditions_and_a_nested_graph(repository: Repository) -> None:
    batched = "max_batch_size: 8 "
    repository.add("count", batched + configs_text("count"), {"model.py": SENDS})
    repository.add_python(
        "add",
        batched + configs_text("add"),
        """
        a, b = (pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in "ab")
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", (a + b).astype(np.int32))])
        """,
    )
    extra = parameter("tutti.when.OUT", "M > 0") + parameter("tutti.default.OUT", "-5")
    steps = [step("count", "M", x="X"), step("add", "OUT", a="M", b="M")]
    repository.add("inner", batched + ensemble(steps, extra=extra), {".keep": ""})
    outer = step("inner", "OUT", X="X").replace('"y"', '"OUT"')
    repository.add("outer", batched + ensemble([outer]), {".keep": ""})
    with engine_over(repository.root) as engine:
        assert not engine.failures()
        for name in ("inner", "outer"):
            model = engine.model(name)
            assert model.config.is_decoupled
            assert model.config.proto.model_transaction_policy.decoupled
            inputs = {"X": Tensor.of("X", np.full((2, 1), 3, np.int32))}
            gather, got = Gather(1), []
            engine([Call(InferRequest(name, inputs), gather, emit=got.append)])
            gather.wait()
            assert [answer.outputs[0].array().reshape(-1).tolist() for answer in got] == [[-5, -5], [2, 2], [4, 4]]
            assert model.statistics.counts.success.count == 1
            refused = Call(InferRequest(name, inputs), Gather(1))
            engine([refused])
            assert isinstance(refused.answer, Unsupported)


def configs_text(name: str) -> str:
    return f'backend: "python" {MODELS[name]}'


def test_stages_of_a_chain() -> None:
    plan = plan_of(ensemble([step("half", "A", x="X"), step("count", "M", x="A"), step("add", "OUT", a="M", b="M")]))
    executor = StreamExecutor(plan, "1", Models(0), ModelStatistics())
    first = executor.first
    assert first.part is not None
    assert first.step is not None
    assert first.then is not None
    assert first.then.part is not None
    assert [one.model_name for one in first.part.steps] == ["half"]
    assert first.step.model_name == "count"
    assert [one.model_name for one in first.then.part.steps] == ["add"]
    assert first.then.step is None
