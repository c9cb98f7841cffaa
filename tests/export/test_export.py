"""The export pipeline: what is verified, refused and published, and that faults of every kind are caught."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image

from tests.browser import look, needs_browser, unreadable
from tests.export import checkpoints
from tests.models import onnx_add_one
from tests.serving import serving
from tutti.console import progress
from tutti.core import extras
from tutti.core.errors import ConfigError
from tutti.export import (
    cli,
    commands,
    layout,
    manifest,
    parity,
    pipeline,
    profiling,
    report,
    sources,
    tensorrt,
)
from tutti.export import labelled as labelled_files
from tutti.export import onnx as to_onnx
from tutti.export.errors import ExportError, ParityError
from tutti.export.graphs import Check, Graph, Product
from tutti.export.parity import Comparer
from tutti.export.variants import Builder
from tutti.repository import config
from tutti.repository.model_config import TensorSpec

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")
LABELLED = str(ROOT / "export" / "data" / "moderation.tsv")
BERT = "config:bert,vocab_size=50,hidden_size=8,num_hidden_layers=1,num_attention_heads=1,intermediate_size=8"
RESNET = "config:resnet,num_labels=3,embedding_size=8,hidden_sizes=[8],depths=[1],layer_type=basic"


class Affine(torch.nn.Module):
    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(4, 64), torch.nn.Linear(64, 3)
        self.gain = gain

    def forward(self, x: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
        return self.second((self.first(x) * self.gain).relu() / self.gain) + 0 * unused.shape[0]


def graph(gain: float = 1.0, axes: bool = True, **more: Any) -> Graph:
    rng = np.random.default_rng(0)
    cases = [
        {"x": rng.normal(size=(n, 4)).astype(np.float32), "unused": np.zeros((n, 1), np.float32)} for n in (1, 2, 9)
    ]
    batch = {"x": {0: "batch"}, "unused": {0: "batch"}} if axes else {}
    shapes = {"x": ((1, 4), (2, 4), (8, 4)), "unused": ((1, 1), (2, 1), (8, 1))}
    example = {"x": torch.randn(2, 4), "unused": torch.randn(2, 1)}
    given: dict[str, Any] = {"labels": ["a", "b", "c"], "decision": "y", **more}
    return Graph("affine", Affine(gain).eval(), example, ("y",), batch, cases, shapes, **given)


def built(tmp_path: Path, of: Graph, *variants: str) -> Builder:
    builder = Builder(of, tmp_path)
    for variant in ("fp32", *variants):
        builder.make(variant)
    return builder


def test_specs_come_from_the_saved_graph(tmp_path: Path) -> None:
    path = built(tmp_path, graph()).result.built["fp32"].path
    inputs, outputs = to_onnx.tensor_specs(path)
    assert inputs[0] == TensorSpec("x", "FP32", (4,))
    assert outputs == [TensorSpec("y", "FP32", (3,))]


def test_every_variant_of_a_faithful_graph_passes(tmp_path: Path) -> None:
    result = built(tmp_path, graph(), "fp16", "int8", "torch").result
    assert result.reference == "PyTorch in float64"
    for variant, one in result.built.items():
        found = one.comparison
        assert found.failures == [], variant
        assert found.cases == 3
        assert (found.rows, found.top1) == (12, 1.0)
        assert 0 < found.max_abs < 0.05
        assert found.p99_abs <= found.max_abs
        assert found.worst is not None
        assert found.worst.output == "y"
    errors = {variant: one.comparison.max_abs for variant, one in result.built.items()}
    assert errors["fp32"] < errors["fp16"] < errors["int8"], "each is really in fewer bits"
    assert to_onnx.precision(tmp_path / "model.fp16.onnx")[0] == "fp16"
    assert to_onnx.precision(tmp_path / "model.int8.onnx")[0] == "int8"


def test_a_torch_package_is_called_as_servers_call_it(tmp_path: Path) -> None:
    """By position: a package takes its arguments only as it was exported with."""
    of = graph()
    built(tmp_path, of, "torch")
    module = torch.export.load(str(tmp_path / "model.pt2")).module(check_guards=False)
    x, unused = torch.randn(5, 4), torch.zeros(5, 1)
    torch.testing.assert_close(module(x, unused), of.module(x, unused))


@pytest.mark.parametrize("fault", ["perturbed", "not finite"])
def test_a_planted_fault_in_an_operator_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    save = to_onnx.save

    def planted(module: Any, path: Path, *rest: Any) -> None:
        save(module, path, *rest)
        model = onnx.load(str(path))
        weight = next(tensor for tensor in model.graph.initializer if sorted(tensor.dims) == [3, 64])
        array = numpy_helper.to_array(weight).copy()
        array = array * 1.01 if fault == "perturbed" else np.full_like(array, np.inf)
        weight.CopyFrom(numpy_helper.from_array(array.astype(np.float32), weight.name))
        onnx.save(model, str(path))

    monkeypatch.setattr(to_onnx, "save", planted)
    (failure, *_) = built(tmp_path, graph()).result.built["fp32"].comparison.failures
    assert failure.startswith("output 'y' on x [1, 4]")
    assert ("differs from PyTorch" if fault == "perturbed" else "not finite") in failure


def test_a_constant_folded_batch_axis_is_caught(tmp_path: Path) -> None:
    failures = built(tmp_path, graph(axes=False)).result.built["fp32"].comparison.failures
    assert any("fixed batch axis: it was folded into a constant" in one for one in failures)
    assert any("cannot be executed on x [1, 4]" in one for one in failures)


def test_what_is_too_large_for_16_bits_is_caught(tmp_path: Path) -> None:
    result = built(tmp_path, graph(gain=1e5), "fp16").result
    assert result.built["fp32"].comparison.is_well
    (failure,) = result.built["fp16"].comparison.failures
    assert "16 bits are not enough: tensor '" in failure
    assert "65504 is the most" in failure


def test_a_precision_that_was_not_built_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a converter that leaves everything as it was."""
    monkeypatch.setattr(to_onnx, "to_half", lambda source, target, _: shutil.copyfile(source, target))
    (failure,) = built(tmp_path, graph(), "fp16").result.built["fp16"].comparison.failures
    assert failure.startswith("expected a graph in fp16, its weights are in fp32")


def test_decisions_are_compared() -> None:
    comparer = Comparer("g", "int8", graph().limits_of("int8"), "y")
    right = np.eye(4, 3, dtype=np.float32)
    comparer.case({"x": right}, {"y": right}, {"y": right[:, ::-1]})
    found = comparer.result()
    assert found.top1 == 0.5
    assert any("decisions are PyTorch's" in one for one in found.failures)


def test_sources(tmp_path: Path) -> None:
    assert sources.resolve("org/model").location == "org/model"
    made = sources.resolve("config:resnet,hidden_sizes=[16,32],layer_type=basic")
    assert (made.location, made.config_type) == (None, "resnet")
    assert dict(made.options) == {"hidden_sizes": [16, 32], "layer_type": "basic"}
    assert "random weights" in made.provenance
    folder = sources.resolve("package:tutti/export/steps")
    assert folder.path.is_dir()
    assert folder.content() == sources.resolve(str(folder.path)).content()
    for wrong in ("package:no_such_package/x", "package:tutti/export/nothing", "config:resnet,broken"):
        with pytest.raises(ExportError):
            sources.resolve(wrong)


def entry(tmp_path: Path, name: str = "m", **fields: object) -> layout.Entry:
    file = tmp_path / "built.onnx"
    file.write_bytes(onnx_add_one())
    specs = [TensorSpec("x", "FP32", (4,))], [TensorSpec("y", "FP32", (4,))]
    return layout.Entry(name, "onnxruntime", *specs, {"model.onnx": file}, **fields)  # type: ignore[arg-type]


def test_publishing_writes_a_model_the_server_reads(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    for _ in range(2):  # the second time replaces the first
        more = {"labels": ["a", "b"], "parameters": {"k": "v"}, "warmups": [layout.Warmup(2, {"x": (4,)})]}
        layout.publish(repository, [entry(tmp_path, **more)])
    read = config.load(repository / "m" / "config.pbtxt")
    assert read.parameters["k"] == "v"
    assert read.outputs[0].label_filename == "labels.txt"
    assert [(warmup.batch_size, warmup.inputs["x"].dims) for warmup in read.warmups] == [(2, (4,))]
    assert (repository / "m" / "labels.txt").read_text() == "a\nb\n"
    assert sorted(path.name for path in (repository / "m").iterdir()) == ["1", "config.pbtxt", "labels.txt"]
    assert [path.name for path in (repository / "m" / "1").iterdir()] == ["model.onnx"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [], "nothing is left behind"


def test_other_versions_are_kept(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    layout.publish(repository, [entry(tmp_path)], version=1)
    (repository / "m" / "1" / ".gitkeep").touch()
    layout.publish(repository, [entry(tmp_path)], version=2)
    layout.publish(repository, [entry(tmp_path)], version=1)
    assert sorted(path.name for path in (repository / "m").iterdir()) == ["1", "2", "config.pbtxt"]
    assert sorted(path.name for path in (repository / "m" / "1").iterdir()) == [".gitkeep", "model.onnx"]


def test_a_configuration_that_was_edited_is_kept_beside(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "m"
    for labels in (["a"], ["a", "b"]):  # what nobody has edited leaves nothing
        layout.publish(tmp_path / "models", [entry(tmp_path, labels=labels, max_batch_size=len(labels))])
    assert sorted(path.name for path in folder.iterdir()) == ["1", "config.pbtxt", "labels.txt"]
    path = folder / "config.pbtxt"
    written = path.read_text()
    for number, name in enumerate(("config.pbtxt.before", "config.pbtxt.before-2")):
        edited = written.replace("max_batch_size: 2", f"max_batch_size: {number + 4}")
        assert edited != written
        path.write_text(edited)
        for _ in range(2):
            layout.publish(tmp_path / "models", [entry(tmp_path, labels=["a", "b"], max_batch_size=2)], version=2)
        assert (folder / name).read_text() == edited
        assert path.read_text() == written
    assert len(list(folder.glob("config.pbtxt*"))) == 3
    path.write_text("# Written by `tutti export`.\n" + edited)
    assert not layout.is_edited(path.read_text()), "older exports left no sum"


def test_without_an_exchange_of_the_system_folders_are_still_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_exchange", lambda *_: False)
    for label in ("a", "b"):
        layout.publish(tmp_path / "models", [entry(tmp_path, labels=[label])])
    assert (tmp_path / "models" / "m" / "labels.txt").read_text() == "b\n"
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["m"]


def test_nothing_is_published_when_one_entry_is_wrong(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    with pytest.raises(ConfigError):
        layout.publish(repository, [entry(tmp_path), entry(tmp_path, "n", max_batch_size=-1)])
    missing = entry(tmp_path, "n")
    (tmp_path / "built.onnx").unlink()
    with pytest.raises(ExportError, match="missing files"):
        layout.publish(repository, [missing])
    assert not repository.exists()


def test_what_runs_that_were_killed_have_left_is_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / f".models.export-{dead.pid}" / "m"
    left.mkdir(parents=True)
    layout.publish(tmp_path / "models", [entry(tmp_path)])
    assert not left.parent.exists()


def run(tmp_path: Path, of: Graph, **options: Any) -> pipeline.Outcome:
    source = sources.Source(None, "affine", given="config:affine")
    work = tmp_path / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    return pipeline.run(
        Product([of]), source, "affine", tmp_path / "models", pipeline.Options(**options), work, key="the key"
    )


def test_a_manifest_says_what_it_was_made_of(tmp_path: Path) -> None:
    outcome = run(tmp_path, graph(), variants=("fp32", "fp16", "int8"), cpu="int8", gpu="fp16")
    assert [path.name for path in outcome.published] == ["affine"]
    version = tmp_path / "models" / "affine" / "1"
    said = json.loads((version / manifest.NAME).read_text())
    assert said["key"] == "the key"
    assert "random weights" in said["provenance"]
    assert set(said["variants"]) == {"fp32", "fp16", "int8"}
    assert said["variants"]["fp16"]["limits"] == {"max_error": 0.02, "cosine": 0.999, "top1": 0.99}
    assert said["libraries"]["torch"] == manifest.libraries()["torch"]
    for name, known in said["files"].items():
        assert layout.sha256(version / name) == known["sha256"]
    read = config.load(tmp_path / "models" / "affine" / "config.pbtxt")
    assert (read.cpu_filename, read.gpu_filename) == ("model.int8.onnx", "model.fp16.onnx")
    assert manifest.unchanged(tmp_path / "models", "the key", 1) == ["affine"]
    assert manifest.unchanged(tmp_path / "models", "another", 1) == []
    (version / "model.onnx").write_bytes(b"cut")
    assert manifest.unchanged(tmp_path / "models", "the key", 1) == []


def refused(tmp_path: Path, of: Graph, *variants: str) -> pipeline.Outcome:
    """What was found in an export that publishes nothing."""
    with pytest.raises(ParityError) as failed:
        run(tmp_path, of, variants=("fp32", *variants))
    assert not (tmp_path / "models").exists()
    found = pipeline.stopped(failed.value)
    assert found is not None
    return found


def test_a_truncated_file_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(source: Path, target: Path) -> None:
        data = Path(source).read_bytes()
        Path(target).write_bytes(data[: len(data) // 2] if target.name == "model.onnx" else data)

    monkeypatch.setattr(layout.shutil, "copyfile", cut)
    assert refused(tmp_path, graph()).failures == [
        "affine/model.onnx: it is not the file that was verified: truncated, or written since"
    ]


def test_a_swapped_pair_of_labels_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = layout._write

    def swapped(path: Path, text: str) -> None:
        write(path, "b\na\nc\n" if path.name == "labels.txt" else text)

    monkeypatch.setattr(layout, "_write", swapped)
    assert refused(tmp_path, graph()).failures == [
        "affine/labels.txt: class 0 is 'a' in the checkpoint, and not so here"
    ]


def test_fewer_labels_than_classes_are_caught(tmp_path: Path) -> None:
    (failure,) = refused(tmp_path, graph(labels=["a"])).failures
    assert "the graph has a class" in failure


def test_profiles_choose_batches_and_start_the_scheduler(tmp_path: Path) -> None:
    outcome = run(tmp_path, graph(), profiles=True, goal_ms=1000.0)
    assert {one.rows for one in outcome.measured["affine"]} == {1, 2, 4, 8, 16, 32}
    read = config.load(tmp_path / "models" / "affine" / "config.pbtxt")
    assert read.max_batch_size == 32
    assert set(read.latency_ns) == {1, 2, 4, 8, 16, 32}
    assert all(ns > 0 for ns in read.latency_ns.values())
    page = report.page(outcome)
    assert "<svg" in page
    assert "max_batch_size: 32" in page


@needs_browser
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """With many variants and lengths, long names, large errors and small ones, at 400 and 1280 pixels."""
    folder = tmp_path / "export"
    folder.mkdir()
    outcome = run(folder, graph())
    result = outcome.results[0]
    (comparison,) = result.comparisons
    worst = parity.Worst("an_output", "x [2, 3]", 1.5e-9, [0.123456] * 8, [0.123457] * 8, "text " * 40)
    for variant in ("fp16", "int8", "torch", "torch-fp16"):
        seen = replace(
            comparison, variant=variant, max_abs=1e9, rows=400, worst=worst, note="a note of some length " * 4
        )
        result.built[variant] = replace(result.built["fp32"], variant=variant, comparison=seen)
    outcome.checks = [Check(f"a_model_of_a_long_name/{n}.onnx", True, "as verified " * 9) for n in range(3)]
    for lengths in ((1,), (16, 128, 1_500)):
        outcome.measured = {
            "affine": [
                profiling.Measured(variant, "cpu", rows, length, 1e-3 * factor * rows * length)
                for variant, factor in (("fp32", 20), ("int8", 9), ("fp16", 8.9))
                for length in lengths
                for rows in (1, 2, 4, 8, 16, 32)
            ]
        }
        for width in (400, 1280):
            told = look(report.page(outcome), width, tmp_path)
            assert unreadable(told) == {}
            assert told["texts"] > 10


def test_recommendations_keep_two_batches_within_the_goal() -> None:
    measured = [profiling.Measured("fp32", "cpu", rows, 1, 2 + rows) for rows in (1, 2, 4, 8, 16)]
    found = profiling.recommend(measured, "fp32", 20)
    assert found.max_batch_size == 8
    assert found.preferred == (8,)
    assert found.latency.startswith("1:3.000,2:4.000")
    assert profiling.recommend(measured, "fp32", 0.1).max_batch_size == 1


def test_recommendations_are_for_the_usual_length() -> None:
    measured = [
        profiling.Measured("fp32", "cpu", rows, length, rows * length) for length in (1, 2, 30) for rows in (1, 2, 4, 8)
    ]
    found = profiling.recommend(measured, "fp32", 20)
    assert (found.usual_length, found.max_batch_size) == (2, 4)
    assert found.latency == "1:2.000,2:4.000,4:8.000,8:16.000"
    assert found.longest_ms == 120


@pytest.mark.parametrize("told", ["x", "1:", "0:3", "1:-2", "1:2,nan:3"])
def test_latencies_that_are_none_are_refused(told: str) -> None:
    made = config.parse(
        'backend: "onnxruntime" max_batch_size: 4 input { name: "x" data_type: TYPE_FP32 dims: 1 } '
        'output { name: "y" data_type: TYPE_FP32 dims: 1 } '
        f'parameters {{ key: "tutti.latency_ms" value {{ string_value: "{told}" }} }}',
        "m",
    )
    with pytest.raises(ConfigError, match=r"model 'm': parameters\.tutti\.latency_ms: expected ROWS:MILLISECONDS"):
        _ = made.latency_ns


@pytest.mark.parametrize(
    "content",
    ["label\tsplit\ttext\nsafe\ttrain\n", "label\tsplit\ttext\nsafe\tother\tx\n", "label\tsplit\ttext\na\ttrain\tx\n"],
)
def test_a_labelled_file_that_is_wrong_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "labels.tsv"
    path.write_text(content)
    with pytest.raises(ExportError, match=r"labels\.tsv"):
        labelled_files.read(path)


def test_the_labelled_sentences_of_the_repository() -> None:
    labelled = labelled_files.read(ROOT / "export" / "data" / "moderation.tsv")
    sentences = labelled.texts["train"] + labelled.texts["test"]
    assert len(labelled.labels) >= 3
    assert len(sentences) >= 300
    assert len(set(sentences)) == len(sentences), "a sentence is in both splits"


Export = Callable[..., int]


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Export:
    """The command, into tmp_path/models, its report beside it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: str) -> int:
        where = ["--repository", str(tmp_path / "models"), "--report", str(tmp_path / "report.html")]
        return cli.main([*arguments, *where])

    return run


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["audio", "no-such/hub-id"], "transformers cannot load 'no-such/hub-id'"),
        (["text", "config:no_such_type"], "transformers cannot load"),
        (["text", "config:bret"], "a type that it knows; did you mean 'config:bert'?"),
        (["audio", "config:whisper"], "of whisper a checkpoint is needed, a folder or a hub id; random weights"),
        (["audio", "config:clap"], "of clap a checkpoint is needed"),
        (["audio", BERT], f"is a bert, which takes texts: tutti export text {BERT}"),
        (["vision", BERT], f"is a bert, which takes texts: tutti export text {BERT}"),
        (["text", "config:whisper"], "is a whisper, which takes sounds: tutti export audio config:whisper"),
        (["text", RESNET], f"is a resnet, which takes pictures: tutti export vision {RESNET}"),
        (["vision", "config:no_such_type"], "transformers cannot load"),
        (["audio", "package:tutti/export/cli.py"], "is no TorchScript file"),
        (["vision", RESNET, "--labels", "cat,dog"], "zero-shot needs clip"),
        (["text", "config:bart"], "is a bart, an encoder with a decoder"),
        (["text", BERT, "--labelled", LABELLED], "expected a checkpoint with a tokenizer"),
    ],
)  # fmt: skip
def test_what_is_wrong_exits_non_zero_and_publishes_nothing(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], export: Export
) -> None:
    assert export(*arguments) == 1
    said = capsys.readouterr().err
    assert "nothing was published" in said
    assert says in said
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--variants", "fp32,fp8"],
            "expected some of fp32, fp16, int8, torch, torch-fp16, torch-bf16, tensorrt, got 'fp8'",
        ),
        (["--compute-capability", "SM89"], "needs --format tensorrt"),
    ],
)
def test_flags_that_make_no_sense(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str], export: Export
) -> None:
    assert export("vision", RESNET, *flags) == 2
    assert says in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_caught(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], export: Export
) -> None:
    for number, extra in enumerate((40, 0)):
        folder = checkpoints.text(tmp_path / f"bert{number}", "bert", False)
        if extra:  # more ids than the model has rows
            checkpoints.word_pieces(folder, extra)
        else:  # as many, but others are special
            read = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**read, "pad_token_id": 7}))
        assert export("text", str(folder)) == 1
        said = capsys.readouterr().err
        assert (
            "tokenizer: it has ids up to" if extra else "pad_token_id is 7 for the model, 0 for the tokenizer"
        ) in said
        assert "report: " in said
        assert "Nothing was published" in (tmp_path / "report.html").read_text()
        assert not (tmp_path / "models").exists()


def test_what_is_told_to_type_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], export: Export
) -> None:
    """The last lines of an export, typed as they are but for the port and the picture's name; and lines before them."""
    monkeypatch.setattr(progress, "_SILENT_S", 0.0)
    monkeypatch.setattr(progress, "_LOG_S", 0.0)
    models = tmp_path / "models"
    assert export("vision", RESNET, "--image-size", "16", "--name", "pets") == 0
    said, told = capsys.readouterr()
    assert re.search(r"^vision 'pets' \[2/4\], \d+ s.*: pets_classifier: fp32$", told, re.MULTILINE), told
    names = said.partition(f"published in {models}: ")[2].partition(" (")[0].split(", ")
    assert sorted(names) == ["pets_classifier", "pets_decoder", "pets_ensemble", "pets_labels"]
    assert f"\nserve it:  tutti serve {models}\n" in said
    ask = said.partition("ask it:    ")[2].strip()
    picture = tmp_path / "picture.png"
    Image.new("RGB", (20, 30)).save(picture)
    with serving(models, tmp_path / "log") as served:
        command = ask.replace("127.0.0.1:8000", served.http).replace("picture.png", str(picture))
        assert command != ask
        answer = subprocess.run(command, shell=True, capture_output=True, check=True, timeout=60).stdout
    assert b'"name":"LABEL"' in answer, answer
    assert b'"error"' not in answer


def test_texts_and_tensors_are_asked_as_they_come(sample_repository: Path, tmp_path: Path) -> None:
    (tmp_path / "a b").symlink_to(sample_repository)
    url = "curl -s http://127.0.0.1:8000/v2/models"
    for names, ask in (
        (["text_gate"], f"{url}/text_gate/generate -d '" + '{"TEXT": "a text"}' + "'"),
        (["text_gate", "speech_vad"], f"{url}/speech_vad"),
    ):
        serve, told = commands.following(tmp_path / "a b", names)
        assert serve == f"serve it:  tutti serve '{tmp_path}/a b'"
        assert told == f"ask it:    {ask}"


def test_a_rerun_does_nothing_unless_something_has_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], export: Export
) -> None:
    assert export("vision", RESNET, "--image-size", "16") == 0
    folder = tmp_path / "models" / "image_classifier"
    before = folder.stat().st_ino
    capsys.readouterr()
    assert export("vision", RESNET, "--image-size", "16") == 0
    said = capsys.readouterr().out
    assert "nothing has changed: image_classifier" in said or "nothing has changed: image_" in said
    assert folder.stat().st_ino == before
    assert export("vision", RESNET, "--image-size", "16", "--force") == 0
    assert folder.stat().st_ino != before
    (folder / "1" / "model.onnx").write_bytes(b"cut")
    assert export("vision", RESNET, "--image-size", "16") == 0
    assert len((folder / "1" / "model.onnx").read_bytes()) > 100, "what is not as it was left is made again"
    assert export("vision", RESNET, "--image-size", "24") == 0
    assert config.load(folder / "config.pbtxt").inputs[0].dims == (3, 24, 24)


def test_a_dry_run_shows_what_would_be_done(tmp_path: Path, capsys: pytest.CaptureFixture[str], export: Export) -> None:
    assert export("vision", RESNET, "--image-size", "16", "--variants", "fp16,int8", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "variants: fp32, fp16, int8" in said
    assert "image_classifier: model, onnxruntime; PIXELS -> IMAGE_SCORES; 5 cases" in said
    assert "and the ensemble over them" in said
    assert not (tmp_path / "models").exists()


def test_without_tensorrt_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], export: Export
) -> None:
    for name in tensorrt._MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    assert export("audio", "package:tutti/export/cli.py", "--format", "tensorrt") == 1
    assert f"{extras.install('tensorrt')} for TensorRT-RTX" in capsys.readouterr().err


MODALITIES = {
    "audio": checkpoints.spectrogram_transformer,
    "text": lambda folder: checkpoints.text(folder, "bert", True),
    "vision": checkpoints.vit,
}
# Each of "KIND FOLDER" in argv, one after the other.
EXPORTS = """
import json, sys
from tutti.export import cli
for kind, folder in map(str.split, sys.argv[1:]):
    command = [kind, folder + "/checkpoint", "--name", "m", "--variants", "fp16", "--format", "tensorrt"]
    status = cli.main([*command, "--compute-capability", "SM89", "--repository", folder + "/models"])
    print(f"\\n== {kind} {status}", flush=True)
"""


@pytest.fixture(scope="module", autouse=True)
def building(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> "Iterator[tuple[Path, subprocess.Popen[bytes]] | None]":
    """Plans of one model for each modality are begun with this module, for the tests at its end, if they were chosen.

    In a process of their own: the library is large, and prints to stderr.
    """
    chosen = [item for item in request.session.items if item.path == request.path]
    is_there = importlib.util.find_spec("tensorrt_rtx_bindings") is not None
    if not is_there or not any("plans" in item.fixturenames for item in chosen):
        yield None
        return
    folder = tmp_path_factory.mktemp("plans")
    for kind, make in MODALITIES.items():
        make(folder / kind / "checkpoint")
    command = [sys.executable, "-c", EXPORTS, *(f"{kind} {folder / kind}" for kind in MODALITIES)]
    with (folder / "said").open("wb") as said, (folder / "errors").open("wb") as errors:
        process = subprocess.Popen(command, stdout=said, stderr=errors, cwd=ROOT)
    yield folder, process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def plans(building: "tuple[Path, subprocess.Popen[bytes]] | None") -> dict[str, tuple[Path, int, str]]:
    """By modality: the repository, the command's status, and what it said."""
    pytest.importorskip("tensorrt_rtx_bindings", exc_type=ImportError)
    assert building is not None
    folder, process = building
    process.wait(500)
    found = re.findall(r"(.*?)\n== (\w+) (\d+)\n", (folder / "said").read_text(), re.DOTALL)
    assert [kind for _, kind, _ in found] == list(MODALITIES), (folder / "errors").read_text()
    return {kind: (folder / kind / "models", int(status), said) for said, kind, status in found}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", MODALITIES)
def test_a_tensorrt_plan_is_really_built(plans: dict[str, tuple[Path, int, str]], kind: str) -> None:
    repository, status, said = plans[kind]
    assert status == 0, said
    assert (repository / "m_classifier" / "1" / "model.plan").stat().st_size > 10_000
    read = config.load(repository / "m_classifier" / "config.pbtxt")
    assert (read.backend, read.proto.default_model_filename) == ("tensorrt", "model.plan")
    assert "layers in HALF" in said, "the network was looked into"
    assert "tensorrt_rtx" in said


def test_the_configs_in_git_are_those_the_export_scripts_write(sample_repository: Path) -> None:
    """`make models` has just run, or ran when the scripts last changed: git must see no difference."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "status", "--porcelain", "--", "model_repository"]
    assert subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout == ""
    assert sample_repository.is_dir()
