"""Trace files of a real tritonserver and ours: the same traces, nested alike, with the same activities and tensors."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo.client import Client
from tests.ensembles.test_traces import nested
from tests.models import Repository
from tests.peers import tritonserver
from tests.serving import serving, wait_until

pytestmark = [pytest.mark.triton, pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]

SPEC = "data_type: TYPE_FP32 dims: 4"
SETTINGS = ("level=TIMESTAMPS", "level=TENSORS", "rate=1")
MODELS = ("add_one", "pair", "three")
# Triton's front-ends tell when an answer is out, ours when it begins to be written.
OURS_LACKS = {"HTTP_SEND_END"}


def step(model: str, read: str, made: str, names: str = "xy") -> str:
    x, y = names
    return (
        f'step {{ model_name: "{model}" model_version: -1 input_map {{ key: "{x}" value: "{read}" }} '
        f'output_map {{ key: "{y}" value: "{made}" }} }}'
    )


@pytest.fixture
def graphs(repository: Repository) -> Repository:
    repository.add_onnx()
    for name, steps in (
        ("pair", step("add_one", "X", "T") + step("add_one", "T", "Y")),
        ("three", step("pair", "X", "T", "XY") + step("add_one", "T", "Y")),
    ):
        repository.add(
            name,
            f'platform: "ensemble" max_batch_size: 8 input {{ name: "X" {SPEC} }} output {{ name: "Y" {SPEC} }} '
            f"ensemble_scheduling {{ {steps} }}",
            {".keep": ""},
        )
    return repository


def ask(http: str) -> None:
    client = Client("http", http)
    for model in MODELS:
        client.infer(model, {"x" if model == "add_one" else "X": np.zeros((1, 4), np.float32)})


def flags(file: Path, *more: str) -> Iterator[str]:
    for setting in (f"triton,file={file}", *SETTINGS, *more):
        yield from ("--trace-config", setting)


def shape(trace: dict[str, Any]) -> Any:
    """A trace without its times; Triton writes whole numbers without a point."""
    names = {time["name"] for time in trace["times"]} - OURS_LACKS
    tensors = sorted((what, name, [float(x) for x in data.split(",")]) for what, name, data in trace["tensors"])
    steps = sorted(trace["steps"], key=lambda step: step["id"])
    return trace["model_name"], trace["model_version"], sorted(names), tensors, [shape(step) for step in steps]


def test_the_same_traces(graphs: Repository, tmp_path: Path) -> None:
    tritonserver.require()
    theirs_at, ours_at = tmp_path / "theirs", tmp_path / "ours"
    files = [theirs_at.with_name(f"theirs.{number}") for number in range(len(MODELS))]
    with tritonserver.running(graphs.root, tmp_path, *flags(theirs_at, "triton,log-frequency=1")) as served:
        ask(served.http)
        wait_until(lambda: all(file.exists() for file in files))
    with serving(graphs.root, tmp_path / "log", *flags(ours_at)) as served:
        ask(served.http)
    theirs = [trace for file in files for trace in nested(json.loads(file.read_text()))]
    ours = nested(json.loads(ours_at.read_text()))
    assert [trace["model_name"] for trace in ours] == list(MODELS)
    by_model = sorted(theirs, key=lambda trace: MODELS.index(trace["model_name"]))
    assert [shape(trace) for trace in ours] == [shape(trace) for trace in by_model]


FAILING = ("fails", "around")


def test_what_fails_is_traced_with_its_version(graphs: Repository, tmp_path: Path) -> None:
    """Of what is refused before it is executed Triton writes no trace."""
    tritonserver.require()
    io = f'max_batch_size: 8 input {{ name: "X" {SPEC} }} output {{ name: "Y" {SPEC} }}'
    graphs.add_python("fails", f'backend: "python" {io}', "    raise ValueError('no')\n")
    steps = step("fails", "X", "Y", "XY")
    graphs.add("around", f'platform: "ensemble" {io} ensemble_scheduling {{ {steps} }}', {".keep": ""})

    def fail(http: str) -> None:
        for model in FAILING:
            with pytest.raises(Exception, match="ValueError: no"):
                Client("http", http).infer(model, {"X": np.zeros((1, 4), np.float32)})

    theirs_at, ours_at = tmp_path / "theirs", tmp_path / "ours"
    files = [theirs_at.with_name(f"theirs.{number}") for number in range(len(FAILING))]
    with tritonserver.running(graphs.root, tmp_path, *flags(theirs_at, "triton,log-frequency=1")) as served:
        fail(served.http)
        wait_until(lambda: all(file.exists() for file in files))
    with serving(graphs.root, tmp_path / "log", *flags(ours_at)) as served:  # type: ignore[assignment]
        fail(served.http)

    def versions(traces: list[dict[str, Any]]) -> list[Any]:
        return sorted((trace["model_name"], trace["model_version"], versions(trace["steps"])) for trace in traces)

    theirs = [trace for file in files for trace in nested(json.loads(file.read_text()))]
    ours = nested(json.loads(ours_at.read_text()))
    assert versions(ours) == versions(theirs) == [("around", 1, [("fails", 1, [])]), ("fails", 1, [])]
