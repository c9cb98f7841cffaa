"""Inputs as they come: pictures as bytes, sound as whole numbers, equal to what processors and floats make of them."""

import io
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.export import checkpoints
from tests.export.test_export import RESNET
from tests.serving import engine_over, infer
from tutti.core.types import InferRequest, InferResponse, Tensor
from tutti.export import cli, pixels, silero, sound, sources
from tutti.export import onnx as to_onnx
from tutti.export.narrow import narrowed
from tutti.export.pixels import Form
from tutti.export.variants import Builder, in_float64
from tutti.repository import config

pytestmark = pytest.mark.filterwarnings("ignore")
FORMS = {"chw": Form(), "hwc": Form("uint8", "hwc"), "fp32": Form("fp32")}
HOW = pixels.Preprocessing((0.1, 0.5, 0.9), (0.2, 0.3, 0.7), 4, 6)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def asked(repository: Path, model: str, name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    with engine_over(repository) as engine:
        assert engine.failures() == []
        (answer,) = infer(engine, [InferRequest(model, {name: Tensor.of(name, array)})])
    assert isinstance(answer, InferResponse), answer
    return {tensor.name: tensor.array() for tensor in answer.outputs}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_a_picture_enters_alike(form: Form) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 6), np.uint8)
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (HOW.mean, HOW.std))
    sent = form.sent(levels, HOW)
    assert (sent.dtype.name, sent.shape[1:]) == (form.type.replace("fp", "float"), form.shape(HOW))
    entered = form.entrance(HOW)(torch.from_numpy(sent)).numpy()
    np.testing.assert_allclose(entered, (levels / 255 - mean) / std, atol=2e-6)


def test_bytes_stay_exact_where_the_network_has_16_bits() -> None:
    made, elements = narrowed(FORMS["hwc"].entrance(HOW), torch.bfloat16)
    assert elements == 0
    assert made(torch.zeros(1, 4, 6, 3, dtype=torch.uint8)).dtype == torch.float32


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_levels_are_compared_with_the_checkpoints_own_processor(form: Form, tmp_path: Path) -> None:
    source = sources.resolve(str(checkpoints.vit(tmp_path / "vit")))
    how = pixels.Preprocessing((0.4,) * 3, (0.2,) * 3, 32, 32)
    assert pixels.check_levels(source, how, form).is_well
    for wrong in (
        replace(how, mean=(0.4, 0.4, 0.401)),
        replace(how, scale=1 / 256),
        replace(how, std=(0.2, 0.201, 0.2)),
    ):
        assert not pixels.check_levels(source, wrong, form).is_well


def png() -> bytes:
    small = Image.fromarray(np.random.default_rng(5).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((60, 50), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("flags", "backend", "spec"),
    [
        (["--input-layout", "hwc", "--format", "torch", "--gpu", "fp16"], "pytorch", ("UINT8", (32, 32, 3))),
        (["--input-type", "fp32", "--variants", "fp16"], "onnxruntime", ("FP32", (3, 32, 32))),
    ],
)
def test_pictures_are_served_in_the_form_that_was_asked_for(
    flags: list[str], backend: str, spec: tuple[str, tuple[int, ...]], tmp_path: Path
) -> None:
    """From a file's bytes, through the decoder step, to the scores of the original behind its own processor."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    folder, repository = checkpoints.resnet(tmp_path / "resnet"), tmp_path / "models"
    assert cli.main(["vision", str(folder), "--name", "m", *flags, "--repository", str(repository)]) == 0
    decoder, model = (config.load(repository / name / "config.pbtxt") for name in ("m_decoder", "m_classifier"))
    assert model.backend == backend
    for tensor in (decoder.outputs[0], model.inputs[0]):
        assert (tensor.name, tensor.datatype, tensor.dims) == ("PIXELS", *spec)
    original = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    with torch.inference_mode():
        given = processor(Image.open(io.BytesIO(png())), return_tensors="pt")["pixel_values"]
        right = original(given).logits.softmax(-1).numpy()
    answers = asked(repository, "m_ensemble", "IMAGE", np.array([[png()]], dtype=object))
    np.testing.assert_allclose(answers["IMAGE_SCORES"], right, atol=1e-5)


def pcm(samples: np.ndarray, rate: int = 16_000, channels: int = 1) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(samples.astype("<i2").tobytes())
    return file.getvalue()


def test_whole_numbers_become_the_floats_that_files_are_read_as() -> None:
    every = np.arange(-32768, 32768).astype(np.int16)
    floats = sound.FromInt16()(torch.from_numpy(every)).numpy()
    read, _ = sound.published("audio_decoder").read_wav(pcm(every))  # type: ignore[attr-defined]
    assert np.array_equal(floats, read)
    assert np.array_equal(sound.to_int16(floats), every)
    assert sound.to_int16(np.array([1.5, 1.0, -2.0], np.float32)).tolist() == [32767, 32767, -32768], "cut, not wrapped"


def test_a_graph_over_whole_numbers_answers_as_over_floats(tmp_path: Path) -> None:
    """More inputs than the samples pass as they are; each variant is held to the same reference."""
    plain = silero.level_graph("s")
    whole = sound.in_int16(plain)
    assert [tensor.dtype for tensor in whole.example.values()] == [torch.int16, torch.int32]
    reference, _ = in_float64(whole)
    for case in whole.cases:
        floats = {**case, "CLIP": sound.from_int16(case["CLIP"])}
        given = [torch.from_numpy(np.asarray(array)) for array in floats.values()]
        np.testing.assert_array_equal(plain.module(*given), whole.module(*map(torch.from_numpy, case.values())))
        assert plain.reference is not None
        np.testing.assert_array_equal(reference(case)["LEVEL"], plain.reference(floats)["LEVEL"])
    builder = Builder(whole, tmp_path)
    for variant in ("fp32", "torch"):
        builder.make(variant)
        assert builder.result.built[variant].comparison.failures == []
    inputs, _ = to_onnx.tensor_specs(builder.result.built["fp32"].path)
    assert [spec.datatype for spec in inputs] == ["INT16", "INT32"]


def test_sound_is_served_as_whole_numbers(tmp_path: Path) -> None:
    """A spectrogram's classifier in every precision; a file's samples reach it as they are in the file."""
    from transformers import ASTForAudioClassification, AutoFeatureExtractor

    folder, repository = checkpoints.spectrogram_transformer(tmp_path / "ast"), tmp_path / "models"
    flags = ["--input-type", "int16", "--variants", "fp16", "--format", "torch", "--gpu", "fp16"]
    assert cli.main(["audio", str(folder), "--name", "m", *flags, "--repository", str(repository)]) == 0
    decoder, model = (config.load(repository / name / "config.pbtxt") for name in ("m_decoder", "m_classifier"))
    assert (model.backend, model.gpu_filename) == ("pytorch", "model.fp16.pt2")
    for tensor in (decoder.outputs[0], model.inputs[0]):
        assert (tensor.name, tensor.datatype, tensor.dims) == ("AUDIO", "INT16", (-1,))
    samples = (np.random.default_rng(1).normal(size=24_000) * 4000).clip(-32768, 32767).astype(np.int16)
    assert np.array_equal(asked(repository, "m_decoder", "AUDIO_FILE", files(samples))["AUDIO"], samples[np.newaxis])
    features = AutoFeatureExtractor.from_pretrained(folder)([samples / np.float32(32768)], sampling_rate=16_000)
    with torch.inference_mode():
        given = torch.from_numpy(np.asarray(features["input_values"]))
        right = ASTForAudioClassification.from_pretrained(folder).eval()(given).logits.softmax(-1).numpy()
    answers = asked(repository, "m_ensemble", "AUDIO_FILE", files(samples))
    np.testing.assert_allclose(answers["SCORES"], right, atol=1e-4)


def files(samples: np.ndarray) -> np.ndarray:
    return np.array([[pcm(samples)]], dtype=object)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["audio", "x", "--input-type", "int16", "--format", "tensorrt"], "TensorRT has no whole numbers of 16 bits"),
        (["audio", "x", "--input-type", "int16", "--variants", "tensorrt"], "TensorRT has no whole numbers of 16 bits"),
        (["vision", RESNET, "--input-type", "fp32", "--input-layout", "hwc"], "hwc needs --input-type uint8"),
    ],
)
def test_forms_that_make_no_sense(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["audio", "x", "--input-type", "uint8"], ["vision", "x", "--input-type", "int16"]]
)
def test_forms_of_the_other_kind_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "--input-type: '" in (told := capsys.readouterr().err) and "is none of" in told
