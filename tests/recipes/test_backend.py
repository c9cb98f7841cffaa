"""A backend in a package of its own, as CONTRIBUTING.md has it: built, installed, served, and true to the contract."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton

from tests import wheels
from tests.models import Repository
from tests.serving import serving

ROOT = Path(__file__).parents[2]
PACKAGE = Path(__file__).parent / "backend"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment's commands; it has the package beside the tutti of this checkout."""
    folder = tmp_path_factory.mktemp("backend")
    shutil.copytree(PACKAGE, folder / "source")
    environment = wheels.install(wheels.pack(folder / "source", folder), folder / "environment")
    (libraries,) = environment.bin.parent.glob("lib/python*/site-packages/libraries.pth")
    libraries.write_text(f"{ROOT}\n{libraries.read_text()}")
    return environment.bin


def run(environment: Path, *arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    command = [str(environment / "python"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def test_it_is_served_as_ours_are(environment: Path, repository: Repository, tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {"affine.json": '{"scale": 3, "offset": -1}'}
    repository.add("thrice", 'backend: "affine" max_batch_size: 8 dynamic_batching {}', files)
    repository.add("unread", 'backend: "affine" parameters { key: "depth" value { string_value: "2" } }', files)
    repository.add("unknown", 'backend: "afine"', files)
    x = np.array([[1, 2, 3]], np.float32)
    tensor = triton.InferInput("x", x.shape, "FP32")
    tensor.set_data_from_numpy(x)
    log = tmp_path / "log"
    with serving(repository.root, log, "--exit-on-error=false", "--strict-readiness=false", python=str(
        environment / "python"
    )) as served:  # fmt: skip
        client = triton.InferenceServerClient(served.http)
        assert client.infer("thrice", [tensor]).as_numpy("y").tolist() == [[2, 5, 8]]
        assert client.get_model_metadata("thrice")["platform"] == "affine"
        config = client.get_model_config("thrice")
        assert (config["backend"], config["default_model_filename"]) == ("affine", "affine.json")
        client.close()
    said = log.read_text()
    assert "parameters.depth: the affine backend does not read it; it reads repeat, and tutti's" in said
    assert "'afine' is not one of onnxruntime, pytorch, tensorrt, python, affine (of tutti-affine 0.1.0)" in said
    assert "did you mean 'affine'?" in said


def test_it_keeps_the_contract(environment: Path, tmp_path: Path) -> None:
    shutil.copy(PACKAGE / "test_contract.py", tmp_path)
    done = run(environment, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", ".", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "1 skipped" in done.stdout  # no inputs fail


def test_the_doctor_knows_it(environment: Path, tmp_path: Path) -> None:
    done = run(environment, "-m", "tutti", "doctor", cwd=tmp_path)
    assert "ok    backend 'affine'" in done.stdout, done.stdout + done.stderr
    assert "of tutti-affine 0.1.0" in done.stdout


def test_nothing_of_it_is_in_the_tree() -> None:
    code = "from tutti.repository import backend_records; print(backend_records.find('affine', 'm'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout == "None\n", done.stderr
