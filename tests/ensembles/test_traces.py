"""Traces of ensembles contain their steps, nested as in Triton's files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ensembles.test_extensions import (
    COUNT_UP,
    ITEMS,
    ONE,
    SCORE,
    TIMES_TEN,
    ensemble,
    output,
    step,
)
from tests.models import IN_PROCESS, Repository
from tests.serving import Gather, engine_over
from tutti.core.errors import InferError
from tutti.core.types import Call, InferRequest, InferResponse, Tensor
from tutti.observing.trace_records import Record
from tutti.observing.tracing import TraceConfig, Tracer
from tutti.serving.engine import Engine

EXECUTED = [
    "REQUEST_START", "QUEUE_START", "COMPUTE_START", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START", "COMPUTE_END",
    "REQUEST_END",
]  # fmt: skip
OF_ENSEMBLE = ["REQUEST_START", "QUEUE_START", "REQUEST_END"]
ASKS_TEN = """
    x = pb_utils.get_input_tensor_by_name(request, "x")
    asked = pb_utils.InferenceRequest(
        model_name="ten", inputs=[x], requested_output_names=["y"], trace=request.trace()
    )
    y = pb_utils.get_output_tensor_by_name(asked.exec(), "y")
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", y.as_numpy())])
"""
COUNT_DOWN = f"""
    backend: "python" max_batch_size: 8 input {{ name: "x" {ONE} }} output {{ name: "y" {ONE} }}
    model_transaction_policy {{ decoupled: true }}
""" + IN_PROCESS  # fmt: skip


@pytest.fixture
def models(repository: Repository) -> Repository:
    repository.add_python("ten", SCORE + IN_PROCESS, TIMES_TEN)
    repository.add_python("count_up", ITEMS + IN_PROCESS, COUNT_UP)
    return repository


def ask(engine: Engine, tracer: Tracer, *requests: list[float], model: str = "e", name: str = "X") -> list[Call]:
    """Traced requests that come together."""
    gather = Gather(len(requests))
    calls = []
    for index, values in enumerate(requests):
        x = Tensor.of(name, np.array(values, np.float32).reshape(-1, 1))
        calls.append(Call(InferRequest(model, {name: x}, id=f"r{index}"), gather, None, lambda _: None))
        tracer.begin(calls[-1])
    engine(calls)
    gather.wait()
    for call in calls:
        tracer.end(call)
    return calls


def told(models: Repository, path: Path, *requests: list[float], **options: Any) -> list[dict[str, Any]]:
    """The traces of requests to one engine: those of steps are in their `steps`."""
    tracer = Tracer(TraceConfig(file=str(path), levels=("TIMESTAMPS", "TENSORS"), rate=1))
    with engine_over(models.root) as engine:
        assert not engine.failures(), engine.failures()
        ask(engine, tracer, *requests, **options)
    tracer.close()
    return nested(json.loads(path.read_text()))


def nested(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    traces: dict[int, dict[str, Any]] = {}
    for entry in entries:
        trace = traces.setdefault(entry["id"], {"times": [], "tensors": [], "steps": []})
        trace["times"] += entry.pop("timestamps", [])
        if "tensor" in entry:
            trace["tensors"].append((entry["activity"], entry["tensor"]["name"], entry["tensor"]["data"]))
        else:
            trace.update(entry)
    for trace in traces.values():
        if "parent_id" in trace:
            traces[trace["parent_id"]]["steps"].append(trace)
    return [trace for trace in traces.values() if "parent_id" not in trace]


def activities(trace: dict[str, Any]) -> list[str]:
    return [time["name"] for time in trace["times"]]


def test_steps_are_nested_as_in_triton(models: Repository, tmp_path: Path) -> None:
    models.add("inner", ensemble(step("ten", "S") + step("ten", "Y", "S"), output("Y")), {".keep": ""})
    models.add("e", ensemble(step("inner", "S", y="Y", x="X") + step("ten", "Y", "S"), output("Y")), {".keep": ""})
    (trace,) = told(models, tmp_path / "trace", [1])
    assert (trace["model_name"], activities(trace)) == ("e", OF_ENSEMBLE)
    inner, last = trace["steps"]
    assert (inner["model_name"], activities(inner)) == ("inner", OF_ENSEMBLE)
    for own in (last, *inner["steps"]):
        assert (own["model_name"], activities(own), own["batch_rows"]) == ("ten", EXECUTED, 1)
        assert own["request_id"] == "r0" and own["model_version"] == 1
    assert [own["tensors"] for own in inner["steps"]] == [
        [("TENSOR_QUEUE_INPUT", "x", "1.0"), ("TENSOR_BACKEND_OUTPUT", "y", "10.0")],
        [("TENSOR_QUEUE_INPUT", "x", "10.0"), ("TENSOR_BACKEND_OUTPUT", "y", "100.0")],
    ]
    assert trace["tensors"] == [("TENSOR_QUEUE_INPUT", "X", "1.0"), ("TENSOR_BACKEND_OUTPUT", "Y", "1000.0")]


def test_requests_that_come_together_have_steps_of_their_own(models: Repository, tmp_path: Path) -> None:
    models.add("e", ensemble(step("ten", "S") + step("ten", "Y", "S"), output("Y")), {".keep": ""})
    traces = told(models, tmp_path / "trace", [1], [2, 3], [13])
    assert [trace["request_id"] for trace in traces] == ["r0", "r1", "r2"]
    assert [len(trace["steps"]) for trace in traces] == [2, 2, 1]
    assert [own["tensors"][0][2] for trace in traces for own in trace["steps"]] == [
        "1.0", "10.0", "2.0,3.0", "20.0,30.0", "13.0",
    ]  # fmt: skip
    assert "thirteen" in traces[2]["error"] and "thirteen" in traces[2]["steps"][0]["error"]
    assert "error" not in traces[0]


def test_what_is_left_out_says_why(models: Repository, tmp_path: Path) -> None:
    graph = ensemble(
        step("ten", "S") + step("ten", "Y", "S"), output("S") + output("Y"), when__Y="S > 15", default__Y="-1"
    )
    models.add("e", graph, {".keep": ""})
    low, high = told(models, tmp_path / "trace", [1], [2])
    assert (len(low["steps"]), len(high["steps"])) == (1, 2)
    assert activities(low)[-2:] == ["SKIPPED ten: not S > 15", "REQUEST_END"]
    assert not any("SKIPPED" in name for name in activities(high))


def test_a_step_for_items_tells_how_many(models: Repository, tmp_path: Path) -> None:
    graph = ensemble(
        step("count_up", "I", y="items", more='output_map { key: "n" value: "N" }') + step("ten", "Y", "I"),
        output("Y", "data_type: TYPE_FP32 dims: [ -1, 1 ]"),
        each__Y="I", items__I="N", gather__Y="concat",
    )  # fmt: skip
    models.add("e", graph, {".keep": ""})
    (trace,) = told(models, tmp_path / "trace", [3, 2])
    first, items = trace["steps"]
    assert "items" not in first
    assert (items["model_name"], items["items"]) == ("ten", 5)


def test_decoupled_steps_and_what_comes_after_them(models: Repository, tmp_path: Path) -> None:
    models.add(
        "down", COUNT_DOWN,
        {
            "model.py": """
            import numpy as np
            import triton_python_backend_utils as pb_utils


            class TritonPythonModel:
                def execute(self, requests):
                    for request in requests:
                        x = int(pb_utils.get_input_tensor_by_name(request, "x").as_numpy()[0, 0])
                        sender = request.get_response_sender()
                        for number in range(x):
                            y = pb_utils.Tensor("y", np.full((1, 1), number, np.float32))
                            sender.send(pb_utils.InferenceResponse([y]))
                        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            """
        },
    )  # fmt: skip
    models.add("e", ensemble(step("down", "S") + step("ten", "Y", "S"), output("Y")), {".keep": ""})
    (trace,) = told(models, tmp_path / "trace", [3])
    assert sorted(own["model_name"] for own in trace["steps"]) == ["down", "ten", "ten", "ten"]
    assert activities(trace) == OF_ENSEMBLE
    with engine_over(models.root) as engine:
        gather, answers = Gather(1), list[InferResponse]()
        x = Tensor.of("X", np.array([[3]], np.float32))
        last = Call(InferRequest("e", {"X": x}, parameters={"tutti_explain": True}), gather, None, answers.append)
        engine([last])
        gather.wait()
    assert isinstance(last.answer, InferResponse)
    explained = [json.loads(str(answer.parameters["tutti_explain"])) for answer in [*answers, last.answer]]
    done = [[step["step"] for step in one["steps"]].count("ten") for one in explained]
    assert done == sorted(done) and done[0] >= 1 and done[-1] == 3, "each tells what has been done so far"
    (down,) = [step for step in explained[-1]["steps"] if step["step"] == "down"]
    assert 0 <= down["start_us"] <= down["end_us"] <= explained[-1]["total_us"]


@pytest.mark.parametrize("isolation", [IN_PROCESS, ""])
def test_requests_of_python_models_are_steps(models: Repository, tmp_path: Path, isolation: str) -> None:
    models.add_python("asks", SCORE + isolation, ASKS_TEN)
    models.add("e", ensemble(step("asks", "Y"), output("Y")), {".keep": ""})
    (trace,) = told(models, tmp_path / "trace", [4])
    (asks,) = trace["steps"]
    (ten,) = asks["steps"]
    assert (asks["model_name"], activities(asks)) == ("asks", EXECUTED)
    assert (ten["model_name"], activities(ten)) == ("ten", EXECUTED)


def test_bytes_that_are_none_are_answered_and_told(models: Repository, tmp_path: Path) -> None:
    """Whoever sent them has an answer, of an ensemble, too, and the trace says what could not be shown."""
    text = "data_type: TYPE_STRING dims: 1"
    said = f'backend: "python" input {{ name: "x" {text} }} output {{ name: "y" {text} }}' + IN_PROCESS
    models.add_python(
        "say", said, 'return pb_utils.InferenceResponse([pb_utils.get_input_tensor_by_name(request, "x")])'
    )
    graph = ensemble(step("say", "Y"), output("Y", text), f'input {{ name: "X" {text} }}')
    models.add("e", graph.replace("max_batch_size: 8", ""), {".keep": ""})
    tracer = Tracer(TraceConfig(file=str(tmp_path / "trace"), levels=("TIMESTAMPS", "TENSORS"), rate=1))
    with engine_over(models.root) as engine:
        assert not engine.failures(), engine.failures()
        gather = Gather(1)
        call = Call(InferRequest("e", {"X": Tensor("X", "BYTES", (1,), b"\x02\0\0\0A")}), gather)
        tracer.begin(call)
        engine([call])
        gather.wait()
        tracer.end(call)
    tracer.close()
    assert isinstance(call.answer, InferError)
    entries = json.loads((tmp_path / "trace").read_text())
    assert [entry["model_name"] for entry in entries if "model_name" in entry] == ["e", "say"]
    shown = [entry["tensor"] for entry in entries if "tensor" in entry]
    assert [(one["name"], one["data"]) for one in shown] == [("X", ""), ("x", "")]
    assert "tensor 'x'" in shown[1]["not_shown"]


def test_a_step_is_answered_whatever_its_trace_meets(
    models: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(record: Record, call: Call) -> None:
        raise RuntimeError("no trace of this")

    models.add("e", ensemble(step("ten", "Y"), output("Y")), {".keep": ""})
    monkeypatch.setattr(Record, "end", fails)
    tracer = Tracer(TraceConfig(file=str(tmp_path / "trace"), levels=("TIMESTAMPS",), rate=1))
    with engine_over(models.root) as engine:
        (call,) = ask(engine, tracer, [2])
    assert isinstance(call.answer, InferResponse)


def test_a_steps_batch_rows_are_told_of_requests_that_share_a_frame(models: Repository) -> None:
    models.add("e", ensemble(step("ten", "Y"), output("Y")), {".keep": ""})
    gather = Gather(2)
    with engine_over(models.root) as engine:
        assert not engine.failures(), engine.failures()
        x = [Tensor.of("X", np.zeros((rows, 1), np.float32)) for rows in (1, 2)]
        calls = [Call(InferRequest("e", {"X": tensor}), gather) for tensor in x]
        engine(calls)
        gather.wait()
    for call in calls:
        assert isinstance(call.answer, InferResponse) and call.times is not None
        ((name, _, _, rows),) = call.times.spent(call.arrived_ns).steps
        assert (name, rows) == ("ten", 3)
