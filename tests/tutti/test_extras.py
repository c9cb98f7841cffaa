"""The commands that install what is missing: from the checkout or for the wheel, never a stranger's package."""

import importlib.metadata
import re
import shlex
import sys
from pathlib import Path

import pytest

from tutti.backends import onnxruntime
from tutti.core import extras

ROOT = Path(__file__).parents[2]
PACKAGES = ("tutti", "ensembles", "export", "loadtest", "ray_app")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """By name, the version; the metadata has two extras."""
    known = {"ray": "2.60.0", "numpy": "2", "tutti-serve": "1"}
    lines = [
        "numpy>=2",
        'ray[serve]==2.60.*; extra == "ray"',
        'psutil>=6 ; extra == "ray"',
        'onnx>1; extra == "export"',
    ]
    monkeypatch.setattr(importlib.metadata, "requires", {"tutti-serve": lines}.get)
    monkeypatch.setattr(extras, "version", lambda name: known.get(name, ""))
    return known


def test_what_is_missing_is_named(installed: dict[str, str]) -> None:
    assert extras.missing("ray") == ["psutil>=6"]
    assert extras.missing("export") == ["onnx>1"]
    installed["onnx"] = "2"
    assert extras.missing("export") == []


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its folder of programs, with a pip: that of the interpreter that runs, in the current folder."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "pip").touch(0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.setattr(extras, "_ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return programs


def checkout(folder: Path) -> None:
    (folder / "pyproject.toml").write_text('[project]\nname = "tutti-serve"\n')


def test_a_checkout_is_installed_from_where_it_is(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout(tmp_path)
    assert extras.install("export") == ".venv/bin/pip install -e '.[export]'"
    assert extras.install() == ".venv/bin/pip install -e ."
    monkeypatch.setenv("PATH", str(environment))
    assert extras.install("export") == "pip install -e '.[export]'"
    monkeypatch.chdir(environment)
    assert shlex.split(extras.install("ray")) == ["pip", "install", "-e", f"{tmp_path}[ray]"]


def test_a_wheel_is_named_as_it_is_installed(environment: Path, installed: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "somebody-elses"\n')
    assert extras.install("export") == ".venv/bin/pip install 'tutti-serve[export]'"
    (environment / "pip").unlink()
    assert extras.install("export") == ".venv/bin/python -m pip install 'tutti-serve[export]'"


def test_somebody_elses_package_of_the_name_is_not_asked_for(environment: Path, installed: dict[str, str]) -> None:
    """Where pip would look for the name on an index, since nothing is installed by it, the wheel is named."""
    del installed["tutti-serve"]
    told = shlex.split(extras.install("ray"))
    assert told[:-1] == [".venv/bin/pip", "install"]
    assert re.fullmatch(r"\./tutti_serve-[\d.]+-py3-none-any\.whl\[ray\]", told[-1])


def test_every_extra_that_the_code_names_is_there() -> None:
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    named = {name for path in paths for name in re.findall(r"extras\.install\([\"'](\w+)", path.read_text())}
    assert len(named) >= 5
    for extra in named:
        assert extras.requirements(extra), extra


def test_nobody_is_told_to_install_by_a_name_that_is_not_ours() -> None:
    """Of what a person reads: the code's messages, the documents, the recipes."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    files += [*ROOT.glob("docs/*.md"), *ROOT.glob("ray_app/deploy/*"), ROOT / "README.md", ROOT / "Makefile"]
    by_name = re.compile(r"pip3? install (?:[^\s`,]+ )*?['\"]?tutti(?:\[|['\"`\s]|$)", re.MULTILINE)
    assert by_name.search("pip install -q 'tutti[export]'")
    assert not by_name.search("pip install -q 'tutti-serve[export]'")
    for path in files:
        assert not by_name.search(path.read_text(encoding="utf-8")), path


def test_two_onnxruntimes_are_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    onnxruntime._warn_of_two.cache_clear()  # a model was loaded before
    monkeypatch.setattr(extras, "folder", lambda _: "/site-packages")
    for _ in range(2):
        onnxruntime._warn_of_two()
    onnxruntime._warn_of_two.cache_clear()
    (record,) = caplog.records
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu" in record.message
    monkeypatch.setattr(extras, "folder", lambda name: f"/{name}")
    onnxruntime._warn_of_two()
    onnxruntime._warn_of_two.cache_clear()
    assert len(caplog.records) == 1
