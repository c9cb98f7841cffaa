"""Ragged batches, as Triton defines them: inputs of unequal shape, flattened one after the other. Pure.

`batch_input` tells the model where each request's part is, and `batch_output` cuts outputs into parts of an input's
shape.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from tutti.core.dtypes import NUMPY, Array
from tutti.core.errors import Internal
from tutti.core.types import InferRequest, Shape, Tensor

Kind = Literal[
    "BATCH_ELEMENT_COUNT",
    "BATCH_ACCUMULATED_ELEMENT_COUNT",
    "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO",
    "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE",
    "BATCH_ITEM_SHAPE",
    "BATCH_ITEM_SHAPE_FLATTEN",
]


@dataclass(frozen=True, slots=True)
class BatchInput:
    """An input that the server makes, under each of `names`, from the shapes of the batch's `source` inputs."""

    kind: Kind
    names: tuple[str, ...]
    datatype: str
    source: str


@dataclass(frozen=True, slots=True)
class Ragged:
    """What of a model is ragged. `scattered`: output -> the input whose shapes its parts have."""

    inputs: frozenset[str] = frozenset()
    batch_inputs: tuple[BatchInput, ...] = ()
    scattered: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.inputs or self.batch_inputs or self.scattered)

    def made(self, requests: Sequence[InferRequest]) -> dict[str, Array]:
        """The batch inputs for one batch."""
        arrays = {}
        for spec in self.batch_inputs:
            array = _values(spec, [request.inputs[spec.source].shape for request in requests])
            arrays.update(dict.fromkeys(spec.names, array))
        return arrays

    def parts(self, model: str, output: Tensor, requests: Sequence[InferRequest]) -> list[Tensor]:
        """A scattered output, one part for each request. Raises Internal when the model made too few elements."""
        shapes = [request.inputs[self.scattered[output.name]].shape for request in requests]
        sizes = [int(np.prod(shape)) for shape in shapes]
        flat = output.array().reshape(-1)
        if flat.size != sum(sizes):
            raise Internal(f"model '{model}': output '{output.name}': expected {sum(sizes)} elements, got {flat.size}")
        ends = np.cumsum(sizes)
        return [
            Tensor(output.name, output.datatype, shape, flat[end - size : end].reshape(shape))
            for shape, size, end in zip(shapes, sizes, ends, strict=True)
        ]


NOT_RAGGED = Ragged()


def flattened(requests: Sequence[InferRequest], name: str) -> Array:
    """Input `name` of all requests as one dimension."""
    return np.concatenate([request.inputs[name].array().reshape(-1) for request in requests])


def _values(spec: BatchInput, shapes: Sequence[Shape]) -> Array:
    counts = [int(np.prod(shape)) for shape in shapes]
    dtype = NUMPY[spec.datatype]
    if spec.kind == "BATCH_ELEMENT_COUNT":
        return np.array(counts, dtype)
    if spec.kind == "BATCH_ACCUMULATED_ELEMENT_COUNT":
        return np.cumsum(counts).astype(dtype)
    if spec.kind == "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO":
        return np.cumsum([0, *counts]).astype(dtype)
    if spec.kind == "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE":
        return np.zeros(max(counts), dtype)
    items = np.array([shape[1:] for shape in shapes for _ in range(shape[0])], dtype)
    return items.reshape(-1) if spec.kind == "BATCH_ITEM_SHAPE_FLATTEN" else items
