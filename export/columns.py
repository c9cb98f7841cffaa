"""The named columns that a pipeline of scikit-learn's was fitted on: each is an input of its own.

A ColumnTransformer picks columns of a data frame by name, and so does its ONNX graph.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tutti.core.dtypes import Array
from tutti.export import estimators, texts

# So large a share of the values to ask with is missing, where values may be.
_MISSING = 0.15


@dataclass(frozen=True, slots=True)
class Column:
    """One of them, and some values that the model has seen where it keeps them."""

    name: str
    # "float", "int64" or "text".
    kind: str
    known: tuple[Any, ...] = ()
    # Values may be missing; `gap` is what stands for a missing text in the frame, None or not a number.
    has_gaps: bool = False
    gap: Any = None
    # Whole texts, of which the known values are words.
    is_prose: bool = False

    @property
    def typical(self) -> Any:
        """A value for an example: one that it knows, else zero; texts as bytes."""
        if self.is_prose:
            return " ".join(self.known[:2]).encode()
        if self.kind == "text":
            return (str(self.known[0]) if self.known else "text").encode()
        return self.known[0] if self.known else 0

    def drawn(self, count: int, rng: np.random.Generator) -> Array:
        """Values to ask with: known ones, or normal numbers; where some may be missing, some are.

        A missing number is not a number, a missing text is empty.
        """
        if self.is_prose:
            return np.array(texts.drawn(self.known, count, rng), object)
        if self.kind == "int64":
            return rng.choice(np.array(self.known or [0, 1], np.int64), count)
        gap: Any = "" if self.kind == "text" else np.nan
        known = [str(value) for value in self.known] if self.kind == "text" else _in_32_bits(self.known)
        values = rng.choice(np.array(known or ["text"], object), count) if self.kind == "text" or known else None
        values = rng.standard_normal(count) if values is None else values
        values = np.where(rng.random(count) < _MISSING, gap, values) if self.has_gaps else values
        return values if self.kind == "text" else values.astype(np.float32)


def _in_32_bits(values: Sequence[float]) -> list[float]:
    """Those of them that 32 bits hold as they are."""
    return [value for value in values if float(np.float32(value)) == value]


def of(model: Any) -> list[Column]:
    """Those that a model picks by their names, by a ColumnTransformer within it; none of any other."""
    names = next(
        (part.feature_names_in_ for part in estimators.within(model) if hasattr(part, "feature_names_in_")), ()
    )
    known: dict[str, Column] = {}
    for part in estimators.within(model):
        for _, transformer, columns in getattr(part, "transformers_", ()):
            picked = [columns] if isinstance(columns, str) else list(columns)
            if not all(isinstance(name, str) for name in picked) or isinstance(transformer, str):
                continue  # dropped or passed on as they are; or picked by number
            known.update((name, column) for name, column in zip(picked, _columns(transformer, picked), strict=True))
    return [known.get(name, Column(name, "float")) for name in map(str, names)] if known else []


def rename(graph: Any, named: Sequence[Column]) -> None:
    """Give an ONNX graph's inputs their columns' names again: the converter leaves letters, digits and _ of them."""
    for field, column in zip(graph.input, named, strict=False):
        for node in graph.node:
            for index, name in enumerate(node.input):
                if name == field.name:
                    node.input[index] = column.name
        field.name = column.name


def _columns(transformer: Any, names: list[str]) -> Iterator[Column]:
    steps = list(estimators.within(transformer))
    categories = next((step.categories_ for step in steps if hasattr(step, "categories_")), None)
    vocabulary = next((step.vocabulary_ for step in steps if hasattr(step, "vocabulary_")), None)
    imputer = next((step for step in steps if hasattr(step, "missing_values")), None)
    for index, name in enumerate(names):
        if vocabulary is not None:
            yield Column(name, "text", tuple(sorted(vocabulary)), is_prose=True)
        elif categories is None:
            yield Column(name, "float", has_gaps=_is_gap(getattr(imputer, "missing_values", 0)))
        else:
            yield _of_categories(name, categories[index].tolist(), imputer)


def _of_categories(name: str, categories: Sequence[Any], imputer: Any) -> Column:
    values = tuple(value for value in categories if not _is_gap(value))
    gaps = [value for value in categories if _is_gap(value)]
    if imputer is not None and _is_gap(imputer.missing_values):
        gaps.append(imputer.missing_values)
    kind = _kind(values)
    kind = "float" if gaps and kind == "int64" else kind  # whole numbers have no gaps
    return Column(name, kind, values, bool(gaps), gaps[0] if gaps else None)


def _is_gap(value: Any) -> bool:
    return value is None or value != value


def _kind(values: tuple[Any, ...]) -> str:
    """By the values themselves: an array of several columns may be of objects."""
    if all(isinstance(value, int) for value in values):
        return "int64"
    return "float" if all(isinstance(value, int | float) for value in values) else "text"
