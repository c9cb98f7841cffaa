"""A fitted model of scikit-learn's as a draft: as ONNX where that answers as it does, or else in Python as it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tutti.core import extras
from tutti.core.dtypes import Array
from tutti.core.errors import ConfigError
from tutti.export import columns, estimators, maps, onnx_files, pickled, texts
from tutti.export.agreement import compared, own_answers, quietly
from tutti.export.draft import MAX_BATCH_SIZE, Draft, Field
from tutti.export.errors import ExportError, first_line
from tutti.export.unpickling import modules_beside, unpickled

CHECKED_ROWS = 100
# So many classes, or columns, are told by name.
_MOST_CLASSES = 50


def draft(source: Path, name: str, work: Path, in_python: bool) -> Draft:
    """A pickle's model, whose answers are compared with its own. Raises ExportError where it cannot be served."""
    model = unpickled(source)
    try:
        model = estimators.answering(model)
    except ExportError as error:
        raise ExportError(f"'{source.name}' {error}") from None
    width: int | None = getattr(model, "n_features_in_", None)
    named = columns.of(model)
    rows = _named_rows(named) if named else {"X": _rows(model, width)}
    asked = Asked(model, tuple(named), width, rows)
    plain = partial(_in_python, source, work, asked)
    if in_python:
        return _with_meanings(plain("--python"), asked)
    try:
        return _with_meanings(replace(_as_onnx(source, name, work, asked), otherwise=plain), asked)
    except ModuleNotFoundError as error:
        raise ExportError(_without(error)) from None
    except ExportError as error:
        return _with_meanings(plain(str(error)), asked)


def _with_meanings(draft: Draft, asked: "Asked") -> Draft:
    """The draft, saying what the columns of its numbers are of."""
    notes = list(draft.notes)
    classes = getattr(asked.model, "classes_", None)
    shown = {output.name for output in draft.outputs} & {"probabilities", "scores"}
    if isinstance(classes, np.ndarray) and classes.ndim == 1 and len(classes) <= _MOST_CLASSES and shown:
        notes.append(f"{min(shown)}: one for each class, in the order {', '.join(map(str, classes.tolist()))}")
    columns_of = getattr(asked.model, "feature_names_in_", None)
    if columns_of is not None and not asked.named and len(columns_of) <= _MOST_CLASSES:
        notes.append(f"X has the columns {', '.join(map(str, columns_of))}, in this order")
    return replace(draft, notes=tuple(notes))


def _without(error: ModuleNotFoundError) -> str:
    return (
        f"'{error.name}' is not installed, which makes an ONNX graph of the pickle: {extras.install('sklearn')}. Or "
        "--python, which serves the pickle itself with scikit-learn"
    )


@dataclass(frozen=True, slots=True)
class Asked:
    """A model of scikit-learn's, and rows to ask it with: numbers in `width` columns, texts, or named columns."""

    model: Any
    named: tuple[columns.Column, ...]
    width: int | None
    rows: Mapping[str, Array]

    @property
    def is_text(self) -> bool:
        return not self.named and self.width is None

    @property
    def known(self) -> dict[str, Any]:
        """A value for each named column."""
        return {column.name: column.typical for column in self.named}

    def as_fitted(self) -> Any:
        """The rows as the model itself takes them: an array, a list of texts, or a data frame."""
        values = {name: _as_python(column) for name, column in self.rows.items()}
        if not self.named:
            return values["X"]
        for column in self.named:
            if column.kind == "text" and column.has_gaps:
                values[column.name] = [text if text else column.gap for text in values[column.name]]
        return _frame(
            {
                name: np.ravel(np.array(column, object) if isinstance(column, list) else column)
                for name, column in values.items()
            }
        )

    def origin(self, source: Path) -> str:
        return f"{source.name}, a {type(self.model).__name__} of scikit-learn's"


def _as_onnx(source: Path, name: str, work: Path, asked: Asked) -> Draft:
    """Raises ExportError, with what of it has no graph."""
    from skl2onnx.common.data_types import FloatTensorType, Int64TensorType, StringTensorType

    kinds = {"text": StringTensorType, "int64": Int64TensorType, "float": FloatTensorType}
    types = [(column.name, kinds[column.kind]([None, 1])) for column in asked.named]
    if not types:
        types = [("X", StringTensorType([None, 1]) if asked.is_text else FloatTensorType([None, asked.width]))]
    model = estimators.to_onnx(asked.model, types)
    columns.rename(model.graph, asked.named)
    if not hasattr(asked.model, "predict_proba"):  # what it calls probabilities are distances
        maps.rename_output(model.graph, "probabilities", "scores")
    expected = own_answers(asked.model, asked.as_fitted())
    _tell_widths(model.graph, expected)
    path = work / "model.onnx"
    path.write_bytes(model.SerializeToString())
    try:
        as_graph = onnx_files.draft(path, name, work, asked.origin(source))
    except ConfigError as error:
        raise ExportError(f"as ONNX it is none: {error}") from None
    check = partial(compared, expected, asked.rows, 0 if asked.is_text else 1)
    return replace(as_graph, known=asked.known, check=check)


def _in_python(source: Path, work: Path, asked: Asked, why: str) -> Draft:
    """The pickle beside a program that asks it. Raises ExportError where scikit-learn itself does not answer."""
    try:
        expected = quietly(partial(pickled.answers, asked.model, asked.as_fitted()))
    except Exception as error:
        problem = f"scikit-learn itself fails ({type(error).__name__}: {first_line(error)})"
        raise ExportError(
            f"'{source.name}': asked with values like those it was fitted on{_of_columns(asked)}, {problem}"
        ) from error
    kinds = {"text": "BYTES", "int64": "INT64", "float": "FP32"}
    inputs = [Field(column.name, kinds[column.kind], (1,)) for column in asked.named]
    if not inputs:
        inputs = [Field("X", "BYTES", (1,)) if asked.is_text else Field("X", "FP32", (asked.width or 1,))]
    because = why if why == "--python" else f"it is not served as ONNX: {why}"
    return Draft(
        "python",
        pickled.PROGRAM,
        "model.py",
        tuple(inputs),
        tuple(Field(*output) for output in pickled.outputs(expected)),
        MAX_BATCH_SIZE,
        asked.origin(source),
        (f"{because}; Python serves the pickle itself (model.py), where scikit-learn is installed",),
        (pickled.copied(source, work), *modules_beside(source)),
        asked.known,
        partial(compared, list(expected.values()), asked.rows, 0),
        pickled.parameters(asked.named, asked.is_text),
        pickled.ABOUT,
    )


def _of_columns(asked: Asked) -> str:
    """The columns and what each is asked with: one of them may be what it stumbles over."""
    told = [f"{column.name}={column.typical!r} ({column.kind})" for column in asked.named]
    return f" ({', '.join(told[:8])}{f' and {len(told) - 8} more' if len(told) > 8 else ''})" if told else ""


def _tell_widths(graph: Any, expected: Sequence[Array]) -> None:
    """Correct the sizes of outputs that the converter takes for others, as of a forest of several targets."""
    for output, answer in zip(graph.output, expected, strict=False):
        dims = output.type.tensor_type.shape.dim
        if len(dims) == 2 and answer.ndim == 2 and dims[1].dim_value == 1 != answer.shape[1]:
            dims[1].dim_value = answer.shape[1]


def _rows(model: Any, width: int | None) -> Array:
    """Random inputs: numbers, or texts of words that the model knows, and of others."""
    rng = np.random.default_rng(0)
    if width is not None:
        return rng.standard_normal((CHECKED_ROWS, width)).astype(np.float32)
    drawn = texts.drawn(estimators.vocabulary(model), CHECKED_ROWS, rng)
    return np.array([[text.encode()] for text in drawn], dtype=object)


def _named_rows(named: Sequence[columns.Column]) -> dict[str, Array]:
    """The same for each column: [rows, 1], texts as bytes."""
    rng = np.random.default_rng(0)
    rows: dict[str, Array] = {}
    for column in named:
        values = column.drawn(CHECKED_ROWS, rng)
        if values.dtype == object:
            values = np.array([text.encode() for text in values], object)
        rows[column.name] = values[:, np.newaxis]
    return rows


def _as_python(column: Array) -> Any:
    """Texts as a list; numbers in 64 bits, since some, as KMeans, take no others than they were fitted on."""
    if column.dtype == object:
        return [value.decode() for value in column[:, 0]]
    return column.astype(np.float64) if column.dtype == np.float32 else column


def _frame(values: Mapping[str, Array]) -> Any:
    """Of the library that is here: scikit-learn takes either's."""
    try:
        import pandas
    except ModuleNotFoundError:
        import pyarrow

        return pyarrow.table(dict(values))
    return pandas.DataFrame(dict(values))
