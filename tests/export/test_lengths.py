"""How many tokens models take: what PyTorch, the exported graph and the published model each make of it must agree."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from tests.export import checkpoints
from tests.serving import engine_over, infer
from tutti.backends.onnxruntime import OnnxBackend
from tutti.core.dtypes import Array
from tutti.core.errors import InvalidArgument
from tutti.core.types import InferRequest, InferResponse, Tensor
from tutti.export import cli, lengths, pipeline, whisper
from tutti.export import onnx as to_onnx
from tutti.export.graphs import Claim, Graph
from tutti.export.variants import Builder, Result
from tutti.repository import config
from tutti.repository.model_config import TensorSpec
from tutti.serving.engine import Engine

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = 32

# What is claimed of families, and what PyTorch makes of it

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
# Type -> its options, and how many tokens it takes; None for any number.
KINDS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "bert": ("bert", {**SMALL, "max_position_embeddings": 40}, 40),
    "distilbert": ("distilbert", {"dim": 8, "n_layers": 1, "n_heads": 1, "hidden_dim": 8,
                                  "max_position_embeddings": 40}, 40),
    "electra": ("electra", {**SMALL, "embedding_size": 8, "max_position_embeddings": 40}, 40),
    "albert": ("albert", {**SMALL, "embedding_size": 8, "max_position_embeddings": 40}, 40),
    "roberta": ("roberta", {**SMALL, "max_position_embeddings": 42}, 40),
    "roberta, its padding is 0": ("roberta", {**SMALL, "max_position_embeddings": 42, "pad_token_id": 0}, 41),
    "roberta, its padding is 5": ("roberta", {**SMALL, "max_position_embeddings": 42, "pad_token_id": 5}, 36),
    "xlm-roberta": ("xlm-roberta", {**SMALL, "max_position_embeddings": 42}, 40),
    "xlm-roberta-xl": ("xlm-roberta-xl", {**SMALL, "max_position_embeddings": 42}, 40),
    "camembert": ("camembert", {**SMALL, "max_position_embeddings": 42}, 40),
    "data2vec-text": ("data2vec-text", {**SMALL, "max_position_embeddings": 42}, 40),
    "roberta-prelayernorm": ("roberta-prelayernorm", {**SMALL, "max_position_embeddings": 42}, 40),
    "xmod": ("xmod", {**SMALL, "max_position_embeddings": 42, "default_language": "en_XX"}, 40),
    "ibert": ("ibert", {**SMALL, "max_position_embeddings": 42}, 40),
    "esm": ("esm", {**SMALL, "max_position_embeddings": 42, "pad_token_id": 1, "mask_token_id": 4}, 40),
    "mpnet": ("mpnet", {**SMALL, "max_position_embeddings": 42}, 40),
    "mpnet, its padding is 0": ("mpnet", {**SMALL, "max_position_embeddings": 42, "pad_token_id": 0}, 40),
    "gpt2": ("gpt2", {"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 40, "bos_token_id": 1,
                      "eos_token_id": 2}, 40),
    "opt": ("opt", {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "ffn_dim": 8,
                    "word_embed_proj_dim": 8, "max_position_embeddings": 40}, 40),
    "deberta, with places": ("deberta-v2", {**SMALL, "max_position_embeddings": 40}, 40),
    "deberta": ("deberta-v2", {**SMALL, "max_position_embeddings": 40, "position_biased_input": False,
                               "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16,
                               "share_att_key": True, "norm_rel_ebd": "layer_norm"}, None),
    "modernbert": ("modernbert", {**SMALL, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1,
                                  "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_claim_is_what_pytorch_answers_and_no_more(name: str) -> None:
    from transformers import AutoConfig, AutoModel

    kind, options, most = KINDS[name]
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, vocab_size=60, **options)).eval()
    claimed = lengths.places(model.config)
    assert claimed == (most or 40)

    def answers(length: int) -> bool:
        ids = torch.full((1, length), 3 if model.config.pad_token_id != 3 else 2)
        try:
            with torch.inference_mode():
                model(input_ids=ids, attention_mask=torch.ones_like(ids))
        except (IndexError, RuntimeError):
            return False
        return True

    assert answers(claimed)
    assert answers(claimed + 1) == (most is None)


def test_without_a_word_about_it_there_is_no_claim() -> None:
    from transformers import AutoConfig

    assert lengths.places(AutoConfig.for_model("t5")) is None
    assert lengths.places(AutoConfig.for_model("resnet")) is None


class Places(torch.nn.Module):
    """A table of ten, indexed by places from `first` on."""

    def __init__(self, first: int = 0) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(10, 2)
        self._first = first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table(torch.arange(x.shape[1]) + self._first).sum(1)


class Anything(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.mark.parametrize(
    ("module", "claimed", "most", "says"),
    [
        (Places(), 10, 10, "at most 10, it fails on more"),
        (Places(3), 7, 7, "at most 7"),
        (Places(), 9, None, "any, it answers more than the 9 items of its configuration"),
        (Places(3), 10, None, "places for 10 items, by its configuration, and fails on as many: "),
        (Anything(), 10, None, "any"),
        (Anything(), 1 << 30, 1 << 30, f"at most {1 << 30}, by its configuration: not executed"),
    ],
)
def test_a_claim_is_held_against_the_graph(
    module: torch.nn.Module,
    claimed: int,
    most: int | None,
    says: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "model.onnx"
    to_onnx.save(module.eval(), path, {"x": torch.zeros(2, 5)}, ["y"], {"x": {0: "batch", 1: "length"}})
    capfd.readouterr()
    claim = Claim(claimed, lambda length: {"x": np.zeros((1, length), np.float32)})
    found = lengths.prove(to_onnx.session(path), claim)
    assert found.most == most
    assert says in found.note + found.fault
    assert bool(found.fault) == ("fails on as many" in says)
    assert "onnxruntime" not in capfd.readouterr().err, "what it is expected to fail on is no error"


def test_whispers_decoder_ends_with_its_places(tmp_path: Path) -> None:
    speech = whisper.load(str(checkpoints.whisper(tmp_path / "checkpoint", encoder_layers=1, decoder_layers=1)))
    said = whisper.rules(speech, "", "transcribe")
    graph = whisper._decoder_graph(whisper.Decoder(speech.model).eval(), "m", speech, said)
    builder = Builder(graph, tmp_path)
    builder.make("fp32")
    assert builder.result.built["fp32"].comparison.is_well
    loaded, places = to_onnx.session(builder.result.built["fp32"].path), speech.model.config.max_target_positions
    assert said["max_length"] <= places, "and no token is fed that is longer"

    def fed(before: int) -> str:
        last = graph.cases[-1]
        longer = {k: np.zeros((*v.shape[:2], before, v.shape[3]), np.float32) for k, v in last.items() if "past" in k}
        return to_onnx.failure(loaded, {**last, **longer})

    assert fed(places - 1) == ""
    assert "out of data bounds" in fed(places)


@pytest.mark.parametrize(
    ("backend", "most", "expected"),
    [
        ("onnxruntime", None, {}),
        ("onnxruntime", 7, {"a": [7], "b": [7, 7]}),
        ("tensorrt", None, {"a": [9], "b": [6, 8]}),
        ("tensorrt", 7, {"a": [7], "b": [6, 7]}),
    ],
)
def test_a_plan_takes_what_it_was_built_for(backend: str, most: int | None, expected: Any) -> None:
    shapes = {
        "a": ((1, 1), (2, 4), (8, 9)),
        "b": ((1, 1, 3, 1), (2, 4, 3, 4), (8, 6, 3, 8)),
        "c": ((1, 3), (2, 3), (8, 3)),
    }
    graph = Graph("g", Anything(), {}, ("y",), {}, [], shapes)
    specs = [TensorSpec("a", "INT64", (-1,)), TensorSpec("b", "FP32", (-1, 3, -1)), TensorSpec("c", "FP32", (3,))]
    assert pipeline._max_dims(Result(graph, most=most), specs, backend) == expected


# What is published and served


@dataclass(frozen=True)
class Published:
    """An exported model; `most` tokens by its places, `kept` by its tokenizer."""

    repository: Path
    kind: str
    most: int
    kept: int
    padding: int

    @functools.cached_property
    def graph(self) -> Any:
        return to_onnx.session(self.repository / "m_encoder" / "1" / "model.onnx")

    @functools.cached_property
    def vocabulary(self) -> int:
        return config.load(self.repository / "m_encoder" / "config.pbtxt").bounds.ranges["input_ids"].high + 1


# Positions that the checkpoint is made with, what its tokenizer says, what of that are tokens.
MADE = {"bert": (600, 10**9, 600), "roberta": (64, 10**9, 63), "mpnet": (64, 48, 62)}


@pytest.fixture(
    scope="module", params=["roberta", *(pytest.param(one, marks=pytest.mark.slow) for one in ("bert", "mpnet"))]
)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Published:
    folder = tmp_path_factory.mktemp(request.param)
    positions, most_tokens, most = MADE[request.param]
    checkpoint = checkpoints.text(folder / "checkpoint", request.param, False, positions, most_tokens)
    command = [
        "text",
        str(checkpoint),
        "--name",
        "m",
        "--variants",
        "fp32,torch",
        "--repository",
        str(folder / "models"),
    ]
    assert cli.main(command) == 0
    return Published(
        folder / "models", request.param, most, min(most, most_tokens), 1 if request.param == "mpnet" else 0
    )


@pytest.fixture(scope="module")
def engine(published: Published) -> Iterator[Engine]:
    with engine_over(published.repository) as served:
        assert served.failures() == []
        yield served


def tokens(ids: Any, mask: Any = None) -> InferRequest:
    given = {"input_ids": np.asarray(ids, np.int64)}
    given["attention_mask"] = np.ones_like(given["input_ids"]) if mask is None else mask
    return InferRequest("m_encoder", {name: Tensor.of(name, array) for name, array in given.items()})


def embedding(answer: Any) -> Array:
    assert isinstance(answer, InferResponse), answer
    array: Array = answer.tensor("EMBEDDING").array()
    return array


def test_the_configuration_says_what_the_graph_does(published: Published) -> None:
    model = config.load(published.repository / "m_encoder" / "config.pbtxt")
    assert model.max_dims.sizes == {"input_ids": (published.most,), "attention_mask": (published.most,)}
    assert [spec.dims for spec in model.inputs] == [(-1,), (-1,)]
    for length, is_fine in ((published.most, True), (published.most + 1, False), (published.most * 3, False)):
        case = {"input_ids": np.full((2, length), 7), "attention_mask": np.ones((2, length), np.int64)}
        assert (to_onnx.failure(published.graph, case) == "") == is_fine, length


def test_as_many_tokens_are_answered_and_one_more_is_refused(published: Published, engine: Engine) -> None:
    most = published.most
    ids = np.full((2, most), 7)
    (last,) = infer(engine, [tokens(ids)])
    right = to_onnx.run(published.graph, {"input_ids": ids, "attention_mask": np.ones_like(ids)})["EMBEDDING"]
    np.testing.assert_allclose(embedding(last), right, atol=1e-5)
    (beyond,) = infer(engine, [tokens(np.full((2, most + 1), 7))])
    assert isinstance(beyond, InvalidArgument)
    what = f"expected at most {most} in dimension 1 of its shape, got {most + 1}: [2, {most + 1}]"
    assert beyond.message == f"model 'm_encoder': input 'input_ids': {what}"


def test_the_other_format_has_the_same_limit(published: Published) -> None:
    """PyTorch itself, of what was verified as model.pt2."""
    exported = torch.export.load(str(published.repository / "m_encoder" / "1" / "model.pt2")).module(check_guards=False)

    def run(length: int) -> Any:
        ids = torch.full((1, length), 7)
        with torch.inference_mode():
            return exported(ids, torch.ones_like(ids))

    assert torch.isfinite(run(published.most)).all()
    with pytest.raises((IndexError, RuntimeError)):
        run(published.most + 1)


def test_a_text_of_five_thousand_words_is_answered_by_its_beginning(published: Published, engine: Engine) -> None:
    words = [checkpoints.WORDS[n] for n in np.random.default_rng(0).integers(0, len(checkpoints.WORDS), 5000)]
    kept = " ".join(words[: published.kept])
    texts = [" ".join(words), kept, "act now", " ".join([*words[: published.kept], "cat"] * 3)]
    requests = [
        InferRequest("m_ensemble", {"TEXT": Tensor("TEXT", "BYTES", (1, 1), np.array([[text.encode()]], dtype=object))})
        for text in texts
    ]
    long, cut, short, longer = [embedding(answer) for answer in infer(engine, requests)]
    np.testing.assert_allclose(long, cut, atol=1e-5)
    np.testing.assert_allclose(long, longer, atol=1e-5)
    assert np.abs(long - short).max() > 1e-3


# Whatever comes


class Recorder:
    """Keeps what reaches the backend of encoders."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.feeds: list[Mapping[str, Array]] = []
        run = OnnxBackend.run

        def recorded(backend: OnnxBackend, names: Sequence[str], feed: Mapping[str, Array]) -> Sequence[Array]:
            self.feeds.append({name: array.copy() for name, array in feed.items()})
            return run(backend, names, feed)

        monkeypatch.setattr(OnnxBackend, "run", recorded)


@dataclass(frozen=True)
class Drawn:
    """A request that may be wrong: `is_good` must be answered, `is_out` must not get anywhere.

    What is neither is empty, or has a mask of another length: that is between the client and the graph.
    """

    ids: Array
    mask: Array
    is_good: bool
    is_out: bool


def drawn(rng: np.random.Generator, published: Published) -> Drawn:
    most, rows = published.most, published.vocabulary
    near = [1, 2, 15, 16, most - 1, most, most + 1, most + 2, 2 * most, 0]
    length = int(rng.choice(near) if rng.random() < 0.5 else rng.integers(1, min(most, 80) + 8))
    count = int(rng.choice([1, 1, 1, 2, 3, ROWS, ROWS + 1, 0]) if rng.random() < 0.3 else 1)
    ids = rng.integers(0, rows, (count, length))
    if rng.random() < 0.3:  # some padding, where it may be
        ids[:, length // 2 :] = published.padding
    is_spoilt = bool(ids.size) and rng.random() < 0.15
    if is_spoilt:
        wrong = [rows, rows + 1, -1, -2, 2**31, 2**32, 2**40, 2**63 - 1, -(2**63)]
        ids.flat[rng.integers(ids.size)] = wrong[rng.integers(len(wrong))]
    mask = (rng.random(ids.shape) < 0.9).astype(np.int64)
    is_torn = length > 1 and rng.random() < 0.05
    if is_torn:
        mask = mask[:, :-1]
    is_out = is_spoilt or length > most or count > ROWS
    return Drawn(ids, mask, not is_out and not is_torn and length > 0 and count > 0, is_out)


def highest_place(published: Published, ids: Array) -> int:
    """Of all tokens, as the family counts."""
    if published.kind == "bert":
        return ids.shape[1] - 1
    is_token = ids != published.padding
    return int((np.cumsum(is_token, axis=1) * is_token + published.padding).max(initial=0))


def test_of_2000_random_requests_nothing_out_of_range_reaches_the_backend(
    published: Published, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(17)
    recorder = Recorder(monkeypatch)
    positions = MADE[published.kind][0]
    given = [drawn(rng, published) for _ in range(2000)]
    answers: list[Any] = []
    while len(answers) < len(given):
        part = given[len(answers) : len(answers) + int(rng.integers(1, 65))]
        answers += infer(engine, [tokens(one.ids, one.mask) for one in part])
    for one, answer in zip(given, answers, strict=True):
        if one.is_good:
            assert embedding(answer).shape == (len(one.ids), 32)
        elif one.is_out:
            assert isinstance(answer, InvalidArgument), answer
    good = [index for index, one in enumerate(given) if one.is_good]
    assert 800 < len(good) < 1800, "some of both"
    for index in rng.choice(good, 40, replace=False):
        case = {"input_ids": given[index].ids, "attention_mask": given[index].mask}
        np.testing.assert_allclose(
            embedding(answers[index]), to_onnx.run(published.graph, case)["EMBEDDING"], atol=2e-5
        )
    assert recorder.feeds
    for feed in recorder.feeds:
        ids = feed["input_ids"]
        assert ids.shape[1] <= published.most and len(ids) <= ROWS
        assert ids.min(initial=0) >= 0 and ids.max(initial=0) < published.vocabulary
        assert highest_place(published, ids) < positions
    assert sum(len(feed["input_ids"]) for feed in recorder.feeds) >= sum(len(given[index].ids) for index in good)


def test_the_recorder_would_see_it(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bounds and limits both get through."""
    recorder = Recorder(monkeypatch)
    file = published.repository / "m_encoder" / "config.pbtxt"
    text = file.read_text()
    vocabulary, most = published.vocabulary, published.most
    unbounded = text_format.Parse(text, pb.ModelConfig())
    for name in ("tutti.bounds", "tutti.max_dims"):
        del unbounded.parameters[name]
    file.write_text(text_format.MessageToString(unbounded))
    try:
        with engine_over(published.repository) as engine:
            infer(engine, [tokens([[vocabulary]]), tokens([[7] * (most + 1)])])
    finally:
        file.write_text(text)
    assert any(feed["input_ids"].max() == published.vocabulary for feed in recorder.feeds)
    assert any(feed["input_ids"].shape[1] > published.most for feed in recorder.feeds)
