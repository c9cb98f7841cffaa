"""Pools from GPUs and the memory that models take."""

from pathlib import Path

import pytest
import yaml

from tests.models import Repository
from tests.ray_app.test_placement import ensemble, model
from tutti.app.cli import main
from tutti.core.errors import ConfigError
from tutti.ray_app.options import Options
from tutti.ray_app.planner import CONTEXT_MB, plan

MB = 1_000_000


def memory(name: str, mb: float, extra: str = "") -> object:
    return model(name, f'parameters {{ key: "tutti.memory_mb" value {{ string_value: "{mb}" }} }} {extra}')


def test_models_are_packed_largest_first() -> None:
    configs = {one.name: one for one in (memory("a", 300), memory("b", 700), memory("c", 600), memory("d", 250))}  # type: ignore[attr-defined]
    planned = plan(configs, dict.fromkeys(configs, 0), 5, 1000 + CONTEXT_MB, 1)  # type: ignore[arg-type]
    assert [(pool.name, pool.replicas, pool.models) for pool in planned.pools] == [
        ("gpu1", 3, ("a", "b")),
        ("gpu2", 2, ("c", "d")),
        ("cpu", 1, ("*",)),
    ]
    assert planned.why["b"] == "gpu1 and cpu: 700 MB, with 1 others; 0 MB are left"


def test_without_a_parameter_files_are_counted_twice() -> None:
    configs = {"a": model("a"), "b": model("b")}
    planned = plan(configs, {"a": 100 * MB, "b": 100 * MB}, 2, 300 + CONTEXT_MB, 0)
    assert [pool.models for pool in planned.pools] == [("a",), ("b",)]
    assert "200 MB" in planned.why["a"]


def test_what_is_for_cpus_takes_no_gpu() -> None:
    configs = {
        "big": model("big"),
        "decode": model("decode", backend="python"),
        "cpu": model("cpu", "instance_group { kind: KIND_CPU }"),
        "both": ensemble("both", "decode", "big"),
    }
    planned = plan(configs, dict.fromkeys(configs, MB), 1, 8000, 2)
    assert [(pool.name, pool.models) for pool in planned.pools] == [("gpu", ("big",)), ("cpu", ("*",))]
    assert planned.why["decode"].startswith("cpu: ")
    assert planned.why["both"].startswith("in segments: its models prefer different pools")


@pytest.mark.parametrize(
    ("configs", "gpus", "message"),
    [
        ([memory("huge", 5000)], 1, "model 'huge': expected at most 3,400 MB, .* got 5,000 MB"),
        ([memory("a", 3000), memory("b", 3000)], 1, "expected 2 GPUs or more, .* got 1: a; b"),
        ([memory("bad", -1)], 1, "model 'bad': parameters.tutti.memory_mb: expected megabytes, got '-1'"),
        ([], 0, "no pools"),
    ],
)
def test_what_cannot_be_planned(configs: list, gpus: int, message: str) -> None:
    named = {one.name: one for one in configs}
    with pytest.raises(ConfigError, match=message):
        plan(named, dict.fromkeys(named, MB), gpus, 4000, 0)


def test_the_command_writes_a_placement_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repository = Repository(tmp_path / "models")
    repository.add_onnx("one")
    repository.add_onnx("other")
    file = tmp_path / "pools.yaml"
    assert main(["cluster", "plan", str(repository.root), "--gpus", "3", "--output", str(file)]) == 0
    assert "gpu and cpu" in capsys.readouterr().out
    options = Options(model_repository="r", **yaml.safe_load(file.read_text()))
    assert [(pool.name, pool.replicas) for pool in options.pool_specs(3)] == [("gpu", 3), ("cpu", 1)]
    assert main(["cluster", "why", str(repository.root), "--placement", str(file), "--gpus", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "one    gpu and cpu: every pool takes it"
    assert main(["cluster", "plan", str(repository.root), "--gpus", "1", "--gpu-memory-gb", "0.1"]) == 1
    assert "model 'one': expected at most" in capsys.readouterr().err
