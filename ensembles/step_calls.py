"""The calls by which a step's rows reach its model: in requests that it takes, with a deadline, a trace and an id."""

from collections.abc import Mapping, Sequence

from tutti.core.types import Call, InferRequest, Sink, Tensor
from tutti.ensembles.axes import changed_inputs
from tutti.ensembles.columns import stretch
from tutti.ensembles.graph import Plan, Step
from tutti.ensembles.grouping import Group
from tutti.ensembles.running import Piece, RunningFrame
from tutti.scheduling.cost import Costs


class StepCalls:
    """Makes calls that settle at `sink`. `costs` are what each step's executions took before."""

    def __init__(self, plan: Plan, followers: Mapping[int, Sequence[int]], costs: Sequence[Costs], sink: Sink) -> None:
        self._plan = plan
        self._followers = followers
        self._costs = costs
        self._sink = sink

    def of(self, frame: RunningFrame, step: Step, group: Group, at_ns: int) -> list[Call]:
        """The calls for a group, in the order of its rows: one, or as many as the model's batch size asks for."""
        size = step.max_rows or group.rows
        count = 1 if group.rows <= size else -(-group.rows // size)
        group.outputs = [None] * count
        deadline_ns = self._deadline_ns(frame, step, group) if frame.has_deadlines else 0
        if count == 1:
            piece = Piece(frame, step, group, 0, group.rows, at_ns)
            return [self._call(piece, group.inputs, deadline_ns)]
        calls = []
        for number in range(count):
            inputs = {name: stretch(tensor, number * size, size) for name, tensor in group.inputs.items()}
            piece = Piece(frame, step, group, number, min(size, group.rows - number * size), at_ns)
            calls.append(self._call(piece, inputs, deadline_ns))
        return calls

    def _call(self, piece: Piece, inputs: dict[str, Tensor], deadline_ns: int) -> Call:
        frame, step, group = piece.frame, piece.step, piece.group
        parent = frame.calls[group.calls[0]].request
        if step.axes_in:
            inputs = changed_inputs(step.axes_in, inputs)
        request_id = parent.id if len(group.calls) == 1 else ""
        request = InferRequest(step.model_name, inputs, step.version, request_id, step.wanted, parent.parameters)
        request.device_outputs = step.staying
        call = Call(request, self._sink, piece)
        call.deadline_ns = deadline_ns
        call.requests = len(group.calls)
        if (outer := frame.calls[group.calls[0]].trace) is not None:
            outer.follow(call)
            if step.each is not None and call.trace is not None:
                call.trace.note("items", piece.rows)
        return call

    def _deadline_ns(self, frame: RunningFrame, step: Step, group: Group) -> int:
        """Until when a step must have ended: as the most patient of its calls says.

        An optional one leaves time for the steps after it, and goes by the most hurried.
        """
        deadlines = [frame.calls[index].deadline_ns for index in group.calls]
        if step.is_optional:
            earliest = min([deadline for deadline in deadlines if deadline], default=0)
            return max(1, earliest - self._needed_ns(frame, step)) if earliest else 0
        return max(deadlines) if all(deadlines) else 0

    def _needed_ns(self, frame: RunningFrame, step: Step) -> int:
        """How long the slowest chain of steps from here to the end of the graph is expected to take."""
        ways = [
            self._costs[later].of(None).tail_ns(frame.rows) + self._needed_ns(frame, self._plan.steps[later])
            for later in self._followers[step.index]
            if later in frame.waits and not self._plan.steps[later].is_optional
        ]
        return max(ways, default=0)
