"""Text: embeddings and classifiers of BERT's kind with their own tokenizers, a classifier head over embeddings, a gate.

An encoder's graph ends in the pooling and normalisation that its sentence-transformers files ask for (by default the
mean over the attention mask, and length 1); the tokenizer is a python step of its own.
"""

import csv
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from export import layout, lengths, onnx
from export.ensemble import chain, labels_step
from export.errors import ExportError
from export.graphs import Arrays, Check, Claim, Graph, Product
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
_TEXT = TensorSpec("TEXT", "BYTES", (1,))
_SENTENCES = (
    "Act now and win a free phone.", "The meeting is at ten.", "x", "¿Dónde está la biblioteca?",
    "A long sentence says little, and goes on and on about it, until everybody who has begun to read it has left. " * 3,
)  # fmt: skip


class SentenceEncoder(torch.nn.Module):
    """input_ids, attention_mask [batch, length] INT64 -> EMBEDDING [batch, width] FP32."""

    def __init__(self, model: Any, pooling: str = "mean", is_normalized: bool = True) -> None:
        super().__init__()
        self.model = model
        self._pooling = pooling
        self._is_normalized = is_normalized

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        if self._pooling == "cls":
            pooled = hidden[:, 0]
        elif self._pooling == "max":
            pooled = hidden.masked_fill(weights == 0, torch.finfo(hidden.dtype).min).amax(1)
        else:
            pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return F.normalize(pooled, p=2.0, dim=1) if self._is_normalized else pooled


class SequenceClassifier(torch.nn.Module):
    """input_ids, attention_mask [batch, length] INT64 -> SCORES [batch, classes] FP32.

    Softmax; each class by itself where the checkpoint's problem is multi_label_classification; raw for a regression.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        kind = model.config.problem_type
        self._kind = "raw" if kind == "regression" or model.config.num_labels == 1 else kind or "single"

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        if self._kind == "raw":
            return logits
        return logits.sigmoid() if self._kind.startswith("multi") else logits.softmax(-1)


@dataclass(frozen=True, slots=True)
class Encoder:
    """A loaded model with its tokenizer; None for random weights.

    It has `places` for so many tokens, None for any number; its tokenizer makes at most `max_length` of a text.
    """

    module: torch.nn.Module
    tokenizer: Any
    max_length: int
    vocabulary: int
    places: int | None = None
    labels: tuple[str, ...] = ()

    @property
    def output(self) -> str:
        return "SCORES" if self.labels else "EMBEDDING"

    def tokens(self, texts: Sequence[str]) -> Arrays:
        """As the tokenizer step makes them, but for the buckets."""
        found = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="np"
        )
        return {name: found[name].astype(np.int64) for name in ("input_ids", "attention_mask")}

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


def load(source: Source, task: str = "auto") -> Encoder:
    """A model from a hub id, a local folder, or a configuration, which has no tokenizer."""
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    torch.manual_seed(SEED)
    try:
        if source.location is None:
            config = AutoConfig.for_model(source.config_type, **dict(source.options))
        else:
            config = AutoConfig.from_pretrained(source.location)
        if task == "auto":
            named = " ".join(config.architectures or [])
            task = "classification" if "ForSequenceClassification" in named else "embedding"
        family = AutoModelForSequenceClassification if task == "classification" else AutoModel
        if source.location is None:
            model, tokenizer = family.from_config(config), None
        else:
            model = family.from_pretrained(source.location, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(source.location)
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"transformers cannot load '{source.given}': {error}") from None
    if tokenizer is not None and not hasattr(tokenizer, "backend_tokenizer"):
        raise ExportError(f"'{source.given}' has a tokenizer without a tokenizer.json: expected a fast one")
    vocabulary = model.get_input_embeddings().num_embeddings
    places = lengths.places(model.config)
    limit = _MOST_TOKENS if places is None else places
    limit = min(limit, int(tokenizer.model_max_length)) if tokenizer is not None else limit
    if task == "classification":
        names = model.config.id2label
        labels = tuple(str(names[number]) for number in range(len(names)))
        return Encoder(SequenceClassifier(model).eval(), tokenizer, limit, vocabulary, places, labels)
    pooling, is_normalized, most = _pooling(source)
    limit = min(limit, most)
    return Encoder(SentenceEncoder(model, pooling, is_normalized).eval(), tokenizer, limit, vocabulary, places)


def _pooling(source: Source) -> tuple[str, bool, int]:
    """(mean, cls or max; whether it is normalised; the most tokens), as sentence-transformers' files say."""
    folder = Path(source.location) if source.is_local and source.location else None
    if folder is None or not (folder / "modules.json").is_file():
        return "mean", True, 1 << 20
    modules = json.loads((folder / "modules.json").read_text())
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    unknown = set(kinds) - {"Transformer", "Pooling", "Normalize"}
    if unknown:
        raise ExportError(f"modules.json: expected Transformer, Pooling and Normalize, got {sorted(unknown)[0]}")
    pooling = "mean"
    for module in modules:
        path = folder / module["path"] / "config.json"
        if module["type"].endswith("Pooling") and path.is_file():
            given = json.loads(path.read_text())
            chosen = [key for key, value in given.items() if key.startswith("pooling_mode_") and value is True]
            chosen = chosen or [f"pooling_mode_{given.get('pooling_mode', 'mean')}_tokens"]
            known = {"mean_tokens": "mean", "cls_token": "cls", "cls_tokens": "cls", "max_tokens": "max"}
            kind = chosen[0].removeprefix("pooling_mode_")
            if len(chosen) != 1 or kind not in known:
                raise ExportError(f"1_Pooling/config.json: expected mean, cls or max pooling, got {chosen}")
            pooling = known[kind]
    settings = folder / "sentence_bert_config.json"
    most = int(json.loads(settings.read_text()).get("max_seq_length") or 1 << 20) if settings.is_file() else 1 << 20
    return pooling, "Normalize" in kinds, most


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
    own.enable_truncation(encoder.max_length)
    texts = (*_SENTENCES, _SENTENCES[-1] * 100)  # one that is longer than any model takes
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
    for batch, length in ((1, 2), (1, 16), (2, 32), (5, 33), (3, encoder.max_length)):
        mask = np.ones((batch, length), dtype=np.int64)
        mask[-1, max(1, length // 2) :] = 0
        cases.append(
            {"input_ids": rng.integers(0, encoder.vocabulary, size=(batch, length)) * mask, "attention_mask": mask}
        )
    if encoder.tokenizer is not None:
        cases += [encoder.tokens(_SENTENCES), encoder.tokens(_SENTENCES[:1])]
        cases += [encoder.tokens(samples[at : at + 32]) for at in range(0, len(samples), 32)]
    return cases


def _claim(encoder: Encoder) -> Claim | None:
    """Of how many tokens there may be, by rows without padding, which some models give no places of its own."""
    if encoder.places is None:
        return None
    token = next(one for one in (2, 3) if one != encoder.module.model.config.pad_token_id)
    return Claim(
        encoder.places,
        lambda length: {
            "input_ids": np.full((1, length), token, np.int64),
            "attention_mask": np.ones((1, length), np.int64),
        },
    )


def graph(encoder: Encoder, name: str, samples: Sequence[str] = ()) -> Graph:
    """NAME_encoder or NAME_classifier."""
    axes = {0: onnx.BATCH, 1: "length"}
    example = {
        "input_ids": torch.randint(0, encoder.vocabulary, (2, 24)),
        "attention_mask": torch.ones(2, 24, dtype=torch.int64),
    }
    usual = min(64, encoder.max_length)
    shapes = ((1, min(16, usual)), (8, usual), (MAX_BATCH_SIZE, encoder.max_length))
    return Graph(
        f"{name}_{'classifier' if encoder.labels else 'encoder'}",
        encoder.module,
        example,
        (encoder.output,),
        dict.fromkeys(example, axes),
        _cases(encoder, samples),
        dict.fromkeys(example, shapes),
        max_batch_size=MAX_BATCH_SIZE,
        labels=encoder.labels,
        decision="SCORES" if encoder.labels else "",
        lengths=_claim(encoder),
    )


def tokenizer_step(encoder: Encoder, name: str, work: Path) -> layout.Entry:
    """NAME_tokenizer."""
    file = work / "tokenizer.json"
    encoder.tokenizer.backend_tokenizer.save(str(file))
    ids = [TensorSpec(one, "INT64", (-1,)) for one in ("input_ids", "attention_mask")]
    files = {"model.py": layout.step_file("tokenizer"), "tokenizer.json": file}
    parameters = {"max_length": str(encoder.max_length), "pad_id": str(encoder.tokenizer.pad_token_id or 0)}
    return layout.Entry(f"{name}_tokenizer", "python", [_TEXT], ids, files, MAX_BATCH_SIZE, parameters)


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
    source: Source, name: str, ensemble: str, work: Path, task: str, labelled: Path | None, samples: Path | None
) -> Product:
    """NAME_tokenizer with NAME_encoder or NAME_classifier; given a labelled file, a head and a gate, too."""
    encoder = load(source, task)
    graphs = [graph(encoder, name, _samples(samples))]
    steps: list[layout.Entry] = []
    checks: list[Callable[[Mapping[str, Result]], Check]] = []
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
        if labels:
            steps.append(labels_step(name, labels, work))
        names = [f"{name}_tokenizer", *(one.name for one in graphs), *([f"{name}_labels"] if labels else [])]
        make = lambda entries: chain(ensemble, _TEXT, [entries[one] for one in names])  # noqa: E731
    return Product(graphs, steps, make, source.provenance, checks, accuracy)
