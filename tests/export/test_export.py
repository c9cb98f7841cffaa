"""The export pipeline: what is published, what is refused, and that a graph which differs is caught."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from export import cli, layout, parity, sources, tensorrt, text
from export import onnx as to_onnx
from export.errors import ExportError, ParityError
from tests.models import onnx_add_one
from tutti import config
from tutti.config import TensorSpec
from tutti.errors import ConfigError

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")


class Affine(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + 0 * unused.shape[0]


@pytest.fixture
def graph(tmp_path: Path) -> tuple[Affine, Path]:
    torch.manual_seed(0)
    module, path = Affine().eval(), tmp_path / "model.onnx"
    example = {"x": torch.randn(2, 4), "unused": torch.randn(2, 1)}
    to_onnx.save(module, path, example, ["y"], {"x": {0: "batch"}, "unused": {0: "batch"}})
    return module, path


def reference(module: Affine) -> parity.Reference:
    def run(case: parity.Arrays) -> parity.Arrays:
        with torch.inference_mode():
            return {"y": module(torch.from_numpy(case["x"]), torch.zeros(len(case["x"]), 1)).numpy()}

    return run


def cases() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {"x": rng.normal(size=(n, 4)).astype(np.float32), "unused": np.zeros((n, 1), np.float32)} for n in (1, 2, 9)
    ]


def test_specs_come_from_the_saved_graph(graph: tuple[Affine, Path]) -> None:
    inputs, outputs = to_onnx.tensor_specs(graph[1])
    assert inputs[0] == TensorSpec("x", "FP32", (4,))
    assert outputs == [TensorSpec("y", "FP32", (3,))]


def test_a_faithful_graph_passes(graph: tuple[Affine, Path]) -> None:
    module, path = graph
    report = parity.check(path, reference(module), cases(), 1e-5)
    assert report.cases == 3
    assert report.max_abs_error <= 1e-5


@pytest.mark.parametrize("fault", ["perturbed", "not finite"])
def test_planted_faults_are_caught(graph: tuple[Affine, Path], fault: str) -> None:
    module, path = graph
    model = onnx.load(str(path))
    weight = next(tensor for tensor in model.graph.initializer if list(tensor.dims) in ([3, 4], [4, 3]))
    array = numpy_helper.to_array(weight).copy()
    array = array * 1.01 if fault == "perturbed" else np.full_like(array, np.inf)
    weight.CopyFrom(numpy_helper.from_array(array.astype(np.float32), weight.name))
    onnx.save(model, str(path))
    with pytest.raises(ParityError, match=r"output 'y' on x \[1, 4\]"):
        parity.check(path, reference(module), cases(), 1e-5)


def test_a_constant_folded_batch_axis_is_caught(graph: tuple[Affine, Path], tmp_path: Path) -> None:
    module, _ = graph
    path = tmp_path / "fixed.onnx"
    to_onnx.save(module, path, {"x": torch.randn(2, 4), "unused": torch.randn(2, 1)}, ["y"], {})
    with pytest.raises(Exception, match="Got invalid dimensions"):
        parity.check(path, reference(module), cases(), 1e-5)


def test_sources(tmp_path: Path) -> None:
    assert sources.resolve("org/model").location == "org/model"
    made = sources.resolve("config:resnet,hidden_sizes=[16,32],layer_type=basic")
    assert (made.location, made.config_type) == (None, "resnet")
    assert dict(made.options) == {"hidden_sizes": [16, 32], "layer_type": "basic"}
    assert sources.resolve("package:export/steps").path.is_dir()
    for wrong in ("package:no_such_package/x", "package:export/nothing", "config:resnet,broken"):
        with pytest.raises(ExportError):
            sources.resolve(wrong)


def entry(tmp_path: Path, name: str = "m", **fields: object) -> layout.Entry:
    graph = tmp_path / "built.onnx"
    graph.write_bytes(onnx_add_one())
    specs = [TensorSpec("x", "FP32", (4,))], [TensorSpec("y", "FP32", (4,))]
    return layout.Entry(name, "onnxruntime", *specs, {"model.onnx": graph}, **fields)  # type: ignore[arg-type]


def test_publishing_writes_a_model_the_server_reads(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    for _ in range(2):  # the second time replaces the first
        layout.publish(repository, [entry(tmp_path, labels=["a", "b"], parameters={"k": "v"})])
    read = config.load(repository / "m" / "config.pbtxt")
    assert read.parameters["k"] == "v"
    assert read.outputs[0].label_filename == "labels.txt"
    assert (repository / "m" / "labels.txt").read_text() == "a\nb\n"
    assert sorted(path.name for path in (repository / "m").iterdir()) == ["1", "config.pbtxt", "labels.txt"]
    assert [path.name for path in (repository / "m" / "1").iterdir()] == ["model.onnx"]


def test_nothing_is_published_when_one_entry_is_wrong(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    with pytest.raises(ConfigError):
        layout.publish(repository, [entry(tmp_path), entry(tmp_path, "n", max_batch_size=-1)])
    missing = entry(tmp_path, "n")
    (tmp_path / "built.onnx").unlink()
    with pytest.raises(ExportError, match="missing files"):
        layout.publish(repository, [missing])
    assert not repository.exists()


@pytest.mark.parametrize(
    "content",
    ["label\tsplit\ttext\nsafe\ttrain\n", "label\tsplit\ttext\nsafe\tother\tx\n", "label\tsplit\ttext\na\ttrain\tx\n"],
)
def test_a_labelled_file_that_is_wrong_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "labels.tsv"
    path.write_text(content)
    with pytest.raises(ExportError, match=r"labels\.tsv"):
        text.read_labelled(path)


def test_the_labelled_sentences_of_the_repository() -> None:
    labelled = text.read_labelled(ROOT / "export" / "data" / "moderation.tsv")
    sentences = labelled.texts["train"] + labelled.texts["test"]
    assert len(labelled.labels) >= 3
    assert len(sentences) >= 300
    assert len(set(sentences)) == len(sentences), "a sentence is in both splits"


@pytest.mark.parametrize(
    "arguments",
    [
        ["audio", "no/such/file"],
        ["text", "config:bert"],
        ["text", "no/such/folder"],
        ["vision", "config:no_such_type"],
        ["audio", "package:export/cli.py"],
    ],
)
def test_a_wrong_source_exits_non_zero_and_publishes_nothing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    repository = tmp_path / "models"
    assert cli.main([*arguments, "--repository", str(repository)]) == 1
    assert "nothing was published" in capsys.readouterr().err
    assert not repository.exists()


def test_a_graph_that_differs_exits_non_zero(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from export import vision

    monkeypatch.setattr(vision, "TOLERANCE", -1.0)
    source = "config:resnet,num_labels=3,embedding_size=8,hidden_sizes=[8],depths=[1],layer_type=basic"
    repository = tmp_path / "models"
    assert cli.main(["vision", source, "--image-size", "16", "--repository", str(repository)]) == 1
    assert "differs from PyTorch" in capsys.readouterr().err
    assert not repository.exists()


def test_a_local_checkpoint_with_its_own_processor_is_exported(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    small = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1},
    )  # fmt: skip
    checkpoint, repository = tmp_path / "vit", tmp_path / "models"
    ViTForImageClassification(small).save_pretrained(checkpoint)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4] * 3, image_std=[0.2] * 3).save_pretrained(
        checkpoint
    )
    assert cli.main(["vision", str(checkpoint), "--name", "pets", "--repository", str(repository)]) == 0
    read = config.load(repository / "pets_classifier" / "config.pbtxt")
    assert read.inputs[0] == TensorSpec("PIXELS", "UINT8", (3, 32, 32))
    assert (repository / "pets_classifier" / "labels.txt").read_text() == "cat\ndog\n"


def test_without_tensorrt_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in tensorrt._MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    assert (
        cli.main(["audio", "package:export/cli.py", "--format", "tensorrt", "--repository", str(tmp_path / "m")]) == 1
    )
    assert "pip install 'tutti[tensorrt]'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_tensorrt_plan_is_really_built(tmp_path: Path) -> None:
    """In a process of its own: the library is large, and prints to stderr."""
    pytest.importorskip("tensorrt_rtx_bindings", exc_type=ImportError)
    source = "config:resnet,num_labels=3,embedding_size=8,hidden_sizes=[8],depths=[1],layer_type=basic"
    repository = tmp_path / "models"
    command = [sys.executable, "-m", "export.cli", "vision", source, "--image-size", "16", "--format", "tensorrt"]
    command += ["--compute-capability", "SM89", "--repository", str(repository)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    plan = repository / "image_classifier" / "1" / "model.plan"
    assert plan.stat().st_size > 10_000
    assert config.load(repository / "image_classifier" / "config.pbtxt").backend == "tensorrt"


def test_the_configs_in_git_are_those_the_export_scripts_write(sample_repository: Path) -> None:
    """`make models` has just run, or ran when the scripts last changed: git must see no difference."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "status", "--porcelain", "--", "model_repository"]
    assert subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout == ""
    assert sample_repository.is_dir()
