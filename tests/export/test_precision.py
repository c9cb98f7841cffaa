"""torch.export packages in 16 bits: equal to PyTorch as far as 16 bits go, refused where they do not, and served."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.export.test_export import RESNET, graph
from tests.serving import engine_over, infer
from tutti.core.types import InferRequest, InferResponse, Tensor
from tutti.export import cli, features, manifest, narrow, program, silero, sources, vision
from tutti.export.errors import ExportError
from tutti.export.graphs import Graph, Limits
from tutti.export.parity import Comparer
from tutti.export.variants import Builder
from tutti.repository import config

pytestmark = pytest.mark.filterwarnings("ignore")
NARROW = {"torch-fp16": torch.float16, "torch-bf16": torch.bfloat16}
LEAST = torch.finfo(torch.float32).min


class Attention(torch.nn.Module):
    """One layer that hides places in every way that code is found to do it, each in numbers of 32 bits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.norm = torch.nn.Linear(4, 16), torch.nn.LayerNorm(16)
        self.register_buffer("never", torch.tensor(LEAST))

    def forward(self, x: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.enter(x))
        is_hidden = (mask == 0).unsqueeze(1)
        similar = hidden @ hidden.transpose(1, 2) / 4
        scores = similar.masked_fill(is_hidden, LEAST)
        scores = scores + (1.0 - mask.unsqueeze(1).to(scores.dtype)) * -1e9
        first = scores.softmax(-1) @ hidden
        # As a bias that is made in 32 bits: the sum is wide, and must not stay so.
        scores = similar + torch.where(is_hidden, LEAST, 0.0)
        second = scores.softmax(-1) @ hidden
        scores = torch.where(is_hidden, self.never, similar) + bias.unsqueeze(1)
        third = scores.softmax(-1) @ hidden
        return torch.cat([first, second, third], -1)


def attention() -> Graph:
    rng = np.random.default_rng(0)
    cases = []
    for rows, length in ((1, 3), (2, 7), (5, 4)):
        mask = np.ones((rows, length), np.int64)
        mask[:, length // 2 :] = 0
        bias = np.where(mask, 0.0, LEAST).astype(np.float32)
        cases.append({"x": rng.normal(size=(rows, length, 4)).astype(np.float32), "mask": mask, "bias": bias})
    example = {name: torch.from_numpy(array) for name, array in cases[1].items()}
    axes = {name: {0: "batch", 1: "length"} for name in example}
    return Graph("attention", Attention().eval(), example, ("y",), axes, cases, {})


def built(of: Graph, folder: Path, *variants: str) -> Builder:
    builder = Builder(of, folder)
    for variant in variants:
        builder.make(variant)
    return builder


@pytest.mark.parametrize("variant", NARROW)
def test_masks_that_16_bits_cannot_say_still_hide(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = built(attention(), tmp_path, variant).result.built[variant].comparison
    assert comparison.failures == []
    assert comparison.cases == 3
    assert 1e-6 < comparison.max_abs < 0.1, "really rounded"
    monkeypatch.setattr(narrow, "_PLACING", frozenset())
    comparison = built(attention(), tmp_path, variant).result.built[variant].comparison
    assert any("not finite" in one or "without overflow" in one for one in comparison.failures)


@pytest.mark.parametrize("variant", NARROW)
def test_weights_are_narrow_and_the_edges_are_not(variant: str, tmp_path: Path) -> None:
    one = built(attention(), tmp_path, variant).result.built[variant]
    loaded = torch.export.load(str(one.path))
    assert {tensor.dtype for tensor in loaded.state_dict.values()} == {NARROW[variant]}
    values = {node.name: node.meta["val"].dtype for node in loaded.graph.nodes if node.op == "placeholder"}
    assert [values[name] for name in loaded.graph_signature.user_inputs] == [torch.float32, torch.int64, torch.float32]
    case = attention().cases[0]
    with torch.inference_mode():
        (answer,) = program.runnable(loaded)(*(torch.from_numpy(array) for array in case.values()))
    assert answer.dtype == torch.float32
    assert set(program.products(loaded)) == {NARROW[variant]}
    assert "products in " in one.comparison.precision


def test_more_bits_are_nearer(tmp_path: Path) -> None:
    result = built(attention(), tmp_path, "torch", *NARROW).result
    errors = [result.built[variant].comparison.max_abs for variant in ("torch", "torch-fp16", "torch-bf16")]
    assert errors[0] < errors[1] / 10
    assert errors[1] < errors[2]


def test_what_is_too_large_for_float16_is_refused_by_name(tmp_path: Path) -> None:
    """Not for bfloat16, whose range is that of 32 bits."""
    result = built(graph(gain=1e5), tmp_path, *NARROW).result
    assert result.built["torch-bf16"].comparison.is_well
    *_, failure = result.built["torch-fp16"].comparison.failures
    assert failure.startswith("16 bits are not enough: what '")
    assert "gets larger than 65504, which is the most" in failure


def test_a_weight_that_is_too_large_is_refused_by_name(tmp_path: Path) -> None:
    of = graph()
    with torch.no_grad():
        of.module.second.weight[0, 0] = 7e4
    (failure,) = built(of, tmp_path, "torch-fp16").result.built["torch-fp16"].comparison.failures
    assert failure == "16 bits are not enough: parameter 'second.weight' reaches 7e+04, 6.55e+04 is the most"


def test_a_program_that_stayed_as_it_was_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unchanged(module: torch.nn.Module, datatype: torch.dtype) -> tuple[torch.nn.Module, int]:
        return module, 1

    monkeypatch.setattr(narrow, "narrowed", unchanged)
    monkeypatch.setattr(narrow.Narrow, "_entered", lambda self, name, x: x)
    (failure,) = built(graph(), tmp_path, "torch-fp16").result.built["torch-fp16"].comparison.failures
    assert failure == "expected a program in torch.float16, it has 2 products in float32"


def test_what_must_stay_wide_does(tmp_path: Path) -> None:
    """The spectrogram's weights keep their bits, and what shares a weight still does."""
    module = torch.nn.ModuleDict(
        {"mel": features.LogMel(torch.rand(6, 1, 4), 2, np.eye(3), 1e-10, "log"), "a": torch.nn.Linear(3, 3)}
    )
    module["b"] = torch.nn.Linear(3, 3)
    module["b"].weight = module["a"].weight
    made, elements = narrow.narrowed(module, torch.float16)
    assert torch.equal(made["mel"].weight, module["mel"].weight)
    assert made["a"].weight is made["b"].weight
    assert elements == 9 + 3 + 3
    assert module["a"].weight.dtype == torch.float32, "the original is untouched"
    result = built(silero.level_graph("s"), tmp_path, "torch-fp16").result
    assert (result.built, result.left_out) == ({}, {"torch-fp16": "all of it stays in 32 bits"})


def test_ties_within_what_is_tolerated_are_no_decisions() -> None:
    def compared(margin: float) -> float:
        comparer = Comparer("g", "torch-bf16", Limits(0.1, 0.9, 0.95), "y")
        right = np.array([[0.5, 0.5 + margin]])
        comparer.case({"x": right}, {"y": right}, {"y": right[:, ::-1]})
        return comparer.result().top1

    assert (compared(0.05), compared(0.11)) == (1.0, 0.0)


def test_a_model_that_pytorch_cannot_trace_is_told(tmp_path: Path) -> None:
    class Asks(torch.nn.Module):
        def forward(self, x: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match=r"^PyTorch cannot export model\.pt2: Could not guard"):
        program.save(Asks(), tmp_path / "model.pt2", graph().example, graph().axes)


def answered(repository: Path, model: str, given: Any) -> np.ndarray:
    with engine_over(repository) as engine:
        assert engine.failures() == []
        (answer,) = infer(
            engine, [InferRequest(model, {name: Tensor.of(name, array) for name, array in given.items()})]
        )
    assert isinstance(answer, InferResponse), answer
    return answer.outputs[0].array()


def test_a_published_model_serves_32_bits_on_processors_and_16_on_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both files answer through the server, the one for GPUs by a configuration that names it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    repository = tmp_path / "models"
    command = ["vision", RESNET, "--image-size", "16", "--name", "m", "--format", "torch", "--gpu", "bf16"]
    assert cli.main([*command, "--ensemble", "", "--repository", str(repository)]) == 0
    path = repository / "m_classifier" / "config.pbtxt"
    read = config.load(path)
    assert (read.backend, read.model_filename, read.gpu_filename) == ("pytorch", "model.pt2", "model.bf16.pt2")
    assert [(spec.name, spec.datatype, spec.dims) for spec in read.inputs] == [("PIXELS", "UINT8", (3, 16, 16))]
    assert [(spec.name, spec.datatype, spec.dims) for spec in read.outputs] == [("IMAGE_SCORES", "FP32", (3,))]
    said = json.loads((repository / "m_classifier" / "1" / manifest.NAME).read_text())
    assert set(said["variants"]) == {"fp32", "torch", "torch-bf16"}
    assert said["variants"]["torch-bf16"]["limits"] == {"max_error": 0.1, "cosine": 0.99, "top1": 0.95}
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 16, 16), np.uint8)
    loaded, how, _ = vision.load(sources.resolve(RESNET), 16, "auto")
    with torch.inference_mode():
        right = vision.ImageClassifier(loaded.model, how).eval()(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(answered(repository, "m_classifier", {"PIXELS": pixels}), right, atol=1e-5)
    path.write_text(path.read_text().replace('"model.pt2"', '"model.bf16.pt2"'))
    coarse = answered(repository, "m_classifier", {"PIXELS": pixels})
    np.testing.assert_allclose(coarse, right, atol=2e-2)
    assert np.abs(coarse - right).max() > 1e-5, "it is the other file"


@pytest.mark.parametrize(
    ("flags", "variants", "gpu"),
    [
        (["--format", "torch"], ("fp32", "torch"), "torch"),
        (["--format", "torch", "--gpu", "fp16"], ("fp32", "torch", "torch-fp16"), "torch-fp16"),
        (["--format", "torch", "--variants", "torch-bf16"], ("fp32", "torch", "torch-bf16"), "torch-bf16"),
        (
            ["--format", "torch", "--variants", "torch-bf16,torch-fp16"],
            ("fp32", "torch", "torch-fp16", "torch-bf16"),
            "torch-fp16",
        ),
        (["--format", "torch", "--variants", "torch-fp16", "--gpu", "fp32"], ("fp32", "torch", "torch-fp16"), "torch"),
        (["--variants", "torch-fp16"], ("fp32", "torch-fp16"), "fp32"),
        (["--gpu", "fp16"], ("fp32", "fp16"), "fp16"),
    ],
)
def test_what_is_served_on_gpus_follows_from_the_flags(flags: list[str], variants: tuple[str, ...], gpu: str) -> None:
    options = cli._options(cli.make_parser().parse_args(["vision", RESNET, *flags]))
    assert (options.variants, options.gpu) == (variants, gpu)


@pytest.mark.parametrize("served", ["onnx", "tensorrt"])
def test_bfloat16_needs_pytorch(served: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["vision", RESNET, "--format", served, "--gpu", "bf16"]) == 2
    assert f"--gpu bf16 needs --format torch, got --format {served}" in capsys.readouterr().err
