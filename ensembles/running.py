"""What an executor knows of frames on their way: which steps are ready, executing and over. Decides nothing."""

import threading
from collections.abc import Sequence
from typing import Any

from tutti.core.dtypes import Array
from tutti.core.types import Call
from tutti.ensembles.explain import Explanation, StepsTimes
from tutti.ensembles.frame import Frame
from tutti.ensembles.graph import Plan, Step
from tutti.ensembles.grouping import Group
from tutti.observing.explanations import Facts


class Piece:
    """The token of a step's call: it carries the `number`th stretch of a group's rows."""

    __slots__ = ("frame", "group", "number", "rows", "started_ns", "step")

    def __init__(
        self, frame: "RunningFrame", step: Step, group: Group, number: int, rows: int, started_ns: int
    ) -> None:
        self.frame = frame
        self.step = step
        self.group = group
        self.number = number
        self.rows = rows
        self.started_ns = started_ns


class StepRun:
    """One step of one frame in execution. `entry` and `times` are for its explanation."""

    __slots__ = ("entry", "groups", "left", "mask", "shed", "times")

    def __init__(self, groups: list[Group], mask: Array | None) -> None:
        self.groups = groups
        self.mask = mask
        # How many calls have not come back.
        self.left = 0
        self.shed = 0
        self.entry: dict[str, Any] | None = None
        self.times: list[Facts] = []


class RunningFrame(Frame):
    """A frame, and how far its steps are."""

    def __init__(self, plan: Plan, calls: Sequence[Call], steps: frozenset[int], is_alike: bool = False) -> None:
        """`steps` are those that it goes through; `is_alike`: the calls' inputs are known to have the same shapes."""
        super().__init__(plan, calls, is_alike)
        # Held by whoever changes the frame: steps come back from any thread.
        self.lock = threading.Lock()
        # How many others each step still waits for; -1 once it is over.
        self.waits = {index: len(plan.steps[index].needs) for index in steps}
        self.left = len(steps)
        self.runs: dict[int, StepRun] = {}
        self.has_deadlines = max([call.deadline_ns for call in calls]) > 0
        self.looked_ns = 0
        # For each call, the models that were left out.
        self.shed: dict[int, list[str]] = {}
        self.explanation: Explanation | None = None
        # What is known of the steps that have been executed.
        self.times = StepsTimes()


Ready = list[tuple[RunningFrame, Step]]


class Outcome:
    """What follows from steps that are over: steps that are ready, calls to send again alone, calls that have ended."""

    __slots__ = ("again", "ended", "ready")

    def __init__(self) -> None:
        self.ready: Ready = []
        self.again: list[Call] = []
        self.ended: list[Call] = []
