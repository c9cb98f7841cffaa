"""Requests as models see them: those of their batches, and those that they make to other models."""

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tutti.backends.python.pb_utils import server
from tutti.backends.python.pb_utils.answers import Answers
from tutti.backends.python.pb_utils.constants import (
    TRITONSERVER_MEMORY_GPU,
    TRITONSERVER_REQUEST_FLAG_SEQUENCE_END,
    TRITONSERVER_REQUEST_FLAG_SEQUENCE_START,
    TRITONSERVER_REQUEST_RELEASE_RESCHEDULE,
)
from tutti.backends.python.pb_utils.errors import TritonModelException
from tutti.backends.python.pb_utils.memory import PreferredMemory
from tutti.backends.python.pb_utils.responses import InferenceResponse
from tutti.backends.python.pb_utils.senders import InferenceResponseSender
from tutti.backends.python.pb_utils.tensors import Tensor, checked_tensors, received, sent
from tutti.backends.python.pb_utils.values import checked_parameters, text_of
from tutti.core.types import Call, InferRequest
from tutti.devices import device_turns

# Parameters of Triton's own meaning.
_OF_TRITON = ("sequence_id", "sequence_start", "sequence_end", "priority", "timeout")


class InferenceTrace:
    """A request's trace, to hand on to requests made in its name."""

    def __init__(self, trace: Any = None) -> None:
        self._trace = trace

    def get_context(self) -> str | None:
        return getattr(self._trace, "context", None)

    def _follow(self, call: Call) -> None:
        """Have a request that is made in its name be a step of it."""
        if self._trace is not None:
            self._trace.follow(call)


def _flagged(flags: int) -> dict[str, bool]:
    """Flags of sequences as parameters."""
    return {
        "sequence_start": bool(flags & TRITONSERVER_REQUEST_FLAG_SEQUENCE_START),
        "sequence_end": bool(flags & TRITONSERVER_REQUEST_FLAG_SEQUENCE_END),
    }


class InferenceRequest:
    """A request: one of the batch, as execute sees it, or one that a model makes to another model.

    Of the latter, outputs stay on the device where they are made, unless `preferred_memory` says otherwise.
    """

    __slots__ = (
        "_call", "_held", "_is_on_host", "_output_names", "_preferred_memory", "_request", "_sender", "_tensors",
        "_trace",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str = "",
        correlation_id: int | str = 0,
        inputs: Sequence[Tensor] = (),
        requested_output_names: Sequence[str] = (),
        model_name: str = "",
        model_version: int = -1,
        flags: int = 0,
        timeout: int = 0,
        preferred_memory: PreferredMemory | None = None,
        trace: InferenceTrace | None = None,
        parameters: str | Mapping[str, Any] | None = None,
    ) -> None:
        parameters = checked_parameters(parameters) if parameters else {}
        if correlation_id is None or flags is None:
            raise TypeError(f"{'flags' if flags is None else 'correlation_id'}: expected a number, got None")
        if correlation_id:
            parameters["sequence_id"] = correlation_id
        if correlation_id or flags:
            parameters.update(_flagged(flags))
        if timeout:
            parameters["timeout"] = timeout
        version = str(model_version) if model_version > 0 else ""
        names = tuple(map(text_of, requested_output_names))
        tensors = {tensor.name(): sent(tensor) for tensor in checked_tensors(inputs)}
        self._request = InferRequest(text_of(model_name), tensors, version, text_of(request_id), names, parameters)
        if preferred_memory is None or preferred_memory.preferred_memory_type == TRITONSERVER_MEMORY_GPU:
            self._request.device_outputs = frozenset(names)
        self._preferred_memory = preferred_memory
        self._trace = trace
        # Another thread may send it, and the execution that made it wait for that.
        self._held = device_turns.held_here()
        self._is_on_host = False
        self._tensors: dict[str, Tensor] = {}
        self._output_names: Sequence[str] = names
        self._call: Call | None = None
        self._sender: Callable[[Call], InferenceResponseSender] | None = None

    @classmethod
    def received(
        cls,
        call: Call,
        output_names: Sequence[str],
        sender: Callable[[Call], InferenceResponseSender],
        is_on_host: bool = True,
    ) -> "InferenceRequest":
        """A request of a batch. The model has its inputs in host memory where `is_on_host`."""
        self = cls.__new__(cls)
        self._request = call.request
        self._preferred_memory = None
        self._trace = None
        self._held = device_turns.held_here()
        self._is_on_host = is_on_host
        self._tensors = {}
        self._output_names = output_names
        self._call = call
        self._sender = sender
        return self

    def inputs(self) -> list[Tensor]:
        return [tensor for name in self._request.inputs if (tensor := self._input(name)) is not None]

    def _input(self, name: str) -> Tensor | None:
        """The same tensor each time: what a model has written to it is there."""
        tensor = self._tensors.get(name)
        if tensor is None:
            inner = self._request.inputs.get(name)
            if inner is None:
                return None
            tensor = self._tensors[name] = received(inner, self._is_on_host)
        return tensor

    def request_id(self) -> str:
        return self._request.id

    def correlation_id(self) -> int | str:
        value = self._request.parameters.get("sequence_id", 0)
        return value if isinstance(value, int | str) else 0

    def model_name(self) -> str:
        return self._request.model_name

    def model_version(self) -> int:
        return int(self._request.model_version or -1)

    def flags(self) -> int:
        parameters = self._request.parameters
        start = TRITONSERVER_REQUEST_FLAG_SEQUENCE_START if parameters.get("sequence_start") else 0
        return start | (TRITONSERVER_REQUEST_FLAG_SEQUENCE_END if parameters.get("sequence_end") else 0)

    def set_flags(self, flags: int) -> None:
        """Set the flags of sequences, in place of earlier ones."""
        self._request = replace(self._request, parameters={**self._request.parameters, **_flagged(flags)})

    def timeout(self) -> int:
        """Microseconds; 0 for none."""
        value = self._request.parameters.get("timeout", 0)
        return value if isinstance(value, int) else 0

    def parameters(self) -> str:
        """The request's parameters as a JSON object; those of Triton's own meaning have methods of their own."""
        return json.dumps({key: value for key, value in self._request.parameters.items() if key not in _OF_TRITON})

    def requested_output_names(self) -> list[str]:
        return list(self._request.outputs or self._output_names)

    def preferred_memory(self) -> PreferredMemory:
        return self._preferred_memory or PreferredMemory()

    def trace(self) -> InferenceTrace:
        return InferenceTrace(self._call.trace if self._call is not None else None)

    def is_cancelled(self) -> bool:
        """Whether the caller has gone."""
        return self._call is not None and self._call.is_cancelled

    def set_release_flags(self, flags: int) -> None:
        if flags & TRITONSERVER_REQUEST_RELEASE_RESCHEDULE:
            raise TritonModelException("iterative sequences are not supported: a request cannot be rescheduled")

    def get_response_sender(self) -> InferenceResponseSender:
        if self._call is None or self._sender is None:
            raise TritonModelException("only a received request has a response sender")
        return self._sender(self._call)

    def exec(
        self, decoupled: bool = False, execution_timeout: int | None = None
    ) -> "InferenceResponse | Iterator[InferenceResponse]":
        """Have another model answer, and wait. `decoupled` gives an iterator over its answers.

        The last of a decoupled model's answers has no outputs where it ended without one.

        `execution_timeout` is nanoseconds in all.
        """
        answers = self._submit(execution_timeout, decoupled)
        if decoupled:
            return iter(answers)
        last = InferenceResponse()
        for response in answers:
            last = response
        return last

    async def async_exec(self, decoupled: bool = False, execution_timeout: int | None = None) -> Any:
        """As exec, awaited."""
        answers = self._submit(execution_timeout, decoupled)
        if decoupled:
            return iter(answers)
        if not answers.ended.done():
            with device_turns.given_up(self._held):
                ended = asyncio.wrap_future(answers.ended)
                await asyncio.wait([ended], timeout=answers.left_s())
                ended.cancel()  # nobody waits any more: the loop may be gone when the answer comes
        last = InferenceResponse()
        for response in answers:
            last = response
        return last

    def _submit(self, timeout_ns: int | None, takes_several: bool) -> "Answers":
        if server.infer is None:
            raise TritonModelException("no server answers requests in this process")
        timeout_s = None if timeout_ns is None else timeout_ns / 1e9
        answers = Answers(timeout_s, self._preferred_memory, self._held)
        call = Call(self._request, answers, None, answers.emit if takes_several else None)
        answers.call = call
        if self._trace is not None:
            self._trace._follow(call)
        server.infer([call])
        return answers
