"""A batch of calls on its way through a graph, as columns over the rows of all calls: executes nothing.

Says which rows take a step, and what the calls are answered. `grouping` takes a step's rows out of the columns,
`outputs` puts back what its model gave for them.
"""

from collections.abc import Sequence

import numpy as np

from tutti.core.dtypes import NUMPY, Array
from tutti.core.types import Answer, Call, Columns, InferResponse, Shape, Tensor
from tutti.ensembles import conditions
from tutti.ensembles.columns import CallRows, Column, renamed
from tutti.ensembles.graph import Plan, Step, TensorType


class Frame(CallRows):
    """Calls that go through the graph together: they have the same inputs and ask for the same outputs."""

    def __init__(self, plan: Plan, calls: Sequence[Call], is_alike: bool = False) -> None:
        """`is_alike`: the calls' inputs are known to have the same shapes."""
        super().__init__(calls)
        self.plan = plan
        outputs = calls[0].request.outputs
        self.asked = [name for name in plan.outputs if not outputs or name in outputs]
        self.everyone = tuple(range(len(calls)))
        self.open = len(calls)
        self.is_over = [False] * len(calls)
        # A mask of the rows whose calls are over.
        self.gone: Array | None = None
        self._decided: Array | None = None
        self.columns: dict[str, Column] = {}
        for name, spec in plan.tensors.items():
            if name in plan.producer:
                continue
            parts: list[Tensor | None] = [call.request.inputs.get(name) for call in calls]
            if parts[0] is not None:
                self.columns[name] = Column(parts=parts, is_alike=is_alike)
            elif spec.default is not None:
                self.columns[name] = self.defaults(name, spec)

    def end(self, index: int, answer: Answer) -> None:
        """Answer a call before its last step. Steps take none of its rows from then on."""
        if self.is_over[index]:
            return
        self.is_over[index] = True
        self.open -= 1
        self.calls[index].answer = answer
        if self.open:
            if self.gone is None:
                self.gone = np.zeros(self.rows, bool)
            self.gone[self.starts[index] : self.stop(index)] = True

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

    def defaults(self, name: str, spec: TensorType) -> Column:
        """The default for all rows."""
        return Column(parts=[self.default(name, spec, index) for index in range(len(self.calls))])

    def default(self, name: str, spec: TensorType, index: int) -> Tensor:
        """The default for the rows of one call."""
        dims = tuple(max(0, dim) for dim in spec.dims)
        array = full((self.sizes[index], *dims) if self.plan.is_batched else dims, spec)
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
        answers: list[InferResponse | None] = [
            InferResponse.of_part(plan.name, version, columns, start, start + size)
            for start, size in zip(self.starts, self.sizes, strict=True)
        ]
        if self.open < len(self.calls):
            return [None if is_over else answer for is_over, answer in zip(self.is_over, answers, strict=True)]
        return answers

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
                part = self.default(name, self.plan.tensors[name], index)
            if part is not None:
                outputs.append(renamed(name, part))
        return InferResponse(self.plan.name, version, outputs)


def full(shape: Shape, spec: TensorType) -> Array:
    """An array of a tensor's default; zeros, or empty texts, where it has none."""
    if spec.datatype == "BYTES":
        array: Array = np.full(shape, b"" if spec.default is None else spec.default, dtype=object)
        return array
    if spec.default is None:
        return np.zeros(shape, NUMPY[spec.datatype])
    return np.full(shape, spec.default, NUMPY[spec.datatype])
