"""Runs calls through a Plan: an `Infer` made of other `Infer`s.

Dataflow: a step of a call starts as soon as its inputs are there. Calls whose steps become ready together are
submitted together, so a batch stays a batch, and each step's own scheduler joins what arrives from elsewhere.
Intermediates are passed by reference and dropped after their last reader.
"""

import threading
from collections.abc import Sequence

from ensembles.graph import Plan, Step
from tutti.errors import Cancelled, InferError
from tutti.statistics import ModelStatistics
from tutti.types import Call, Infer, InferRequest, InferResponse, Tensor, now_ns, settle, settle_all


class _Run:
    """One call on its way through the graph."""

    __slots__ = ("call", "is_over", "left", "steps", "tensors", "waits")

    def __init__(self, call: Call, steps: frozenset[int], plan: Plan) -> None:
        self.call = call
        self.steps = steps
        self.left = len(steps)
        self.is_over = False
        self.tensors: dict[str, Tensor] = dict(call.request.inputs)
        self.waits = {index: len(plan.steps[index].needs) for index in steps}


class EnsembleExecutor:
    """An `Infer` over a plan. Its steps' calls go to `infer`, and settle here, from any thread."""

    def __init__(self, plan: Plan, version: str, infer: Infer, statistics: ModelStatistics) -> None:
        self._plan = plan
        self._version = version
        self._infer = infer
        self._statistics = statistics
        self._lock = threading.Lock()
        self._followers = {
            step.index: tuple(later.index for later in plan.steps if step.index in later.needs) for step in plan.steps
        }
        self._steps_for: dict[tuple[str, ...], frozenset[int]] = {}

    def __call__(self, calls: Sequence[Call]) -> None:
        ready: dict[int, list[_Run]] = {}
        for call in calls:
            run = _Run(call, self._needed(call.request.outputs), self._plan)
            for index in sorted(run.steps):
                if not run.waits[index]:
                    ready.setdefault(index, []).append(run)
        self._start(ready)

    def settle(self, calls: Sequence[Call]) -> None:
        """Steps' calls come back: store their outputs, start what has become ready, end what is complete."""
        ready: dict[int, list[_Run]] = {}
        ended: list[Call] = []
        with self._lock:
            for call in calls:
                run, step = call.token
                if run.is_over:
                    continue
                if isinstance(call.answer, InferError):
                    self._fail(run, step, call.answer)
                    ended.append(run.call)
                else:
                    self._advance(run, step, call.answer, ready)
                    if run.left == 0:
                        self._complete(run)
                        ended.append(run.call)
        if ready:
            self._start(ready)
        if ended:
            self._record(ended)
            settle(ended)

    def _needed(self, outputs: tuple[str, ...]) -> frozenset[int]:
        steps = self._steps_for.get(outputs)
        if steps is None:
            steps = self._steps_for[outputs] = self._plan.steps_for(outputs)
        return steps

    def _start(self, ready: dict[int, list[_Run]]) -> None:
        for index, runs in ready.items():
            step = self._plan.steps[index]
            calls = [self._step_call(run, step) for run in runs]
            gone = [call for call in calls if call.token[0].call.is_cancelled]
            if gone:
                settle_all(gone, Cancelled("the request was cancelled by its caller"))
                calls = [call for call in calls if call.answer is None]
            if calls:
                self._infer(calls)

    def _step_call(self, run: _Run, step: Step) -> Call:
        inputs = {}
        for model_name, name in step.inputs:
            tensor = run.tensors.get(name)
            if tensor is not None:  # an optional input that was not sent
                inputs[model_name] = Tensor(model_name, tensor.datatype, tensor.shape, tensor.data)
        parent = run.call.request
        wanted = tuple(model_name for model_name, _ in step.outputs)
        request = InferRequest(step.model_name, inputs, step.version, parent.id, wanted, parent.parameters)
        call = Call(request, self, (run, step))
        call.deadline_ns = run.call.deadline_ns
        return call

    def _advance(self, run: _Run, step: Step, answer: InferResponse | None, ready: dict[int, list[_Run]]) -> None:
        assert answer is not None
        names = dict(step.outputs)
        for output in answer.outputs:
            run.tensors[names[output.name]] = output
        run.left -= 1
        run.waits[step.index] = -1
        for later in self._followers[step.index]:
            if later in run.waits:
                run.waits[later] -= 1
                if run.waits[later] == 0:
                    ready.setdefault(later, []).append(run)
        self._drop_read(run, step)

    def _drop_read(self, run: _Run, step: Step) -> None:
        """Forget the tensors that no unfinished step reads and nobody asked for."""
        kept = run.call.request.outputs or self._plan.outputs
        for _, name in step.inputs:
            if name not in kept and all(run.waits.get(reader, -1) == -1 for reader in self._plan.readers[name]):
                run.tensors.pop(name, None)

    def _complete(self, run: _Run) -> None:
        run.is_over = True
        outputs = []
        asked = run.call.request.outputs
        for name in self._plan.outputs:
            if asked and name not in asked:
                continue
            tensor = run.tensors[name]
            outputs.append(Tensor(name, tensor.datatype, tensor.shape, tensor.data))
        run.call.answer = InferResponse(self._plan.name, self._version, outputs)

    def _fail(self, run: _Run, step: Step, error: InferError) -> None:
        run.is_over = True
        run.call.answer = type(error)(f"in ensemble '{self._plan.name}', step '{step.model_name}': {error.message}")

    def _record(self, calls: Sequence[Call]) -> None:
        now = now_ns()
        failed = [call for call in calls if isinstance(call.answer, InferError)]
        if failed:
            self._statistics.record_failures(failed, now)
        if len(failed) < len(calls):
            self._statistics.record_successes([c for c in calls if not isinstance(c.answer, InferError)], now)
