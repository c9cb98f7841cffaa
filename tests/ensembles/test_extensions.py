"""What a graph may say beyond Triton: checked at load, and done for each row, item and request."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.models import IN_PROCESS, Repository, onnx_text
from tests.serving import Gather, engine_over, infer, wait_until
from tutti.core.errors import InvalidArgument
from tutti.core.types import Call, InferRequest, InferResponse, Tensor
from tutti.observing import explanations
from tutti.observing.waterfall import waterfall
from tutti.serving.engine import Engine

ONE = "data_type: TYPE_FP32 dims: 1"
SCORE = f"""
    backend: "python" max_batch_size: 64 input {{ name: "x" {ONE} }} output {{ name: "y" {ONE} }} dynamic_batching {{}}
"""
TIMES_TEN = """
    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
    if (x == 13).any():
        return pb_utils.InferenceResponse([], pb_utils.TritonError("thirteen", pb_utils.TritonError.INVALID_ARG))
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", x * 10)])
"""
ITEMS = f"""
    backend: "python" max_batch_size: 8 input {{ name: "x" {ONE} }} dynamic_batching {{}}
    output {{ name: "items" data_type: TYPE_FP32 dims: [ -1, 1 ] }} output {{ name: "n" data_type: TYPE_INT32 dims: 1 }}
"""
COUNT_UP = """
    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
    n = x.astype(np.int32)
    items = np.tile(np.arange(max(int(n.max()), 0), dtype=np.float32)[np.newaxis, :, np.newaxis], (len(x), 1, 1))
    return pb_utils.InferenceResponse([pb_utils.Tensor("items", items), pb_utils.Tensor("n", n)])
"""


def ensemble(steps: str, outputs: str, inputs: str = f'input {{ name: "X" {ONE} }}', **parameters: str) -> str:
    shown = "".join(
        f'parameters {{ key: "tutti.{key.replace("__", ".")}" value {{ string_value: "{value}" }} }}'
        for key, value in parameters.items()
    )
    return f'platform: "ensemble" max_batch_size: 8 {inputs} {outputs} {shown} ensemble_scheduling {{ {steps} }}'


def step(model: str, made: str, read: str = "X", y: str = "y", x: str = "x", more: str = "") -> str:
    return (
        f'step {{ model_name: "{model}" model_version: -1 input_map {{ key: "{x}" value: "{read}" }} {more} '
        f'output_map {{ key: "{y}" value: "{made}" }} }}'
    )


def output(name: str, spec: str = ONE) -> str:
    return f'output {{ name: "{name}" {spec} }}'


@pytest.fixture
def models(repository: Repository) -> Repository:
    repository.add_python("ten", SCORE + IN_PROCESS, TIMES_TEN)
    repository.add_python("costly", SCORE + IN_PROCESS, TIMES_TEN)
    repository.add_python("count_up", ITEMS + IN_PROCESS, COUNT_UP)
    return repository


@pytest.fixture
def serve(models: Repository) -> Iterator[Callable[[str], Engine]]:
    opened: list[Any] = []

    def start(text: str) -> Engine:
        models.add("e", text, {".keep": ""})
        manager = engine_over(models.root)
        opened.append(manager)
        engine = manager.__enter__()
        assert not engine.failures(), engine.failures()
        return engine

    yield start
    for manager in opened:
        manager.__exit__(None, None, None)


def ask(values: list[float], outputs: tuple[str, ...] = (), **parameters: Any) -> InferRequest:
    x = np.array(values, np.float32).reshape(-1, 1)
    return InferRequest("e", {"X": Tensor.of("X", x)}, outputs=outputs, parameters=parameters)


def shown(answer: Any) -> dict[str, Any]:
    assert isinstance(answer, InferResponse), answer
    return {tensor.name: tensor.array().tolist() for tensor in answer.outputs}


def test_a_step_runs_where_its_condition_holds(serve: Callable[[str], Engine]) -> None:
    engine = serve(
        ensemble(
            step("ten", "S") + step("costly", "Y", "S"), output("S") + output("Y"),
            when__Y="S > 15", default__Y="-1",
        )
    )  # fmt: skip
    low, mixed, bad = infer(engine, [ask([1]), ask([2, 1, 3]), ask([13])])
    assert shown(low) == {"S": [[10]], "Y": [[-1]]}
    assert shown(mixed) == {"S": [[20], [10], [30]], "Y": [[200], [-1], [300]]}
    assert isinstance(bad, InvalidArgument)
    assert engine.model("costly").statistics.counts.inferences == 2
    assert engine.model("e").statistics.counts.steps["costly"].skipped_rows == 2


def test_decided_rows_leave_and_their_requests_do_not_wait(models: Repository) -> None:
    models.add_python("slow", SCORE + IN_PROCESS, f"\n    import time\n    time.sleep(0.5){TIMES_TEN}")
    text = ensemble(
        step("ten", "S") + step("slow", "Y", "S"), output("S") + output("Y"), exit="S >= 50", default__Y="7"
    )
    models.add("e", text, {".keep": ""})
    with engine_over(models.root) as engine:
        assert not engine.failures()
        gather = [Gather(1), Gather(1)]
        calls = [Call(ask([value]), one) for value, one in zip((9, 1), gather, strict=True)]
        started = time.monotonic()
        engine(calls)
        gather[0].wait()
        assert calls[1].answer is None, "the other one is still at work"
        assert shown(calls[0].answer) == {"S": [[90]], "Y": [[7]]}
        gather[1].wait()
        assert time.monotonic() - started >= 0.5
        assert shown(calls[1].answer) == {"S": [[10]], "Y": [[100]]}


def test_a_branch_without_its_input_is_left_out(serve: Callable[[str], Engine], models: Repository) -> None:
    both = f"""backend: "python" max_batch_size: 8 dynamic_batching {{}} output {{ name: "y" {ONE} }}
        input {{ name: "x" {ONE} optional: true }} input {{ name: "w" {ONE} optional: true }}"""
    body = """
    given = [pb_utils.get_input_tensor_by_name(request, name) for name in ("x", "w")]
    total = sum(tensor.as_numpy() for tensor in given if tensor is not None)
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", total)])
"""
    models.add_python("fuse", both + IN_PROCESS, body)
    inputs = f'input {{ name: "X" {ONE} optional: true }} input {{ name: "W" {ONE} optional: true }}'
    engine = serve(
        ensemble(
            step("ten", "A") + step("costly", "B", "W")
            + step("fuse", "Y", "A", more='input_map { key: "w" value: "B" }'),
            output("A") + output("B") + output("Y"), inputs,
        )
    )  # fmt: skip
    w = Tensor.of("W", np.full((1, 1), 2, np.float32))
    x = Tensor.of("X", np.full((1, 1), 1, np.float32))
    only_x, only_w, together = infer(
        engine,
        [InferRequest("e", {"X": x}), InferRequest("e", {"W": w}), InferRequest("e", {"X": x, "W": w})],
    )
    assert shown(only_x) == {"A": [[10]], "Y": [[10]]}
    assert shown(only_w) == {"B": [[20]], "Y": [[20]]}
    assert shown(together) == {"A": [[10]], "B": [[20]], "Y": [[30]]}
    (nothing,) = infer(engine, [InferRequest("e", {})])
    assert shown(nothing) == {}, "what has nothing to work on does not run"


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("max", [[20], [-1], [0]]), ("min", [[0], [-1], [0]]), ("mean", [[10], [-1], [0]]), ("sum", [[30], [0], [0]]),
        ("concat", [[[0], [10], [20]], [[-1], [-1], [-1]], [[0], [-1], [-1]]]),
    ],
)  # fmt: skip
def test_a_step_for_each_item(serve: Callable[[str], Engine], how: str, expected: list[Any]) -> None:
    engine = serve(
        ensemble(
            step("count_up", "I", y="items", more='output_map { key: "n" value: "N" }') + step("costly", "Y", "I"),
            output("N", "data_type: TYPE_INT32 dims: 1")
            + output("Y", "data_type: TYPE_FP32 dims: [ -1, 1 ]" if how == "concat" else ONE),
            each__Y="I", items__I="N", gather__Y=how, default__Y="-1",
        )
    )  # fmt: skip
    answer, nothing = infer(engine, [ask([3, 0, 1]), ask([0])])
    assert shown(answer)["Y"] == expected
    assert shown(nothing)["Y"] == {"sum": [[0]], "concat": [[]]}.get(how, [[-1]])
    assert engine.model("e").statistics.counts.steps["costly"].items == 4


def test_many_rows_of_items_are_one_execution(models: Repository) -> None:
    models.add_onnx("item")
    rng = np.random.default_rng(5)
    counts = rng.integers(0, 51, 200)
    spec = "data_type: TYPE_FP32 dims: [ -1, 4 ]"
    (models.root / "item" / "config.pbtxt").write_text(
        'backend: "onnxruntime" max_batch_size: 10000 dynamic_batching {} input { name: "x" data_type: TYPE_FP32 '
        'dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 4 }'
    )
    models.add_python(
        "cut",
        f"""backend: "python" max_batch_size: 256 dynamic_batching {{}} input {{ name: "x" {spec} }}
        input {{ name: "n" data_type: TYPE_INT32 dims: 1 }} output {{ name: "items" {spec} }}
        output {{ name: "count" data_type: TYPE_INT32 dims: 1 }} {IN_PROCESS}""",
        """
    x, n = (pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in ("x", "n"))
    return pb_utils.InferenceResponse([pb_utils.Tensor("items", x), pb_utils.Tensor("count", n)])
""",
    )
    text = ensemble(
        step("cut", "I", y="items", more='input_map { key: "n" value: "C" } output_map { key: "count" value: "N" }')
        + step("item", "Y", "I"),
        output("Y", spec), f'input {{ name: "X" {spec} }} input {{ name: "C" data_type: TYPE_INT32 dims: 1 }}',
        each__Y="I", items__I="N",
    ).replace("max_batch_size: 8", "max_batch_size: 256")  # fmt: skip
    models.add("e", text, {".keep": ""})
    x = rng.normal(0, 1, (200, 50, 4)).astype(np.float32)
    request = InferRequest("e", {"X": Tensor.of("X", x), "C": Tensor.of("C", counts.astype(np.int32).reshape(-1, 1))})
    with engine_over(models.root) as engine:
        assert not engine.failures(), engine.failures()
        (answer,) = infer(engine, [request])
        assert isinstance(answer, InferResponse), answer
        assert engine.model("item").statistics.counts.executions == 1
        assert engine.model("e").statistics.counts.steps["item"].items == counts.sum()
        got = answer.tensor("Y").array()
        alone = [
            infer(engine, [InferRequest("item", {"x": Tensor.of("x", x[row, :n])})])[0] if n else None
            for row, n in enumerate(counts)
        ]
    for row, (n, one) in enumerate(zip(counts, alone, strict=True)):
        if isinstance(one, InferResponse):
            np.testing.assert_array_equal(got[row, :n], one.tensor("y").array())
        assert not got[row, n:].any()


def test_an_optional_step_is_left_out_where_time_is_short(models: Repository) -> None:
    models.add_python("slow", SCORE + IN_PROCESS, f"\n    import time\n    time.sleep(0.6){TIMES_TEN}")
    text = ensemble(
        step("ten", "S") + step("slow", "Y", "S"), output("S") + output("Y"),
        optional__Y="true", default__Y="-1", deadline_ms="10000",
    )  # fmt: skip
    models.add("e", text, {".keep": ""})
    with engine_over(models.root) as engine:
        (full,) = infer(engine, [ask([1])])
        assert shown(full) == {"S": [[10]], "Y": [[100]]}
        assert full.parameters == {}  # type: ignore[union-attr]
        hog = threading.Thread(target=lambda: infer(engine, [ask([1])]))
        hog.start()
        wait_until(lambda: engine.model("slow").executing())
        (hurried,) = infer(engine, [ask([2], timeout=300_000)])
        hog.join()
        assert shown(hurried) == {"S": [[20]], "Y": [[-1]]}
        assert hurried.parameters == {"tutti_shed": "slow"}  # type: ignore[union-attr]
        assert engine.model("e").statistics.counts.steps["slow"].shed_requests == 1
        assert engine.model("e").statistics.counts.success.count == 3


def test_a_request_may_ask_what_happened(serve: Callable[[str], Engine]) -> None:
    engine = serve(ensemble(step("ten", "S") + step("costly", "Y", "S"), output("Y"), when__Y="S > 15", default__Y="0"))
    (answer,) = infer(engine, [ask([1, 2, 3], tutti_explain=True)])
    told = json.loads(answer.parameters[explanations.PARAMETER])  # type: ignore[union-attr]
    assert (told["ensemble"], told["rows"]) == ("e", 3)
    first, second = told["steps"]
    assert (first["step"], first["rows"], second["step"], second["rows"]) == ("ten", 3, "costly", 2)
    assert second["batch_rows"] == 2
    assert 0 <= first["start_us"] <= first["end_us"] <= second["start_us"] <= second["end_us"] <= told["total_us"]
    assert {"queue_us", "compute_us"} <= first.keys()
    (none,) = infer(engine, [ask([1], tutti_explain=True)])
    assert json.loads(none.parameters[explanations.PARAMETER])["steps"][1]["skipped"] == "not S > 15"  # type: ignore[union-attr]
    assert "left out: not S > 15" in waterfall(json.loads(none.parameters[explanations.PARAMETER]))  # type: ignore[union-attr]


GOOD = (step("ten", "S") + step("costly", "Y", "S"), output("Y"))
FAN = (
    step("count_up", "I", y="items", more='output_map { key: "n" value: "N" }') + step("costly", "Y", "I"),
    output("Y"),
)


@pytest.mark.parametrize(
    ("graph", "parameters", "why"),
    [
        (GOOD, {"when__Y": "S > 1"}, "output 'Y': is not made for every row: needs parameters.tutti.default.Y"),
        (GOOD, {"when__Y": "S >"}, "step 1 'costly' tutti.when: expected a value"),
        (GOOD, {"when__Y": "Y > 1", "default__Y": "0"}, "cycle among"),
        (GOOD, {"when__Z": "S > 1"}, "parameters.tutti.when.Z: no step makes a tensor of that name"),
        (GOOD, {"wenn__Y": "S > 1"}, "parameters.tutti.wenn.Y: is not known"),
        (GOOD, {"default__Z": "0"}, "parameters.tutti.default.Z: there is no tensor of that name"),
        (GOOD, {"default__Y": "zero"}, "parameters.tutti.default.Y: expected a value of FP32, got 'zero'"),
        (GOOD, {"exit": "S > 1"}, "output 'Y': is not made for every row"),
        (GOOD, {"exit": "nope > 1"}, "parameters.tutti.exit: there is no tensor 'nope'"),
        (GOOD, {"each__Y": "X"}, "step 1 'costly' tutti.each: the step has no input 'X'"),
        (GOOD, {"each__Y": "S"}, r"expected shape \[-1, -1, 1\], items of ensemble tensor 'S' has \[-1, 1\]"),
        (GOOD, {"gather__Y": "max"}, "parameters.tutti.gather.Y: needs tutti.each.Y"),
        (GOOD, {"gather__Y": "most"}, "parameters.tutti.gather.Y: expected one of concat, max"),
        (GOOD, {"optional__Y": "yes"}, "parameters.tutti.optional.Y: expected true or false"),
        (GOOD, {"deadline_ms": "soon"}, "parameters.tutti.deadline_ms: expected a whole number"),
        (FAN, {"each__Y": "I", "items__I": "N", "gather__Y": "max"}, "output 'Y': is not made for every row"),
        (FAN, {"each__Y": "I", "items__I": "S", "gather__Y": "sum"}, "parameters.tutti.items.I: nothing makes 'S'"),
        (FAN, {"each__Y": "I", "items__I": "X", "gather__Y": "sum"}, "expected one whole number a row, 'X' is FP32"),
        (FAN, {"each__Y": "I"}, r"configured with shape \[-1, 1\], its step makes \[-1, -1, 1\]"),
        (
            FAN,
            {"each__Y": "I", "items__I": "N", "gather__Y": "sum", "default__N": "1"},
            "parameters.tutti.default.N: a row without items has none: expected 0",
        ),
    ],
)
def test_mistakes_are_found_at_load(
    models: Repository, graph: tuple[str, str], parameters: dict[str, str], why: str
) -> None:
    models.add("e", ensemble(*graph, **parameters), {".keep": ""})
    with engine_over(models.root) as engine, pytest.raises(AssertionError, match=why):
        assert not engine.failures(), engine.failures()[0]


TEXT = "data_type: TYPE_STRING dims: [ 1 ]"
ECHO = f"""
    max_batch_size: 8 dynamic_batching {{}}
    input {{ name: "x" {TEXT} RESHAPE }} output {{ name: "y" {TEXT} RESHAPE }}
"""
ECHO_OF_TEXT = """
    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
    assert all(type(element) is bytes for element in x.ravel())
    texts = [[element.decode()] for element in x.ravel()]
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", np.array(texts, dtype=FORM))])
"""


@pytest.mark.parametrize("maker", ["onnxruntime", "object", "str"])
@pytest.mark.parametrize("mode", ["", IN_PROCESS])
def test_text_is_compared_whichever_backend_made_it(repository: Repository, maker: str, mode: str) -> None:
    if maker == "onnxruntime":
        config = 'backend: "onnxruntime" ' + ECHO.replace("RESHAPE", "reshape { shape: [ ] }")
        repository.add("maker", config, {"model.onnx": onnx_text()})
    else:
        config = 'backend: "python" ' + ECHO.replace("RESHAPE", "") + mode
        repository.add_python("maker", config, ECHO_OF_TEXT.replace("FORM", maker))
    config = 'backend: "python" ' + ECHO.replace("RESHAPE", "") + mode
    repository.add_python("reader", config, ECHO_OF_TEXT.replace("FORM", "object"))
    repository.add(
        "e",
        ensemble(
            step("maker", "S") + step("reader", "Y", "S"), output("Y", TEXT), f'input {{ name: "X" {TEXT} }}',
            when__Y="S == 'urgent'", default__Y="none",
        ),
        {".keep": ""},
    )  # fmt: skip
    sent = np.array([[b"urgent"], [b"normal"], ["örtlich".encode()]], dtype=object)
    with engine_over(repository.root) as engine:
        (answer,) = infer(engine, [InferRequest("e", {"X": Tensor.of("X", sent)})])
    assert shown(answer) == {"Y": [[b"urgent"], [b"none"], [b"none"]]}
