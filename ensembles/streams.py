"""Graphs with decoupled steps: each answer of such a step goes on through the rest of the graph by itself.

The plan is cut at its decoupled steps. What lies between them are plans as any other; a request goes through them and
comes out as any number of answers, in the order in which the steps gave theirs.
"""

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tutti.core.errors import Cancelled, InferError, Internal
from tutti.core.types import Answer, Call, Infer, InferRequest, InferResponse, Parameters, Sink, Tensor, now_ns
from tutti.ensembles.axes import changed_inputs, changed_outputs
from tutti.ensembles.executor import EnsembleExecutor, record
from tutti.ensembles.explain import tell_decoupled
from tutti.ensembles.graph import Plan, Step
from tutti.ensembles.solo import as_error, in_ensemble
from tutti.observing.explanations import Facts
from tutti.observing.statistics import ModelStatistics

# How often a step that waits for its answers to be taken looks whether its caller still waits.
_LOOK_EVERY_S = 0.05


@dataclass(frozen=True)
class Stage:
    """What is done with one answer of a decoupled step, or with the request: `part`, if anything, then `step`.

    Without `step` the graph's outputs are made.
    """

    part: Plan | None
    step: Step | None
    then: "Stage | None" = None


def stages(plan: Plan) -> Stage:
    """The plan, cut at its decoupled steps."""
    return _stage(plan, plan.outputs, None)


def _stage(plan: Plan, wanted: Sequence[str], then: Stage | None, step: Step | None = None) -> Stage:
    """The stage that makes `wanted` and ends with `step`, with those before it."""
    indices: set[int] = set()
    before: Step | None = None
    waiting = [plan.producer[name] for name in wanted if name in plan.producer]
    while waiting:
        index = waiting.pop()
        if plan.steps[index].is_decoupled:
            before = plan.steps[index]
        elif index not in indices:
            indices.add(index)
            waiting.extend(plan.steps[index].needs)
    made_here = [name for name in dict.fromkeys(wanted) if plan.producer.get(name) in indices]
    stage = Stage(plan.part(indices, made_here) if indices else None, step, then)
    return stage if before is None else _stage(plan, before.read, stage, before)


class _Place:
    """Where answers belong in the order of all: those of one request of a decoupled step, or of what comes of one."""

    __slots__ = ("has_ended", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[_Place | Answer] = deque()
        self.has_ended = False


# What an inner call is for. Without tensors it is a decoupled step's.
_Token = tuple[Stage, dict[str, Tensor] | None, _Place]


class _Inner(Call):
    """A call within a request's run: cancelled when the run is over or its caller has gone."""

    __slots__ = ("_run",)

    def __init__(self, request: InferRequest, run: "_Run", token: Any) -> None:
        self._run = run
        super().__init__(request, run, token)
        outer = run.outer
        self.deadline_ns, self.arrived_ns = outer.deadline_ns, now_ns()

    @property
    def is_cancelled(self) -> bool:
        return self._run.is_over or self._run.outer.is_cancelled

    @is_cancelled.setter
    def is_cancelled(self, value: bool) -> None:
        """Ignored: a call is cancelled with its run alone."""


class StreamExecutor:
    """An `Infer` over a plan with decoupled steps."""

    def __init__(self, plan: Plan, version: str, infer: Infer, statistics: ModelStatistics) -> None:
        self.plan = plan
        self.version = version
        self.infer = infer
        self.statistics = statistics
        self.first = stages(plan)
        self.parts: dict[int, EnsembleExecutor] = {}
        stage: Stage | None = self.first
        while stage is not None:
            if stage.part is not None:
                self.parts[id(stage)] = EnsembleExecutor(stage.part, version, infer, statistics, is_part=True)
            stage = stage.then

    def __call__(self, calls: Sequence[Call]) -> None:
        for call in calls:
            if self.plan.deadline_ns:
                call.deadline_ns = call.deadline_ns or call.arrived_ns + self.plan.deadline_ns
            _Run(self, call).start()


class _Run(Sink):
    """One request on its way."""

    def __init__(self, executor: StreamExecutor, outer: Call) -> None:
        self.outer = outer
        self.is_over = False
        self._executor = executor
        self._plan = executor.plan
        self._root = _Place()
        # Held for the order of answers only: what is ready leaves by one thread at a time, without it.
        self._changed = threading.Condition()
        self._ready: deque[Answer] = deque()
        self._is_emitting = False

    def start(self) -> None:
        self._begin(self._executor.first, dict(self.outer.request.inputs), self._root)

    def settle(self, calls: Sequence[Call]) -> None:
        """Calls of parts and of decoupled steps come back."""
        for call in calls:
            stage, tensors, place = call.token
            answer = call.answer
            if isinstance(answer, InferError):
                if stage.step is not None and tensors is None:
                    answer = self._told(stage.step, answer)
                self._put(place, answer, is_end=True)
            elif not isinstance(answer, InferResponse):
                raise AssertionError("a settled call has an answer")
            elif tensors is None:
                if not answer.is_null:
                    self._take(stage, place, answer)
                if stage.step is not None and call.trace is not None:
                    tell_decoupled(self.outer, stage.step.model_name, call)
                self._put(place, None, is_end=True)
            else:
                tensors.update((tensor.name, tensor) for tensor in answer.outputs)
                self._go_on(stage, tensors, place, answer.parameters)

    def _begin(self, stage: Stage, tensors: dict[str, Tensor], place: _Place) -> None:
        part = stage.part
        if part is None:
            self._go_on(stage, tensors, place, {})
            return
        outer = self.outer.request
        inputs = {name: tensors[name] for name in part.tensors if name in tensors}
        asked = () if stage.step is not None else tuple(name for name in outer.outputs if name in part.outputs)
        if not asked and stage.step is None and outer.outputs:  # no output of the last stage is asked for
            self._go_on(stage, tensors, place, {})
            return
        request = InferRequest(part.name, inputs, "", outer.id, asked, outer.parameters)
        self._submit(self._executor.parts[id(stage)], request, (stage, tensors, place))

    def _go_on(self, stage: Stage, tensors: dict[str, Tensor], place: _Place, parameters: Parameters) -> None:
        """After a stage's part: its decoupled step, or the answer."""
        step, outer = stage.step, self.outer.request
        if step is None:
            names = [name for name in self._plan.outputs if not outer.outputs or name in outer.outputs]
            outputs = [
                Tensor(name, t.datatype, t.shape, t.data) for name in names if (t := tensors.get(name)) is not None
            ]
            self._put(place, InferResponse(self._plan.name, self._executor.version, outputs, parameters), is_end=True)
            return
        inputs = {}
        for model_name, name in step.inputs:
            tensor = tensors.get(name)
            if tensor is not None:
                inputs[model_name] = Tensor(model_name, tensor.datatype, tensor.shape, tensor.data)
        if step.axes_in:
            try:
                inputs = changed_inputs(step.axes_in, inputs)
            except Exception as error:  # for example a tensor on a device that has failed
                self._put(place, self._told(step, as_error(error)), is_end=True)
                return
        if any(name not in tensors for name in step.required):  # a missing optional input: the step does not run
            self._put(place, None, is_end=True)
            return
        request = InferRequest(step.model_name, inputs, step.version, outer.id, step.wanted, outer.parameters)
        self._submit(self._executor.infer, request, (stage, None, place))

    def _submit(self, infer: Infer, request: InferRequest, token: _Token) -> None:
        call = _Inner(request, self, token)
        stage, tensors, place = token
        if tensors is None:
            call.emit = lambda response: self._take(stage, place, response)
            if self.outer.trace is not None:
                self.outer.trace.follow(call)
                if isinstance(self.outer.trace, Facts):
                    call.trace = Facts(call.trace)
        elif self._plan.is_batched:
            try:
                call.rows = _rows(request.inputs.values())
            except InferError as error:
                self._put(place, Internal(f"in ensemble '{self._plan.name}': {error.message}"), is_end=True)
                return
        if tensors is not None:  # a part's steps are the request's
            call.trace = self.outer.trace
        infer([call])

    def _take(self, stage: Stage, place: _Place, response: InferResponse) -> None:
        """An answer of a decoupled step: go on with it. Waits while as many as may are on their way."""
        step, then = stage.step, stage.then
        assert step is not None
        assert then is not None
        try:
            outputs = changed_outputs(step.axes_out, response.outputs) if step.axes_out else response.outputs
        except Exception as error:
            self._put(place, self._told(step, as_error(error)), is_end=False)
            return
        by_name = {tensor.name: tensor for tensor in outputs if tensor is not None}
        place_of_answer = _Place()
        if not self._enter(step, place, place_of_answer):
            return
        tensors = {name: by_name[model_name] for model_name, name in step.outputs if model_name in by_name}
        missing = [name for name in step.wanted if name not in by_name and name not in step.dispensable]
        if missing:
            lacking = Internal(f"output '{missing[0]}': the model's answer lacks it")
            self._put(place_of_answer, self._told(step, lacking), is_end=True)
            return
        for name, tensor in tensors.items():
            tensors[name] = Tensor(name, tensor.datatype, tensor.shape, tensor.data)
        self._begin(then, tensors, place_of_answer)

    def _enter(self, step: Step, place: _Place, place_of_answer: _Place) -> bool:
        with self._changed:
            # Counted for each request of the step: answers leave in order, and one request must not wait for another.
            while step.max_inflight and len(place.waiting) >= step.max_inflight and not self._is_done():
                self._changed.wait(_LOOK_EVERY_S)
            if self._is_done():
                return False
            place.waiting.append(place_of_answer)
        return True

    def _is_done(self) -> bool:
        return self.is_over or self.outer.is_cancelled

    def _put(self, place: _Place, answer: Answer | None, is_end: bool) -> None:
        """Store an answer in its place; hand out what is next in order."""
        with self._changed:
            if answer is not None:
                place.waiting.append(answer)
            place.has_ended = place.has_ended or is_end
            if self.is_over:
                return
            if self._advance(self._root):
                self._ready.append(InferResponse(self._plan.name, self._executor.version, [], is_null=True))
                self.is_over = True
            self._changed.notify_all()
            if self._is_emitting:
                return
            self._is_emitting = True
        while True:
            with self._changed:
                if not self._ready:
                    self._is_emitting = False
                    return
                ready = self._ready.popleft()
            self._hand_out(ready)

    def _advance(self, place: _Place) -> bool:
        """Move what is next in order to the ready; returns whether a place has nothing more to come."""
        while place.waiting and not self.is_over:
            head = place.waiting[0]
            if isinstance(head, _Place):
                if not self._advance(head):
                    return False
            else:
                self._ready.append(head)
                self.is_over = isinstance(head, InferError)
            place.waiting.popleft()
        return place.has_ended and not self.is_over

    def _hand_out(self, answer: Answer) -> None:
        outer = self.outer
        if isinstance(answer, InferResponse) and not answer.is_null:
            if outer.emit is not None and not outer.is_cancelled:
                outer.emit(answer)
            return
        if outer.is_cancelled:
            answer = Cancelled("the request was cancelled by its caller")
        outer.answer = answer
        record(self._executor.statistics, [outer])
        outer.sink.settle([outer])

    def _told(self, step: Step, error: InferError) -> InferError:
        return in_ensemble(self._plan.name, step, error)


def _rows(tensors: Iterable[Tensor]) -> int:
    sizes = {tensor.name: tensor.shape[0] if tensor.shape else 0 for tensor in tensors}
    rows = next(iter(sizes.values()), 1)
    if rows < 1 or any(size != rows for size in sizes.values()):
        raise Internal(f"tensors disagree on the batch size, or have none: {sizes}")
    return rows
