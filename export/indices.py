"""Which values the integer inputs of a saved graph may have: those that become indices must be rows of their tables.

Followed are operators that move values and change none; what arithmetic makes of a value is not guessed at, but told.
Variants of fewer bits, and the same module in another format, have the tables of the graph that is looked at.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import inliner

from tutti.core.dtypes import NUMPY
from tutti.export.graphs import Arrays
from tutti.export.onnx import tensor_specs

_log = logging.getLogger(__name__)

# Operators whose first operand is indexed by the second one, along an attribute `axis`, or by its columns.
_BY_AXIS = ("Gather", "GatherElements", "ScatterElements")
_BY_COLUMNS = ("GatherND", "ScatterND")
# Operators whose output has all values of the first operand, or of any; and those whose output has some of them.
_MOVING = ("Expand", "Flatten", "Identity", "Pad", "Reshape", "Squeeze", "Tile", "Transpose", "Unsqueeze")
_SELECTING = ("Gather", "GatherElements", "GatherND", "Slice", "Split")
_MEASURING = ("Shape", "Size")
_LARGE = 1024


@dataclass(frozen=True, slots=True)
class Found:
    """`bounds` has the lowest and the highest value of inputs, by name; `unclear` says what has none and why."""

    bounds: Mapping[str, tuple[int, int]]
    unclear: Sequence[str]

    def fault(self, cases: Sequence[Arrays]) -> str:
        """What of the data that the graph was verified on would be refused; "" for nothing."""
        for name, (low, high) in self.bounds.items():
            for values in [case[name] for case in cases if np.size(case[name])]:
                if np.min(values) < low or np.max(values) > high:
                    span = f"{np.min(values)} to {np.max(values)}"
                    return f"input '{name}': it indexes {low} to {high}, and was verified on {span}"
        return ""

    def __str__(self) -> str:
        return ", ".join(f"{name} {low} to {high}" for name, (low, high) in self.bounds.items())


def find(path: Path) -> Found:
    """What the graph in the file says about its integer inputs; what is unclear is logged, too."""
    graph = _Graph(onnx.load(str(path), load_external_data=False))
    bounds: dict[str, tuple[int, int]] = {}
    unclear: list[str] = []
    for spec in tensor_specs(path)[0]:
        if not spec.datatype.startswith(("INT", "UINT")):
            continue
        sizes, notes = _sizes(spec.name, *graph.follow(spec.name))
        unclear += notes
        if sizes:
            bounds[spec.name] = (0, min(min(sizes) - 1, int(np.iinfo(NUMPY[spec.datatype]).max)))
    for note in unclear:
        _log.warning("%s: %s", path.parent.name, note)
    return Found(bounds, unclear)


@dataclass(frozen=True, slots=True)
class _Trail:
    """A tensor with an input's values, or with `is_part` some of them, or what the operator `through` has made of them.

    They are its column `column`, where that is known.
    """

    tensor: str
    is_part: bool = False
    through: str = ""
    column: int | None = None


@dataclass(frozen=True, slots=True)
class _Use:
    """Indices of a table of `size` rows, None where that varies or is not known."""

    node: str
    size: int | None
    trail: _Trail


def _sizes(name: str, uses: Sequence[_Use], is_read: bool) -> tuple[list[int], list[str]]:
    """The tables' sizes that bound an input, and what is to be told of its other uses.

    Parts of an input may mean different things: they count where nothing else is made of it, and all are of one table.
    """
    notes = [
        f"input '{name}' reaches the indices of {use.node} through {use.trail.through}: what it is there has no bounds"
        for use in uses
        if use.trail.through
    ]
    plain = [use for use in uses if not use.trail.through]
    notes += [f"input '{name}' indexes an axis of {use.node} whose size varies" for use in plain if use.size is None]
    whole = [use.size for use in plain if use.size is not None and not use.trail.is_part]
    parts = [use.size for use in plain if use.size is not None and use.trail.is_part]
    if parts and not is_read and len(set(parts)) == 1:
        whole += parts
    elif parts and min(parts) < min(whole, default=max(parts) + 1):
        notes.append(
            f"input '{name}': parts of it index tables of {sorted(set(parts))} rows: no bounds follow from that"
        )
    return whole, list(dict.fromkeys(notes))


class _Graph:
    """Who reads a tensor, nested graphs included, and the sizes of axes."""

    def __init__(self, model: Any) -> None:
        if model.functions:
            model = inliner.inline_local_functions(model)
        for tensor in model.graph.initializer:
            if np.prod(tensor.dims) > _LARGE:
                tensor.ClearField("raw_data")  # weights say nothing about shapes, and are long to copy
        model = onnx.shape_inference.infer_shapes(model)
        self._outputs = {value.name for value in model.graph.output}
        self._shapes: dict[str, list[int | None]] = {}
        self._readers: dict[str, list[tuple[Any, int]]] = defaultdict(list)
        self._add(model.graph)

    def _add(self, graph: Any) -> None:
        for tensor in graph.initializer:
            self._shapes[tensor.name] = list(tensor.dims)
        for value in (*graph.input, *graph.value_info, *graph.output):
            dims = value.type.tensor_type.shape.dim
            if value.name not in self._shapes and value.type.tensor_type.HasField("shape"):
                self._shapes[value.name] = [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]
        for node in graph.node:
            for position, name in enumerate(node.input):
                self._readers[name].append((node, position))
            for inner in _nested(node):
                self._add(inner)

    def follow(self, name: str) -> tuple[list[_Use], bool]:
        """Where an input's values become indices, and whether anything else is made of them."""
        uses: list[_Use] = []
        is_read = name in self._outputs
        waiting = [_Trail(name)]
        seen = set(waiting)
        while waiting:
            trail = waiting.pop()
            for node, position in self._readers[trail.tensor]:
                if node.op_type in _MEASURING:
                    continue
                if _is_index(node, position):
                    uses.append(_Use(f"{node.op_type} '{node.name}'", self._size(node, trail), trail))
                    continue
                after = list(self._after(node, position, trail))
                is_read |= any(
                    not trail.through and (trail_after.through or trail_after.tensor in self._outputs)
                    for trail_after in after
                )
                waiting += [later for later in after if later not in seen]
                seen.update(after)
        return uses, is_read

    def _after(self, node: Any, position: int, trail: _Trail) -> Iterator[_Trail]:
        """The trail behind an operator that is no index's."""
        column = self._column(node, position, trail)
        step = replace(trail, column=column)
        if not trail.through and not _moves(node, position):
            is_part = trail.is_part or (node.op_type in _SELECTING and position == 0)
            is_changed = node.op_type not in _SELECTING or position > 0
            step = replace(step, is_part=is_part, through=node.op_type if is_changed else "")
        inner = [value.name for graph in _nested(node) for value in graph.input]
        return (replace(step, tensor=name) for name in (*node.output, *inner) if name)

    def _column(self, node: Any, position: int, trail: _Trail) -> int | None:
        if node.op_type in ("Cast", "Identity"):
            return trail.column
        if node.op_type != "Concat":
            return None
        widths = [(self._shapes.get(name) or [None])[-1] for name in node.input[: position + 1]]
        rank = len(self._shapes.get(node.input[position]) or ())
        if _attribute(node, "axis", 0) not in (-1, rank - 1) or None in widths or widths[-1] != 1:
            return None
        return sum(width or 0 for width in widths[:-1])

    def _size(self, node: Any, trail: _Trail) -> int | None:
        """Of the axis that the trail's values index."""
        shape = self._shapes.get(node.input[0])
        if shape is None:
            return None
        axis: int | None = _attribute(node, "axis", 0)
        if node.op_type in _BY_COLUMNS:
            width = (self._shapes.get(node.input[1]) or [None])[-1]
            column = 0 if width == 1 else trail.column
            axis = None if column is None else _attribute(node, "batch_dims", 0) + column
        return shape[axis] or None if axis is not None and -len(shape) <= axis < len(shape) else None


def _is_index(node: Any, position: int) -> bool:
    return position == 1 and node.op_type in (*_BY_AXIS, *_BY_COLUMNS)


def _moves(node: Any, position: int) -> bool:
    """Whether the output has all values of this operand, unchanged."""
    if node.op_type == "Cast":
        kind: str = onnx.TensorProto.DataType.Name(_attribute(node, "to", 0))
        return kind.startswith(("INT", "UINT"))
    return node.op_type == "Concat" or (node.op_type in _MOVING and position == 0)


def _attribute(node: Any, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)


def _nested(node: Any) -> list[Any]:
    return [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
