"""The commands that install what is missing: of the libraries themselves, never of a stranger's package."""

import importlib.metadata
import re
from pathlib import Path

import pytest

from tutti.backends import onnxruntime
from tutti.core import extras

ROOT = Path(__file__).parents[2]
PACKAGES = ("tutti", "ensembles", "export", "loadtest", "ray_app")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """By name, the version; the metadata has two extras."""
    known = {"ray": "2.60.0", "numpy": "2"}
    lines = [
        "numpy>=2",
        'ray[serve]==2.60.*; extra == "ray"',
        'psutil>=6 ; extra == "ray"',
        'onnx>1; extra == "export"',
    ]
    monkeypatch.setattr(importlib.metadata, "requires", {"tutti": lines}.get)
    monkeypatch.setattr(extras, "version", lambda name: known.get(name, ""))
    return known


def test_what_is_missing_is_named(installed: dict[str, str]) -> None:
    assert extras.missing("ray") == ["psutil>=6"]
    assert extras.install("export") == "pip install 'onnx>1'"
    # That Ray is there does not say that what its own extra brings is.
    assert extras.install("ray") == "pip install 'ray[serve]==2.60.*' 'psutil>=6'"


def test_what_cannot_be_imported_though_it_is_there_is_named(installed: dict[str, str]) -> None:
    installed["onnx"] = "2"
    assert extras.missing("export") == []
    assert extras.install("export") == "pip install 'onnx>1'"


def test_somebody_elses_package_of_the_name_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["flask"])
    assert extras.install("ray") == "pip install -e '.[ray]', where tutti's pyproject.toml is"


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
