"""Sentence encoders, a classifier head over their embeddings, and a cheap gate before them.

The encoder's graph ends in mean pooling over the attention mask and L2 normalisation, as sentence-transformers does;
the tokenizer is a python step of its own.
"""

import csv
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from export import layout, onnx, parity
from export.errors import ExportError
from export.formats import Format, model_files
from export.parity import Report
from export.sources import Source
from tutti.config import TensorSpec

MAX_BATCH_SIZE = 32
TOLERANCE = 1e-4
GATE_FEATURES = 16_384
GATE_RISK = 0.2
_MIN_GATE_RECALL = 0.95
_MIN_LABELLED = 20


class SentenceEncoder(torch.nn.Module):
    """input_ids, attention_mask [batch, length] INT64 -> EMBEDDING [batch, width] FP32 of length 1."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return F.normalize(pooled, p=2.0, dim=1)


@dataclass(frozen=True, slots=True)
class Encoder:
    """A loaded encoder with its tokenizer."""

    module: SentenceEncoder
    tokenizer: Any
    max_length: int

    def embed(self, texts: list[str]) -> np.ndarray[Any, Any]:
        """[len(texts), width], in PyTorch."""
        parts = []
        for at in range(0, len(texts), 64):
            tokens = self.tokenizer(
                texts[at : at + 64], padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            )
            with torch.inference_mode():
                parts.append(self.module(tokens["input_ids"], tokens["attention_mask"]).numpy())
        return np.concatenate(parts)


def load(source: Source) -> Encoder:
    """An encoder from a hub id or a local folder."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if source.location is None:
        raise ExportError("a text encoder needs a tokenizer: give a hub id or a local folder, not config:")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location)
        model = AutoModel.from_pretrained(source.location, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ExportError(f"transformers cannot load '{source.location}': {error}") from None
    limit = min(int(tokenizer.model_max_length), int(getattr(model.config, "max_position_embeddings", 512)))
    settings = Path(source.location) / "sentence_bert_config.json"
    if settings.is_file():
        limit = min(limit, int(json.loads(settings.read_text())["max_seq_length"]))
    return Encoder(SentenceEncoder(model).eval(), tokenizer, limit)


def _cases(vocabulary: int, max_length: int) -> list[Mapping[str, np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(0)
    cases: list[Mapping[str, np.ndarray[Any, Any]]] = []
    for batch, length in ((1, 2), (1, 16), (2, 32), (5, 33), (3, max_length)):
        mask = np.ones((batch, length), dtype=np.int64)
        mask[-1, max(1, length // 2) :] = 0
        ids = rng.integers(0, vocabulary, size=(batch, length)) * mask
        cases.append({"input_ids": ids, "attention_mask": mask})
    return cases


def _reference(module: torch.nn.Module, output: str) -> parity.Reference:
    def run(case: parity.Arrays) -> parity.Arrays:
        with torch.inference_mode():
            result = module(**{name: torch.from_numpy(np.asarray(array)) for name, array in case.items()})
        return {output: result.numpy()}

    return run


def export_encoder(encoder: Encoder, name: str, format: Format, work: Path) -> tuple[list[layout.Entry], Report]:
    """NAME_tokenizer and NAME_encoder."""
    path = work / "encoder.onnx"
    axes = {0: onnx.BATCH, 1: "length"}
    example = {
        "input_ids": torch.randint(0, encoder.tokenizer.vocab_size, (2, 24)),
        "attention_mask": torch.ones(2, 24, dtype=torch.int64),
    }
    onnx.save(encoder.module, path, example, ["EMBEDDING"], dict.fromkeys(example, axes))
    cases = _cases(encoder.tokenizer.vocab_size, encoder.max_length)
    report = parity.check(path, _reference(encoder.module, "EMBEDDING"), cases, TOLERANCE)
    inputs, outputs = onnx.tensor_specs(path)
    shapes = ((1, 2), (8, 64), (MAX_BATCH_SIZE, encoder.max_length))
    backend, files = model_files(format, path, {spec.name: shapes for spec in inputs})
    tokenizer_file = work / "tokenizer.json"
    encoder.tokenizer.backend_tokenizer.save(str(tokenizer_file))
    return [
        layout.Entry(
            f"{name}_tokenizer",
            "python",
            [TensorSpec("TEXT", "BYTES", (1,))],
            inputs,
            {"model.py": layout.step_file("tokenizer"), "tokenizer.json": tokenizer_file},
            MAX_BATCH_SIZE,
            {"max_length": str(encoder.max_length), "pad_id": str(encoder.tokenizer.pad_token_id)},
        ),
        layout.Entry(f"{name}_encoder", backend, inputs, outputs, files, MAX_BATCH_SIZE),
    ], report


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


def export_classifier(
    encoder: Encoder, labelled: Labelled, name: str, format: Format, work: Path
) -> tuple[layout.Entry, Report, float]:
    """NAME_classifier: EMBEDDING -> LABEL_SCORES, logistic regression on the train split; and its test accuracy."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=10.0, max_iter=1000)
    fitted.fit(encoder.embed(labelled.texts["train"]), labelled.targets["train"])
    embeddings = encoder.embed(labelled.texts["test"])
    accuracy = float(fitted.score(embeddings, labelled.targets["test"]))
    linear = torch.nn.Linear(embeddings.shape[1], len(labelled.labels))
    linear.weight.data = torch.from_numpy(np.asarray(fitted.coef_, dtype=np.float32))
    linear.bias.data = torch.from_numpy(np.asarray(fitted.intercept_, dtype=np.float32))
    module = _Classifier(linear).eval()
    path = work / "classifier.onnx"
    onnx.save(
        module, path, {"EMBEDDING": torch.from_numpy(embeddings[:2])}, ["LABEL_SCORES"], {"EMBEDDING": {0: onnx.BATCH}}
    )
    cases = [{"EMBEDDING": embeddings[:n]} for n in (1, 2, 7, MAX_BATCH_SIZE)]
    report = parity.check(path, _reference(module, "LABEL_SCORES"), cases, TOLERANCE)
    inputs, outputs = onnx.tensor_specs(path)
    width = embeddings.shape[1]
    backend, files = model_files(format, path, {"EMBEDDING": ((1, width), (8, width), (MAX_BATCH_SIZE, width))})
    parameters = {"intra_op_thread_count": "1"}
    entry = layout.Entry(
        f"{name}_classifier", backend, inputs, outputs, files, MAX_BATCH_SIZE, parameters, labelled.labels
    )
    return entry, report, accuracy


def export_gate(labelled: Labelled, name: str, work: Path) -> tuple[layout.Entry, float]:
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
    entry = layout.Entry(
        f"{name}_gate",
        "python",
        [TensorSpec("TEXT", "BYTES", (1,))],
        [TensorSpec("RISK", "FP32", (1,))],
        files,
        MAX_BATCH_SIZE,
    )
    return entry, float((risk[is_other["test"]] > GATE_RISK).mean())


def _gate_features() -> Any:
    """The function that the published step uses too."""
    spec = importlib.util.spec_from_file_location("text_gate_features", layout.step_file("text_gate_features"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.features


class _Classifier(torch.nn.Module):
    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, EMBEDDING: torch.Tensor) -> torch.Tensor:  # noqa: N803 - the tensor's name in the repository
        return self.linear(EMBEDDING).softmax(-1)  # type: ignore[no-any-return]


def export(
    source: Source, repository: Path, name: str, format: Format, work: Path, labelled: Path | None
) -> tuple[list[Report], float | None]:
    """Publish the encoder with its tokenizer and, given a labelled file, a classifier; and its test accuracy.

    Raises ParityError, and publishes nothing, where a graph differs.
    """
    encoder = load(source)
    entries, report = export_encoder(encoder, name, format, work)
    reports, accuracy = [report], None
    if labelled is not None:
        examples = read_labelled(labelled)
        entry, report, accuracy = export_classifier(encoder, examples, name, format, work)
        gate, recall = export_gate(examples, name, work)
        if recall < _MIN_GATE_RECALL:
            raise ExportError(f"the text gate lets {recall:.3f} of the texts through that it must, not 0.95")
        entries += [entry, gate]
        reports.append(report)
    layout.publish(repository, entries)
    return reports, accuracy
