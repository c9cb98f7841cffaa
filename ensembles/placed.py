"""Executes a graph whose models live in several places: segments where their models are, the rest here."""

from collections.abc import Callable, Hashable, Sequence

from tutti.core.types import Call, Infer, now_ns
from tutti.ensembles.executor import EnsembleExecutor
from tutti.ensembles.graph import Plan, Step
from tutti.ensembles.segments import cut
from tutti.ensembles.streams import StreamExecutor
from tutti.observing.statistics import ModelStatistics

ServeSegment = Callable[[Step, Plan, Hashable], Infer]
"""Has a segment served at a place. The step stands for it; its model's name is the segment's."""


def executor_of(plan: Plan, version: str, infer: Infer, statistics: ModelStatistics) -> Infer:
    """What executes a plan of which every step's model is reached through `infer`."""
    if plan.is_decoupled:
        return StreamExecutor(plan, version, infer, statistics)
    return EnsembleExecutor(plan, version, infer, statistics)


class PlacedExecutor:
    """An `Infer` over a plan, cut by places."""

    def __init__(
        self,
        plan: Plan,
        version: str,
        infer: Infer,
        statistics: ModelStatistics,
        place_of: Callable[[Step], Hashable],
        serve: ServeSegment,
    ) -> None:
        cut_plan = cut(plan, place_of)
        self._plan = plan
        self._infer = infer
        stands = {step.model_name: step for step in cut_plan.plan.steps if step.is_segment}
        self._segments = {
            name: serve(stands[name], segment, cut_plan.places[name]) for name, segment in cut_plan.segments.items()
        }
        self._cut = executor_of(cut_plan.plan, version, self._dispatch, statistics)
        # Takes requests that ask for some outputs only: a segment would also execute steps that they do not need.
        self._uncut = executor_of(plan, version, infer, statistics)
        self._everything = plan.steps_for(())

    def __call__(self, calls: Sequence[Call]) -> None:
        whole = [call for call in calls if self._needs_all(call.request.outputs)]
        if whole:
            self._cut(whole)
        if len(whole) < len(calls):
            self._uncut([call for call in calls if not self._needs_all(call.request.outputs)])

    def _needs_all(self, outputs: tuple[str, ...]) -> bool:
        return not outputs or self._plan.steps_for(outputs) == self._everything

    def _dispatch(self, calls: Sequence[Call]) -> None:
        segment = self._segments.get(calls[0].request.model_name)
        (segment or self._infer)(calls)


class Arriving:
    """An `Infer` that notes when a segment's calls came, and their rows. A model does so as it checks its calls."""

    def __init__(self, infer: Infer, is_batched: bool) -> None:
        self._infer = infer
        self._is_batched = is_batched

    def __call__(self, calls: Sequence[Call]) -> None:
        now = now_ns()
        for call in calls:
            call.arrived_ns = now
            if self._is_batched:
                call.rows = next(iter(call.request.inputs.values())).shape[0]
        self._infer(calls)


def executor_of_segment(segment: Plan, infer: Infer) -> Infer:
    """What executes a segment in the place where its models are."""
    executor = EnsembleExecutor(segment, "1", infer, ModelStatistics(), is_part=True)
    return Arriving(executor, segment.is_batched)
