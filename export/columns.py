"""The named columns that a pipeline of scikit-learn's was fitted on: each is an input of its own.

A ColumnTransformer picks columns of a data frame by name, and so does its ONNX graph.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tutti.core.dtypes import Array


@dataclass(frozen=True, slots=True)
class Column:
    """One of them, and some values that the model has seen where it keeps them."""

    name: str
    # "float", "int64" or "text".
    kind: str
    known: tuple[Any, ...] = ()

    def drawn(self, count: int, rng: np.random.Generator) -> Array:
        """Values to ask with: known ones, or normal numbers."""
        if self.kind == "text":
            return rng.choice(np.array([str(value) for value in self.known] or ["text"], object), count)
        if self.kind == "int64":
            return rng.choice(np.array(self.known or [0, 1], np.int64), count)
        return rng.standard_normal(count).astype(np.float32)


def of(model: Any) -> list[Column]:
    """Those of a model whose first step is a ColumnTransformer by names; none of any other."""
    first = model.steps[0][1] if hasattr(model, "steps") else model
    if not hasattr(first, "transformers_") or not hasattr(model, "feature_names_in_"):
        return []
    known: dict[str, Column] = {}
    for _, transformer, columns in first.transformers_:
        names = [columns] if isinstance(columns, str) else list(columns)
        if not all(isinstance(name, str) for name in names) or isinstance(transformer, str):
            continue  # dropped or passed on as they are; or picked by number
        known.update((name, column) for name, column in zip(names, _columns(transformer, names), strict=True))
    return [known.get(name, Column(name, "float")) for name in map(str, model.feature_names_in_)]


def rename(graph: Any, named: Sequence[Column]) -> None:
    """Give an ONNX graph's inputs their columns' names again: the converter leaves letters, digits and _ of them."""
    for field, column in zip(graph.input, named, strict=False):
        for node in graph.node:
            for index, name in enumerate(node.input):
                if name == field.name:
                    node.input[index] = column.name
        field.name = column.name


def _columns(transformer: Any, names: list[str]) -> Iterator[Column]:
    steps = [step for _, step in transformer.steps] if hasattr(transformer, "steps") else [transformer]
    categories = next((step.categories_ for step in steps if hasattr(step, "categories_")), None)
    vocabulary = next((step.vocabulary_ for step in steps if hasattr(step, "vocabulary_")), None)
    for index, name in enumerate(names):
        if vocabulary is not None:
            yield Column(name, "text", tuple(sorted(vocabulary)))
        elif categories is None:
            yield Column(name, "float")
        else:
            values = tuple(categories[index].tolist())
            yield Column(name, _kind(values), values)


def _kind(values: tuple[Any, ...]) -> str:
    """By the values themselves: an array of several columns may be of objects."""
    if all(isinstance(value, int) for value in values):
        return "int64"
    return "float" if all(isinstance(value, int | float) for value in values) else "text"
