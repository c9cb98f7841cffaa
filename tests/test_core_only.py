"""The serving core alone, in an environment of its own without torch, transformers and Ray, serves the repository."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from demo.client import Client, load_items
from tests.models import onnx_add_one
from tests.serving import serving

ROOT = Path(__file__).parents[1]
ABSENT = ("torch", "transformers", "ray", "onnx", "sklearn")


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_core_serves_the_sample_repository(sample_repository: Path, tmp_path: Path) -> None:
    environment = tmp_path / "core"
    python = environment / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    pip = [sys.executable, "-m", "pip", "--python", python]
    install = [*pip, "install", "--quiet", "--disable-pip-version-check", "--no-compile", "-e", str(ROOT)]
    subprocess.run(install, check=True, capture_output=True, text=True)
    probe = f"import importlib.util as u; print([m for m in {ABSENT!r} if u.find_spec(m)])"
    found = subprocess.run([python, "-c", probe], check=True, capture_output=True, text=True, cwd="/")
    assert found.stdout.strip() == "[]"
    with serving(sample_repository, tmp_path / "log", python=str(python)) as served:
        item = load_items()[0]
        for protocol in ("http", "grpc"):
            answer, _ = Client(protocol, getattr(served, protocol)).infer("content_intelligence", item.inputs())
            assert int(answer["IMAGE_SCORES"].argmax()) == item.digit
            assert answer["SEGMENTS"].shape == (1, len(item.segments_s), 2)


# As with the core's libraries alone: no module of an extra is found.
WITHOUT_EXTRAS = """
import sys
EXTRAS = "torch transformers onnx onnxscript safetensors sklearn skl2onnx joblib ray psutil locust pyarrow soundfile"
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in EXTRAS.split():
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
sys.meta_path.insert(0, Missing())
from tutti.app import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def core(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", WITHOUT_EXTRAS, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


def test_an_onnx_file_becomes_a_model_without_an_extra(tmp_path: Path) -> None:
    (tmp_path / "one.onnx").write_bytes(onnx_add_one())
    done = core(tmp_path, "init", "models", "one.onnx")
    assert (done.returncode, done.stderr) == (0, "")
    assert "serve it:  tutti serve models" in done.stdout


def test_what_a_pickle_needs_is_told_with_the_command_that_installs_it(tmp_path: Path) -> None:
    (tmp_path / "iris.pkl").write_bytes(pickle.dumps({}))
    done = core(tmp_path, "init", "models", "iris.pkl")
    assert done.returncode == 1
    assert re.match(r"tutti init: 'joblib' is not installed: .*pip install -e '.*\[sklearn\]'", done.stderr)


@pytest.mark.parametrize("command", ["init", "export text", "ensemble explain", "loadtest run", "serve"])
def test_help_is_there_without_an_extra(command: str, tmp_path: Path) -> None:
    done = core(tmp_path, *command.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: tutti {command}" in done.stdout
