"""What lies in a repository and is no model is named, with what would make it one."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import Repository
from tutti.repository import unserved

MODEL = "not served: "
CASES = {
    "nothing": ([], "models FILE' makes such a folder of a model's file)"),
    "a file": (["bert.onnx"], "a model is a folder; put the file at bert/1/model.onnx, or let 'tutti init "),
    "a file for a GPU": (["bert.plan"], "put the file at bert/1/model.plan"),
    "no version": (["bert/model.onnx"], "'model.onnx' belongs in a version's folder; put it at bert/1/model.onnx"),
    "no version, another name": (["bert/net.onnx"], "put it at bert/1/model.onnx"),
    "no version, python": (["step/model.py"], "put it at step/1/model.py"),
    "another name": (
        ["bert/1/net.onnx"],
        "1/net.onnx should be called model.onnx, or be named by default_model_",
    ),
    "torch": (["net/1/model.pt"], 'write net/config.pbtxt, with names, types and sizes of its own: backend: "pytorch"'),
    "exported": (["net/1/model.pt2"], 'backend: "pytorch" max_batch_size: 8 input {'),
    "exported, to be told by its file": (
        ["net/1/model.pt2"],
        "/net/1/model.pt2 --name net --force' writes it, or write",
    ),
    "tensorrt": (["net/2/model.plan"], 'backend: "tensorrt" max_batch_size: 8 input'),
    "weights": (["net/1/best.pth"], 'default_model_filename: "best.pth"'),
    "a slip": (["net/config.pbtx", "net/1/model.plan"], "it has 'config.pbtx'; expected config.pbtxt"),
    "another slip": (["net/config.pbtxt.txt", "net/1/x"], "it has 'config.pbtxt.txt'; expected config.pbtxt"),
    "a checkpoint": (["bert/config.json", "bert/model.safetensors"], "it is a checkpoint; 'tutti export text "),
    "an old checkpoint": (["bert/config.json", "bert/pytorch_model.bin"], "it is a checkpoint"),
    "a repository": (["models/bert/1/model.onnx"], "it is a repository of its own: tutti serve "),
    "no model in a version": (["net/1/readme.txt"], "its folder 1 has no model of a kind that is known"),
    "an empty version": (["net/1/"], "its folder 1 has no model of a kind that is known"),
    "a bad name": ([" net/1/model.onnx"], "folder ' net' is not served: that is no valid model name"),
}


def fill(root: Path, names: list[str]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()


@pytest.mark.parametrize("case", CASES)
def test_what_would_make_it_a_model_is_told(case: str, tmp_path: Path) -> None:
    names, says = CASES[case]
    fill(tmp_path / "models", names)
    told = unserved.unserved(tmp_path / "models")
    assert len(told) == 1, told
    assert says in told[0]


@pytest.mark.parametrize("names", [["config.pbtxt"], ["1/model.onnx"], ["2/model.pt"], ["1/model.py", "labels.txt"]])
def test_a_models_folder_is_no_repository(names: list[str], tmp_path: Path) -> None:
    fill(tmp_path / "bert", names)
    (told,) = unserved.unserved(tmp_path / "bert")
    assert (
        told == f"'{tmp_path / 'bert'}' is a model's folder; its repository is the folder above: tutti serve {tmp_path}"
    )


def test_what_is_served_is_not_told(repository: Repository) -> None:
    repository.add_onnx()
    fill(repository.root, ["README.md", ".git/config", "notes/today.txt"])
    assert unserved.unserved(repository.root) == []
    fill(repository.root, ["1/x.onnx"])
    (told,) = unserved.unserved(repository.root)
    assert "'1' is not served: 'x.onnx' belongs in a version's folder" in told


@pytest.mark.parametrize("case", ["nothing", "torch"])
def test_a_server_tells_it(case: str, tmp_path: Path) -> None:
    names, says = CASES[case]
    fill(tmp_path / "models", names)
    command = [sys.executable, "-m", "tutti", "serve", str(tmp_path / "models"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert says in done.stderr
