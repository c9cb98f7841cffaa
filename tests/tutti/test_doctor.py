"""What the doctor finds on a machine, and what it makes of it."""

import re
import resource
import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from tutti.app import cli, doctor
from tutti.core import extras
from tutti.devices import gpu_presence, nvml


def findings() -> dict[str, doctor.Finding]:
    return {finding.subject: finding for finding in doctor.examine()}


def test_this_machine_can_serve(capsys: pytest.CaptureFixture[str]) -> None:
    found = findings()
    assert all(finding.verdict == "ok" for name, finding in found.items() if name in ("tutti", "python", "libraries"))
    assert f"numpy {extras.version('numpy')}" in found["libraries"].text
    is_bad = any(finding.verdict == "bad" for finding in found.values())
    assert cli.main(["doctor"]) == int(is_bad)
    assert len(capsys.readouterr().out.splitlines()) == len(found)


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Only what is named, and of the core all that is not."""
    known = {**dict.fromkeys(doctor._CORE, "1"), **{name.replace("_", "-"): text for name, text in versions.items()}}
    monkeypatch.setattr(extras, "version", lambda name: known.get(name, ""))


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, orjson="", ray="2.60", psutil="7")
    found = findings()
    assert found["libraries"].verdict == "bad"
    assert found["libraries"].text == f"lacks orjson: {extras.install()}"
    lacks = f"lacks pyyaml: {extras.install('ray')}"
    assert found["extra 'ray'"] == doctor.Finding("extra 'ray'", "note", lacks)
    assert cli.main(["doctor"]) == 1


@pytest.mark.parametrize(
    ("plain", "gpu", "is_fine"), [("a", "", True), ("", "a", True), ("a", "a", False), ("a", "b", True)]
)
def test_one_onnxruntime_is_enough(monkeypatch: pytest.MonkeyPatch, plain: str, gpu: str, is_fine: bool) -> None:
    installed(monkeypatch, onnxruntime=plain, onnxruntime_gpu=gpu)
    monkeypatch.setattr(extras, "folder", {"onnxruntime": plain, "onnxruntime-gpu": gpu}.__getitem__)
    monkeypatch.setattr(gpu_presence, "has_gpu", lambda: False)
    found = findings()
    assert found["libraries"].verdict == "ok"
    assert ("onnxruntime" not in found) == is_fine
    assert is_fine or extras.SWAP_ONNXRUNTIME in found["onnxruntime"].text


@pytest.mark.parametrize(("hard", "verdict"), [(1024, "bad"), (4096, "ok"), (resource.RLIM_INFINITY, "ok")])
def test_few_open_files_are_few_connections(monkeypatch: pytest.MonkeyPatch, hard: int, verdict: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, hard))
    finding = findings()["open files"]
    assert finding.verdict == verdict
    assert ("raise the hard limit" in finding.text) == (verdict == "bad")


def test_little_shared_memory_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 << 20))
    assert findings()["shared memory"].verdict == "note"
    assert "--shm-size" in findings()["shared memory"].text
    monkeypatch.setattr(doctor, "_SHARED_MEMORY", tmp_path / "none")
    assert findings()["shared memory"].text.startswith("no ")


def test_a_gpu_that_cannot_be_used_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "visible_gpus", lambda: ())
    monkeypatch.setattr(gpu_presence, "has_gpu", lambda: False)
    assert findings()["GPUs"].verdict == "note"
    monkeypatch.setattr(gpu_presence, "has_gpu", lambda: True)
    assert findings()["GPUs"].verdict == "bad"
    monkeypatch.setattr(nvml, "visible_gpus", lambda: (nvml.Gpu(0, "GPU-1", "H100", 80 << 30, None),))
    assert findings()["cuda:0"].text == "H100, 80 GiB"


def test_a_compiler_is_looked_for_where_the_server_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert findings()["C++ compiler"].verdict == "note"
    assert "no no-such-compiler" in findings()["C++ compiler"].text


def test_doctor_and_commands_know_the_same_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each extra's own requirements are among them, as pyproject.toml has them."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for extra, needed in extras.NEEDED.items():
        required = {re.match(r"[\w-]+", line)[0] for line in project["optional-dependencies"][extra]}  # type: ignore[index]
        assert required - {"tritonclient"} <= set(needed), extra
    monkeypatch.setattr(extras, "version", lambda name: "" if name in ("hpack", "locust") else "1")
    assert extras.absent("loadtest") == ["locust", "hpack"]
