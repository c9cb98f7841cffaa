"""Runs calls through a Plan: an `Infer` made of other `Infer`s.

Calls that arrive together go through the graph as one Frame: a step's model gets their rows as one request where that
may be, and a step starts as soon as its inputs are there. Intermediates are passed by reference and dropped after their
last reader. A request that fails, is cancelled or is decided early leaves its frame; the others go on.
"""

import logging
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from tutti.core import rows
from tutti.core.dtypes import Array
from tutti.core.errors import Cancelled, DeadlineExceeded, InferError, Unavailable
from tutti.core.types import Answer, Call, Infer, InferResponse, now_ns, settle
from tutti.ensembles import grouping, outputs
from tutti.ensembles.axes import changed_outputs
from tutti.ensembles.explain import Explanation, begun_ns
from tutti.ensembles.graph import Plan, Step
from tutti.ensembles.grouping import Group
from tutti.ensembles.running import Outcome, Piece, Ready, RunningFrame, StepRun
from tutti.ensembles.solo import SoloExecutor, as_error, in_ensemble, in_turn, output_fault, wanted_outputs
from tutti.ensembles.step_calls import StepCalls
from tutti.observing.explanations import PARAMETER, Facts
from tutti.observing.statistics import ModelStatistics
from tutti.scheduling.cost import Costs

_log = logging.getLogger(__name__)

SHED_PARAMETER = "tutti_shed"
# A frame checks at most this often whether its callers still wait.
_LOOK_EVERY_NS = 500_000


class EnsembleExecutor:
    """An `Infer` over a plan. Its steps' calls go to `infer`, and settle here, from any thread."""

    def __init__(
        self, plan: Plan, version: str, infer: Infer, statistics: ModelStatistics, is_part: bool = False
    ) -> None:
        """`is_part`: its calls are not the ensemble's requests, and are not counted as such."""
        self._is_part = is_part
        self._plan = plan
        self._version = version
        self._infer = infer
        self._statistics = statistics
        self._followers = {
            step.index: tuple(later.index for later in plan.steps if step.index in later.needs) for step in plan.steps
        }
        self._steps_for: dict[tuple[str, ...], frozenset[int]] = {}
        self._costs = [Costs() for _ in plan.steps]
        self._calls = StepCalls(plan, self._followers, self._costs, self)
        self._solo = SoloExecutor(plan, version, infer, self._settle)
        self._frame_rows = max(1, *(step.max_rows for step in plan.steps))

    def __call__(self, calls: Sequence[Call]) -> None:
        plan = self._plan
        if plan.deadline_ns:
            for call in calls:
                call.deadline_ns = call.deadline_ns or call.arrived_ns + plan.deadline_ns
        if len(calls) == 1 and self._solo.takes(calls[0]) and PARAMETER not in calls[0].request.parameters:
            self._solo.start(calls[0])
            return
        is_alike = len(calls) > 1 and self._are_alike(calls)
        bursts: Iterable[Sequence[Call]] = (calls,)
        if not is_alike and len(calls) > 1:
            alike: dict[Hashable, list[Call]] = {}
            for call in calls:
                alike.setdefault(self._key(call), []).append(call)
            bursts = alike.values()
        ready = []
        for frame in [self._frame(part, is_alike) for burst in bursts for part in self._cut(burst)]:
            steps = [plan.steps[index] for index in sorted(frame.waits) if not frame.waits[index]]
            ready += [(frame, step) for step in steps]
        in_turn(self._submit, ready)

    def settle(self, calls: Sequence[Call]) -> None:
        """Steps' calls come back: store their outputs, start what has become ready, end what is complete."""
        outcome = Outcome()
        for call in calls:
            piece: Piece = call.token
            with piece.frame.lock:
                if call.times is not None:
                    piece.frame.times.add(piece.step.model_name, call.times, call.arrived_ns)
                try:
                    self._take_back(piece, call.answer, outcome)
                except Exception as error:  # for example outputs that do not fit together
                    self._end_all(piece.frame, piece.step, error, outcome)
        self._go_on(outcome)

    def _key(self, call: Call) -> Hashable:
        """Calls of equal keys share a frame. Large ones do not: they would have to be copied; nor do traced ones."""
        request = call.request
        if not self._plan.is_batched or call.trace is not None or rows.is_large([request]):
            return id(call)
        parameters = tuple(sorted(request.parameters.items())) if request.parameters else ()
        return tuple(request.inputs), request.outputs, parameters, tuple(map(type, request.parameters.values()))

    def _cut(self, calls: Sequence[Call]) -> list[Sequence[Call]]:
        """Calls in stretches of as many rows as some step takes at once: a larger frame would wait for all of them."""
        if len(calls) == 1 or sum([call.rows for call in calls]) <= self._frame_rows:
            return [calls]
        parts: list[list[Call]] = [[]]
        size = 0
        for call in calls:
            if parts[-1] and size + call.rows > self._frame_rows:
                parts.append([])
                size = 0
            parts[-1].append(call)
            size += call.rows
        return list(parts)

    def _are_alike(self, calls: Sequence[Call]) -> bool:
        """Whether the calls are known to have equal inputs and no parameters, as most have that come together."""
        first = calls[0].request
        signature = first.signature
        if signature is None or not self._plan.is_batched or rows.is_large([first]):
            return False
        return not any(call.request.signature is not signature or call.request.parameters for call in calls)

    def _frame(self, calls: Sequence[Call], is_alike: bool = False) -> RunningFrame:
        names = calls[0].request.outputs
        steps = self._steps_for.get(names)
        if steps is None:
            steps = self._steps_for[names] = self._plan.steps_for(names)
        frame = RunningFrame(self._plan, calls, steps, is_alike)
        parameters = calls[0].request.parameters
        if parameters and parameters.get(PARAMETER) in (True, "true"):
            frame.explanation = Explanation(begun_ns(calls[0]), frame.rows)
        return frame

    def _submit(self, ready: Ready) -> None:
        calls: dict[int, list[Call]] = {}
        outcome = Outcome()
        for frame, step in ready:
            begun: list[Call] = []
            with frame.lock:
                try:
                    begun = self._prepare(frame, step, outcome)
                except Exception as error:  # for example a BYTES tensor that is not well formed
                    self._end_all(frame, step, error, outcome)
            if begun and step.index in calls:
                calls[step.index] += begun
            elif begun:
                calls[step.index] = begun
        # Steps whose models have threads of their own go first: they execute while this thread executes the others.
        order = calls if len(calls) <= 1 else sorted(calls, key=lambda index: self._plan.steps[index].is_merged)
        for index in order:
            self._infer(calls[index])
        self._go_on(outcome)

    def _go_on(self, outcome: Outcome) -> None:
        if outcome.again:
            self._infer(outcome.again)
        if outcome.ready:
            in_turn(self._submit, outcome.ready)
        if outcome.ended:
            self._settle(outcome.ended)

    def _settle(self, ended: Sequence[Call]) -> None:
        if not self._is_part:
            record(self._statistics, ended)
        settle(ended)

    def _prepare(self, frame: RunningFrame, step: Step, outcome: Outcome) -> list[Call]:
        """The calls of one step for one frame. Where no row takes it, it has ended with that."""
        self._drop_gone(frame, step, outcome)
        if step.unless is not None and frame.open:
            for index in frame.leave(step.unless, self._version):
                self._explained(frame, index)
                frame.calls[index].times = frame.times
                outcome.ended.append(frame.calls[index])
        calls = self._begin(frame, step) if frame.open else []
        if not calls and frame.open:
            self._finish(frame, step, outcome)
        return calls

    def _drop_gone(self, frame: RunningFrame, step: Step, outcome: Outcome) -> None:
        """End the calls that nobody waits for any longer; one looks again after a while only."""
        now = now_ns()
        if not frame.has_deadlines and now - frame.looked_ns < _LOOK_EVERY_NS:
            return
        frame.looked_ns = now
        for index, call in enumerate(frame.calls):
            if frame.is_over[index] or not (call.is_cancelled or call.deadline_ns):
                continue
            if call.is_cancelled:
                self._end(frame, index, step, Cancelled("the request was cancelled by its caller"), outcome)
            elif call.deadline_ns <= now:
                late = DeadlineExceeded("the request's deadline passed before this step")
                self._end(frame, index, step, late, outcome)

    def _begin(self, frame: RunningFrame, step: Step) -> list[Call]:
        """The calls of one step for one frame; none where no row takes it."""
        mask: Array | None = None
        whole = grouping.everything(frame, step) if step.is_plain else None
        if whole is not None:
            requests = [whole]
        else:
            mask = frame.chosen(step)
            requests = grouping.groups(frame, step, mask) if mask is None or mask.any() else []
            self._count(frame, step, mask, requests)
        run = frame.runs[step.index] = StepRun(requests, mask)
        now = now_ns()
        calls = self._calls.of(frame, step, requests[0], now) if requests else []
        for group in requests[1:]:
            calls += self._calls.of(frame, step, group, now)
        run.left = len(calls)
        if not calls and frame.calls[0].trace is not None:
            frame.calls[0].trace.record(f"SKIPPED {step.model_name}: {frame.why_not(step)}", now)
        if frame.explanation is not None:
            self._explain(frame, step, run, calls, now)
        return calls

    def _explain(self, frame: RunningFrame, step: Step, run: StepRun, calls: Sequence[Call], now: int) -> None:
        assert frame.explanation is not None
        if not calls:
            frame.explanation.skipped(step.model_name, now, frame.why_not(step))
            return
        rows_chosen = frame.rows if run.mask is None else int(run.mask.sum())
        items = sum([group.rows for group in run.groups]) if step.each is not None else None
        run.entry = frame.explanation.begun(step.model_name, now, rows_chosen, len(calls), items)
        for call in calls:
            call.trace = times = Facts(call.trace)
            run.times.append(times)

    def _take_back(self, piece: Piece, answer: Answer | None, outcome: Outcome) -> None:
        frame, step = piece.frame, piece.step
        run = frame.runs[step.index]
        if isinstance(answer, InferResponse):
            answer = self._stored(piece, answer)
        if isinstance(answer, InferResponse):
            if frame.has_deadlines:
                self._costs[step.index].record(None, frame.rows, now_ns() - piece.started_ns)
        else:
            assert answer is not None
            self._failed(piece, answer, run, outcome)
        run.left -= 1
        if not run.left and frame.open:
            self._finish(frame, step, outcome)

    def _stored(self, piece: Piece, answer: InferResponse) -> InferResponse | InferError:
        """The answer, kept; an error where it is not what the graph can go on with."""
        step = piece.step
        tensors = wanted_outputs(step, answer)
        if isinstance(tensors, InferError):
            return tensors
        fault = output_fault(step, tensors, piece.rows)
        if fault is not None:
            return fault
        piece.group.outputs[piece.number] = changed_outputs(step.axes_out, tensors) if step.axes_out else tensors
        if piece.frame.explanation is not None:
            piece.frame.explanation.answered(piece.frame.runs[step.index].entry, answer)
        return answer

    def _failed(self, piece: Piece, error: InferError, run: StepRun, outcome: Outcome) -> None:
        frame, step, group = piece.frame, piece.step, piece.group
        is_refusal = isinstance(error, Unavailable | DeadlineExceeded)
        group.outputs[piece.number] = None
        if step.is_optional and is_refusal:
            run.shed += len(group.calls)
            for index in group.calls:
                self._shed(frame, index, step)
        elif len(group.calls) == 1 or is_refusal:
            for index in group.calls:
                self._end(frame, index, step, error, outcome)
        elif group in run.groups:  # one call may be to blame: each is sent again alone, so that the others succeed
            run.groups.remove(group)
            now = now_ns()
            for index in group.calls:
                if not frame.is_over[index]:
                    alone = grouping.group_of_call(frame, group, index)
                    if not alone.rows:
                        continue
                    run.groups.append(alone)
                    calls = self._calls.of(frame, step, alone, now)
                    run.left += len(calls)
                    outcome.again += calls

    def _shed(self, frame: RunningFrame, index: int, step: Step) -> None:
        names = frame.shed.setdefault(index, [])
        if step.model_name not in names:
            names.append(step.model_name)
            self._statistics.record_step(step.model_name, 0, 1, 0)

    def _finish(self, frame: RunningFrame, step: Step, outcome: Outcome) -> None:
        """All of a step's calls are back, or there were none."""
        run = frame.runs.pop(step.index)
        if frame.explanation is not None and run.entry is not None:
            frame.explanation.ended(run.entry, now_ns(), run.times, run.shed)
        outputs.put(frame, step, run.groups, run.mask)
        frame.left -= 1
        frame.waits[step.index] = -1
        for later in self._followers[step.index]:
            if later in frame.waits:
                frame.waits[later] -= 1
                if frame.waits[later] == 0:
                    outcome.ready.append((frame, self._plan.steps[later]))
        for name in step.read:
            if name not in frame.asked and all(
                frame.waits.get(reader, -1) == -1 for reader in self._plan.readers[name]
            ):
                frame.columns.pop(name, None)
        if not frame.left:
            self._complete(frame, outcome)

    def _complete(self, frame: RunningFrame, outcome: Outcome) -> None:
        answers = frame.answers(self._version)
        if frame.open == len(frame.calls) and not frame.shed and frame.explanation is None:
            times = frame.times
            for call, answer in zip(frame.calls, answers, strict=True):
                call.answer = answer
                call.times = times
            outcome.ended += frame.calls
            answers = []
        for index, answer in enumerate(answers):
            if answer is None:
                continue
            frame.calls[index].answer = answer
            self._explained(frame, index)
            if index in frame.shed:
                answer.parameters[SHED_PARAMETER] = ",".join(frame.shed[index])
            frame.calls[index].times = frame.times
            outcome.ended.append(frame.calls[index])
        frame.columns.clear()
        frame.open = 0

    def _explained(self, frame: RunningFrame, index: int) -> None:
        if frame.explanation is not None:
            frame.explanation.tell(self._plan.name, frame.calls[index], now_ns())

    def _end(self, frame: RunningFrame, index: int, step: Step, error: InferError, outcome: Outcome) -> None:
        if not frame.is_over[index]:
            if not step.is_segment:  # the errors of a segment name the ensemble already
                error = in_ensemble(self._plan.name, step, error)
            frame.end(index, error)
            run = frame.runs.get(step.index)
            if frame.explanation is not None and run is not None and run.entry is not None:
                frame.explanation.ended(run.entry, now_ns(), run.times, run.shed)
            self._explained(frame, index)
            frame.calls[index].times = frame.times
            outcome.ended.append(frame.calls[index])

    def _end_all(self, frame: RunningFrame, step: Step, error: Exception, outcome: Outcome) -> None:
        if not isinstance(error, InferError | ValueError):
            _log.exception("ensemble '%s': step '%s' cannot go on", self._plan.name, step.model_name)
        failure = as_error(error)
        for index in range(len(frame.calls)):
            self._end(frame, index, step, failure, outcome)
        frame.columns.clear()

    def _count(self, frame: RunningFrame, step: Step, mask: Any, groups: Sequence[Group]) -> None:
        is_conditional = step.when is not None or step.unless is not None
        skipped = 0
        if is_conditional and mask is not None:
            skipped = int((~mask if frame.gone is None else ~(mask | frame.gone)).sum())
        items = sum([group.rows for group in groups]) if step.each is not None else 0
        if skipped or items:
            self._statistics.record_step(step.model_name, skipped, 0, items)


def record(statistics: ModelStatistics, calls: Sequence[Call]) -> None:
    """Count calls of an ensemble that have ended."""
    now = now_ns()
    failed = [call for call in calls if isinstance(call.answer, InferError)]
    if not failed:
        statistics.record_successes(calls, now)
        return
    statistics.record_failures(failed, now)
    if len(failed) < len(calls):
        statistics.record_successes([c for c in calls if not isinstance(c.answer, InferError)], now)
