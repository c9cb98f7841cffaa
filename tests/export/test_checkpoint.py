"""What is published is the checkpoint's model, whole: head, projections, prompts, lengths; or it is refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.export import checkpoints
from tests.serving import engine_over, infer
from tutti.core.types import InferRequest, InferResponse, Tensor
from tutti.export import checkpoint, cli, sentences, sources, text, text_checkpoint, text_tokenizer
from tutti.export.errors import ExportError
from tutti.export.sound import as_wav

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(120)]
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Exports into tmp_path/models as "m"; gives the exit status and all that was said."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)

    def export(kind: str, folder: Path, *flags: str) -> tuple[int, str]:
        command = [kind, str(folder), "--name", "m", "--repository", str(tmp_path / "models"), *flags]
        status = cli.main(command)
        said = capsys.readouterr()
        return status, said.out + said.err

    return export


def ask(folder: Path, **inputs: bytes) -> dict[str, Any]:
    """The ensemble's outputs."""
    given = {name: Tensor(name, "BYTES", (1, 1), np.array([[data]], dtype=object)) for name, data in inputs.items()}
    with engine_over(folder / "models") as engine:
        assert engine.failures() == []
        (answer,) = infer(engine, [InferRequest("m_ensemble", given)])
        assert isinstance(answer, InferResponse), answer
        return {tensor.name: tensor.array() for tensor in answer.outputs}


def named(*labels: str) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {one: at for at, one in enumerate(labels)}}


def bert(folder: Path, family: str, **more: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of a checkpoint of this class."""
    torch.manual_seed(0)
    tokenizer = checkpoints.word_pieces(folder)
    config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **SMALL, **more)
    model = checkpoints._wide(getattr(transformers, family)(config)).eval()
    model.save_pretrained(folder)
    return model, tokenizer


def sentence_files(folder: Path, modes: dict[str, Any], *more: tuple[str, str], **settings: Any) -> None:
    kinds = (("Transformer", ""), ("Pooling", "1_Pooling"), *more)
    told = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (kind, path) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(told))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **modes}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12, "do_lower_case": False}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))


def dense(folder: Path, width: int = 8) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(3)
    folder.mkdir()
    activation = "torch.nn.modules.activation.Tanh"
    told = {"in_features": 32, "out_features": width, "bias": True, "activation_function": activation}
    (folder / "config.json").write_text(json.dumps(told))
    save_file(
        {"linear.weight": torch.randn(width, 32), "linear.bias": torch.randn(width)}, folder / "model.safetensors"
    )


def test_prompts_projections_and_lengths_are_those_of_sentence_transformers(tmp_path: Path, run: Run) -> None:
    """The text is longer than what max_seq_length leaves of it."""
    library = pytest.importorskip("sentence_transformers")
    folder = tmp_path / "c"
    bert(folder, "BertModel")
    dense(folder / "2_Dense")
    prompts = {"query": "act now ", "passage": "the meeting "}
    sentence_files(
        folder, {"pooling_mode_cls_token": True}, ("Dense", "2_Dense"), ("Normalize", "3_Normalize"),
        prompts=prompts, default_prompt_name="query",
    )  # fmt: skip
    status, said = run("text", folder)
    assert status == 0, said
    assert "'act now ' stands before each text; --prompt takes another of its own: 'passage'" in said
    assert "not used: pooler.dense.weight, pooler.dense.bias" in said
    assert "served: 'm_ensemble' answers as the checkpoint's own pipeline" in said
    sentence = "win a free phone " * 9
    expected = library.SentenceTransformer(str(folder), device="cpu").encode([sentence])
    np.testing.assert_allclose(ask(tmp_path, TEXT=sentence.encode())["EMBEDDING"], expected, atol=1e-5)
    assert expected.shape == (1, 8)


@pytest.mark.parametrize("mode", ["max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", ["cls", "mean"]])
def test_each_pooling_is_that_of_sentence_transformers(mode: Any) -> None:
    pooling = pytest.importorskip("sentence_transformers.sentence_transformer.modules.pooling")
    torch.manual_seed(0)
    hidden, mask = torch.randn(3, 7, 4), torch.tensor([[1] * 7, [1] * 3 + [0] * 4, [1] + [0] * 6])
    theirs = pooling.Pooling(4, mode)({"token_embeddings": hidden, "attention_mask": mask})["sentence_embedding"]
    ours = sentences.Pooling([mode] if isinstance(mode, str) else mode)(hidden, mask)
    torch.testing.assert_close(ours, theirs)


def test_what_its_modules_have_and_nobody_covers_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.text(tmp_path / "c", "bert", False)
    sentence_files(folder, {"pooling_mode": "mean"}, ("CNN", "2_CNN"))
    source = sources.resolve(str(folder))
    with pytest.raises(ExportError, match=r"modules\.json has a CNN behind its pooling"):
        sentences.read(source)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "median"}))
    with pytest.raises(ExportError, match=r"expected some of cls, .*, got median"):
        sentences.read(source)
    with pytest.raises(ExportError, match="no prompt 'query': expected one of none"):
        sentences.read(source, "query")


def test_labels_of_tokens(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "c"
    model, tokenizer = bert(folder, "BertForTokenClassification", **named("O", "B-PER", "I-PER"))
    status, said = run("text", folder)
    assert status == 0, said
    sentence = "the cat is free at ten and win a dog photo"
    tag = transformers.pipeline("token-classification", model=model, tokenizer=tokenizer, aggregation_strategy="simple")
    expected, got = tag(sentence), ask(tmp_path, TEXT=sentence.encode())
    entities = json.loads(got["ENTITIES"][0, 0])
    assert entities
    for key in ("entity_group", "start", "end", "word"):
        assert [one[key] for one in entities] == [one[key] for one in expected]
    np.testing.assert_allclose([one["score"] for one in entities], [one["score"] for one in expected], atol=1e-5)
    assert set(got["TOKEN_LABELS"][0]) <= {b"", b"O", b"B-PER", b"I-PER"}


def test_a_cross_encoder_takes_pairs_and_scores_as_it_says(tmp_path: Path, run: Run) -> None:
    """Types of tokens tell the two texts apart."""
    folder = tmp_path / "c"
    model, tokenizer = bert(folder, "BertForSequenceClassification", num_labels=1)
    told = json.loads((folder / "config.json").read_text())
    told["sentence_transformers"] = {"activation_fn": "torch.nn.modules.linear.Identity"}
    (folder / "config.json").write_text(json.dumps(told))
    status, said = run("text", folder)
    assert status == 0, said
    pair = ("act now", "the meeting is at ten")
    with torch.inference_mode():
        expected = model(**tokenizer(*pair, return_tensors="pt")).logits.numpy()
        alike = model(**tokenizer(" ".join(pair), return_tensors="pt")).logits.numpy()
    got = ask(tmp_path, TEXT=pair[0].encode(), TEXT_PAIR=pair[1].encode())["SCORES"]
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert abs(float(got[0, 0] - alike[0, 0])) > 1e-3


def test_a_cross_encoder_saved_by_sentence_transformers_is_told(tmp_path: Path) -> None:
    """Its files say that it takes pairs, how long they may be, and that scores are the logits."""
    library = pytest.importorskip("sentence_transformers")
    bert(tmp_path / "c", "BertForSequenceClassification", num_labels=1)
    made = library.CrossEncoder(str(tmp_path / "c"), device="cpu", activation_fn=torch.nn.Identity(), max_length=20)
    made.save_pretrained(str(tmp_path / "saved"))
    encoder = text_checkpoint.load(sources.resolve(str(tmp_path / "saved")))
    assert (encoder.kind, encoder.module.function, encoder.max_length) == ("ranking", "none", 20)
    with torch.inference_mode():
        given = encoder.tokens(["act now"], ["the meeting is at ten"])
        ours = encoder.module(**{name: torch.from_numpy(array) for name, array in given.items()})
    theirs = made.predict([("act now", "the meeting is at ten")])
    np.testing.assert_allclose(ours.numpy().reshape(-1), theirs, atol=1e-5)


def test_the_text_side_of_clip(tmp_path: Path, run: Run) -> None:
    folder = checkpoints.contrastive(tmp_path / "c", "clip")
    status, said = run("text", folder)
    assert status == 0, said
    tokens = transformers.AutoTokenizer.from_pretrained(folder)("a photo of a cat", return_tensors="pt")
    given = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        found = transformers.CLIPModel.from_pretrained(folder).eval().get_text_features(**given).pooler_output
    expected = torch.nn.functional.normalize(found, dim=-1).numpy()
    np.testing.assert_allclose(ask(tmp_path, TEXT=b"a photo of a cat")["EMBEDDING"], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("problem", "classes", "function"),
    [
        (None, 3, "softmax"),
        ("multi_label_classification", 3, "sigmoid"),
        ("regression", 1, "none"),
        (None, 1, "sigmoid"),
    ],
)
def test_scores_are_those_of_the_pipelines(problem: str | None, classes: int, function: str, tmp_path: Path) -> None:
    model, tokenizer = bert(tmp_path, "BertForSequenceClassification", num_labels=classes, problem_type=problem)
    assert checkpoint.function_of(model.config) == function
    with torch.inference_mode():
        ours = checkpoint.scores(model(**tokenizer("win a phone", return_tensors="pt")).logits, function)[0].tolist()
    theirs = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)("win a phone", top_k=None)
    np.testing.assert_allclose(sorted(ours), sorted(one["score"] for one in theirs), atol=1e-6)


def test_a_backbone_is_published_as_an_embedding(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "c"
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    model = checkpoints._wide(transformers.Dinov2Model(transformers.Dinov2Config(**shape)))
    model.eval().save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    status, said = run("vision", folder)
    assert status == 0, said
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["m_decoder", "m_encoder", "m_ensemble"]
    assert "answers as the checkpoint's own pipeline" in said
    status, said = run("vision", folder, "--task", "classification")
    assert status == 1
    assert "it holds a Dinov2Model, whose files lack classifier.bias, classifier.weight" in said
    assert "--task embedding publishes its embeddings" in said


def test_speech_is_transcribed_by_ctc(tmp_path: Path, run: Run) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "c"
    folder.mkdir()
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJ"]
    (folder / "vocab.json").write_text(json.dumps({one: at for at, one in enumerate(tokens)}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    tokenizer.save_pretrained(folder)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    extractor.save_pretrained(folder)
    config = transformers.Wav2Vec2Config(
        **SMALL, vocab_size=len(tokens), pad_token_id=0, conv_dim=[16, 16, 16], conv_stride=[5, 4, 4],
        conv_kernel=[10, 8, 4], num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, feat_extract_norm="group",
    )  # fmt: skip
    model = checkpoints._wide(transformers.Wav2Vec2ForCTC(config)).eval()
    model.save_pretrained(folder)
    status, said = run("audio", folder)
    assert status == 0, said
    samples = (np.random.default_rng(0).normal(size=16_000) * 6000).clip(-32768, 32767).astype("<i2")
    given = extractor(samples / 32768, sampling_rate=16_000, return_tensors="pt")["input_values"]
    with torch.inference_mode():
        expected = tokenizer.decode(model(given).logits[0].argmax(-1))
    assert len(expected) > 3
    assert ask(tmp_path, AUDIO_FILE=as_wav(samples, 16_000))["TEXT"].tolist() == [[expected.encode()]]


REFUSED: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "questions": ("text", lambda folder: bert(folder, "BertForQuestionAnswering"), "BertForQuestionAnswering"),
    "choices": ("text", lambda folder: bert(folder, "BertForMultipleChoice"), "--task embedding"),
    "sounds without a head": ("audio", lambda folder: sound(folder, "Wav2Vec2Model"), "is a Wav2Vec2Model"),
    "speakers": ("audio", lambda folder: sound(folder, "Wav2Vec2ForXVector"), "is a Wav2Vec2ForXVector"),
    "masks": ("vision", lambda folder: segments(folder), "is a SegformerForSemanticSegmentation"),
    "nothing": ("text", lambda folder: folder.mkdir(), "transformers cannot load"),
    "half a file": ("text", lambda folder: cut(folder), "transformers cannot load"),
}


def sound(folder: Path, family: str) -> None:
    checkpoints.waveform(folder, "wav2vec2")
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, "architectures": [family]}))


def segments(folder: Path) -> None:
    sizes = {"hidden_sizes": [8, 16, 32, 32], "depths": [1] * 4, "num_attention_heads": [1, 2, 4, 4]}
    config = transformers.SegformerConfig(**sizes, decoder_hidden_size=16)
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(folder)


def cut(folder: Path) -> None:
    bert(folder, "BertModel")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_covered_is_refused_in_a_sentence(name: str, tmp_path: Path, run: Run) -> None:
    kind, make, expected = REFUSED[name]
    make(tmp_path / "c")
    status, said = run(kind, tmp_path / "c")
    assert status == 1
    assert expected in said
    assert "Traceback" not in said
    assert len(said.splitlines()) == 2, "the page, and why"
    assert expected.split()[0] in (tmp_path / "m.export.html").read_text()
    assert not (tmp_path / "models").exists()


def test_a_head_of_random_numbers_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    bert(folder, "BertModel")
    with pytest.raises(ExportError, match=r"holds a BertModel, whose files lack classifier\.bias, classifier\.weight"):
        text_checkpoint.load(sources.resolve(str(folder)), "classification")


def test_whatever_a_library_raises_becomes_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("by nobody foreseen\nand more of it")

    monkeypatch.setattr(text, "load", fail)
    status, said = run("text", tmp_path)
    assert status == 1
    assert said.splitlines()[-1].endswith("something is wrong with it: ZeroDivisionError: by nobody foreseen")
    assert "Traceback" not in said


def test_a_served_answer_that_is_another_stops_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """As it would be if the step forgot the prompt."""
    folder = tmp_path / "c"
    bert(folder, "BertModel")
    sentence_files(folder, {"pooling_mode": "mean"}, prompts={"query": "act now "}, default_prompt_name="query")
    kept = text_tokenizer.tokenizer_step

    def forgetful(encoder: Any, name: str, work: Path) -> Any:
        step = kept(encoder, name, work)
        return replace(step, parameters={key: value for key, value in step.parameters.items() if key != "prompt"})

    monkeypatch.setattr(text, "tokenizer_step", forgetful)
    status, said = run("text", folder)
    assert status == 1
    assert "served: a short text: output 'EMBEDDING' differs by" in said
    assert not (tmp_path / "models").exists()
