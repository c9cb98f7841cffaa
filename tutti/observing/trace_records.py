"""One request's trace while it is collected, and those of the steps within it. Knows nothing of where traces go."""

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tutti.core.errors import InferError
from tutti.core.types import Call, InferRequest, InferResponse, Sink, Tensor, now_ns
from tutti.observing.explanations import AT_REPLICA

_log = logging.getLogger(__name__)

# The version that a request is for which has none in its answer, "" where nobody knows.
VersionOf = Callable[[InferRequest], str]
# Of a larger tensor a trace has only so many elements: their text takes 20 bytes each.
MAX_ELEMENTS = 64 * 1024
# Of an explained step, what its trace says, and the activities that end its stages.
_OF_STEPS = ("items", "batch_rows", "batch_requests", "instance", "device", "cache")
_STAGES = (
    ("queue_us", ("COMPUTE_START",)), ("input_us", ("COMPUTE_INPUT_END",)), ("compute_us", ("COMPUTE_OUTPUT_START",)),
    ("output_us", ("COMPUTE_END",)),
)  # fmt: skip
# A step that runs for many items, or a model that asks others again and again, must not fill the memory.
MAX_STEPS = 1000


class Record:
    """The trace of one call. As a sink, it is put before that of a step's call, to see its end.

    `context` is the W3C traceparent of the span that the request is part of. `notes` are facts about the call, as
    `batch_rows`; `tensors` are (activity, what is shown of a tensor).
    """

    def __init__(
        self,
        numbers: Iterator[int],
        call: Call,
        with_tensors: bool,
        context: str = "",
        parent: "Record | None" = None,
        version_of: VersionOf = lambda request: request.model_version,
    ) -> None:
        """`numbers` gives the trace, and each step's within it, its id."""
        self.id = next(numbers)
        self.request: InferRequest = call.request
        self.with_tensors = with_tensors
        self.context = context
        self.parent = parent
        self.timestamps: list[tuple[str, int]] = [("REQUEST_START", now_ns())]
        self.notes: dict[str, Any] = {}
        self.tensors: list[tuple[str, dict[str, Any]]] = []
        self.steps: list[Record] = []
        self.version = ""
        self.error = ""
        # Of the front-end that took the request: "HTTP", "GRPC".
        self.protocol = ""
        self._numbers = numbers
        self._version_of = version_of
        self._sink: Sink | None = call.sink

    def record(self, activity: str, ns: int) -> None:
        self.timestamps.append((activity, ns))

    def note(self, what: str, value: object) -> None:
        if what == AT_REPLICA and isinstance(value, dict):
            try:
                self._was_elsewhere(value)
            except Exception as error:  # another's: whatever it is, callers wait
                _log.debug("what a replica has told is not understood: %r", error)
        elif isinstance(value, int | float | str):
            self.notes[what] = value

    def follow(self, call: Call) -> None:
        """`call` is made for the one that is traced: it is traced as a step of it."""
        if len(self.steps) >= MAX_STEPS:
            self.notes["steps_left_out"] = self.notes.get("steps_left_out", 0) + 1
            return
        step = Record(self._numbers, call, self.with_tensors, self.context, self, self._version_of)
        self.steps.append(step)
        call.trace = call.sink = step

    def settle(self, calls: Sequence[Call]) -> None:
        """A step's call has its answer."""
        sink = self._sink
        assert sink is not None
        for call in calls:
            call.sink = sink
            try:
                self.end(call)
            except Exception:  # the trace is not whole then: the answer is more than that
                _log.exception("a step's trace could not be ended")
        sink.settle(calls)

    def end(self, call: Call) -> None:
        """The call has its answer. Shows tensors now: their memory may be another's once it is handed on."""
        answer = call.answer
        asked = call.request
        # Traces wait to be written: what they say of a request is little, and its tensors, which sinks may know, large.
        self.request = InferRequest(call.request.model_name, {}, id=call.request.id)
        self._sink = None
        if self.steps and not any(name == "QUEUE_START" for name, _ in self.timestamps):
            self.record("QUEUE_START", call.arrived_ns or self.timestamps[0][1])
        if self.protocol:
            self.record("INFER_RESPONSE_COMPLETE", now_ns())
        self.record("REQUEST_END", now_ns())
        if self.protocol:
            self.record(f"{self.protocol}_SEND_START", now_ns())
        if isinstance(answer, InferResponse):
            self.version = answer.model_version
        elif answer is not None:
            self.error = answer.message
            self.version = self._version_of(asked)
        if self.with_tensors:
            outputs = answer.outputs if isinstance(answer, InferResponse) else []
            self.tensors = [("TENSOR_QUEUE_INPUT", shown(tensor)) for tensor in call.request.inputs.values()]
            self.tensors += [("TENSOR_BACKEND_OUTPUT", shown(tensor)) for tensor in outputs]

    def _was_elsewhere(self, explained: Mapping[str, Any]) -> None:
        """A replica has told where its time went. Its clock is another: its part lies in the middle of our wait."""
        times = dict(self.timestamps)
        if "COMPUTE_START" not in times or "COMPUTE_END" not in times:
            return
        way_ns = times["COMPUTE_END"] - times["COMPUTE_START"] - round(1000 * explained["total_us"])
        self.notes.update({fact: explained[fact] for fact in ("instance", "device") if fact in explained})
        self._add_steps(explained.get("steps", []), times["COMPUTE_START"] + max(0, way_ns) // 2)

    def _add_steps(self, steps: Sequence[Mapping[str, Any]], start_ns: int) -> None:
        for told in steps:
            begin_ns = start_ns + round(1000 * told["start_us"])
            if "skipped" in told:
                self.record(f"SKIPPED {told['step']}: {told['skipped']}", begin_ns)
                continue
            request = InferRequest(told["step"], {}, id=self.request.id)
            step = Record(self._numbers, Call(request, self), False, self.context, self)
            step.timestamps = [("REQUEST_START", begin_ns), ("QUEUE_START", begin_ns)]
            at_ns = begin_ns
            for stage, activities in _STAGES:
                if stage in told:
                    at_ns += round(1000 * told[stage])
                    step.timestamps += [(activity, at_ns) for activity in activities]
            end_us = told.get("end_us")
            if end_us is not None:
                step.record("REQUEST_END", max(at_ns, start_ns + round(1000 * end_us)))
            step.notes = {fact: told[fact] for fact in _OF_STEPS if fact in told}
            step._add_steps(told.get("steps", []), begin_ns)
            self.steps.append(step)

    def sorted(self) -> list[tuple[str, int]]:
        """Its timestamps in their order."""
        return sorted(self.timestamps, key=lambda stamp: stamp[1])

    def all(self) -> Iterator["Record"]:
        """It, its steps, and theirs."""
        yield self
        for step in list(self.steps):
            yield from step.all()


def numbers() -> Iterator[int]:
    """The ids of traces."""
    return itertools.count(1)


def shown(tensor: Tensor) -> dict[str, Any]:
    """A tensor as Triton's traces have it. One that is on a device stays there; of bytes that are none, why not."""
    about = {"name": tensor.name, "shape": ",".join(map(str, tensor.shape)), "dtype": tensor.datatype}
    try:
        elements = Tensor(tensor.name, tensor.datatype, tensor.shape, tensor.data).array().reshape(-1)
    except (InferError, ValueError) as error:
        return {**about, "data": "", "not_shown": str(error)}
    values = ",".join([_text(value) for value in elements[:MAX_ELEMENTS].tolist()])
    cut = {"elements_left_out": len(elements) - MAX_ELEMENTS} if len(elements) > MAX_ELEMENTS else {}
    return {**cut, **about, "data": values}


def _text(value: object) -> str:
    """An element; of a long text the beginning, as of a long tensor."""
    return value[:MAX_ELEMENTS].decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
