"""The ensemble over an export: from raw bytes to labels, texts or embeddings, one step after the other."""

from collections.abc import Sequence
from pathlib import Path

from tutti.export.layout import Entry, Link, step_file
from tutti.repository.model_config import TensorSpec

MAX_BATCH_SIZE = 32


def labels_step(name: str, labels: Sequence[str], work: Path) -> Entry:
    """NAME_labels: class scores -> the name of the best class, and its score."""
    file = work / f"{name}.labels.txt"
    file.write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
    scores = TensorSpec("SCORES", "FP32", (len(labels),))
    specs = [TensorSpec("LABEL", "BYTES", (1,)), TensorSpec("SCORE", "FP32", (1,))]
    files = {"model.py": step_file("labels"), "labels.txt": file}
    return Entry(f"{name}_labels", "python", [scores], specs, files, MAX_BATCH_SIZE)


def entities_step(name: str, labels: Sequence[str], work: Path) -> Entry:
    """NAME_entities: a text, the class scores and places of its tokens -> its entities, and each token's label."""
    file = work / f"{name}.labels.txt"
    file.write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
    inputs = [
        TensorSpec("TEXT", "BYTES", (1,)),
        TensorSpec("TOKEN_SCORES", "FP32", (-1, len(labels))),
        TensorSpec("OFFSETS", "INT64", (-1, 2)),
    ]
    outputs = [
        TensorSpec("ENTITIES", "BYTES", (1,)),
        TensorSpec("TOKEN_LABELS", "BYTES", (-1,)),
        TensorSpec("TOKEN_OFFSETS", "INT64", (-1, 2)),
    ]
    files = {"model.py": step_file("entities"), "labels.txt": file}
    return Entry(f"{name}_entities", "python", inputs, outputs, files, MAX_BATCH_SIZE)


def chain(name: str, sources: TensorSpec | Sequence[TensorSpec], steps: Sequence[Entry]) -> Entry:
    """Steps of which each takes what those before it make: tensors of its inputs' names, or the last in order.

    Its outputs are the last step's, and the scores of those before it.
    """
    inputs = [sources] if isinstance(sources, TensorSpec) else list(sources)
    before = {spec.name: spec.name for spec in inputs}
    known = dict(before)
    links, outputs = [], []
    for number, step in enumerate(steps):
        names = [spec.name for spec in step.inputs]
        if set(names) <= set(before):
            taken = {name: before[name] for name in names}
        elif set(names) <= set(known):
            taken = {name: known[name] for name in names}
        else:
            taken = dict(zip(names, before.values(), strict=True))
        is_last = number == len(steps) - 1
        shown = [spec for spec in step.outputs if is_last or spec.name.endswith("SCORES")]
        names_of_outputs = {
            spec.name: spec.name if spec in shown else f"{step.name}.{spec.name}" for spec in step.outputs
        }
        outputs += shown
        links.append(Link(step.name, taken, names_of_outputs))
        before, known = names_of_outputs, {**known, **names_of_outputs}
    return Entry(name, "", inputs, outputs, {}, MAX_BATCH_SIZE, links=links)
