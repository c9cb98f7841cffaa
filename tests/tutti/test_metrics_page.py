"""The metrics page under Triton's names: why requests fail, and what the machine does."""

import re
from pathlib import Path

import pytest

from tests.models import Repository
from tests.serving import engine_over, infer
from tests.tutti.test_python_backend import ONE_TO_ONE, add, request
from tutti.core.types import Call, InferRequest
from tutti.frontends.v2.metrics_page import Metrics
from tutti.observing.host_metrics import HostMetrics


class Counted:
    """A sink that forgets."""

    def settle(self, calls: object) -> None:
        pass


def failures(page: str, model: str) -> dict[str, float]:
    start = f'nv_inference_request_failure{{model="{model}",reason="'
    lines = [line.removeprefix(start) for line in page.splitlines() if line.startswith(start)]
    return {line.partition('"')[0]: float(line.split()[-1]) for line in lines}


def test_failures_have_their_reasons(repository: Repository) -> None:
    fails = "def execute(self, requests): raise ValueError('no')"
    add(repository, "fails", fails, ONE_TO_ONE.format(rows=0, extra=""))
    with engine_over(repository.root) as engine:
        page = Metrics(engine)
        nothing = dict.fromkeys(("BACKEND", "CANCELED", "OTHER", "REJECTED"), 0.0)
        assert failures(page.render()[0].decode(), "fails") == nothing
        infer(engine, [request("fails", 1), request("fails", 2), InferRequest("fails", {})])
        cancelled = Call(request("fails", 3), Counted())
        cancelled.is_cancelled = True
        late = Call(request("fails", 4), Counted())
        late.deadline_ns = 1
        engine([cancelled, late])
        infer(engine, [request("fails", 5)])  # what came before has ended
        counted = failures(page.render()[0].decode(), "fails")
    assert counted == {"BACKEND": 3.0, "CANCELED": 1.0, "OTHER": 1.0, "REJECTED": 1.0}


def proc(folder: Path, busy: int, idle: int, available: int = 250) -> Path:
    (folder / "stat").write_text(f"cpu  {busy} 0 0 {idle} 0 0 0 0 7 7\ncpu0 1 1 1 1\n")
    (folder / "meminfo").write_text(f"MemTotal:       1000 kB\nMemFree: 1 kB\nMemAvailable:   {available} kB\n")
    return folder


def test_the_machine_is_measured_between_scrapes(tmp_path: Path) -> None:
    host = HostMetrics(proc(tmp_path, 100, 100))

    def seen() -> dict[str, float]:
        return {family.name: family.samples[0].value for family in host.collect()}

    seen()
    proc(tmp_path, 130, 110, available=100)
    assert seen() == {
        "nv_cpu_utilization": 0.75, "nv_cpu_memory_total_bytes": 1024000, "nv_cpu_memory_used_bytes": 900 * 1024,
    }  # fmt: skip
    assert seen()["nv_cpu_utilization"] == 0.75  # no time has passed
    proc(tmp_path, 130, 120)
    assert seen()["nv_cpu_utilization"] == 0.0


@pytest.mark.parametrize("left", ["", "cpu\n"])
def test_where_the_machine_does_not_tell_there_are_no_families(tmp_path: Path, left: str) -> None:
    proc(tmp_path, 1, 1)
    if left:
        (tmp_path / "stat").write_text(left)
    else:
        (tmp_path / "meminfo").unlink()
    assert list(HostMetrics(tmp_path).collect()) == []


ENSEMBLE = """
max_batch_size: 8
input {{ name: "x" data_type: TYPE_FP32 dims: 4 }}
output {{ name: "y" data_type: TYPE_FP32 dims: 4 }}
ensemble_scheduling {{ step {{ model_name: "{step}" model_version: -1
  input_map {{ key: "x" value: "x" }} output_map {{ key: "y" value: "y" }} }} }}
"""


def test_the_models_below_an_ensemble_are_told(repository: Repository) -> None:
    """Those of nested ones as well, so that a dashboard counts a request once."""
    repository.add_onnx()
    repository.add("inner", ENSEMBLE.format(step="add_one"), {})
    repository.add("outer", ENSEMBLE.format(step="inner"), {})
    with engine_over(repository.root) as engine:
        page = Metrics(engine).render()[0].decode()
    told = re.findall(r'^tutti_ensemble_step\{model="(\w+)",step="(\w+)",version="1"\} 1.0$', page, re.MULTILINE)
    assert sorted(told) == [("inner", "add_one"), ("outer", "add_one"), ("outer", "inner")]
