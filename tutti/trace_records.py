"""One request's trace while it is collected, and those of the steps within it. Knows nothing of where traces go."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from tutti.types import Call, InferResponse, Tensor, now_ns

# Of a larger tensor a trace has only so many elements: their text takes 20 bytes each.
MAX_ELEMENTS = 64 * 1024
# A step that runs for many items, or a model that asks others again and again, must not fill the memory.
MAX_STEPS = 1000


class Record:
    """The trace of one call. As a sink, it is put before that of a step's call, to see its end.

    `context` is the W3C traceparent of the span that the request is part of. `notes` are facts about the call, as
    `batch_rows`; `tensors` are (activity, what is shown of a tensor).
    """

    def __init__(
        self, numbers: Iterator[int], call: Call, with_tensors: bool, context: str = "", parent: "Record | None" = None
    ) -> None:
        """`numbers` gives the trace, and each step's within it, its id."""
        self.id = next(numbers)
        self.request = call.request
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
        self._sink = call.sink

    def record(self, activity: str, ns: int) -> None:
        self.timestamps.append((activity, ns))

    def note(self, what: str, value: object) -> None:
        if isinstance(value, int | float | str):
            self.notes[what] = value

    def follow(self, call: Call) -> None:
        """`call` is made for the one that is traced: it is traced as a step of it."""
        if len(self.steps) >= MAX_STEPS:
            self.notes["steps_left_out"] = self.notes.get("steps_left_out", 0) + 1
            return
        step = Record(self._numbers, call, self.with_tensors, self.context, self)
        self.steps.append(step)
        call.trace = call.sink = step

    def settle(self, calls: Sequence[Call]) -> None:
        """A step's call has its answer."""
        for call in calls:
            self.end(call)
            call.sink = self._sink
        self._sink.settle(calls)

    def end(self, call: Call) -> None:
        """The call has its answer. Shows tensors now: their memory may be another's once it is handed on."""
        answer = call.answer
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
        if self.with_tensors:
            made = answer.outputs if isinstance(answer, InferResponse) else []
            self.tensors = [("TENSOR_QUEUE_INPUT", shown(tensor)) for tensor in call.request.inputs.values()]
            self.tensors += [("TENSOR_BACKEND_OUTPUT", shown(tensor)) for tensor in made]

    def sorted(self) -> list[tuple[str, int]]:
        """Its timestamps in their order."""
        return sorted(self.timestamps, key=lambda one: one[1])

    def all(self) -> Iterator["Record"]:
        """It, its steps, and theirs."""
        yield self
        for step in list(self.steps):
            yield from step.all()


def numbers() -> Iterator[int]:
    """The ids of traces."""
    return itertools.count(1)


def shown(tensor: Tensor) -> dict[str, Any]:
    """A tensor as Triton's traces have it. One that is on a device stays there."""
    elements = Tensor(tensor.name, tensor.datatype, tensor.shape, tensor.data).array().reshape(-1)
    values = ",".join([_text(value) for value in elements[:MAX_ELEMENTS].tolist()])
    cut = {"elements_left_out": len(elements) - MAX_ELEMENTS} if len(elements) > MAX_ELEMENTS else {}
    return {
        **cut,
        "name": tensor.name,
        "data": values,
        "shape": ",".join(map(str, tensor.shape)),
        "dtype": tensor.datatype,
    }


def _text(value: object) -> str:
    """An element; of a long text the beginning, as of a long tensor."""
    return value[:MAX_ELEMENTS].decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
