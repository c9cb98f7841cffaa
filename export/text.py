"""Text: embeddings, classifiers, rerankers, labels of tokens, with their tokenizers; a head over embeddings, a gate.

Which of these a checkpoint is, its architecture says. An encoder's graph ends in what its sentence-transformers files
ask for (by default the mean over the attention mask, and length 1); the tokenizer is a python step of its own.
"""

import csv
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from export import checkpoint, layout, lengths, onnx, sentences, text_trials
from export.ensemble import chain, entities_step, labels_step
from export.errors import ExportError
from export.graphs import Arrays, Check, Claim, Graph, Product
from export.sentences import Pooling, Recipe
from export.sources import Source
from export.variants import Result
from tutti.config import TensorSpec

MAX_BATCH_SIZE = 32
GATE_FEATURES = 16_384
GATE_RISK = 0.2
SEED = 0
_MIN_GATE_RECALL = 0.95
_MIN_LABELLED = 20
# Of a text, where the checkpoint does not say.
_MOST_TOKENS = 512
# A vocabulary may be filled up to a round size; more rows than that belong to another tokenizer.
_SPARE_ROWS = 512
# Of the head's accuracy with another variant of the encoder.
_MAX_ACCURACY_COST = 0.05
# What tokenizers say that know no limit.
_NO_LENGTH = 1 << 20
_TEXT = TensorSpec("TEXT", "BYTES", (1,))
_TEXT_PAIR = TensorSpec("TEXT_PAIR", "BYTES", (1,))


class SentenceEncoder(torch.nn.Module):
    """input_ids, attention_mask [batch, length] INT64 -> EMBEDDING [batch, width] FP32."""

    def __init__(self, model: Any, pooling: Pooling, stages: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling
        self.stages = torch.nn.Sequential(*stages)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        found = self.model(**_given(input_ids, attention_mask, token_type_ids))
        return self.stages(self.pooling(found.last_hidden_state, attention_mask))  # type: ignore[no-any-return]


class Classifier(torch.nn.Module):
    """input_ids, attention_mask [batch, length] INT64 -> SCORES [batch, classes] FP32, or of each token."""

    def __init__(self, model: Any, function: str) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        found = self.model(**_given(input_ids, attention_mask, token_type_ids))
        return checkpoint.scores(found.logits, self.function)


class ContrastiveText(torch.nn.Module):
    """input_ids, attention_mask [batch, length] INT64 -> EMBEDDING [batch, width] FP32 of length 1: CLIP."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        if hasattr(self.model, "get_text_features"):
            found = self.model.get_text_features(**given)
            found = found if isinstance(found, torch.Tensor) else found.pooler_output
        else:
            found = self.model(**given).text_embeds
        return F.normalize(found, dim=-1)


def _given(ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What a network is called with: types only where the checkpoint's tokenizer makes some that are not 0."""
    return {"input_ids": ids, "attention_mask": mask} | ({} if types is None else {"token_type_ids": types})


@dataclass(frozen=True, slots=True)
class Encoder:
    """A loaded model with its tokenizer; None for random weights.

    `kind` is embedding, classification, ranking (classes of a pair of texts) or tokens (classes of each token). It has
    `places` for so many tokens, None for any number; its tokenizer makes at most `max_length` of a text. `inputs` are
    the graph's; `prompt` stands before each text. `weights` is what was seen of the checkpoint's.
    """

    module: torch.nn.Module
    tokenizer: Any
    max_length: int
    vocabulary: int
    places: int | None = None
    labels: tuple[str, ...] = ()
    kind: str = "embedding"
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    prompt: str = ""
    checks: tuple[Check, ...] = ()
    is_fixed: bool = False

    @property
    def output(self) -> str:
        return {"embedding": "EMBEDDING", "tokens": "TOKEN_SCORES"}.get(self.kind, "SCORES")

    @property
    def model(self) -> str:
        """The last part of its graph's name."""
        named = {"embedding": "encoder", "tokens": "tagger", "ranking": "ranker"}
        return named.get(self.kind, "classifier")

    @property
    def texts(self) -> tuple[TensorSpec, ...]:
        return (_TEXT, _TEXT_PAIR) if self.kind == "ranking" else (_TEXT,)

    def tokens(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Arrays:
        """As the tokenizer step makes them, but for the buckets. Of pairs, each with itself where none are given."""
        second = list(pairs or texts) if self.kind == "ranking" else None
        found = self.tokenizer(
            [self.prompt + text for text in texts], second, padding="max_length" if self.is_fixed else True,
            truncation=True, max_length=self.max_length, return_tensors="np", padding_side="right",
            return_attention_mask=True, return_token_type_ids="token_type_ids" in self.inputs,
        )  # fmt: skip
        return {name: found[name].astype(np.int64) for name in self.inputs}

    def embed(self, texts: list[str], run: Callable[[Arrays], Any] | None = None) -> np.ndarray[Any, Any]:
        """[len(texts), width], in PyTorch or as `run` does it."""
        parts = []
        for at in range(0, len(texts), 64):
            tokens = self.tokens(texts[at : at + 64])
            if run is not None:
                parts.append(run(tokens))
                continue
            with torch.inference_mode():
                parts.append(self.module(*map(torch.from_numpy, tokens.values())).numpy())
        return np.concatenate(parts)


# What the architecture's name says behind "For", and what is made of it.
_KINDS = {"SequenceClassification": "classification", "TokenClassification": "tokens"}
_PLAIN = ("", "MaskedLM", "PreTraining", "CausalLM")
_CONTRASTIVE = ("clip", "siglip", "siglip2")
_COVERED = "embeddings, classifiers, rerankers (pairs of texts) and labels of tokens"


def load(source: Source, task: str = "auto", prompt: str | None = None) -> Encoder:
    """A model from a hub id, a local folder, or a configuration, which has no tokenizer.

    `task` auto is what its architecture says. Raises ExportError for what is not covered, or not the checkpoint's.
    """
    recipe = sentences.read(source, prompt)
    config = checkpoint.configuration(recipe.source)
    kind = _kind(config, source) if task == "auto" else {"token-classification": "tokens"}.get(task, task)
    if task == "auto" and recipe.is_told and kind != "embedding":
        kind = "embedding"
    if task == "auto" and recipe.is_cross_encoder:
        kind = "ranking"
    if recipe.prompt and kind != "embedding":
        raise ExportError("its prompt stands before texts to embed, and is not covered here: --prompt '' leaves it out")
    tokenizer = _tokenizer(recipe)
    if config.model_type in _CONTRASTIVE or config.model_type.endswith("_text_model"):
        return _contrastive(source, config, tokenizer, kind)
    loaded = checkpoint.load(_family(config, kind), recipe.source, config)
    if kind == "embedding" and not checkpoint.architecture(config) and source.location and loaded.unread:
        raise ExportError(
            f"config.json does not say what '{source.given}' is, and its {checkpoint.named(loaded.unread)} are no "
            "encoder's: give --task embedding, classification, ranking or token-classification"
        )
    model = loaded.model
    labels = checkpoint.labels(model.config) if kind != "embedding" else ()
    module: torch.nn.Module
    if kind == "embedding":
        module = SentenceEncoder(model, recipe.pooling, recipe.stages).eval()
    else:
        module = Classifier(model, "softmax" if kind == "tokens" else _function(config, kind, recipe)).eval()
    places = lengths.places(model.config)
    limit = _limit(places, tokenizer, recipe.most)
    vocabulary = model.get_input_embeddings().num_embeddings
    encoder = Encoder(module, tokenizer, limit, vocabulary, places, labels, kind, prompt=recipe.prompt)
    encoder = replace(encoder, inputs=_inputs(encoder))
    example = {name: one.clamp(max=1) for name, one in _example(encoder).items()}
    hint = "--task embedding publishes the embeddings of its encoder" if kind != "embedding" else ""
    seen = checkpoint.check_weights(loaded, module, example, source, hint)
    return replace(encoder, checks=(seen, *_told(recipe, kind)))


def _kind(config: Any, source: Source) -> str:
    """What the checkpoint's architecture makes of texts. Raises ExportError for what is not covered."""
    name, task = checkpoint.architecture(config), checkpoint.task_of(config)
    if config.model_type in ("clip", "siglip", "siglip2"):
        return "embedding"
    if config.is_encoder_decoder and not name.endswith("EncoderModel") and config.model_type not in _WITH_ENCODERS:
        raise ExportError(
            f"'{source.given}' is a {name or config.model_type}, an encoder with a decoder: `tutti export text` covers "
            f"{_COVERED} of encoders alone, as BertForSequenceClassification"
        )
    if task not in (*_KINDS, *_PLAIN):
        raise ExportError(
            f"'{source.given}' is a {name}: `tutti export text` covers {_COVERED}; --task embedding publishes the "
            "embeddings of its encoder, without the head"
        )
    if task == "CausalLM" and checkpoint.read_json(source, "modules.json") is None:
        raise ExportError(
            f"'{source.given}' is a {name}, which writes texts: `tutti export text` covers {_COVERED}; serve it with "
            "a language model's engine"
        )
    kind = _KINDS.get(task, "embedding")
    return "ranking" if kind == "classification" and _is_of_pairs(config) else kind


# Of whose encoders transformers has a class of their own.
_WITH_ENCODERS = ("t5", "mt5", "umt5")


def _is_of_pairs(config: Any) -> bool:
    """Cross-encoders say so; a single score without a problem is a reranker's; entailment is between two texts."""
    if config.model_type == "bert" and checkpoint.architecture(config).endswith("NextSentencePrediction"):
        return True
    if getattr(config, "sentence_transformers", None) or getattr(config, "sbert_ce_default_activation_function", None):
        return True
    names = [str(name).lower() for name in config.id2label.values()]
    return "entailment" in names or (config.num_labels == 1 and config.problem_type is None)


def _function(config: Any, kind: str, recipe: Recipe) -> str:
    """As transformers' pipeline; of a reranker's single score, as the cross-encoder says."""
    told = (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
    told = str(recipe.activation or told or getattr(config, "sbert_ce_default_activation_function", None) or "")
    if kind == "ranking" and config.num_labels == 1 and told:
        last = told.rpartition(".")[2]
        if last not in ("Identity", "Sigmoid"):
            raise ExportError(f"config.json: the cross-encoder's activation: expected Identity or Sigmoid, got {told}")
        return "none" if last == "Identity" else "sigmoid"
    return checkpoint.function_of(config)


def _family(config: Any, kind: str) -> Any:
    import transformers

    if kind == "tokens":
        return transformers.AutoModelForTokenClassification
    if kind in ("classification", "ranking"):
        return transformers.AutoModelForSequenceClassification
    if config.model_type in _WITH_ENCODERS:
        return transformers.AutoModelForTextEncoding
    return transformers.AutoModel


def _tokenizer(recipe: Recipe) -> Any:
    """The checkpoint's own; None for random weights. Raises ExportError for one that is not in a tokenizer.json."""
    from transformers import AutoTokenizer

    source = recipe.source
    if source.location is None:
        return None
    with checkpoint.told(source):
        tokenizer = AutoTokenizer.from_pretrained(source.location)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ExportError(f"'{source.given}' has a tokenizer without a tokenizer.json: expected a fast one")
    if tokenizer.pad_token_id is None:
        raise ExportError(
            f"'{source.given}' has a tokenizer without a padding token, so that texts of several lengths cannot share "
            "a batch: add pad_token to its tokenizer_config.json"
        )
    if recipe.is_lowered:
        _lower(tokenizer.backend_tokenizer)
    return tokenizer


def _lower(own: Any) -> None:
    """Texts in small letters before all else, as sentence-transformers does for do_lower_case."""
    from tokenizers import normalizers

    before = [own.normalizer] if own.normalizer is not None else []
    own.normalizer = normalizers.Sequence([normalizers.Lowercase(), *before])


def _limit(places: int | None, tokenizer: Any, most: int | None) -> int:
    """The most tokens of a text: the least of what the model, its tokenizer and sentence-transformers' files say."""
    told = [one for one in (places, most) if one is not None]
    if tokenizer is not None and tokenizer.model_max_length < _NO_LENGTH:
        told.append(int(tokenizer.model_max_length))
    return min(told, default=_MOST_TOKENS)


def _inputs(encoder: Encoder) -> tuple[str, ...]:
    """With token_type_ids where the checkpoint's tokenizer makes some that are not 0: those are what is left out."""
    plain = ("input_ids", "attention_mask")
    tokenizer = encoder.tokenizer
    if tokenizer is None or "token_type_ids" not in tokenizer.model_input_names:
        return plain
    pair = ("a", "b") if encoder.kind == "ranking" else ("a",)
    return (*plain, "token_type_ids") if any(tokenizer(*pair)["token_type_ids"]) else plain


def _told(recipe: Recipe, kind: str) -> list[Check]:
    """What a person may not expect: the prompt that is applied, and those that are not."""
    if kind != "embedding" or not recipe.prompts:
        return []
    others = ", ".join(f"'{name}'" for name, text in recipe.prompts.items() if text != recipe.prompt)
    own = f"{recipe.prompt!r} stands before each text" if recipe.prompt else "none is put before texts"
    return [Check("prompt", True, own + (f"; --prompt takes another of its own: {others}" if others else ""))]


def _contrastive(source: Source, config: Any, tokenizer: Any, kind: str) -> Encoder:
    """CLIP's and SigLIP's text side; its pictures' side is what `tutti export vision` makes."""
    import transformers

    if kind != "embedding":
        raise ExportError(f"'{source.given}' is a {checkpoint.architecture(config)}: only its embeddings are covered")
    if not config.model_type.startswith("clip"):
        raise ExportError(
            f"'{source.given}' is a {checkpoint.architecture(config)}: of texts CLIP's side is covered; its pictures' "
            "is with `tutti export vision`, where --labels compares them with texts"
        )
    family = transformers.CLIPTextModelWithProjection if config.model_type != "clip" else transformers.CLIPModel
    loaded = checkpoint.load(family, source, config)
    module = ContrastiveText(loaded.model).eval()
    text = getattr(config, "text_config", config)
    places = lengths.places(text)
    limit = _limit(places, tokenizer, None)
    encoder = Encoder(module, tokenizer, limit, int(text.vocab_size), places)
    example = _example(encoder)
    example["input_ids"][:, -1] = int(text.eos_token_id)
    return replace(encoder, checks=(checkpoint.check_weights(loaded, module, example, source),))


def check_tokenizer(encoder: Encoder, config: Any) -> Check:
    """Whether the tokenizer is the model's: its ids are rows of the embedding, special ones are those configured."""
    what, tokenizer, rows = "tokenizer", encoder.tokenizer, encoder.vocabulary
    highest = max(tokenizer.get_vocab().values(), default=-1) + 1
    if highest > rows:
        return Check(what, False, f"it has ids up to {highest - 1}, the model has {rows} rows of embeddings")
    if rows - highest > max(_SPARE_ROWS, rows // 50):
        return Check(
            what, False, f"the model has {rows} rows of embeddings, the tokenizer {highest} ids: it is another's"
        )
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        expected, got = getattr(config, name, None), getattr(tokenizer, name, None)
        if isinstance(expected, int) and got is not None and expected != got:
            return Check(what, False, f"{name} is {expected} for the model, {got} for the tokenizer: it is another's")
    return Check(what, True, f"{highest} ids for {rows} rows of embeddings")


def check_step(encoder: Encoder, file: Path) -> Check:
    """Whether the file that the tokenizer step reads gives the ids that transformers gives."""
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(file))
    own.no_padding()
    own.enable_truncation(encoder.max_length, direction=encoder.tokenizer.truncation_side)
    texts = (*text_trials.SENTENCES, text_trials.SENTENCES[-1] * 100)  # one that is longer than any model takes
    for text in texts:
        expected = encoder.tokenizer(text, truncation=True, max_length=encoder.max_length)["input_ids"]
        got = own.encode(text).ids
        if list(expected) != got:
            return Check("tokenizer step", False, f"{text[:40]!r}: expected ids {expected[:8]}, got {got[:8]}")
    return Check("tokenizer step", True, f"the ids of transformers on {len(texts)} texts")


def _cases(encoder: Encoder, samples: Sequence[str]) -> list[Arrays]:
    """Random ids of several batches and lengths, texts where there is a tokenizer, and the user's own."""
    rng = np.random.default_rng(0)
    cases: list[Arrays] = []
    # Not of more tokens than its tokenizer makes: 8 bits are fitted to what the cases have.
    longest = (3, encoder.max_length) if encoder.max_length <= lengths.LONGEST_PROVEN // 2 else (1, 1024)
    for batch, most in ((1, 2), (1, 16), (2, 32), (5, 33), longest):
        length = min(most, encoder.max_length)
        mask = np.ones((batch, length), dtype=np.int64)
        mask[-1, max(1, length // 2) :] = 0
        ids = rng.integers(0, encoder.vocabulary, size=(batch, length)) * mask
        types = np.arange(length) // max(1, length // 3) % 2 * mask
        case = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        cases.append({name: case[name] for name in encoder.inputs})
    if encoder.tokenizer is not None:
        cases += [encoder.tokens(text_trials.SENTENCES), encoder.tokens(text_trials.SENTENCES[:1])]
        cases += [encoder.tokens(samples[at : at + 32]) for at in range(0, len(samples), 32)]
    return cases


def _claim(encoder: Encoder) -> Claim | None:
    """Of how many tokens there may be, by rows without padding, which some models give no places of its own."""
    if encoder.places is None:
        return None
    token = next(one for one in (2, 3) if one != getattr(encoder.module.model.config, "pad_token_id", None))
    return Claim(
        encoder.places,
        lambda length: {
            name: np.full((1, length), {"input_ids": token, "attention_mask": 1}.get(name, 0), np.int64)
            for name in encoder.inputs
        },
    )


def _example(encoder: Encoder) -> dict[str, torch.Tensor]:
    """A batch of 2, of random ids."""
    length = min(24, encoder.max_length)
    example = {
        "input_ids": torch.randint(0, encoder.vocabulary, (2, length)),
        "attention_mask": torch.ones(2, length, dtype=torch.int64),
        "token_type_ids": torch.zeros(2, length, dtype=torch.int64),
    }
    return {name: example[name] for name in encoder.inputs}


def graph(encoder: Encoder, name: str, samples: Sequence[str] = ()) -> Graph:
    """NAME_encoder, NAME_classifier, NAME_ranker or NAME_tagger."""
    example = _example(encoder)
    usual = min(64, encoder.max_length)
    shapes = ((1, min(16, usual)), (8, usual), (MAX_BATCH_SIZE, encoder.max_length))
    is_of_rows = encoder.kind in ("classification", "ranking")
    return Graph(
        f"{name}_{encoder.model}",
        encoder.module,
        example,
        (encoder.output,),
        {one: {0: onnx.BATCH, 1: "length"} for one in example},
        _cases(encoder, samples),
        dict.fromkeys(example, shapes),
        max_batch_size=MAX_BATCH_SIZE,
        labels=encoder.labels if is_of_rows else (),
        decision=encoder.output if encoder.labels else "",
        lengths=_claim(encoder),
    )


def tokenizer_step(encoder: Encoder, name: str, work: Path) -> layout.Entry:
    """NAME_tokenizer."""
    file = work / "tokenizer.json"
    encoder.tokenizer.backend_tokenizer.save(str(file))
    made = [TensorSpec(one, "INT64", (-1,)) for one in encoder.inputs]
    made += [TensorSpec("OFFSETS", "INT64", (-1, 2))] if encoder.kind == "tokens" else []
    files = {"model.py": layout.step_file("tokenizer"), "tokenizer.json": file}
    parameters = {"max_length": str(encoder.max_length), "pad_id": str(encoder.tokenizer.pad_token_id or 0)}
    parameters |= {"prompt": encoder.prompt} if encoder.prompt else {}
    parameters |= {"truncation_side": "left"} if encoder.tokenizer.truncation_side == "left" else {}
    return layout.Entry(f"{name}_tokenizer", "python", list(encoder.texts), made, files, MAX_BATCH_SIZE, parameters)


@dataclass(frozen=True, slots=True)
class Labelled:
    """A labelled file: tab-separated `label`, `split` (train or test) and `text`."""

    labels: tuple[str, ...]
    texts: dict[str, list[str]]
    targets: dict[str, list[int]]


def read_labelled(path: Path) -> Labelled:
    """Raises ExportError naming the line that is wrong. Labels keep the order of their first appearance."""
    labels: list[str] = []
    texts: dict[str, list[str]] = {"train": [], "test": []}
    targets: dict[str, list[int]] = {"train": [], "test": []}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            if row.get("split") not in texts or not row.get("label") or not row.get("text"):
                raise ExportError(f"{path.name}: expected label, split (train or test) and text, got {row}")
            if row["label"] not in labels:
                labels.append(row["label"])
            texts[row["split"]].append(row["text"])
            targets[row["split"]].append(labels.index(row["label"]))
    if len(labels) < 2 or min(len(texts["train"]), len(texts["test"])) < _MIN_LABELLED:
        raise ExportError(f"{path.name}: expected at least 2 labels and {_MIN_LABELLED} texts in each split")
    return Labelled(tuple(labels), texts, targets)


class Head(torch.nn.Module):
    """EMBEDDING [batch, width] FP32 -> LABEL_SCORES [batch, classes] FP32, softmax."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, EMBEDDING: torch.Tensor) -> torch.Tensor:  # noqa: N803 - the tensor's name in the repository
        return self.linear(EMBEDDING).softmax(-1)  # type: ignore[no-any-return]


def train_head(encoder: Encoder, labelled: Labelled) -> tuple[Head, np.ndarray[Any, Any], float]:
    """Logistic regression on the train split; the embeddings of the test split, and the accuracy on it."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=10.0, max_iter=1000)
    fitted.fit(encoder.embed(labelled.texts["train"]), labelled.targets["train"])
    embeddings = encoder.embed(labelled.texts["test"])
    linear = torch.nn.Linear(embeddings.shape[1], len(labelled.labels))
    linear.weight.data = torch.from_numpy(np.asarray(fitted.coef_, dtype=np.float32))
    linear.bias.data = torch.from_numpy(np.asarray(fitted.intercept_, dtype=np.float32))
    return Head(linear).eval(), embeddings, float(fitted.score(embeddings, labelled.targets["test"]))


def head_graph(head: Head, embeddings: np.ndarray[Any, Any], labels: Sequence[str], name: str) -> Graph:
    """NAME_classifier over embeddings."""
    width = embeddings.shape[1]
    return Graph(
        f"{name}_classifier",
        head,
        {"EMBEDDING": torch.from_numpy(embeddings[:2])},
        ("LABEL_SCORES",),
        {"EMBEDDING": {0: onnx.BATCH}},
        [{"EMBEDDING": embeddings[:n]} for n in (1, 2, 7, MAX_BATCH_SIZE)],
        {"EMBEDDING": ((1, width), (8, width), (MAX_BATCH_SIZE, width))},
        parameters={"intra_op_thread_count": "1"},
        labels=labels,
        decision="LABEL_SCORES",
    )


def check_accuracy(
    encoder: Encoder, head: Head, labelled: Labelled, name: str
) -> Callable[[Mapping[str, Result]], Check]:
    """What each variant of the encoder costs the head, on the test split."""

    def check(results: Mapping[str, Result]) -> Check:
        found: dict[str, float] = {}
        for variant, built in results[f"{name}_encoder"].built.items():
            if variant in ("torch", "tensorrt") or not built.comparison.is_well:
                continue
            loaded = onnx.session(built.path)
            embeddings = encoder.embed(labelled.texts["test"], partial(_embedding, loaded))
            with torch.inference_mode():
                decided = head(torch.from_numpy(embeddings)).argmax(-1).numpy()
            found[variant] = float((decided == np.array(labelled.targets["test"])).mean())
        cost = found["fp32"] - min(found.values())
        shown = ", ".join(f"{variant} {accuracy:.4f}" for variant, accuracy in found.items())
        return Check("accuracy of the classifier", cost <= _MAX_ACCURACY_COST, f"{shown}: costs at most {cost:.4f}")

    return check


def _embedding(loaded: Any, case: Arrays) -> Any:
    return onnx.run(loaded, case)["EMBEDDING"]


def gate_step(labelled: Labelled, name: str, work: Path) -> tuple[layout.Entry, float]:
    """NAME_gate: TEXT -> RISK, how likely it is that the text's label is not the first; and its recall of those.

    Cheap beside the encoder: for the recall, the texts of the test split that GATE_RISK lets through.
    """
    from sklearn.linear_model import LogisticRegression

    gate = _gate_features()
    rows = {split: np.stack([gate(text, GATE_FEATURES) for text in texts]) for split, texts in labelled.texts.items()}
    is_other = {split: np.array(targets) > 0 for split, targets in labelled.targets.items()}
    fitted = LogisticRegression(C=30.0, max_iter=2000).fit(rows["train"], is_other["train"])
    risk = fitted.predict_proba(rows["test"])[:, 1]
    path = work / "gate.npz"
    np.savez(path, weights=fitted.coef_[0].astype(np.float32), bias=np.float32(fitted.intercept_[0]))
    files = {
        "model.py": layout.step_file("text_gate"),
        "text_gate_features.py": layout.step_file("text_gate_features"),
        "gate.npz": path,
    }
    entry = layout.Entry(f"{name}_gate", "python", [_TEXT], [TensorSpec("RISK", "FP32", (1,))], files, MAX_BATCH_SIZE)
    return entry, float((risk[is_other["test"]] > GATE_RISK).mean())


def _gate_features() -> Any:
    """The function that the published step uses too."""
    spec = importlib.util.spec_from_file_location("text_gate_features", layout.step_file("text_gate_features"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.features


def _samples(path: Path | None) -> list[str]:
    """The lines of a text file."""
    if path is None:
        return []
    if not path.is_file():
        raise ExportError(f"--samples {path}: expected a file with a text on each line")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def product(
    source: Source,
    name: str,
    ensemble: str,
    work: Path,
    task: str,
    labelled: Path | None,
    samples: Path | None,
    prompt: str | None = None,
) -> Product:
    """NAME_tokenizer with the graph over its ids; given a labelled file, a head and a gate, too."""
    encoder = load(source, task, prompt)
    graphs = [graph(encoder, name, _samples(samples))]
    steps: list[layout.Entry] = []
    checks: list[Callable[[Mapping[str, Result]], Check]] = [lambda _, one=one: one for one in encoder.checks]  # type: ignore[misc]
    accuracy = None
    if encoder.tokenizer is not None:
        steps.append(tokenizer_step(encoder, name, work))
        checks.append(lambda _: check_tokenizer(encoder, encoder.module.model.config))
        checks.append(lambda _: check_step(encoder, work / "tokenizer.json"))
    labels: Sequence[str] = encoder.labels
    if labelled is not None:
        if encoder.labels or encoder.tokenizer is None:
            raise ExportError(
                "--labelled trains a head over embeddings: expected a checkpoint with a tokenizer, to embed"
            )
        examples = read_labelled(labelled)
        head, embeddings, accuracy = train_head(encoder, examples)
        labels = examples.labels
        graphs.append(head_graph(head, embeddings, labels, name))
        checks.append(check_accuracy(encoder, head, examples, name))
        gate, recall = gate_step(examples, name, work)
        if recall < _MIN_GATE_RECALL:
            raise ExportError(f"the text gate lets {recall:.3f} of the texts through that it must, not 0.95")
        steps.append(gate)
    make = None
    if ensemble and encoder.tokenizer is not None:
        last: list[layout.Entry] = []
        if labels:
            last = [(entities_step if encoder.kind == "tokens" else labels_step)(name, labels, work)]
        steps += last
        names = [f"{name}_tokenizer", *(one.name for one in graphs), *(one.name for one in last)]
        make = lambda entries: chain(ensemble, encoder.texts, [entries[one] for one in names])  # noqa: E731
    asked = text_trials.trials(encoder, source) if make is not None and labelled is None else []
    return Product(graphs, steps, make, source.provenance, checks, accuracy, asked)
