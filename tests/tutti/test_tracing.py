"""Which requests are traced, and what Triton's trace files look like."""

import errno
import gc
import json
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from demo.client import Client
from tests.models import IN_PROCESS, Repository
from tests.serving import Gather, engine_over, serving, wait_until
from tutti.core.errors import ConfigError, InferError, InvalidArgument
from tutti.core.types import Call, InferRequest, InferResponse, Tensor
from tutti.frontends.v2.api import Api
from tutti.observing import trace_files, trace_records, tracing
from tutti.observing.trace_files import JsonWriter
from tutti.observing.trace_records import Record
from tutti.observing.tracing import TraceConfig, Tracer, parse_config
from tutti.serving.engine import Engine


def send(engine: Engine, tracer: Tracer, count: int, model: str = "add_one") -> None:
    """`count` requests, one after the other, as a front-end would."""
    for index in range(count):
        gather = Gather(1)
        x = Tensor.of("x", np.full((1, 4), index, np.float32))
        call = Call(InferRequest(model, {"x": x}, id=f"r{index}"), gather)
        if tracer.is_on:
            tracer.begin(call)
        engine([call])
        gather.wait()
        tracer.end(call)


def traced(path: Path) -> list[str]:
    return [entry["request_id"] for entry in json.loads(path.read_text()) if "model_name" in entry]


def entries_so_far(path: Path) -> list[Any]:
    """Of a file that may be written just now."""
    try:
        return list(json.loads(path.read_text()))
    except (OSError, ValueError):
        return []


def traced_so_far(path: Path) -> list[str]:
    return [entry["request_id"] for entry in entries_so_far(path) if "model_name" in entry]


def make(path: Path, **options: object) -> Tracer:
    return Tracer(TraceConfig(file=str(path), **{"levels": ("TIMESTAMPS",), "rate": 1, **options}))  # type: ignore[arg-type]


def test_rate_and_count(repository: Repository, tmp_path: Path) -> None:
    repository.add_onnx()
    tracer = make(tmp_path / "trace", rate=3, count=2)
    with engine_over(repository.root) as engine:
        send(engine, tracer, 12)
        tracer.close()
        assert traced(tmp_path / "trace") == ["r2", "r5"]
        tracer.update("", {"trace_count": "1"})
        send(engine, tracer, 3)
        tracer.close()
        assert len(traced(tmp_path / "trace")) == 3


def test_traces_are_written_as_they_happen(repository: Repository, tmp_path: Path) -> None:
    repository.add_onnx()
    path = tmp_path / "trace"
    tracer = make(path)
    with engine_over(repository.root) as engine:
        for count in (1, 2, 5):
            path.write_text("")  # as a log rotation leaves it
            send(engine, tracer, count)
            wait_until(lambda count=count: len(traced_so_far(path)) == count)  # type: ignore[misc]
        path.rename(tmp_path / "moved")
        send(engine, tracer, 1)
        wait_until(lambda: traced_so_far(path) == ["r0"])
        assert len(traced(tmp_path / "moved")) == 5


def test_the_file_is_whole_after_a_kill(repository: Repository, tmp_path: Path) -> None:
    repository.add_onnx()
    path = tmp_path / "trace"
    flags = ("--trace-config", f"triton,file={path}", "--trace-config", "level=TIMESTAMPS", "--trace-config", "rate=1")
    with serving(repository.root, tmp_path / "log", *flags) as served:
        client = Client("http", served.http)
        for _ in range(20):
            client.infer("add_one", {"x": np.ones((1, 4), np.float32)})
        wait_until(lambda: len(entries_so_far(path)) == 40)
        served.process.send_signal(signal.SIGKILL)
        served.process.wait(20)
    entries = json.loads(path.read_text())
    names = [time["name"] for time in entries[1]["timestamps"]]
    # What Triton's own trace_summary.py goes by.
    assert names[:3] == ["HTTP_RECV_START", "REQUEST_START", "HTTP_RECV_END"]
    assert names[-3:] == ["INFER_RESPONSE_COMPLETE", "REQUEST_END", "HTTP_SEND_START"]
    assert entries[0]["batch_rows"] == 1


def test_traces_that_come_too_fast_are_dropped_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trace_files, "MAX_WAITING", 3)
    begun, may_go_on = threading.Event(), threading.Event()

    class Slow(JsonWriter):
        def _take(self, records: list[Record], is_flushing: bool) -> None:
            begun.set()
            assert may_go_on.wait(60)
            super()._take(records, is_flushing)

    monkeypatch.setattr(tracing, "JsonWriter", Slow)
    tracer = make(tmp_path / "trace")
    trace(tracer, 4)
    assert begun.wait(60)
    trace(tracer, 4, 5)  # none waits for the disk
    may_go_on.set()
    tracer.close()
    assert len(traced(tmp_path / "trace")) == 4
    assert "2 traces were dropped" in caplog.text


def test_traces_that_wait_keep_no_tensors(tmp_path: Path) -> None:
    """Of the request, of the steps within it, or of those that asked for them."""
    waiting: list[Record] = []
    tracer = make(tmp_path / "trace")
    tracer._writer = SimpleNamespace(write=waiting.append)  # type: ignore[assignment]
    outer, step = traced_call(4), traced_call(4)
    tracer.begin(outer)
    assert outer.trace is not None
    outer.trace.follow(step)
    kept = [weakref.ref(call.request.inputs["x"].data) for call in (outer, step)]  # type: ignore[arg-type]
    step.sink.settle([step])
    tracer.end(outer)
    assert len(waiting) == 1 and len(list(waiting[0].all())) == 2
    assert all(ref() is not None for ref in kept)
    del outer, step
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def test_what_a_replica_tells_becomes_steps(tmp_path: Path) -> None:
    """Its part lies in the middle of what was waited for it, whatever its clock says."""
    tracer = make(tmp_path / "trace")
    call = traced_call(4)
    tracer.begin(call)
    assert call.trace is not None
    for name, ns in (("QUEUE_START", 10_000), ("COMPUTE_START", 20_000), ("COMPUTE_END", 120_000)):
        call.trace.record(name, ns)
    inner = {"step": "inner", "start_us": 1, "end_us": 9, "steps": [{"step": "deep", "start_us": 2, "end_us": 5}]}
    ten = {"step": "ten", "start_us": 10, "end_us": 40, "queue_us": 5, "compute_us": 20, "batch_rows": 3}
    left_out = {"step": "costly", "start_us": 41, "skipped": "not S > 1"}
    call.trace.note("at_replica", {"total_us": 60, "steps": [inner, ten, left_out]})
    tracer.end(call)
    tracer.close()
    entries = json.loads((tmp_path / "trace").read_text())
    heads = [entry for entry in entries if "model_name" in entry]
    ids = {head["model_name"]: head["id"] for head in heads}
    parents = {head["model_name"]: head.get("parent_id") for head in heads}
    assert parents == {"m": None, "inner": ids["m"], "deep": ids["inner"], "ten": ids["m"]}
    times = {entry["id"]: {time["name"]: time["ns"] for time in entry["timestamps"]} for entry in entries[1::2]}
    # 100 us were waited, 60 of them were the replica's: it began 20 us after.
    assert times[ids["ten"]] == {
        "REQUEST_START": 50_000, "QUEUE_START": 50_000, "COMPUTE_START": 55_000, "COMPUTE_OUTPUT_START": 75_000,
        "REQUEST_END": 80_000,
    }  # fmt: skip
    assert times[ids["deep"]]["REQUEST_START"] == 43_000
    assert times[ids["m"]]["SKIPPED costly: not S > 1"] == 81_000
    assert next(head for head in heads if head["model_name"] == "ten")["batch_rows"] == 3


@pytest.mark.parametrize("log_frequency", [0, 1])
def test_what_another_server_has_written_is_kept(tmp_path: Path, log_frequency: int) -> None:
    path = tmp_path / "trace"
    first, second = (make(path, log_frequency=log_frequency) for _ in range(2))
    trace(first, 4, 2)
    first.close()
    code = "import sys; from tests.tutti import test_tracing as t; t.write_two(sys.argv[1], int(sys.argv[2]))"
    subprocess.run([sys.executable, "-c", code, str(path), str(log_frequency)], check=True, timeout=60)
    other = min(one for one in tmp_path.iterdir() if "-" in one.name)
    assert len(traced(other)) == (1 if log_frequency else 2)
    trace(first, 4)
    first.close()
    assert len(traced(tmp_path / "trace.0" if log_frequency else path)) == (1 if log_frequency else 3)
    if not log_frequency:  # the first has ended by now, and another server comes
        first._writer._claim.close()  # type: ignore[attr-defined]
        trace(second, 4)
        second.close()
        assert (len(traced(path)), len(traced(tmp_path / "trace.before"))) == (1, 3)


def write_two(path: str, log_frequency: int) -> None:
    """As a second process does."""
    tracer = make(Path(path), log_frequency=log_frequency)
    trace(tracer, 4, 2)
    tracer.close()


@pytest.mark.parametrize(
    ("file", "says"), [("none/trace", "there is no folder"), (".", "is a folder"), ("", "triton,file is not")]
)
def test_a_file_that_cannot_be_written_is_told_at_once(tmp_path: Path, file: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Tracer(TraceConfig(file=str(tmp_path / file) if file else "", levels=("TIMESTAMPS",)))


def test_log_frequency_makes_files(repository: Repository, tmp_path: Path) -> None:
    repository.add_onnx()
    tracer = make(tmp_path / "trace", log_frequency=2)
    with engine_over(repository.root) as engine:
        send(engine, tracer, 5)
        tracer.close()
    assert [traced(tmp_path / f"trace.{n}") for n in range(3)] == [["r0", "r1"], ["r2", "r3"], ["r4"]]


def test_timestamps_and_tensors(repository: Repository, tmp_path: Path) -> None:
    repository.add_onnx()
    tracer = make(tmp_path / "trace", levels=("TIMESTAMPS", "TENSORS"))
    with engine_over(repository.root) as engine:
        send(engine, tracer, 1)
        tracer.close()
    entries = json.loads((tmp_path / "trace").read_text())
    assert entries[0] == {
        "id": 1, "model_name": "add_one", "model_version": 1, "request_id": "r0", "batch_rows": 1,
        "batch_requests": 1, "instance": "add_one_0", "device": "cpu",
    }  # fmt: skip
    names = [time["name"] for time in entries[1]["timestamps"]]
    assert names == [
        "REQUEST_START", "QUEUE_START", "COMPUTE_START", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START", "COMPUTE_END",
        "REQUEST_END",
    ]  # fmt: skip
    times = [time["ns"] for time in entries[1]["timestamps"]]
    assert times == sorted(times)
    tensors = {entry["activity"]: entry["tensor"] for entry in entries[2:]}
    assert tensors["TENSOR_QUEUE_INPUT"] == {"name": "x", "data": "0.0,0.0,0.0,0.0", "shape": "1,4", "dtype": "FP32"}
    assert tensors["TENSOR_BACKEND_OUTPUT"]["data"] == "1.0,1.0,1.0,1.0"


REFUSED = [
    # (model, asked version, input, told version): the one asked for, else the one that would have answered, else -1
    ("add_one", "7", "x", 7),
    ("add_one", "1", "q", 1),
    ("add_one", "", "q", 1),
    ("add_one", "x", "x", -1),
    ("add_one", "9" * 30, "x", -1),
    ("nope", "", "x", -1),
    ("nope", "3", "x", 3),
    ("fails", "", "x", 1),
]


def test_a_refused_request_is_traced_with_the_version_that_it_was_for(repository: Repository, tmp_path: Path) -> None:
    repository.add_onnx()
    spec = "data_type: TYPE_FP32 dims: 4"
    io = f'max_batch_size: 8 input {{ name: "x" {spec} }} output {{ name: "y" {spec} }}'
    repository.add_python("fails", f'backend: "python" {io} {IN_PROCESS}', "    raise ValueError('no')\n")
    maps = 'input_map { key: "x" value: "x" } output_map { key: "y" value: "y" }'
    steps = f'ensemble_scheduling {{ step {{ model_name: "fails" model_version: -1 {maps} }} }}'
    repository.add("around", f'platform: "ensemble" {io} {steps}', {".keep": ""})
    tracer = make(tmp_path / "trace.json")
    with engine_over(repository.root) as engine:
        api = Api(engine, tracer=tracer)
        for model, version, name, _ in [*REFUSED, ("around", "", "x", 1)]:
            gather = Gather(1)
            x = Tensor.of(name, np.zeros((1, 4), np.float32))
            call = Call(InferRequest(model, {name: x}, model_version=version), gather)
            tracer.begin(call)
            api.engine([call])
            gather.wait()
            with pytest.raises(InferError):
                api.complete(call)
        tracer.close()
    heads = [entry for entry in json.loads((tmp_path / "trace.json").read_text()) if "model_name" in entry]
    told = [(head["model_name"], head["model_version"]) for head in heads]
    wanted = [(model, version) for model, _, _, version in REFUSED]
    assert told == [*wanted, ("around", 1), ("fails", 1)]
    assert all(head["error"] for head in heads)


def test_a_model_may_have_settings_of_its_own(repository: Repository, tmp_path: Path) -> None:
    repository.add_onnx()
    repository.add_onnx("other")
    tracer = make(tmp_path / "trace", levels=("OFF",))
    assert not tracer.is_on
    tracer.update("other", {"trace_level": ["TIMESTAMPS"], "trace_rate": "2"})
    with engine_over(repository.root) as engine:
        send(engine, tracer, 4)
        send(engine, tracer, 4, "other")
        tracer.update("other", {"trace_level": None, "trace_rate": None})
        assert not tracer.is_on
        send(engine, tracer, 4, "other")
        tracer.close()
    assert traced(tmp_path / "trace") == ["r1", "r3"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"trace_rate": "0"}, "Expecting value >= 1"),
        ({"trace_count": "-2"}, "Expecting value >= -1"),
        ({"trace_rate": 5}, "as text"),
        ({"trace_level": "TIMESTAMPS"}, "a list"),
        ({"trace_level": ["LOUD"]}, "a list"),
        ({"nonsense": "1"}, "expected one of"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, changes: dict, says: str) -> None:
    tracer = make(tmp_path / "trace")
    before = tracer.settings()
    with pytest.raises(InvalidArgument, match=says):
        tracer.update("", {"trace_rate": "9", **changes})
    assert tracer.settings() == before, "all or nothing"


def test_flags() -> None:
    made = parse_config(
        ["triton,file=/f", "level=TIMESTAMPS", "level=TENSORS", "rate=5", "count=-1", "log-frequency=2"]
    )
    assert (made.file, made.levels, made.rate, made.log_frequency) == ("/f", ("TIMESTAMPS", "TENSORS"), 5, 2)
    made = parse_config(["mode=opentelemetry", "opentelemetry,url=http://h/v1/traces", "opentelemetry,resource=a=b"])
    assert (made.mode, made.url, made.resource) == ("opentelemetry", "http://h/v1/traces", {"a": "b"})
    for wrong in ("rate", "rate=x", "level=LOUD", "mode=x", "nonsense=1"):
        with pytest.raises(ConfigError):
            parse_config([wrong])


def traced_call(size: int) -> Call:
    x = Tensor.of("x", np.zeros((1, size), np.float32))
    call = Call(InferRequest("m", {"x": x}, id="r"), Gather(1))
    call.answer = InferResponse("m", "1", [x])
    return call


def trace(tracer: Tracer, size: int, count: int = 1) -> None:
    for _ in range(count):
        call = traced_call(size)
        tracer.begin(call)
        tracer.end(call)


def test_traces_of_large_tensors_are_written_soon_and_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_files, "MAX_HELD_BYTES", 1000)
    monkeypatch.setattr(trace_records, "MAX_ELEMENTS", 300)
    tracer = make(tmp_path / "trace", levels=("TENSORS",), log_frequency=1000)
    trace(tracer, 400)
    wait_until(lambda: bool(entries_so_far(tmp_path / "trace.0")))
    entries = json.loads((tmp_path / "trace.0").read_text())
    shown = next(entry["tensor"] for entry in entries if entry.get("activity") == "TENSOR_QUEUE_INPUT")
    assert len(shown["data"].split(",")) == 300 and shown["elements_left_out"] == 100


def test_a_full_disk_costs_the_traces_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(trace_files, "time", SimpleNamespace(monotonic=lambda: now_s))
    tracer = make(tmp_path / "trace")
    trace(tracer, 4, 2)
    tracer.close()
    whole = trace_files.write_all

    def fails(file: object, data: bytes) -> None:
        whole(file, data[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trace_files, "write_all", fails)
    trace(tracer, 4, 100)
    tracer.close()
    assert len(traced(tmp_path / "trace")) == 2, "the file is still an array"
    assert sum("dropped" in record.message for record in caplog.records) == 1
    monkeypatch.setattr(trace_files, "write_all", whole)
    trace(tracer, 4, 2)
    tracer.close()
    assert len(traced(tmp_path / "trace")) == 2, "it is not tried again at once"
    now_s += 1.0
    trace(tracer, 4, 2)
    tracer.close()
    assert len(traced(tmp_path / "trace")) == 4
