"""A batch of calls on its way through a graph, as columns over the rows of all calls: executes nothing.

A step takes rows of columns and gives back columns. Where a step runs for some of the rows only, its outputs are put
back in their places; the others have the tensor's default, or are marked as not there.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np

from tutti.core import rows
from tutti.core.dtypes import NUMPY, Array
from tutti.core.types import Answer, Call, Columns, InferResponse, Shape, Tensor
from tutti.ensembles import conditions
from tutti.ensembles.explain import Explanation, StepsTimes
from tutti.ensembles.graph import Plan, Step, TensorType


class Column:
    """One tensor of all rows: in one piece, or in a part for each call where shapes differ.

    `valid` [rows] says for which rows there is one; None for all. A part is None where its call has none at all.
    """

    __slots__ = ("_is_alike", "_parts", "_whole", "valid")

    def __init__(
        self,
        whole: Tensor | None = None,
        parts: list[Tensor | None] | None = None,
        valid: Array | None = None,
        is_alike: bool = False,
    ) -> None:
        """`is_alike`: the parts are known to have one shape."""
        self._whole = whole
        self._parts = parts
        self._is_alike = is_alike
        self.valid = valid

    def whole(self) -> Tensor | None:
        """All rows in one tensor; None where shapes differ or parts are missing."""
        if self._whole is not None:
            return self._whole
        if self._parts is not None:
            parts = [part for part in self._parts if part is not None]
            first = parts[0] if parts else None
            if first is None or len(parts) < len(self._parts):
                return None
            if not self._is_alike and any(
                part.shape[1:] != first.shape[1:] or part.datatype != first.datatype for part in parts
            ):
                return None
            if len(parts) == 1:
                self._whole = first
            else:
                array = rows.concatenate(parts)
                self._whole = Tensor(first.name, first.datatype, array.shape, array)
            self._parts = None
        return self._whole

    def part(self, frame: "Frame", index: int) -> Tensor | None:
        """The rows of one call."""
        if self._parts is not None:
            return self._parts[index]
        whole = self._whole
        assert whole is not None
        if len(frame.calls) == 1:
            return whole
        start, stop = frame.starts[index], frame.starts[index] + frame.sizes[index]
        return rows.part(whole, start, stop)

    def is_there(self, frame: "Frame", index: int) -> bool:
        """Whether all rows of a call have it."""
        if self.valid is None:
            return self._parts is None or self._parts[index] is not None
        start = frame.starts[index]
        return bool(self.valid[start : start + frame.sizes[index]].all())


@dataclass(slots=True, eq=False)
class Group:
    """Rows that reach a step's model as one request: of these calls (by index), at these rows of the frame.

    For a step that runs per item, `owners` are the rows that the items belong to, ascending.
    """

    calls: tuple[int, ...]
    at: Array | None
    inputs: dict[str, Tensor]
    rows: int
    owners: Array | None = None
    outputs: list[Sequence[Tensor | None] | None] = field(default_factory=list)


class Frame:
    """Calls that go through the graph together: they have the same inputs and ask for the same outputs."""

    def __init__(self, plan: Plan, calls: Sequence[Call], steps: frozenset[int], is_alike: bool = False) -> None:
        """`is_alike`: the calls' inputs are known to have the same shapes."""
        self.plan = plan
        # Held by whoever changes the frame: steps come back from any thread.
        self.lock = threading.Lock()
        self.calls = calls
        outputs = calls[0].request.outputs
        self.asked = [name for name in plan.outputs if not outputs or name in outputs]
        self.sizes = [call.rows for call in calls]
        self.starts = [0, *accumulate(self.sizes[:-1])]
        self.rows = self.starts[-1] + self.sizes[-1]
        self.everyone = tuple(range(len(calls)))
        self.waits = {index: len(plan.steps[index].needs) for index in steps}
        self.left = len(steps)
        self.has_deadlines = max([call.deadline_ns for call in calls]) > 0
        self.looked_ns = 0
        self.open = len(calls)
        self.is_over = [False] * len(calls)
        self._decided: Array | None = None
        # Rows of calls that are over.
        self.gone: Array | None = None
        self.shed: dict[int, list[str]] = {}
        self.explanation: Explanation | None = None
        # Of the steps that have been executed.
        self.times = StepsTimes()
        # What the executor knows of steps in execution.
        self.working: dict[int, Any] = {}
        self.columns: dict[str, Column] = {}
        for name, given in plan.tensors.items():
            if name in plan.producer:
                continue
            parts: list[Tensor | None] = [call.request.inputs.get(name) for call in calls]
            if parts[0] is not None:
                self.columns[name] = Column(parts=parts, is_alike=is_alike)
            elif given.default is not None:
                self.columns[name] = self._nothing(name, given)

    def end(self, index: int, answer: Answer) -> None:
        """A call is over before its last step."""
        if self.is_over[index]:
            return
        self.is_over[index] = True
        self.open -= 1
        self.calls[index].answer = answer
        if self.open:
            if self.gone is None:
                self.gone = np.zeros(self.rows, bool)
            self.gone[self.starts[index] : self.starts[index] + self.sizes[index]] = True

    def chosen(self, step: Step) -> Array | None:
        """For which rows a step runs, [rows] bool; None for all of them."""
        mask: Array | None = None
        for name in step.required:
            column = self.columns.get(name)
            if column is None:
                return np.zeros(self.rows, bool)
            if column.valid is not None:
                mask = column.valid if mask is None else mask & column.valid
        if step.when is not None:
            holds = self.holds(step.when)
            mask = holds if mask is None else mask & holds
        if step.unless is not None:
            mask = ~self.decided(step.unless) if mask is None else mask & ~self.decided(step.unless)
        if self.gone is not None:
            mask = ~self.gone if mask is None else mask & ~self.gone
        return None if mask is None or mask.all() else mask

    def why_not(self, step: Step) -> str:
        """Why no row takes a step."""
        absent = [name for name in step.required if name not in self.columns]
        if absent:
            return f"{', '.join(absent)}: not given or made"
        if step.unless is not None and self.decided(step.unless).all():
            return f"decided: {step.unless.text}"
        if step.when is not None and not self.holds(step.when).any():
            text = step.when.text
            return f"not ({text})" if " or " in text or " and " in text else f"not {text}"
        return "no items" if step.each is not None and self.chosen(step) is None else "no row has all its inputs"

    def decided(self, condition: conditions.Condition) -> Array:
        """For which rows the graph's exit holds, [rows] bool."""
        if self._decided is None:
            self._decided = self.holds(condition)
        return self._decided

    def leave(self, condition: conditions.Condition, version: str) -> list[int]:
        """The calls all of whose rows are decided, by index; they get their answers now, and are over."""
        if self._decided is not None:
            return []
        decided = self.decided(condition)
        left = []
        for index, (start, size) in enumerate(zip(self.starts, self.sizes, strict=True)):
            if not self.is_over[index] and decided[start : start + size].all():
                answer = self._answer(version, self.asked, index)
                assert answer is not None
                self.end(index, answer)
                left.append(index)
        return left

    def holds(self, condition: conditions.Condition) -> Array:
        """For which rows a condition holds, [rows] bool."""
        columns: dict[str, conditions.Column | None] = {}
        for name in condition.names:
            column = self.columns.get(name)
            whole = column.whole() if column is not None else None
            if column is None:
                columns[name] = None
            elif whole is not None:
                array = whole.array() if self.plan.is_batched else whole.array()[np.newaxis]
                columns[name] = conditions.Column(array, column.valid)
            else:
                return self._holds_by_call(condition)
        return condition.holds(columns, self.rows)

    def _holds_by_call(self, condition: conditions.Condition) -> Array:
        held = []
        for index, size in enumerate(self.sizes):
            start = self.starts[index]
            columns: dict[str, conditions.Column | None] = {}
            for name in condition.names:
                column = self.columns.get(name)
                part = column.part(self, index) if column is not None else None
                if column is None or part is None:
                    columns[name] = None
                else:
                    valid = column.valid[start : start + size] if column.valid is not None else None
                    columns[name] = conditions.Column(part.array(), valid)
            held.append(condition.holds(columns, size))
        return np.concatenate(held)

    def groups(self, step: Step, mask: Array | None) -> list[Group]:
        """What of the chosen rows reaches the step's model as which requests."""
        inputs = [(model_name, name) for model_name, name in step.inputs if name in self.columns]
        partial = [name for _, name in inputs if self.columns[name].valid is not None and name not in step.required]
        # Rows that have an optional input and rows that do not are different requests.
        kinds: list[tuple[Array | None, list[str]]] = [(mask, [])]
        for name in partial:
            there = self.columns[name].valid
            assert there is not None
            kinds = [
                kind
                for rows_of, lacking in kinds
                for kind in (
                    (there if rows_of is None else rows_of & there, lacking),
                    (~there if rows_of is None else rows_of & ~there, [*lacking, name]),
                )
            ]
        made: list[Group] = []
        for rows_of, lacking in kinds:
            if rows_of is None or rows_of.any():
                had = [(model_name, name) for model_name, name in inputs if name not in lacking]
                if had or self._runs_on_nothing(step):
                    made += self._groups(step, rows_of, had)
        if step.each is None and step.max_rows and any(group.rows > step.max_rows for group in made):
            return [part for group in made for part in self._cut(group, step.max_rows)]
        return made

    def _runs_on_nothing(self, step: Step) -> bool:
        """Whether a step runs where it has none of its inputs: as in Triton, where callers may leave all of them out.

        Not with a batch axis, since nothing would say for how many rows, nor where none of what it might take was made.
        """
        if not step.inputs:
            return True
        return not self.plan.is_batched and not any(name in self.plan.producer for _, name in step.inputs)

    def _cut(self, group: Group, size: int) -> list[Group]:
        """A group in stretches that the model takes; their outputs need not have one shape."""
        at = np.arange(self.rows) if group.at is None else group.at
        parts = []
        for start in range(0, group.rows, size):
            own = at[start : start + size]
            calls = tuple([i for i in group.calls if ((own >= self.starts[i]) & (own < self._stop(i))).any()])
            inputs = {name: stretch(tensor, start, size) for name, tensor in group.inputs.items()}
            parts.append(Group(calls, own, inputs, len(own)))
        return parts

    def _stop(self, index: int) -> int:
        return self.starts[index] + self.sizes[index]

    def everything(self, step: Step) -> Group | None:
        """All rows as one request, for a plain step; None where that may not be, or needs a closer look."""
        if self.gone is not None or not (step.is_merged or len(self.calls) == 1):
            return None
        if step.max_rows and self.rows > step.max_rows:
            return None
        inputs = {}
        for model_name, name in step.inputs:
            column = self.columns.get(name)
            whole = column.whole() if column is not None and column.valid is None else None
            if whole is None:
                return None
            inputs[model_name] = Tensor(model_name, whole.datatype, whole.shape, whole.data)
        return Group(self.everyone, None, inputs, self.rows)

    def _groups(self, step: Step, mask: Array | None, names: Sequence[tuple[str, str]]) -> list[Group]:
        if step.each is not None:
            return self._groups_of_items(step, mask, names)
        inputs = [(model_name, self.columns[name]) for model_name, name in names]
        if mask is None and (step.is_merged or len(self.calls) == 1):
            taken: dict[str, Tensor] = {}
            for name, column in inputs:
                whole = column.whole()
                if whole is None:
                    break
                taken[name] = _named(name, whole)
            if len(taken) == len(inputs):
                return [Group(self.everyone, None, taken, self.rows)]
        alike: dict[Any, list[int]] = {}
        for index in range(len(self.calls)):
            key: Any = index
            if step.is_merged:
                parts = [(name, column.part(self, index)) for name, column in inputs]
                key = tuple([(name, part.shape[1:], part.datatype) for name, part in parts if part is not None])
            alike.setdefault(key, []).append(index)
        made = [self._group(members, mask, inputs) for members in alike.values()]
        return [group for group in made if group is not None]

    def group_of(self, group: Group, index: int) -> Group:
        """The rows of one call of a group."""
        start = self.starts[index]
        if group.owners is not None:
            mine = (group.owners >= start) & (group.owners < start + self.sizes[index])
            taken = {name: _taken(tensor, mine) for name, tensor in group.inputs.items()}
            return Group((index,), None, taken, int(mine.sum()), group.owners[mine])
        at = np.arange(self.rows) if group.at is None else group.at
        mine = (at >= start) & (at < start + self.sizes[index])
        taken = {name: _taken(tensor, mine) for name, tensor in group.inputs.items()}
        return Group((index,), at[mine], taken, int(mine.sum()))

    def _group(self, members: Sequence[int], mask: Array | None, inputs: Sequence[tuple[str, Column]]) -> Group | None:
        taken: dict[str, list[Tensor]] = {}
        at: list[Array] = []
        calls: list[int] = []
        for index in members:
            if self.is_over[index]:
                continue
            start, size = self.starts[index], self.sizes[index]
            own = mask[start : start + size] if mask is not None else None
            if own is not None and not own.any():
                continue
            calls.append(index)
            is_all = own is None or bool(own.all())
            at.append(np.arange(start, start + size) if own is None or is_all else start + np.flatnonzero(own))
            for name, column in inputs:
                part = column.part(self, index)
                if part is None:
                    continue  # an optional input that was not made
                taken.setdefault(name, []).append(_named(name, part) if is_all else _taken(part, own, name))
        if not calls:
            return None
        rows_at = at[0] if len(at) == 1 else np.concatenate(at)
        return Group(tuple(calls), rows_at, {name: _joined(name, parts) for name, parts in taken.items()}, len(rows_at))

    def _groups_of_items(self, step: Step, mask: Array | None, names: Sequence[tuple[str, str]]) -> list[Group]:
        """The items of all chosen rows; those of one call by themselves where shapes differ or nothing is merged."""
        assert step.each is not None
        by_key: dict[Any, list[tuple[int, dict[str, Tensor], Array]]] = {}
        for index in range(len(self.calls)):
            found = self._items(step, index, mask, names)
            if found is not None:
                inputs, owners = found
                key = tuple([(name, tensor.shape[1:]) for name, tensor in inputs.items()])
                by_key.setdefault(key if step.is_merged else index, []).append((index, inputs, owners))
        groups = []
        for members in by_key.values():
            taken = {name: _joined(name, [inputs[name] for _, inputs, _ in members]) for name in members[0][1]}
            owners = np.concatenate([own for _, _, own in members])
            groups.append(Group(tuple(index for index, _, _ in members), None, taken, len(owners), owners))
        return groups

    def _items(
        self, step: Step, index: int, mask: Array | None, names: Sequence[tuple[str, str]]
    ) -> tuple[dict[str, Tensor], Array] | None:
        """(the step's inputs for each item of a call's chosen rows, the row of each); None without any."""
        assert step.each is not None
        start, size = self.starts[index], self.sizes[index]
        own = np.ones(size, bool) if mask is None else mask[start : start + size]
        if self.is_over[index] or not own.any():
            return None
        first = self.columns[step.each.items[0]].part(self, index)
        assert first is not None
        counts = np.full(size, first.shape[1])
        if step.each.count:
            given = self.columns[step.each.count].part(self, index)
            assert given is not None
            counts = np.clip(given.array().reshape(size).astype(np.int64), 0, first.shape[1])
        counts = np.where(own, counts, 0)
        total = int(counts.sum())
        if not total:
            return None
        real = np.arange(first.shape[1]) < counts[:, np.newaxis]
        of_row = np.repeat(np.arange(size), counts)
        inputs = {}
        for model_name, name in names:
            part = self.columns[name].part(self, index)
            if part is None:
                continue
            array = part.array()
            taken = array[real] if name in step.each.items else array[of_row]
            inputs[model_name] = Tensor(model_name, part.datatype, taken.shape, taken)
        return inputs, start + of_row

    def put(self, step: Step, groups: Sequence[Group], mask: Array | None) -> None:
        """Make columns of what a step gave back for its groups, of the chosen rows."""
        if step.each is not None:
            chosen = np.ones(self.rows, bool) if mask is None else mask
            for position, (_, name) in enumerate(step.outputs):
                self.columns[name] = self._gathered(groups, position, name, step.gathers[position], chosen)
            return
        only = groups[0] if len(groups) == 1 else None
        if only is not None and only.at is None and len(only.outputs) == 1 and only.outputs[0] is not None:
            for (_, name), tensor in zip(step.outputs, only.outputs[0], strict=True):
                if tensor is not None:
                    self.columns[name] = Column(_named(name, tensor))
                elif self.plan.tensors[name].default is not None:
                    self.columns[name] = self._nothing(name, self.plan.tensors[name])
            return
        for position, (_, name) in enumerate(step.outputs):
            column = self._scattered(step, groups, position, name)
            if column is not None:
                self.columns[name] = column

    def _scattered(self, step: Step, groups: Sequence[Group], position: int, name: str) -> Column | None:
        datatypes = _datatypes(groups, position)
        if len(datatypes) > 1:
            return self._of_several_datatypes(groups, position, name)
        spec = self._as_made(name, datatypes)
        done = [(group, array) for group in groups if (array := _output(group, position)) is not None]
        if not done:
            return self._nothing(name, spec) if spec.default is not None else None
        if not self.plan.is_batched or not step.max_rows:
            parts: list[Tensor | None] = [None] * len(self.calls)
            for group, array in done:
                parts[group.calls[0]] = Tensor(name, spec.datatype, array.shape, array)
            return self._with_default(name, spec, parts, None)
        at = [np.arange(self.rows) if group.at is None else group.at for group, _ in done]
        valid = np.zeros(self.rows, bool)
        for one in at:
            valid[one] = True
        is_all = bool(valid.all())
        tail = done[0][1].shape[1:]
        # Where a dimension varies, a call's rows that were not made must not look like those of other calls.
        if all(array.shape[1:] == tail for _, array in done) and (is_all or -1 not in spec.dims):
            arrays = [array for _, array in done]
            joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
            places = at[0] if len(at) == 1 else np.concatenate(at)
            if not is_all or not np.array_equal(places, np.arange(self.rows)):
                whole = _filled((self.rows, *tail), spec)
                whole[places] = joined
                joined = whole
            tensor = Tensor(name, spec.datatype, joined.shape, joined)
            return Column(tensor, valid=None if is_all or spec.default is not None else valid)
        parts = [None] * len(self.calls)
        for index, (start, size) in enumerate(zip(self.starts, self.sizes, strict=True)):
            own = []
            for (group, array), places in zip(done, at, strict=True):
                if index in group.calls:
                    mine = (places >= start) & (places < start + size)
                    own.append((places[mine] - start, array[mine]))
            if not own:
                continue
            tail = own[0][1].shape[1:]
            if spec.is_items and len({array.shape[2:] for _, array in own}) == 1:
                tail = (max(array.shape[1] for _, array in own), *tail[1:])
                own = [(places, _longer(array, tail[0], spec)) for places, array in own]
            if any(array.shape[1:] != tail for _, array in own):
                shapes = [list(array.shape[1:]) for _, array in own]
                raise ValueError(f"output '{name}' has rows of different shapes in one request: {shapes}")
            filled = own[0][1] if len(own[0][1]) == size else _filled((size, *tail), spec)
            for places, array in own:
                if array is not filled:
                    filled[places] = array
            parts[index] = Tensor(name, spec.datatype, filled.shape, filled)
        return self._with_default(name, spec, parts, None if is_all else valid)

    def _as_made(self, name: str, datatypes: set[str]) -> TensorType:
        """A tensor's type with the datatype that its step has given it. Raises ValueError where it gave several."""
        spec = self.plan.tensors[name]
        if len(datatypes) > 1:
            raise ValueError(f"output '{name}' has several datatypes in one request: {', '.join(sorted(datatypes))}")
        return replace(spec, datatype=min(datatypes)) if datatypes and spec.datatype not in datatypes else spec

    def _of_several_datatypes(self, groups: Sequence[Group], position: int, name: str) -> Column:
        """An output that has one datatype in one call and another in another, as a part for each call."""
        parts: list[Tensor | None] = [None] * len(self.calls)
        valid = np.zeros(self.rows, bool)
        for group in groups:
            datatypes, array = _datatypes([group], position), _output(group, position)
            if array is None:
                continue
            spec, index = self._as_made(name, datatypes), group.calls[0]
            if len(group.calls) > 1 or group.rows != self.sizes[index]:
                raise ValueError(f"output '{name}' has several datatypes in one batch, of which this is a part")
            parts[index] = Tensor(name, spec.datatype, array.shape, array)
            valid[self.starts[index] : self._stop(index)] = True
        return self._with_default(name, self.plan.tensors[name], parts, None if valid.all() else valid)

    def _gathered(self, groups: Sequence[Group], position: int, name: str, how: str, chosen: Array) -> Column:
        """An output of all items, a row's brought together again.

        All of no items is nothing, their sum is 0; the largest, the least and the mean of none are not there.
        """
        spec = self._as_made(name, _datatypes(groups, position))
        found: list[Array | None] = [None] * self.rows
        for group in groups:
            array = _output(group, position)
            assert group.owners is not None
            if array is None:
                continue
            owners, first = np.unique(group.owners, return_index=True)
            for owner, begin, end in zip(owners, first, [*first[1:], len(array)], strict=True):
                found[owner] = array[begin:end]
        parts: list[Tensor | None] = []
        for start, size in zip(self.starts, self.sizes, strict=True):
            parts.append(_gather(found[start : start + size], chosen[start : start + size], how, name, spec))
        if spec.default is not None:
            return Column(parts=parts)
        there = np.array([one is not None for one in found]) if how in ("max", "min", "mean") else chosen
        return Column(parts=parts, valid=None if there.all() else there)

    def _with_default(self, name: str, spec: TensorType, parts: list[Tensor | None], valid: Array | None) -> Column:
        if spec.default is None:
            return Column(parts=parts, valid=valid)
        for index, part in enumerate(parts):
            if part is None:
                parts[index] = self._default_part(name, spec, index)
        return Column(parts=parts)

    def _nothing(self, name: str, spec: TensorType) -> Column:
        """The default for all rows."""
        return Column(parts=[self._default_part(name, spec, index) for index in range(len(self.calls))])

    def _default_part(self, name: str, spec: TensorType, index: int) -> Tensor:
        dims = tuple(max(0, dim) for dim in spec.dims)
        array = _filled((self.sizes[index], *dims) if self.plan.is_batched else dims, spec)
        return Tensor(name, spec.datatype, array.shape, array)

    def answers(self, version: str) -> list[InferResponse | None]:
        """Each call's answer, None for those that are over; outputs that were not made are not in it."""
        plan, names = self.plan, self.asked
        wholes = []
        for name in names:
            column = self.columns.get(name)
            whole = column.whole() if column is not None and column.valid is None else None
            if whole is None or whole.datatype == "BYTES" or len(self.calls) == 1:
                return [self._answer(version, names, index) for index in range(len(self.calls))]
            wholes.append(Tensor(name, whole.datatype, whole.shape, whole.data))
        columns = Columns(wholes)
        made: list[InferResponse | None] = [
            InferResponse.of_part(plan.name, version, columns, start, start + size)
            for start, size in zip(self.starts, self.sizes, strict=True)
        ]
        if self.open < len(self.calls):
            made = [None if is_over else answer for is_over, answer in zip(self.is_over, made, strict=True)]
        return made

    def _answer(self, version: str, names: Sequence[str], index: int) -> InferResponse | None:
        if self.is_over[index]:
            return None
        outputs = []
        for name in names:
            column = self.columns.get(name)
            part = None
            if column is not None and column.is_there(self, index):
                part = column.part(self, index)
            elif column is None and self.plan.tensors[name].default is not None:
                part = self._default_part(name, self.plan.tensors[name], index)
            if part is not None:
                outputs.append(_named(name, part))
        return InferResponse(self.plan.name, version, outputs)


def _named(name: str, tensor: Tensor) -> Tensor:
    return Tensor(name, tensor.datatype, tensor.shape, tensor.data)


def _taken(tensor: Tensor, mask: Any, name: str = "") -> Tensor:
    array = tensor.array()[mask]
    return Tensor(name or tensor.name, tensor.datatype, array.shape, array)


def _joined(name: str, parts: Sequence[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    array = rows.concatenate(parts)
    return Tensor(name, parts[0].datatype, array.shape, array)


def _datatypes(groups: Sequence[Group], position: int) -> set[str]:
    """The datatypes that an output has; nearly always one."""
    pieces = [piece[position] for group in groups for piece in group.outputs if piece is not None]
    return {tensor.datatype for tensor in pieces if tensor is not None}


def _output(group: Group, position: int) -> Array | None:
    """One output of all pieces of a group; None where it has failed or was shed."""
    if not group.outputs or any(piece is None for piece in group.outputs):
        return None
    given = [piece[position] for piece in group.outputs if piece is not None]
    arrays = [tensor.array() for tensor in given if tensor is not None]
    if len(arrays) < len(given):
        return None  # the answer lacks it
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def stretch(tensor: Tensor, start: int, size: int) -> Tensor:
    """Rows of a tensor, without a copy."""
    return rows.part(tensor, start, start + size)


def _longer(array: Array, size: int, spec: TensorType) -> Array:
    """[rows, items, ...], filled up to `size` items."""
    if array.shape[1] == size:
        return array
    made = _filled((array.shape[0], size, *array.shape[2:]), spec)
    made[:, : array.shape[1]] = array
    return made


def _filled(shape: Shape, spec: TensorType) -> Array:
    if spec.datatype == "BYTES":
        array: Array = np.full(shape, b"" if spec.default is None else spec.default, dtype=object)
        return array
    if spec.default is None:
        return np.zeros(shape, NUMPY[spec.datatype])
    return np.full(shape, spec.default, NUMPY[spec.datatype])


def _gather(own: Sequence[Array | None], chosen: Array, how: str, name: str, spec: TensorType) -> Tensor:
    """The items' outputs of each of a call's rows, [items, ...] or None, as one tensor."""
    dims = spec.dims[1:] if how == "concat" else spec.dims
    some = next((array for array in own if array is not None), None)
    tail = tuple(max(0, dim) for dim in dims) if some is None else some.shape[1:]
    if how == "concat":
        longest = max((len(array) for array in own if array is not None), default=0)
        made = _filled((len(own), longest, *tail), spec)
        for row, array in enumerate(own):
            if array is not None:
                made[row, : len(array)] = array
        return Tensor(name, spec.datatype, made.shape, made)
    made = _filled((len(own), *tail), spec)
    for row, array in enumerate(own):
        if array is not None:
            made[row] = _REDUCE[how](array)
        elif how == "sum" and chosen[row]:
            made[row] = 0
    return Tensor(name, spec.datatype, made.shape, made)


_REDUCE: dict[str, Any] = {
    "max": lambda array: array.max(axis=0),
    "min": lambda array: array.min(axis=0),
    "mean": lambda array: array.mean(axis=0),
    "sum": lambda array: array.sum(axis=0),
}
