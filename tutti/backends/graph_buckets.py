"""Which CUDA graphs a model is to have: the shapes of batches that are captured before it serves. Pure.

`optimization { cuda { graphs: true } }` asks for graphs, as in Triton. What is captured say its `graph_spec` entries;
where there are none, every shape that the model's inputs can have, for some batch sizes:

    tutti.graphs.batch_sizes  "1, 4, 16": batches are filled up to the next of them. By default up to four for each
                              doubling (8, 10, 12, 14, 16, 20, ...), as many as max_count lets all lengths have, the
                              preferred batch sizes, and max_batch_size
    tutti.graphs.max_count    how many graphs an instance may have, by default 64; the largest shapes are left out first

Inputs of variable length have the lengths of `tutti.buckets.INPUT` (padding.py). Inputs with the same buckets have the
same length.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tutti.core.errors import ConfigError
from tutti.core.types import Shape
from tutti.repository.model_config import ModelConfig, TensorSpec

BATCH_SIZES = "tutti.graphs.batch_sizes"
MAX_COUNT = "tutti.graphs.max_count"
DEFAULT_MAX_COUNT = 64
# Sizes for each doubling: with four, a seventh of what executes is filled up at worst where sizes are many.
_STEPS = (4, 2, 1)


@dataclass(frozen=True, slots=True)
class Bucket:
    """One graph: for `least` to `rows` rows, of inputs of `shapes`, by name and without the batch axis.

    `rows` is 0 for a model whose tensors have no batch axis.
    """

    rows: int
    least: int
    shapes: Mapping[str, Shape] = field(hash=False)

    @property
    def elements(self) -> int:
        """How many elements all inputs have."""
        return max(1, self.rows) * sum(math.prod(shape) for shape in self.shapes.values())

    def shape(self, name: str) -> Shape:
        """An input's shape as the graph has it."""
        return (self.rows, *self.shapes[name]) if self.rows else self.shapes[name]

    def __str__(self) -> str:
        return ", ".join(f"'{name}' {list(self.shape(name))}" for name in self.shapes)


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """What is to be captured, from the smallest to the largest; `notes` say what is not, and why."""

    buckets: Sequence[Bucket] = ()
    notes: Sequence[str] = ()


def are_all_filled_up(buckets: Sequence[Bucket]) -> bool:
    """Whether every batch of as many rows as the largest has, or fewer, is filled up to one of these."""
    ordered = sorted(buckets, key=lambda bucket: bucket.rows)
    befores = [0, *[bucket.rows for bucket in ordered]]
    return all(0 < bucket.least <= before + 1 for bucket, before in zip(ordered, befores, strict=False))


def are_wanted(config: ModelConfig) -> bool:
    return bool(config.proto.optimization.cuda.graphs)


def plan(config: ModelConfig) -> GraphPlan:
    """The graphs of a model that wants some. Raises ConfigError for a graph_spec or parameter that cannot be."""
    most = _max_count(config)
    specified = config.proto.optimization.cuda.graph_spec
    bodies, reason = _bodies(config)
    notes: list[str] = []
    if specified:
        buckets = _specified(config, bodies, notes)
    else:
        buckets = [
            Bucket(rows, least, shapes)
            for shapes in bodies
            for rows, least in _intervals(_batch_sizes(config, most // max(1, len(bodies))))
        ]
    if config.ragged:
        buckets, reason = [], "batches of ragged inputs have any length"
    if not buckets:
        return GraphPlan((), [*notes, f"it has no CUDA graphs: {reason}"])
    buckets.sort(key=lambda bucket: bucket.elements)
    if len(buckets) > most:
        left_out = f"{len(buckets) - most} of {len(buckets)} CUDA graphs are left out, from {buckets[most]} upwards"
        notes.append(f"{left_out} (parameters.{MAX_COUNT} is {most})")
    return GraphPlan(buckets[:most], notes)


def _bodies(config: ModelConfig) -> tuple[list[dict[str, Shape]], str]:
    """All shapes that the inputs can have together; and, where they can have any, why that is."""
    padded = config.padding.inputs
    for spec in config.inputs:
        if -1 not in spec.model_dims:
            continue
        if spec.name not in padded:
            finding = f"input '{spec.name}' has variable dims {list(spec.model_dims)}"
            return [], f"{finding}: they need parameters.tutti.buckets.{spec.name}, or a graph_spec"
        if spec.reshape is not None:
            return [], f"input '{spec.name}' has variable dims and a reshape: they need a graph_spec"
    groups = sorted({padded[spec.name].buckets for spec in config.inputs if -1 in spec.model_dims})
    chosen = itertools.product(*groups)
    return [
        {spec.name: _sized(config, spec, dict(zip(groups, lengths, strict=True))) for spec in config.inputs}
        for lengths in chosen
    ], ""


def _sized(config: ModelConfig, spec: TensorSpec, lengths: Mapping[tuple[int, ...], int]) -> Shape:
    if -1 not in spec.model_dims:
        return spec.model_dims
    padded = config.padding.inputs[spec.name]
    return (*spec.dims[: padded.axis], lengths[padded.buckets], *spec.dims[padded.axis + 1 :])


def _batch_sizes(config: ModelConfig, most_sizes: int) -> list[int]:
    text = config.parameters.get(BATCH_SIZES)
    most = config.max_batch_size
    if text is None:
        preferred = config.batching.preferred_batch_sizes if config.batching is not None else ()
        spaced = [sorted({*_spaced(most, steps), *preferred, most} if most else {0}) for steps in _STEPS]
        return next((sizes for sizes in spaced if len(sizes) <= most_sizes), spaced[-1])
    sizes = [part.strip() for part in text.split(",")]
    if not all(size.isdecimal() and 1 <= int(size) <= most for size in sizes):
        expected = f"expected sizes from 1 to max_batch_size {most}, as '1, 4', got '{text[:80]}'"
        raise _bad(config, f"parameters.{BATCH_SIZES}", expected)
    return sorted(set(map(int, sizes)))


def _spaced(most: int, steps: int) -> set[int]:
    """The powers of two, and up to `steps` - 1 sizes between each and the next."""
    doublings = [1 << n for n in range(most.bit_length())]
    return {size for power in doublings for step in range(steps) if (size := power + power * step // steps) <= most}


def _intervals(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Each size, and the first that the one before it is too small for."""
    return [(size, before + 1 if size else 0) for before, size in itertools.pairwise([0, *sizes])]


def _max_count(config: ModelConfig) -> int:
    text = config.parameters.get(MAX_COUNT, str(DEFAULT_MAX_COUNT))
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise _bad(config, f"parameters.{MAX_COUNT}", f"expected a number of at least 1, got '{text[:80]}'")
    return int(text)


def _specified(config: ModelConfig, bodies: Sequence[Mapping[str, Shape]], notes: list[str]) -> list[Bucket]:
    """What `graph_spec` says: graphs for batches of exactly such a size, or from `graph_lower_bound` on."""
    buckets: dict[tuple[Any, ...], Bucket] = {}
    for index, spec in enumerate(config.proto.optimization.cuda.graph_spec):
        path = f"optimization.cuda.graph_spec[{index}]"
        rows = _rows(config, f"{path}.batch_size", spec.batch_size)
        least = rows
        shapes = [_shapes(config, f"{path}.input", spec.input)] if spec.input else bodies
        if spec.HasField("graph_lower_bound"):
            lower = spec.graph_lower_bound
            least = _rows(config, f"{path}.graph_lower_bound.batch_size", lower.batch_size)
            if least > rows:
                expected = f"expected at most batch_size {rows}, got {least}"
                raise _bad(config, f"{path}.graph_lower_bound.batch_size", expected)
            notes += _bounds(config, path, spec)
        for body in shapes:
            buckets[(rows, *sorted(body.items()))] = Bucket(rows, least, body)
    return list(buckets.values())


def _rows(config: ModelConfig, path: str, rows: int) -> int:
    if config.max_batch_size == 0 and rows != 0:
        raise _bad(config, path, f"expected 0, as max_batch_size is, got {rows}")
    if config.max_batch_size and not 1 <= rows <= config.max_batch_size:
        raise _bad(config, path, f"expected 1 to max_batch_size {config.max_batch_size}, got {rows}")
    return rows


def _shapes(config: ModelConfig, path: str, values: Any) -> dict[str, Shape]:
    by_name = {spec.name: spec for spec in config.inputs}
    if set(values) != set(by_name):
        raise _bad(config, path, f"expected the inputs {sorted(by_name)}, got {sorted(values)}")
    shapes = {}
    for name, spec in by_name.items():
        shape = tuple(values[name].dim)
        if not _fits(spec.model_dims, shape):
            raise _bad(config, f"{path}['{name}']", f"expected a shape of {list(spec.model_dims)}, got {list(shape)}")
        shapes[name] = shape
    return shapes


def _fits(dims: Shape, shape: Shape) -> bool:
    pairs = zip(dims, shape, strict=False)
    return len(dims) == len(shape) and all(size >= 1 and dim in (-1, size) for dim, size in pairs)


def _bounds(config: ModelConfig, path: str, spec: Any) -> list[str]:
    """What is said of lower bounds of shapes: rows are filled up with valid ones, but what would fill a shape?"""
    for name, lower in spec.graph_lower_bound.input.items():
        if name not in spec.input:
            raise _bad(config, f"{path}.graph_lower_bound.input", f"graph_spec has no input '{name}'")
        low, high = list(lower.dim), list(spec.input[name].dim)
        if len(low) != len(high) or any(not 0 <= a <= b for a, b in zip(low, high, strict=False)):
            expected = f"expected dims of at most {high}, got {low}"
            raise _bad(config, f"{path}.graph_lower_bound.input['{name}']", expected)
        if low != high:
            finding = f"{path}: input '{name}': only {high} has a CUDA graph, smaller shapes have none"
            return [f"{finding}: parameters.tutti.buckets.{name} would pad them"]
    return []


def _bad(config: ModelConfig, path: str, why: str) -> ConfigError:
    return ConfigError(f"model '{config.name}': {path}: {why}")
