"""Which rows of a frame reach a step's model as which requests.

What the model takes together is a group: rows of one shape, with the same of the optional inputs. A step that runs per
item has the items of the rows as rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tutti.core.dtypes import Array
from tutti.core.types import Tensor
from tutti.ensembles.columns import Column, joined, renamed, selected, stretch
from tutti.ensembles.frame import Frame
from tutti.ensembles.graph import Step

# (the model's name of an input, the graph's name of its tensor)
_Names = Sequence[tuple[str, str]]


@dataclass(slots=True, eq=False)
class Group:
    """Rows that reach a step's model as one request: of these calls (by index), at these rows of the frame.

    For a step that runs per item, `owners` are the rows that the items belong to, ascending.
    """

    calls: tuple[int, ...]
    places: Array | None
    inputs: dict[str, Tensor]
    rows: int
    owners: Array | None = None
    outputs: list[Sequence[Tensor | None] | None] = field(default_factory=list)

    def places_in(self, frame: Frame) -> Array:
        """The rows of the frame, ascending within a call."""
        return np.arange(frame.rows) if self.places is None else self.places


def everything(frame: Frame, step: Step) -> Group | None:
    """All rows as one request, for a plain step; None where they may have to be split: `groups` looks closer."""
    if frame.gone is not None or not (step.is_merged or len(frame.calls) == 1):
        return None
    if step.max_rows and frame.rows > step.max_rows:
        return None
    inputs = {}
    for model_name, name in step.inputs:
        column = frame.columns.get(name)
        whole = column.whole() if column is not None and column.valid is None else None
        if whole is None:
            return None
        inputs[model_name] = Tensor(model_name, whole.datatype, whole.shape, whole.data)
    return Group(frame.everyone, None, inputs, frame.rows)


def groups(frame: Frame, step: Step, mask: Array | None) -> list[Group]:
    """The chosen rows, split into the requests in which they reach the step's model."""
    result: list[Group] = []
    for chosen, names in _kinds(frame, step, mask):
        if (chosen is None or chosen.any()) and (names or _runs_on_nothing(frame, step)):
            result += _groups_of_items(frame, step, chosen, names) if step.each else _groups(frame, step, chosen, names)
    if step.each is None and step.max_rows and any(group.rows > step.max_rows for group in result):
        return [part for group in result for part in _cut(frame, group, step.max_rows)]
    return result


def group_of_call(frame: Frame, group: Group, index: int) -> Group:
    """The rows of one call of a group."""
    if group.owners is not None:
        mine = (group.owners >= frame.starts[index]) & (group.owners < frame.stop(index))
        inputs = {name: selected(tensor, mine) for name, tensor in group.inputs.items()}
        return Group((index,), None, inputs, int(mine.sum()), group.owners[mine])
    places = group.places_in(frame)
    mine = (places >= frame.starts[index]) & (places < frame.stop(index))
    inputs = {name: selected(tensor, mine) for name, tensor in group.inputs.items()}
    return Group((index,), places[mine], inputs, int(mine.sum()))


def _kinds(frame: Frame, step: Step, mask: Array | None) -> list[tuple[Array | None, _Names]]:
    """The chosen rows by which optional inputs they have: those with and without one are different requests."""
    names = [(model_name, name) for model_name, name in step.inputs if name in frame.columns]
    kinds: list[tuple[Array | None, _Names]] = [(mask, names)]
    for name in [name for _, name in names if name not in step.required]:
        valid = frame.columns[name].valid
        if valid is not None:
            kinds = [kind for rows, having in kinds for kind in _with_and_without(name, valid, rows, having)]
    return kinds


def _with_and_without(
    name: str, valid: Array, rows: Array | None, names: _Names
) -> Iterator[tuple[Array | None, _Names]]:
    yield (valid if rows is None else rows & valid), names
    yield (~valid if rows is None else rows & ~valid), [pair for pair in names if pair[1] != name]


def _runs_on_nothing(frame: Frame, step: Step) -> bool:
    """Whether a step runs where it has none of its inputs: as in Triton, where callers may leave all of them out.

    Not with a batch axis, since nothing would say for how many rows, nor where none of what it might take was made.
    """
    if not step.inputs:
        return True
    return not frame.plan.is_batched and not any(name in frame.plan.producer for _, name in step.inputs)


def _cut(frame: Frame, group: Group, size: int) -> Iterator[Group]:
    """A group cut into stretches of at most the model's batch; their outputs need not have one shape."""
    places = group.places_in(frame)
    for start in range(0, group.rows, size):
        part = places[start : start + size]
        calls = [index for index in group.calls if ((part >= frame.starts[index]) & (part < frame.stop(index))).any()]
        inputs = {name: stretch(tensor, start, size) for name, tensor in group.inputs.items()}
        yield Group(tuple(calls), part, inputs, len(part))


def _groups(frame: Frame, step: Step, mask: Array | None, names: _Names) -> list[Group]:
    """A group for each shape; for each call where the model's requests are not merged."""
    inputs = [(model_name, frame.columns[name]) for model_name, name in names]
    if mask is None and (step.is_merged or len(frame.calls) == 1) and (whole := _wholes(inputs)) is not None:
        return [Group(frame.everyone, None, whole, frame.rows)]
    alike: dict[Any, list[int]] = {}
    for index in range(len(frame.calls)):
        key: Any = index
        if step.is_merged:
            parts = [(name, column.part(frame, index)) for name, column in inputs]
            key = tuple([(name, part.shape[1:], part.datatype) for name, part in parts if part is not None])
        alike.setdefault(key, []).append(index)
    candidates = [_group(frame, members, mask, inputs) for members in alike.values()]
    return [group for group in candidates if group is not None]


def _wholes(inputs: Sequence[tuple[str, Column]]) -> dict[str, Tensor] | None:
    """All rows of each input; None where some input is not in one piece."""
    wholes: dict[str, Tensor] = {}
    for name, column in inputs:
        whole = column.whole()
        if whole is None:
            return None
        wholes[name] = renamed(name, whole)
    return wholes


def _group(
    frame: Frame, members: Sequence[int], mask: Array | None, inputs: Sequence[tuple[str, Column]]
) -> Group | None:
    """The chosen rows of some calls, whose shapes are equal; None without any."""
    parts: dict[str, list[Tensor]] = {}
    places: list[Array] = []
    calls: list[int] = []
    for index in members:
        if frame.is_over[index]:
            continue
        start, stop = frame.starts[index], frame.stop(index)
        chosen = mask[start:stop] if mask is not None else None
        if chosen is not None and not chosen.any():
            continue
        calls.append(index)
        is_all = chosen is None or bool(chosen.all())
        places.append(np.arange(start, stop) if chosen is None or is_all else start + np.flatnonzero(chosen))
        for name, column in inputs:
            part = column.part(frame, index)
            if part is not None:  # it is of an optional input that was not made
                parts.setdefault(name, []).append(renamed(name, part) if is_all else selected(part, chosen, name))
    if not calls:
        return None
    rows = places[0] if len(places) == 1 else np.concatenate(places)
    return Group(tuple(calls), rows, {name: joined(name, pieces) for name, pieces in parts.items()}, len(rows))


def _groups_of_items(frame: Frame, step: Step, mask: Array | None, names: _Names) -> list[Group]:
    """The items of all chosen rows; those of one call by themselves where shapes differ or nothing is merged."""
    by_key: dict[Any, list[tuple[int, dict[str, Tensor], Array]]] = {}
    for index in range(len(frame.calls)):
        items = _items(frame, step, index, mask, names)
        if items is not None:
            inputs, owners = items
            key = tuple([(name, tensor.shape[1:]) for name, tensor in inputs.items()])
            by_key.setdefault(key if step.is_merged else index, []).append((index, inputs, owners))
    result = []
    for members in by_key.values():
        inputs = {name: joined(name, [inputs[name] for _, inputs, _ in members]) for name in members[0][1]}
        owners = np.concatenate([owners for _, _, owners in members])
        result.append(Group(tuple(index for index, _, _ in members), None, inputs, len(owners), owners))
    return result


def _items(
    frame: Frame, step: Step, index: int, mask: Array | None, names: _Names
) -> tuple[dict[str, Tensor], Array] | None:
    """(the step's inputs for each item of a call's chosen rows, the row of each); None without any."""
    assert step.each is not None
    start, size = frame.starts[index], frame.sizes[index]
    chosen = np.ones(size, bool) if mask is None else mask[start : start + size]
    if frame.is_over[index] or not chosen.any():
        return None
    first = frame.columns[step.each.items[0]].part(frame, index)
    assert first is not None
    counts = np.full(size, first.shape[1])
    if step.each.count:
        count = frame.columns[step.each.count].part(frame, index)
        assert count is not None
        counts = np.clip(count.array().reshape(size).astype(np.int64), 0, first.shape[1])
    counts = np.where(chosen, counts, 0)
    if not counts.any():
        return None
    is_item = np.arange(first.shape[1]) < counts[:, np.newaxis]
    row_of_item = np.repeat(np.arange(size), counts)
    inputs = {}
    for model_name, name in names:
        part = frame.columns[name].part(frame, index)
        if part is not None:
            array = part.array()[is_item if name in step.each.items else row_of_item]
            inputs[model_name] = Tensor(model_name, part.datatype, array.shape, array)
    return inputs, start + row_of_item
