"""A model that is to be published: its file, what its configuration says, and what it is asked to prove it."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tutti.core.dtypes import NUMPY, Array, to_config

Ask = Callable[[Mapping[str, Array]], Mapping[str, Array]]
Shape = tuple[int, ...]

MAX_BATCH_SIZE = 8
ANY_SIZE = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Field:
    """A tensor of the model: `dims` as in config.pbtxt, without the batch, -1 for any size."""

    name: str
    datatype: str
    dims: Shape
    # The model itself has no axis but the batch's.
    is_scalar: bool = False
    # The least and the most that each of the dims may be, where that is told.
    bounds: tuple[tuple[int, int], ...] = ()

    def shape(self, size: int) -> Shape:
        """With free dims of this size, or of the nearest that may be."""
        bounds = self.bounds or [(1, ANY_SIZE)] * len(self.dims)
        return tuple(
            min(max(size, least), most) if dim < 0 else dim
            for dim, (least, most) in zip(self.dims, bounds, strict=True)
        )


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
        return any(size < 0 for spec in self.inputs for size in spec.dims)

    def unbatched(self, why: str) -> "Draft":
        """The same, whose requests are not joined: the first axis of each tensor is one of its own."""

        def alone(fields: Sequence[Field]) -> tuple[Field, ...]:
            return tuple(
                replace(
                    spec,
                    dims=(-1,) if spec.is_scalar else (-1, *spec.dims),
                    is_scalar=False,
                    bounds=((1, ANY_SIZE), *spec.bounds) if spec.bounds else (),
                )
                for spec in fields
            )

        notes = (*self.notes, f"requests are not joined: {why}")
        return replace(self, max_batch_size=0, inputs=alone(self.inputs), outputs=alone(self.outputs), notes=notes)

    def example(self, size: int, rows: int) -> dict[str, Array]:
        """Inputs of known values, else of zeros, and of the text "text"; free dims are of this size."""
        tensors = {}
        for spec in self.inputs:
            dims = (1,) if spec.is_scalar else spec.shape(size)
            shape = (rows, *dims) if self.max_batch_size else dims
            is_text = spec.datatype == "BYTES"
            value = self.known.get(spec.name, b"text" if is_text else 0)
            tensors[spec.name] = np.full(shape, value, object if is_text else NUMPY[spec.datatype])
        return tensors

    @property
    def asked_with(self) -> str:
        """What an example holds, in words."""
        if self.known:
            return "values that it knows"
        kinds = {spec.datatype == "BYTES" for spec in self.inputs}
        return " and ".join(name for is_text, name in ((True, 'the text "text"'), (False, "zeros")) if is_text in kinds)

    def write(self, folder: Path, version: int) -> None:
        """The model's folder."""
        (folder / str(version)).mkdir(parents=True)
        shutil.copyfile(self.file, folder / str(version) / self.filename)
        for path in self.beside:
            place = folder / str(version) / path.name
            if path.is_dir():
                shutil.copytree(path, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(path, place)
        (folder / "config.pbtxt").write_text(self.config(folder.name), encoding="utf-8")

    def config(self, name: str) -> str:
        """The text of config.pbtxt, with a word on each spec."""
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
            *(_tensor("input", spec) for spec in self.inputs),
            *(_tensor("output", spec) for spec in self.outputs),
            "# How many execute side by side, on each GPU, or on the processor where there is none.",
            "instance_group { count: 1 }",
            *(f"# {line}" for line in self.about.splitlines()),
            *(_parameter(key, value) for key, value in self.parameters.items()),
        ]
        if self.max_batch_size:
            waits = "A batch is made of what waits when the last one has ended; to wait for more, add"
            parts += [f"# {waits}\n# max_queue_delay_microseconds: 500 in the braces.", "dynamic_batching { }"]
        return "\n".join(parts) + "\n"


def _tensor(kind: str, spec: Field) -> str:
    dims = ", ".join(map(str, spec.dims)) or "1"
    reshape = " reshape { shape: [ ] }" if spec.is_scalar else ""
    datatype = to_config(spec.datatype)
    return f"{kind} {{ name: {_quoted(spec.name)} data_type: {datatype} dims: [ {dims} ]{reshape} }}"


def _parameter(key: str, value: str) -> str:
    return f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
