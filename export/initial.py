"""What a model's file tells of how it is to be served: its tensors, whether rows can be joined, and what to ask it.

Reads ONNX, torch.export's and TorchScript's files, and pickles of scikit-learn's, which become ONNX. A pickle executes
what is in it: it is to be one's own.
"""

import importlib
import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient.grpc import model_config_pb2 as pb

from tutti.core import file_kinds, files
from tutti.core.dtypes import NUMPY, Array, from_config, to_config
from tutti.core.errors import ConfigError, reason
from tutti.export import columns, estimators, maps, pickled, texts
from tutti.export.errors import ExportError, first_line

Ask = Callable[[Mapping[str, Array]], Mapping[str, Array]]
Shape = tuple[int, ...]

_MAX_BATCH_SIZE = 8
_KINDS = {".onnx": "onnx", ".pt2": "exported", ".pt": "scripted", ".pth": "scripted", ".ts": "scripted"}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".onnx")
# Or packed, as joblib does; a pickle of the first protocol is a text that ends with a full stop.
_MAY_BE_PICKLES = ("a pickle", "packed")
_PICKLES = frozenset([".pkl", ".pickle", ".joblib", ".sav", ".p"])
# What joblib appends where it packs, as in model.pkl.gz.
_PACKED = frozenset([".gz", ".z", ".bz2", ".xz", ".lzma", ".lz4"])
_LIBRARY = "sklearn"
_CHECKED_ROWS = 100


@dataclass(frozen=True, slots=True)
class Field:
    """A tensor of the model: `dims` as in config.pbtxt, without the batch, -1 for any size."""

    name: str
    datatype: str
    dims: Shape
    # The model itself has no axis but the batch's.
    is_scalar: bool = False


@dataclass(frozen=True, slots=True)
class Draft:
    """A model that is to be published: its file, and what its configuration says."""

    backend: str
    file: Path
    filename: str
    inputs: tuple[Field, ...]
    outputs: tuple[Field, ...]
    max_batch_size: int
    origin: str
    notes: tuple[str, ...] = ()
    # Files that it needs beside it.
    beside: tuple[Path, ...] = ()
    # What an input is asked with, where zeros and "text" may be refused.
    known: Mapping[str, Any] = field(default_factory=dict, compare=False)
    # Says that the answers are right, or raises ExportError; None where nobody knows.
    check: Callable[["Draft", Ask], str] | None = field(default=None, compare=False)
    # Parameters of the configuration, and what is said above them.
    parameters: Mapping[str, str] = field(default_factory=dict)
    about: str = ""
    # The same model otherwise, where this one does not answer as it should; it is told why.
    otherwise: Callable[[str], "Draft"] | None = field(default=None, compare=False)

    @property
    def has_free_sizes(self) -> bool:
        return any(size < 0 for one in self.inputs for size in one.dims)

    def unbatched(self, why: str) -> "Draft":
        """The same, whose requests are not joined: the first axis of each tensor is one of its own."""

        def alone(fields: Sequence[Field]) -> tuple[Field, ...]:
            return tuple(
                replace(one, dims=(-1,) if one.is_scalar else (-1, *one.dims), is_scalar=False) for one in fields
            )

        notes = (*self.notes, f"requests are not joined: {why}")
        return replace(self, max_batch_size=0, inputs=alone(self.inputs), outputs=alone(self.outputs), notes=notes)

    def example(self, size: int, rows: int) -> dict[str, Array]:
        """Inputs of known values, else of zeros, and of the text "text"; free dims are of this size."""
        made = {}
        for one in self.inputs:
            dims = [size if dim < 0 else dim for dim in one.dims]
            shape = (rows, *dims) if self.max_batch_size else tuple(dims)
            is_text = one.datatype == "BYTES"
            value = self.known.get(one.name, b"text" if is_text else 0)
            made[one.name] = np.full(shape, value, object if is_text else NUMPY[one.datatype])
        return made

    def write(self, folder: Path, version: int) -> None:
        """The model's folder."""
        (folder / str(version)).mkdir(parents=True)
        shutil.copyfile(self.file, folder / str(version) / self.filename)
        for path in self.beside:
            shutil.copyfile(path, folder / str(version) / path.name)
        (folder / "config.pbtxt").write_text(self.config(folder.name), encoding="utf-8")

    def config(self, name: str) -> str:
        """The text of config.pbtxt, with a word on each field."""
        batch = "several requests at a time are not joined: 0"
        if self.max_batch_size:
            batch = "requests are joined along a first axis, which dims leave out, up to so many rows"
        parts = [
            f"# Written by `tutti init` from {self.origin}. A stock Triton reads it, too.",
            *(f"# {note}" for note in self.notes),
            f"name: {_quoted(name)}",
            f"# What executes it, and the file in each version's folder.\nbackend: {_quoted(self.backend)}",
            f"default_model_filename: {_quoted(self.filename)}",
            f"# Batches: {batch}.\nmax_batch_size: {self.max_batch_size}",
            "# Names and types are the model's own; a size of -1 is free.",
            *(_tensor("input", one) for one in self.inputs),
            *(_tensor("output", one) for one in self.outputs),
            "# How many execute side by side, on each GPU, or on the processor where there is none.",
            "instance_group { count: 1 }",
            *(f"# {line}" for line in self.about.splitlines()),
            *(_parameter(key, value) for key, value in self.parameters.items()),
        ]
        if self.max_batch_size:
            what = "A batch is made of what waits when the last one has ended; to wait for more, add"
            parts += [f"# {what}\n# max_queue_delay_microseconds: 500 in the braces.", "dynamic_batching { }"]
        return "\n".join(parts) + "\n"


def _tensor(kind: str, one: Field) -> str:
    dims = ", ".join(map(str, one.dims)) or "1"
    reshape = " reshape { shape: [ ] }" if one.is_scalar else ""
    datatype = to_config(one.datatype)
    return f"{kind} {{ name: {_quoted(one.name)} data_type: {datatype} dims: [ {dims} ]{reshape} }}"


def _parameter(key: str, value: str) -> str:
    return f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def read(
    source: Path, name: str, work: Path, inputs: Sequence[str], max_batch_size: int | None, in_python: bool = False
) -> Draft:
    """What the file is, as a draft. Raises ExportError for what cannot be served, with what would help.

    `in_python` is of pickles: they are served as they are, and not as ONNX.
    """
    if source.is_dir():
        raise ExportError(
            f"'{source}' is a folder without config.json: expected a model's file (.onnx, .pt2, .pt, a pickle), or a "
            f"checkpoint's folder{_candidates(source)}"
        )
    kind = _kind(source)
    if in_python and kind != "pickle":
        raise ExportError(f"--python is for pickles of scikit-learn's: '{source.name}' is none")
    readers: Mapping[str, Callable[[Path, str, Path], Draft]] = {
        "onnx": _onnx,
        "exported": _exported,
        "pickle": partial(_pickled, in_python=in_python),
    }
    if kind == "scripted":
        draft = _scripted(source, inputs)
    else:
        if inputs:
            raise ExportError(f"--input is for TorchScript: '{source.name}' tells its own inputs")
        draft = readers[kind](source, name, work)
    if max_batch_size == 0 and draft.max_batch_size:
        return draft.unbatched("--max-batch-size 0")
    if max_batch_size and not draft.max_batch_size:
        raise ExportError(
            f"--max-batch-size {max_batch_size}: not all tensors have a free first axis to join rows along"
        )
    return replace(draft, max_batch_size=max_batch_size or draft.max_batch_size)


def _candidates(folder: Path) -> str:
    known = sorted(
        path.name for path in folder.iterdir() if path.suffix in (*_KINDS, *_PICKLES) or is_packed_pickle(path)
    )
    return f"; there are {', '.join(known[:5])} in it" if known else ""


def is_pickle(source: Path) -> bool:
    """By its name."""
    return source.suffix.lower() in _PICKLES or is_packed_pickle(source)


def is_packed_pickle(source: Path) -> bool:
    """By its name, as model.pkl.gz."""
    suffixes = [suffix.lower() for suffix in source.suffixes[-2:]]
    return len(suffixes) == 2 and suffixes[0] in _PICKLES and suffixes[1] in _PACKED


def _kind(source: Path) -> str:
    """By the suffix, and by the first bytes where it may be of two kinds."""
    suffix = source.suffix.lower()
    if is_pickle(source):
        what = file_kinds.of(source)
        may_be = what.startswith(_MAY_BE_PICKLES) or (what == "a text" and files.read_bytes(source).endswith(b"."))
        if what and not may_be:
            raise ExportError(f"'{source.name}': expected a pickle of scikit-learn's, and it is {what}")
        return "pickle"
    if suffix not in _KINDS:
        known = ", ".join([*_KINDS, *sorted(_PICKLES)])
        what = file_kinds.of(source)
        is_told = f", and it is {what}" if what else ""
        raise ExportError(f"'{source.name}': expected a file that ends with one of {known}{is_told}")
    if what := file_kinds.mistaken_for_model(source):
        raise ExportError(f"'{source.name}' is {what}")
    kind = _KINDS[suffix]
    if kind in ("exported", "scripted"):
        if what := file_kinds.mistaken_for_program(source):  # before PyTorch is imported
            raise ExportError(f"'{source.name}' {what}")
        is_exported = any(name.endswith(file_kinds.OF_EXPORTED) for name in file_kinds.zipped(source))
        return "exported" if is_exported else "scripted"
    return kind


def _onnx(source: Path, name: str, work: Path, origin: str = "") -> Draft:
    from tutti.backends import onnxruntime

    proto = pb.ModelConfig(name=name)
    beside = tuple(path for path in sorted(source.parent.glob(f"{source.name}*")) if path != source and path.is_file())
    mended: list[str] = []
    try:
        onnxruntime.complete(proto, source)
    except ConfigError as error:
        if "zipmap" not in str(error):
            raise
        origin = origin or source.name
        mended, source = maps.taken_off(source, work / "unmapped.onnx"), work / "unmapped.onnx"
        proto = pb.ModelConfig(name=name)
        onnxruntime.complete(proto, source)
    inputs, outputs = _fields(proto.input), _fields(proto.output)
    size = _MAX_BATCH_SIZE if proto.max_batch_size else 0
    notes = [] if size else ["requests are not joined: not all tensors have a free first axis"]
    told = (*mended, *notes)
    return Draft("onnxruntime", source, "model.onnx", inputs, outputs, size, origin or source.name, told, beside)


def _fields(side: Any) -> tuple[Field, ...]:
    """Of a configuration's message."""
    return tuple(
        Field(one.name, from_config(pb.DataType.Name(one.data_type)), _dims(one), one.HasField("reshape"))
        for one in side
    )


def _dims(one: Any) -> Shape:
    return () if one.HasField("reshape") else tuple(one.dims)


def _exported(source: Path, name: str, work: Path) -> Draft:
    import torch

    try:
        program = torch.export.load(source)
    except Exception as error:
        raise ExportError(f"'{source.name}': PyTorch cannot load it: {first_line(error)}") from None
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    given = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    made = [spec.arg.name for spec in program.graph_signature.output_specs if spec.kind.name == "USER_OUTPUT"]
    inputs = [(one, values[one]) for one in given]
    outputs = [(f"OUTPUT__{index}", values[one]) for index, one in enumerate(made)]
    return _torch("model.pt2", source, inputs, outputs)


def _scripted(source: Path, inputs: Sequence[str]) -> Draft:
    import torch

    try:
        module = torch.jit.load(str(source), map_location="cpu").eval()
    except Exception as error:
        raise ExportError(f"'{source.name}': PyTorch cannot load it: {first_line(error)}") from None
    names = [argument.name for argument in module.forward.schema.arguments[1:]]
    if not inputs:
        example = " ".join(f"--input {one}:FP32:3,224,224" for one in names)
        raise ExportError(f"TorchScript does not tell its inputs' types and sizes: say them, as in {example}")
    fields = [_field(text) for text in inputs]
    strangers = [one.name for one in fields if one.name not in names]
    if strangers:
        raise ExportError(f"--input {strangers[0]}: forward takes {', '.join(names)}")
    try:
        given = [
            torch.zeros((2, *(8 if dim < 0 else dim for dim in one.dims)), dtype=_torch_type(one)) for one in fields
        ]
        with torch.inference_mode():
            answer = module(*given)
    except Exception as error:
        raise ExportError(f"asked with 2 rows of zeros, forward fails: {first_line(error)}") from None
    tensors = list(answer.items()) if isinstance(answer, dict) else []
    if not tensors:
        several = answer if isinstance(answer, tuple | list) else [answer]
        tensors = [(f"OUTPUT__{index}", tensor) for index, tensor in enumerate(several)]
    outputs = [Field(key, _datatype(value), tuple(value.shape[1:]), value.dim() == 1) for key, value in tensors]
    return Draft("pytorch", source, "model.pt", tuple(fields), tuple(outputs), _MAX_BATCH_SIZE, source.name)


def _field(text: str) -> Field:
    """Of NAME:TYPE:DIMS. Raises ExportError."""
    match = re.fullmatch(r"([^:]+):([A-Za-z0-9]+):(-?[0-9]{1,10}(?:,-?[0-9]{1,10})*)", text)
    datatype = match[2].upper().removeprefix("TYPE_") if match else ""
    datatype = {"STRING": "BYTES"}.get(datatype, datatype)
    if match is None or datatype not in NUMPY or datatype == "BYTES":
        raise ExportError(f"--input: expected NAME:TYPE:DIMS, as x:FP32:3,224,224, got '{text}'")
    dims = tuple(int(size) for size in match[3].split(","))
    if any(size < -1 or size == 0 for size in dims):
        raise ExportError(f"--input {text}: expected sizes of 1 and more, or -1 for free ones")
    return Field(match[1], datatype, dims)


def _torch(filename: str, source: Path, inputs: Sequence[tuple[str, Any]], outputs: Sequence[tuple[str, Any]]) -> Draft:
    """Of a program whose tensors have shapes, of numbers or of symbols."""
    for key, value in (*inputs, *outputs):
        if not hasattr(value, "shape"):
            raise ExportError(f"'{source.name}': '{key}' is no tensor: expected forward to take and return tensors")
    is_batched = all(len(value.shape) and not isinstance(value.shape[0], int) for _, value in (*inputs, *outputs))

    def fields(given: Sequence[tuple[str, Any]]) -> tuple[Field, ...]:
        made = []
        for key, value in given:
            shape = tuple(size if isinstance(size, int) else -1 for size in value.shape)
            dims = shape[1:] if is_batched else shape
            made.append(Field(key, _datatype(value), dims, is_batched and not dims))
        return tuple(made)

    size = _MAX_BATCH_SIZE if is_batched else 0
    notes = (
        ()
        if size
        else ("requests are not joined: not all first axes are free (torch.export's dynamic_shapes frees them)",)
    )
    return Draft("pytorch", source, filename, fields(inputs), fields(outputs), size, source.name, notes)


def _datatype(tensor: Any) -> str:
    """Triton's name for the elements of a tensor of PyTorch's. Raises ExportError."""
    name = str(getattr(tensor, "dtype", type(tensor).__name__)).removeprefix("torch.")
    known = {dtype.name: datatype for datatype, dtype in NUMPY.items() if datatype != "BYTES"}
    if name not in known:
        raise ExportError(f"expected tensors of Triton's types, got {name}")
    return known[name]


def _torch_type(one: Field) -> Any:
    import torch

    return getattr(torch, NUMPY[one.datatype].name)


def _pickled(source: Path, name: str, work: Path, in_python: bool) -> Draft:
    """A fitted scikit-learn model, whose answers are compared with its own: as ONNX, or else in Python as it is."""
    model = _unpickled(source)
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
        return plain("--python")
    try:
        return replace(_as_onnx(source, name, work, asked), otherwise=plain)
    except ExportError as error:
        return plain(str(error))


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
        gaps = {column.name: column.gap for column in self.named if column.kind == "text" and column.has_gaps}
        told = {name: _as_python(column) for name, column in self.rows.items()}
        if not self.named:
            return told["X"]
        for name, gap in gaps.items():
            told[name] = [text if text else gap for text in told[name]]
        flat = {name: np.array(column, object) if isinstance(column, list) else column for name, column in told.items()}
        return _frame({name: np.ravel(column) for name, column in flat.items()})

    def origin(self, source: Path) -> str:
        return f"{source.name}, a {type(self.model).__name__} of scikit-learn's"


def _as_onnx(source: Path, name: str, work: Path, asked: Asked) -> Draft:
    """Raises ExportError, with what of it has no graph."""
    from skl2onnx.common.data_types import FloatTensorType, Int64TensorType, StringTensorType

    kinds = {"text": StringTensorType, "int64": Int64TensorType, "float": FloatTensorType}
    types = [(one.name, kinds[one.kind]([None, 1])) for one in asked.named]
    if not types:
        types = [("X", StringTensorType([None, 1]) if asked.is_text else FloatTensorType([None, asked.width]))]
    made = estimators.to_onnx(asked.model, types)
    columns.rename(made.graph, asked.named)
    own = _own_answers(asked.model, asked.as_fitted())
    _tell_widths(made.graph, own)
    path = work / "model.onnx"
    path.write_bytes(made.SerializeToString())
    try:
        draft = _onnx(path, name, work, asked.origin(source))
    except ConfigError as error:
        raise ExportError(f"as ONNX it is none: {error}") from None
    return replace(draft, known=asked.known, check=partial(_compared, own, asked.rows, 0 if asked.is_text else 1))


def _in_python(source: Path, work: Path, asked: Asked, why: str) -> Draft:
    """The pickle beside a program that asks it. Raises ExportError where scikit-learn itself does not answer."""
    try:
        own = _quietly(partial(pickled.answers, asked.model, asked.as_fitted()))
    except Exception as error:
        what = f"scikit-learn itself fails ({type(error).__name__}: {first_line(error)})"
        raise ExportError(f"'{source.name}': asked with values like those it was fitted on, {what}") from error
    kinds = {"text": "BYTES", "int64": "INT64", "float": "FP32"}
    inputs = [Field(one.name, kinds[one.kind], (1,)) for one in asked.named]
    if not inputs:
        inputs = [Field("X", "BYTES", (1,)) if asked.is_text else Field("X", "FP32", (asked.width or 1,))]
    because = why if why == "--python" else f"it is not served as ONNX: {why}"
    return Draft(
        "python",
        pickled.PROGRAM,
        "model.py",
        tuple(inputs),
        tuple(Field(*output) for output in pickled.outputs(own)),
        _MAX_BATCH_SIZE,
        asked.origin(source),
        (f"{because}; Python serves the pickle itself (model.py), where scikit-learn is installed",),
        (pickled.copied(source, work),),
        asked.known,
        partial(_compared, list(own.values()), asked.rows, 0),
        pickled.parameters(asked.named, asked.is_text),
        pickled.ABOUT,
    )


def _unpickled(source: Path) -> Any:
    """Raises ExportError, and ModuleNotFoundError for a library that is not here."""
    import joblib

    try:
        with _importable(source.resolve().parent):
            return joblib.load(source)
    except Exception as error:
        if isinstance(error, AttributeError) and "__main__" in str(error):
            what = f"what it names was in the program that made it: {first_line(error)}"
            raise ExportError(
                f"'{source.name}': {what}; define it in a module, and import that where it is fitted"
            ) from None
        if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith(_LIBRARY + "."):
            raise
        if isinstance(error, ModuleNotFoundError | AttributeError) and _LIBRARY in str(error):
            what = f"another version of scikit-learn than {_version(_LIBRARY)}, which is here, has made it"
            raise ExportError(f"'{source.name}': {what}: {first_line(error)}") from None
        what = f"joblib cannot load it ({type(error).__name__}: {first_line(error)})"
        raise ExportError(f"'{source.name}': expected a pickle of scikit-learn's: {what}") from None


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Modules beside the pickle are found, as where it was made."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _version(library: str) -> str:
    return str(getattr(importlib.import_module(library), "__version__", ""))


def _tell_widths(graph: Any, own: Sequence[Array]) -> None:
    """Correct the sizes of outputs that the converter takes for 1, as of a forest of several targets."""
    for output, answer in zip(graph.output, own, strict=False):
        dims = output.type.tensor_type.shape.dim
        if len(dims) == 2 and answer.ndim == 2 and dims[1].dim_value == 1 != answer.shape[1]:
            dims[1].dim_value = answer.shape[1]


def _rows(model: Any, width: int | None) -> Array:
    """Random inputs: numbers, or texts of words that the model knows, and of others."""
    rng = np.random.default_rng(0)
    if width is not None:
        return rng.standard_normal((_CHECKED_ROWS, width)).astype(np.float32)
    drawn = texts.drawn(estimators.vocabulary(model), _CHECKED_ROWS, rng)
    return np.array([[text.encode()] for text in drawn], dtype=object)


def _named_rows(named: Sequence[columns.Column]) -> dict[str, Array]:
    """The same for each column: [rows, 1], texts as bytes."""
    rng = np.random.default_rng(0)
    drawn = {one.name: one.drawn(_CHECKED_ROWS, rng) for one in named}
    encoded = {
        name: np.array([text.encode() for text in values], object)
        for name, values in drawn.items()
        if values.dtype == object
    }
    return {name: values[:, np.newaxis] for name, values in (drawn | encoded).items()}


def _as_python(column: Array) -> Any:
    """Texts as a list; numbers in 64 bits, since some, as KMeans, take no others than they were fitted on."""
    if column.dtype == object:
        return [value.decode() for value in column[:, 0]]
    return column.astype(np.float64) if column.dtype == np.float32 else column


def _frame(told: Mapping[str, Array]) -> Any:
    """Of the library that is here: scikit-learn takes either's."""
    try:
        import pandas
    except ModuleNotFoundError:
        import pyarrow

        return pyarrow.table(dict(told))
    return pandas.DataFrame(dict(told))


def _compared(own: Sequence[Array], rows: Mapping[str, Array], most: int, draft: Draft, ask: Ask) -> str:
    """That the answers to these rows are the model's own: numbers within 1e-4, and `most` rows may differ."""
    parts: list[list[Array]] = [[] for _ in draft.outputs]
    step = max(1, draft.max_batch_size)
    for start in range(0, _CHECKED_ROWS, step):
        answers = ask({name: column[start : start + step] for name, column in rows.items()})
        for part, one in zip(parts, draft.outputs, strict=True):
            part.append(answers[one.name])
    for one, part, expected in zip(draft.outputs, parts, own, strict=False):
        got = np.concatenate([array.reshape(len(array), -1) for array in part])
        wanted = expected.reshape(len(expected), -1)
        if got.shape != wanted.shape:
            what = f"output '{one.name}' is {list(got.shape)}, and scikit-learn's is {list(expected.shape)}"
            raise ExportError(what)
        differing = _differing(got, wanted)
        if len(differing) > most:
            first = {name: _shown(column[differing[0]]) for name, column in rows.items()}
            of = ", ".join(f"{name}={value}" for name, value in first.items())
            what = f"output '{one.name}' differs from scikit-learn's in {len(differing)} of {_CHECKED_ROWS} rows"
            raise ExportError(f"{what}, as of {of[:200]}")
    return f"its answers to {_CHECKED_ROWS} random rows are scikit-learn's"


def _shown(value: Array) -> str:
    return ", ".join(repr(one.decode()) if isinstance(one, bytes) else f"{one:g}" for one in value.tolist())


def _own_answers(model: Any, rows: Any) -> list[Array]:
    answers = [_quietly(partial(model.predict if hasattr(model, "predict") else model.transform, rows))]
    answers += [_quietly(partial(model.predict_proba, rows))] if hasattr(model, "predict_proba") else []
    return [np.asarray(answer.toarray() if hasattr(answer, "toarray") else answer) for answer in answers]


def _quietly(ask: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that a data frame had and an array has not
        return ask()


def _differing(got: Array, wanted: Array) -> list[int]:
    """Rows."""
    if got.dtype == object:
        decoded = np.array([[value.decode() if isinstance(value, bytes) else value for value in row] for row in got])
        differs = decoded != wanted.astype(str)
    else:
        differs = ~np.isclose(got, wanted, rtol=1e-3, atol=1e-4, equal_nan=True)
    return [int(row) for row in np.flatnonzero(differs.any(axis=1))]


def checkpoint_kind(folder: Path) -> str:
    """text, vision or audio: by what prepares its inputs. Raises ExportError where that is not told."""
    names = {path.name for path in folder.iterdir()}
    if "config.json" in names:
        _json(folder / "config.json")
    for path in sorted(folder.iterdir()):
        if path.suffix in _WEIGHTS and (what := file_kinds.of(path)) and "LFS" in what:
            raise ExportError(f"'{path}' is {what}")
    preparing = "preprocessor_config.json"
    told = {}
    if preparing in names:
        told = _json(folder / preparing)
    if "sampling_rate" in told or "feature_size" in told:
        return "audio"
    if "image_mean" in told or "image_processor_type" in told or "crop_size" in told:
        return "vision"
    if names & {"tokenizer.json", "tokenizer_config.json", "vocab.txt"}:
        return "text"
    raise ExportError(
        f"'{folder}' has no tokenizer and no {preparing}: say what it is with tutti export audio, text or vision"
    )


def _json(path: Path) -> dict[str, Any]:
    """Raises ExportError for what is no object."""
    try:
        told = json.loads(files.read_utf8(path))
    except OSError as error:
        raise ExportError(f"'{path}': {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise ExportError(f"'{path}': no JSON: {first_line(error)}") from None
    if not isinstance(told, dict):
        raise ExportError(f"'{path}': expected an object, got {type(told).__name__}")
    return told
