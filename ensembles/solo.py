"""One request through a graph of plain steps: what a frame does for many, without columns, masks and groups.

Most requests of a server with few clients come alone, and their latency is what Python adds to each step.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from tutti.core.errors import Cancelled, DeadlineExceeded, InferError, Internal
from tutti.core.types import Answer, Call, Infer, InferRequest, InferResponse, Tensor, now_ns
from tutti.ensembles.axes import changed_inputs, changed_outputs
from tutti.ensembles.explain import StepsTimes
from tutti.ensembles.graph import Plan, Step

# Steps that became ready while this thread starts others: they wait, rather than start within them. Without that a
# chain of quick steps would keep every step's tensors, and a stack of frames, until its last one ends.
_here = threading.local()


def in_turn(submit: Callable[[Any], None], ready: Any) -> None:
    """Call `submit` with what is ready; inside such a call of this thread, that one does it afterwards."""
    waiting: deque[tuple[Callable[[Any], None], Any]] | None = getattr(_here, "waiting", None)
    if waiting is not None:
        waiting.append((submit, ready))
        return
    waiting = _here.waiting = deque([(submit, ready)])
    try:
        while waiting:
            next_submit, steps = waiting.popleft()
            next_submit(steps)
    finally:
        _here.waiting = None


def as_error(error: Exception) -> InferError:
    """An exception from within a graph as the error that the request gets."""
    return error if isinstance(error, InferError) else Internal(f"{type(error).__name__}: {error}")


def output_fault(step: Step, outputs: Sequence[Tensor | None], rows: int) -> InferError | None:
    """Why the graph cannot go on with a step's outputs: wrong rows; None where it can."""
    if step.axes_out and rows != 1 and any(axis.is_added for axis in step.axes_out):
        return Internal(f"the model has no batch, and gives one row: the request has {rows}")
    for tensor in outputs if step.max_rows else ():
        if tensor is None:
            continue
        if not tensor.shape or tensor.shape[0] != rows:
            fault = f"expected {rows} rows, the model's answer has shape {list(tensor.shape)}"
            return Internal(f"output '{tensor.name}': {fault}")
    return None


def wanted_outputs(step: Step, answer: InferResponse) -> Sequence[Tensor | None] | InferError:
    """A step's outputs in its order, None for those that the answer may lack, and does; or why they cannot be had."""
    outputs = answer.outputs
    if tuple([tensor.name for tensor in outputs]) == step.wanted:
        return outputs
    by_name = {tensor.name: tensor for tensor in outputs}
    missing = [name for name in step.wanted if name not in by_name and name not in step.dispensable]
    if missing:
        return Internal(f"output '{missing[0]}': the model's answer lacks it")
    return [by_name.get(name) for name in step.wanted]


def in_ensemble(name: str, step: Step, error: InferError) -> InferError:
    """A step's error, naming ensemble and step. Triton's own sentences name the model already, and stay."""
    is_told = error.message.startswith("inference request ") and f"'{step.model_name}'" in error.message
    where = "" if is_told else f"step '{step.model_name}': "
    return type(error)(f"in ensemble '{name}', {where}{error.message}")


class _Program:
    """The part of a plan that the outputs asked for need."""

    def __init__(self, plan: Plan, outputs: tuple[str, ...]) -> None:
        needed = plan.steps_for(outputs)
        self.asked = [name for name in plan.outputs if not outputs or name in outputs]
        self.count = len(needed)
        self.waits = [len(step.needs) for step in plan.steps]
        self.first = [plan.steps[index] for index in sorted(needed) if not plan.steps[index].needs]
        self.followers = [
            [later for later in plan.steps if later.index in needed and step.index in later.needs]
            for step in plan.steps
        ]
        readers = {name: [index for index in all_ if index in needed] for name, all_ in plan.readers.items()}
        kept = set(self.asked)
        # Tensors that are dropped after a step, its only reader; and those that the last of several readers drops.
        self.drops = [
            [name for name in step.read if name not in kept and len(readers[name]) == 1] for step in plan.steps
        ]
        self.shared = {name: len(all_) for name, all_ in readers.items() if name not in kept and len(all_) > 1}


class _Solo:
    """One request on its way."""

    __slots__ = ("call", "is_odd", "is_over", "left", "lock", "program", "shared", "tensors", "times", "waits")

    def __init__(self, call: Call, program: _Program) -> None:
        self.call = call
        self.program = program
        self.times = call.times = StepsTimes()
        self.tensors = dict(call.request.inputs)
        self.waits = program.waits.copy()
        self.shared = program.shared.copy() if program.shared else None
        self.left = program.count
        self.is_over = False
        # Whether a step's outputs had other names or datatypes than its configuration says.
        self.is_odd = False
        self.lock = threading.Lock()


_Ready = list[tuple[_Solo, Step]]


class SoloExecutor:
    """Takes single calls through a plan of plain steps. They are handed to `end` with their answers."""

    def __init__(self, plan: Plan, version: str, infer: Infer, end: Callable[[list[Call]], None]) -> None:
        self._plan = plan
        self._version = version
        self._infer = infer
        self._end = end
        self._programs: dict[tuple[str, ...], _Program] = {}
        self._inputs = sum(name not in plan.producer for name in plan.tensors)
        self._most_rows = min((step.max_rows for step in plan.steps if step.max_rows), default=1)
        self._is_plain = all(step.is_plain and not step.is_optional for step in plan.steps) and all(
            plan.tensors[name].made == "always" for step in plan.steps for name in step.read
        )
        self._datatypes = [[plan.tensors[name].datatype for _, name in step.outputs] for step in plan.steps]
        # For each step, a part of its requests' signatures.
        self._marks = [object() for _ in plan.steps]

    def takes(self, call: Call) -> bool:
        request = call.request
        return self._is_plain and call.rows <= self._most_rows and len(request.inputs) == self._inputs

    def start(self, call: Call) -> None:
        outputs = call.request.outputs
        program = self._programs.get(outputs)
        if program is None:
            program = self._programs[outputs] = _Program(self._plan, outputs)
        solo = _Solo(call, program)
        in_turn(self._submit, [(solo, step) for step in program.first])

    def settle(self, calls: Sequence[Call]) -> None:
        """Steps' calls come back."""
        ready: _Ready = []
        ended: list[Call] = []
        for call in calls:
            solo, step = call.token
            with solo.lock:
                if not solo.is_over:
                    if call.times is not None:
                        solo.times.add(step.model_name, call.times, call.arrived_ns)
                    try:
                        self._take_back(solo, step, call.answer, ready)
                    except Exception as error:  # for example a tensor on a device that has failed
                        self._fail(solo, step, as_error(error))
                    if solo.is_over:
                        ended.append(solo.call)
        if ready:
            in_turn(self._submit, ready)
        if ended:
            self._end(ended)

    def _submit(self, ready: _Ready) -> None:
        if len(ready) > 1:  # models with threads first: they execute while this thread executes the others
            ready = sorted(ready, key=lambda pair: pair[1].is_merged)
        for solo, step in ready:
            call = solo.call
            if call.is_cancelled or (call.deadline_ns and call.deadline_ns <= now_ns()):
                self._drop(solo, step)
                continue
            parent, tensors = call.request, solo.tensors
            inputs = {}
            shapes = []
            with solo.lock:
                if solo.is_over:  # a step that was started with this one has failed meanwhile
                    continue
                for model_name, name in step.inputs:
                    tensor = tensors.get(name)
                    if tensor is not None:
                        inputs[model_name] = Tensor(model_name, tensor.datatype, tensor.shape, tensor.data)
                        shapes.append(tensor.shape)
            if step.axes_in:
                try:
                    inputs = changed_inputs(step.axes_in, inputs)
                except Exception as error:
                    self._end_with(solo, step, as_error(error))
                    continue
            request = InferRequest(
                step.model_name, inputs, step.version, parent.id, step.wanted, parent.parameters, {}, {},
                None if solo.is_odd else (self._marks[step.index], *shapes), step.staying,
            )  # fmt: skip
            inner = Call(request, self, (solo, step))
            inner.deadline_ns = call.deadline_ns
            inner.requests = call.requests
            if call.trace is not None:
                call.trace.follow(inner)
            self._infer([inner])

    def _drop(self, solo: _Solo, step: Step) -> None:
        error: InferError = DeadlineExceeded("the request's deadline passed before this step")
        if solo.call.is_cancelled:
            error = Cancelled("the request was cancelled by its caller")
        self._end_with(solo, step, error)

    def _end_with(self, solo: _Solo, step: Step, error: InferError) -> None:
        with solo.lock:
            if solo.is_over:
                return
            self._fail(solo, step, error)
        self._end([solo.call])

    def _take_back(self, solo: _Solo, step: Step, answer: Answer | None, ready: _Ready) -> None:
        if not isinstance(answer, InferResponse):
            assert answer is not None
            self._fail(solo, step, answer)
            return
        outputs = wanted_outputs(step, answer)
        fault = outputs if isinstance(outputs, InferError) else output_fault(step, outputs, solo.call.rows)
        if isinstance(outputs, InferError) or fault is not None:
            assert fault is not None
            self._fail(solo, step, fault)
            return
        if step.axes_out:
            outputs = changed_outputs(step.axes_out, outputs)
        program, tensors = solo.program, solo.tensors
        if not solo.is_odd and [tensor and tensor.datatype for tensor in outputs] != self._datatypes[step.index]:
            solo.is_odd = True
        for (_, name), tensor in zip(step.outputs, outputs, strict=True):
            if tensor is not None:
                tensors[name] = Tensor(name, tensor.datatype, tensor.shape, tensor.data)
        for name in program.drops[step.index]:
            tensors.pop(name, None)
        if solo.shared is not None:
            self._release(solo, step)
        solo.left -= 1
        if not solo.left:
            answered = [tensors[name] for name in program.asked if name in tensors]
            solo.call.answer = InferResponse(self._plan.name, self._version, answered)
            solo.is_over = True
            return
        for later in program.followers[step.index]:
            solo.waits[later.index] -= 1
            if not solo.waits[later.index]:
                ready.append((solo, later))

    def _release(self, solo: _Solo, step: Step) -> None:
        assert solo.shared is not None
        for name in step.read:
            if name in solo.shared:
                solo.shared[name] -= 1
                if not solo.shared[name]:
                    solo.tensors.pop(name, None)

    def _fail(self, solo: _Solo, step: Step, error: InferError) -> None:
        if not step.is_segment:  # the errors of a segment name the ensemble already
            error = in_ensemble(self._plan.name, step, error)
        solo.call.answer = error
        solo.is_over = True
        solo.tensors.clear()
