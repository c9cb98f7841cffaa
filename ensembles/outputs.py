"""Puts what a step's model gave for its groups back into a frame, as columns over the rows of all calls.

Where a step ran for some of the rows only, its outputs go to their places; the others have the tensor's default, or are
marked as not there. What the items of a row gave is brought together again.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tutti.core.dtypes import Array
from tutti.core.types import Tensor
from tutti.ensembles.columns import Column, renamed
from tutti.ensembles.frame import Frame, full
from tutti.ensembles.graph import Step, TensorType
from tutti.ensembles.grouping import Group

# Groups with an output of each, [rows, ...].
_Arrays = Sequence[tuple[Group, Array]]
_REDUCE: dict[str, Any] = {
    "max": lambda array: array.max(axis=0),
    "min": lambda array: array.min(axis=0),
    "mean": lambda array: array.mean(axis=0),
    "sum": lambda array: array.sum(axis=0),
}


def put(frame: Frame, step: Step, groups: Sequence[Group], mask: Array | None) -> None:
    """Make columns of what a step gave back for its groups, of the chosen rows.

    Raises ValueError for outputs whose shapes or datatypes do not fit together.
    """
    if step.each is not None:
        chosen = np.ones(frame.rows, bool) if mask is None else mask
        for position, (_, name) in enumerate(step.outputs):
            frame.columns[name] = _gathered(frame, groups, position, name, step.gathers[position], chosen)
        return
    only = groups[0] if len(groups) == 1 else None
    if only is not None and only.places is None and len(only.outputs) == 1 and only.outputs[0] is not None:
        for (_, name), tensor in zip(step.outputs, only.outputs[0], strict=True):
            if tensor is not None:
                frame.columns[name] = Column(renamed(name, tensor))
            elif frame.plan.tensors[name].default is not None:
                frame.columns[name] = frame.defaults(name, frame.plan.tensors[name])
        return
    for position, (_, name) in enumerate(step.outputs):
        column = _scattered(frame, step, groups, position, name)
        if column is not None:
            frame.columns[name] = column


def _scattered(frame: Frame, step: Step, groups: Sequence[Group], position: int, name: str) -> Column | None:
    """An output of all groups at its places; None where none of them has it."""
    datatypes = _datatypes(groups, position)
    if len(datatypes) > 1:
        return _of_several_datatypes(frame, groups, position, name)
    spec = _as_made(frame, name, datatypes)
    arrays = [(group, array) for group in groups if (array := _output(group, position)) is not None]
    if not arrays:
        return frame.defaults(name, spec) if spec.default is not None else None
    if not frame.plan.is_batched or not step.max_rows:
        parts: list[Tensor | None] = [None] * len(frame.calls)
        for group, array in arrays:
            parts[group.calls[0]] = Tensor(name, spec.datatype, array.shape, array)
        return _with_default(frame, name, spec, parts, None)
    valid = np.zeros(frame.rows, bool)
    for group, _ in arrays:
        valid[slice(None) if group.places is None else group.places] = True
    there = None if valid.all() else valid
    # Where a dimension varies, a call's rows that were not made must not look like those of other calls.
    tail = arrays[0][1].shape[1:]
    if all(array.shape[1:] == tail for _, array in arrays) and (there is None or -1 not in spec.dims):
        return _in_one_piece(frame, arrays, name, spec, there)
    parts = [_part(frame, index, arrays, name, spec) for index in range(len(frame.calls))]
    return _with_default(frame, name, spec, parts, there)


def _in_one_piece(frame: Frame, arrays: _Arrays, name: str, spec: TensorType, valid: Array | None) -> Column:
    """Outputs of one shape, written to their places among the rows of all calls."""
    pieces, places = [array for _, array in arrays], [group.places_in(frame) for group, _ in arrays]
    values = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    rows = places[0] if len(places) == 1 else np.concatenate(places)
    if valid is not None or not np.array_equal(rows, np.arange(frame.rows)):
        whole = full((frame.rows, *values.shape[1:]), spec)
        whole[rows] = values
        values = whole
    return Column(Tensor(name, spec.datatype, values.shape, values), valid=valid if spec.default is None else None)


def _part(frame: Frame, index: int, arrays: _Arrays, name: str, spec: TensorType) -> Tensor | None:
    """The rows of one call, whose shapes are its own; None without any."""
    start, size = frame.starts[index], frame.sizes[index]
    pieces: list[tuple[Array, Array]] = []
    for group, array in arrays:
        if index in group.calls:
            places = group.places_in(frame)
            mine = (places >= start) & (places < start + size)
            pieces.append((places[mine] - start, array[mine]))
    if not pieces:
        return None
    tail = pieces[0][1].shape[1:]
    if spec.is_items and len({array.shape[2:] for _, array in pieces}) == 1:
        tail = (max(array.shape[1] for _, array in pieces), *tail[1:])
        pieces = [(places, _longer(array, tail[0], spec)) for places, array in pieces]
    if any(array.shape[1:] != tail for _, array in pieces):
        shapes = [list(array.shape[1:]) for _, array in pieces]
        raise ValueError(f"output '{name}' has rows of different shapes in one request: {shapes}")
    part = pieces[0][1] if len(pieces[0][1]) == size else full((size, *tail), spec)
    for places, array in pieces:
        if array is not part:
            part[places] = array
    return Tensor(name, spec.datatype, part.shape, part)


def _of_several_datatypes(frame: Frame, groups: Sequence[Group], position: int, name: str) -> Column:
    """An output that has one datatype in one call and another in another, as a part for each call."""
    parts: list[Tensor | None] = [None] * len(frame.calls)
    valid = np.zeros(frame.rows, bool)
    for group in groups:
        datatypes, array = _datatypes([group], position), _output(group, position)
        if array is None:
            continue
        spec, index = _as_made(frame, name, datatypes), group.calls[0]
        if len(group.calls) > 1 or group.rows != frame.sizes[index]:
            raise ValueError(f"output '{name}' has several datatypes in one batch, of which this is a part")
        parts[index] = Tensor(name, spec.datatype, array.shape, array)
        valid[frame.starts[index] : frame.stop(index)] = True
    return _with_default(frame, name, frame.plan.tensors[name], parts, None if valid.all() else valid)


def _gathered(frame: Frame, groups: Sequence[Group], position: int, name: str, gather: str, chosen: Array) -> Column:
    """An output of all items, a row's brought together again.

    All of no items is nothing, their sum is 0; the largest, the least and the mean of none are not there.
    """
    spec = _as_made(frame, name, _datatypes(groups, position))
    of_rows: list[Array | None] = [None] * frame.rows
    for group in groups:
        array = _output(group, position)
        assert group.owners is not None
        if array is None:
            continue
        owners, first = np.unique(group.owners, return_index=True)
        for owner, begin, end in zip(owners, first, [*first[1:], len(array)], strict=True):
            of_rows[owner] = array[begin:end]
    join = _concatenated if gather == "concat" else _reduced
    parts: list[Tensor | None] = []
    for index, start in enumerate(frame.starts):
        values = join(of_rows[start : frame.stop(index)], chosen[start : frame.stop(index)], gather, spec)
        parts.append(Tensor(name, spec.datatype, values.shape, values))
    if spec.default is not None:
        return Column(parts=parts)
    there = np.array([array is not None for array in of_rows]) if gather in ("max", "min", "mean") else chosen
    return Column(parts=parts, valid=None if there.all() else there)


def _concatenated(of_rows: Sequence[Array | None], chosen: Array, gather: str, spec: TensorType) -> Array:
    """The items' outputs of each row, [items, ...] or None, as [rows, most items, ...]."""
    arrays = [array for array in of_rows if array is not None]
    longest = max((len(array) for array in arrays), default=0)
    values = full((len(of_rows), longest, *_item_shape(arrays, spec.dims[1:])), spec)
    for row, array in enumerate(of_rows):
        if array is not None:
            values[row, : len(array)] = array
    return values


def _reduced(of_rows: Sequence[Array | None], chosen: Array, gather: str, spec: TensorType) -> Array:
    """The items' outputs of each row, [items, ...] or None, reduced to one: [rows, ...]."""
    arrays = [array for array in of_rows if array is not None]
    values = full((len(of_rows), *_item_shape(arrays, spec.dims)), spec)
    for row, array in enumerate(of_rows):
        if array is not None:
            values[row] = _REDUCE[gather](array)
        elif gather == "sum" and chosen[row]:
            values[row] = 0
    return values


def _item_shape(arrays: Sequence[Array], dims: Sequence[int]) -> tuple[int, ...]:
    return arrays[0].shape[1:] if arrays else tuple(max(0, dim) for dim in dims)


def _as_made(frame: Frame, name: str, datatypes: set[str]) -> TensorType:
    """A tensor's type with the datatype that its step has given it. Raises ValueError where it gave several."""
    spec = frame.plan.tensors[name]
    if len(datatypes) > 1:
        raise ValueError(f"output '{name}' has several datatypes in one request: {', '.join(sorted(datatypes))}")
    return replace(spec, datatype=min(datatypes)) if datatypes and spec.datatype not in datatypes else spec


def _with_default(frame: Frame, name: str, spec: TensorType, parts: list[Tensor | None], valid: Array | None) -> Column:
    if spec.default is None:
        return Column(parts=parts, valid=valid)
    return Column(
        parts=[frame.default(name, spec, index) if part is None else part for index, part in enumerate(parts)]
    )


def _datatypes(groups: Sequence[Group], position: int) -> set[str]:
    """The datatypes that an output has; nearly always one."""
    pieces = [piece[position] for group in groups for piece in group.outputs if piece is not None]
    return {tensor.datatype for tensor in pieces if tensor is not None}


def _output(group: Group, position: int) -> Array | None:
    """One output of all pieces of a group; None where it has failed or was shed."""
    if not group.outputs or any(piece is None for piece in group.outputs):
        return None
    tensors = [piece[position] for piece in group.outputs if piece is not None]
    arrays = [tensor.array() for tensor in tensors if tensor is not None]
    if len(arrays) < len(tensors):
        return None  # the answer lacks it
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _longer(array: Array, size: int, spec: TensorType) -> Array:
    """[rows, items, ...], filled up to `size` items."""
    if array.shape[1] == size:
        return array
    values = full((array.shape[0], size, *array.shape[2:]), spec)
    values[:, : array.shape[1]] = array
    return values
