"""What a labelled file trains: a head over an encoder's embeddings, and a cheap gate before the encoder."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tutti.export import layout, onnx
from tutti.export.graphs import Arrays, Check, Graph
from tutti.export.labelled import Labelled
from tutti.export.text_encoder import MAX_BATCH_SIZE, TEXT, Encoder
from tutti.export.variants import Result
from tutti.repository.model_config import TensorSpec

GATE_FEATURES = 16_384
GATE_RISK = 0.2
# Of the head's accuracy with another variant of the encoder.
_MAX_ACCURACY_COST = 0.05


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
        scores: dict[str, float] = {}
        for variant, built in results[f"{name}_encoder"].built.items():
            if variant in ("torch", "tensorrt") or not built.comparison.is_well:
                continue
            loaded = onnx.session(built.path)
            embeddings = encoder.embed(labelled.texts["test"], partial(_embedding, loaded))
            with torch.inference_mode():
                decided = head(torch.from_numpy(embeddings)).argmax(-1).numpy()
            scores[variant] = float((decided == np.array(labelled.targets["test"])).mean())
        cost = scores["fp32"] - min(scores.values())
        shown = ", ".join(f"{variant} {accuracy:.4f}" for variant, accuracy in scores.items())
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
    entry = layout.Entry(f"{name}_gate", "python", [TEXT], [TensorSpec("RISK", "FP32", (1,))], files, MAX_BATCH_SIZE)
    return entry, float((risk[is_other["test"]] > GATE_RISK).mean())


def _gate_features() -> Any:
    """The function that the published step uses too."""
    spec = importlib.util.spec_from_file_location("text_gate_features", layout.step_file("text_gate_features"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.features
