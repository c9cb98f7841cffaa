"""Whether a served model answers as the scikit-learn model that it was made of."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from tutti.core.dtypes import Array
from tutti.export.draft import Ask, Draft
from tutti.export.errors import ExportError


def compared(expected: Sequence[Array], rows: Mapping[str, Array], most: int, draft: Draft, ask: Ask) -> str:
    """That the answers to these rows are the model's own: numbers within 1e-4, and `most` rows may differ.

    `expected` are the model's answers by output. Raises ExportError with a row that differs.
    """
    count = len(next(iter(rows.values())))
    parts: list[list[Array]] = [[] for _ in draft.outputs]
    step = max(1, draft.max_batch_size)
    for start in range(0, count, step):
        answers = ask({name: column[start : start + step] for name, column in rows.items()})
        for part, output in zip(parts, draft.outputs, strict=True):
            part.append(answers[output.name])
    for output, part, answer in zip(draft.outputs, parts, expected, strict=False):
        got = np.concatenate([array.reshape(len(array), -1) for array in part])
        wanted = answer.reshape(len(answer), -1)
        if got.shape != wanted.shape:
            raise ExportError(
                f"output '{output.name}' is {list(got.shape)}, and scikit-learn's is {list(answer.shape)}"
            )
        differing = _differing(got, wanted)
        if len(differing) > most:
            row = ", ".join(f"{name}={_shown(column[differing[0]])}" for name, column in rows.items())
            problem = f"output '{output.name}' differs from scikit-learn's in {len(differing)} of {count} rows"
            raise ExportError(f"{problem}, as of {row[:200]}")
    return f"its answers to {count} random rows are scikit-learn's"


def own_answers(model: Any, rows: Any) -> list[Array]:
    """Those of the outputs that its graph has: what is predicted or transformed, and how sure it is of it."""
    answers = [quietly(partial(model.predict if hasattr(model, "predict") else model.transform, rows))]
    if hasattr(model, "predict_proba"):
        answers.append(quietly(partial(model.predict_proba, rows)))
    elif hasattr(model, "decision_function"):
        scores = np.asarray(quietly(partial(model.decision_function, rows)))
        answers += [scores] if scores.ndim == 2 else []  # of two classes graphs have a score for each
    return [np.asarray(answer.toarray() if hasattr(answer, "toarray") else answer) for answer in answers]


def quietly(ask: Callable[[], Any]) -> Any:
    """Without the warnings of names that a data frame had and an array has not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ask()


def _shown(value: Array) -> str:
    return ", ".join(repr(part.decode()) if isinstance(part, bytes) else f"{part:g}" for part in value.tolist())


def _differing(got: Array, wanted: Array) -> list[int]:
    """Rows."""
    if got.dtype == object:
        decoded = np.array([[value.decode() if isinstance(value, bytes) else value for value in row] for row in got])
        differs = decoded != wanted.astype(str)
    else:
        differs = ~np.isclose(got, wanted, rtol=1e-3, atol=1e-4, equal_nan=True)
    return [int(row) for row in np.flatnonzero(differs.any(axis=1))]
