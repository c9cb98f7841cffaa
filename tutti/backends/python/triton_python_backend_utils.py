"""What a model.py written for Triton's python backend imports as `triton_python_backend_utils`.

Names, arguments and results are those of Triton's module, so such a file runs unchanged.
"""

import asyncio
import contextlib
import enum
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from google.protobuf import json_format
from tritonclient.grpc import model_config_pb2 as pb

from tutti.core import dtypes, errors
from tutti.core.dtypes import Array
from tutti.core.types import RAW_TYPES, Answer, Call, Infer, InferRequest, InferResponse, ModelControl, OnDevice
from tutti.core.types import Tensor as _Tensor
from tutti.devices import device_turns, dlpack
from tutti.devices.tensors import DeviceTensor, gpus
from tutti.observing import custom_metrics
from tutti.repository.config import as_json

TRITONSERVER_REQUEST_FLAG_SEQUENCE_START = 1
TRITONSERVER_REQUEST_FLAG_SEQUENCE_END = 2
TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
TRITONSERVER_REQUEST_RELEASE_ALL = 1
TRITONSERVER_REQUEST_RELEASE_RESCHEDULE = 2
TRITONSERVER_MEMORY_CPU = 0
TRITONSERVER_MEMORY_GPU = 1
TRITON_STRING_TO_NUMPY = {
    dtypes.to_config(name): bool if name == "BOOL" else dtype.type for name, dtype in dtypes.NUMPY.items()
}

# Where exec and async_exec send their requests: the server this process runs.
_infer: Infer | None = None
# What is told of requests that a model does not wait for any longer.
_given_up: Callable[[Call], None] = lambda call: None  # noqa: E731
# What loads and unloads models for models.
_control: ModelControl | None = None
# The folders of versions that this process has models of.
_model_dirs: list[str] = []
_FILE_PREFIX = "file:"


def serve_with(
    infer: Infer, given_up: Callable[[Call], None] = lambda call: None, control: ModelControl | None = None
) -> None:
    """Not for models: the server says what answers their requests to other models, and what loads others for them."""
    global _infer, _given_up, _control
    _infer = infer
    _given_up = given_up
    _control = control


def know_folder(path: str) -> None:
    """Not for models: this process has the model of a version's folder."""
    if path not in _model_dirs:
        _model_dirs.append(path)


def told(error: BaseException) -> str:
    """Not for models: an exception of a model's, in one sentence. Its own text may fail to be made."""
    kind = type(error).__name__
    try:
        return errors.sayable(f"{kind}: {error}")
    except BaseException:
        return f"{kind}, whose text cannot be made"


def are_parameters(given: Mapping[Any, Any]) -> bool:
    """Not for models: whether every protocol can carry these parameters of a response."""
    texts = [each for pair in given.items() for each in pair if isinstance(each, str)]
    return (
        all(isinstance(name, str) for name in given)
        and all(isinstance(value, bool | int | float | str) for value in given.values())
        and all(errors.sayable(text) == text for text in texts)
    )


def has_text(error: BaseException) -> bool:
    """Not for models: whether an exception, and those behind it, have a text."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        try:
            str(link)
        except BaseException:
            return False
        link = link.__cause__ or link.__context__
    return True


class TritonModelException(Exception):
    """Raise from initialize to refuse the load, or from execute to fail the whole batch."""


class TritonError:
    """An error of one response. `code` is one of the class's constants."""

    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)
    _CLASSES: ClassVar[dict[int, type[errors.InferError]]] = {
        NOT_FOUND: errors.NotFound,
        INVALID_ARG: errors.InvalidArgument,
        UNAVAILABLE: errors.Unavailable,
        UNSUPPORTED: errors.Unsupported,
        CANCELLED: errors.Cancelled,
        ALREADY_EXISTS: errors.AlreadyExists,
        UNKNOWN: errors.Unknown,
    }

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message = message
        self._code = code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code

    def as_infer_error(self) -> errors.InferError:
        return self._CLASSES.get(self._code, errors.Internal)(errors.sayable(self._message))

    @classmethod
    def of(cls, error: errors.InferError) -> "TritonError":
        code = next((code for code, kind in cls._CLASSES.items() if isinstance(error, kind)), cls.INTERNAL)
        return cls(error.message, code)

    def __str__(self) -> str:
        return self._message


class Tensor:
    """A named tensor over a numpy array, or over memory of a GPU."""

    # `_datatype` is "" where it is that of the array's own dtype.
    __slots__ = ("_data", "_datatype", "_name")

    def __init__(self, name: str, array: Array) -> None:
        if array is None:
            raise TypeError(f"tensor '{name}': expected an array, got None")
        self._name = _tensor_name(name)
        self._data: Array | OnDevice = array if type(array) is np.ndarray else np.asarray(array)
        self._datatype = ""

    @classmethod
    def from_dlpack(cls, name: str, tensor: Any) -> "Tensor":
        """A tensor over a DLPack capsule, or anything with `__dlpack__`, as torch's and cupy's tensors, without a copy.

        Elements are in row-major order. Work on a GPU that this thread has begun is waited for before anyone reads
        them; a capsule's maker has to see to work that other threads or streams do.
        """
        name = _tensor_name(name)
        try:
            data, datatype = _of_dlpack(tensor)
        except ValueError as error:
            raise TritonModelException(f"tensor '{name}': {error}") from None
        return cls._over(name, data, datatype)

    @classmethod
    def _over(cls, name: str, data: Array | OnDevice, datatype: str) -> "Tensor":
        made = cls.__new__(cls)
        made._name = name
        made._data = data
        made._datatype = datatype
        return made

    @classmethod
    def _received(cls, tensor: _Tensor, is_on_host: bool) -> "Tensor":
        """A tensor that came to a model; its elements are there.

        In host memory they are a copy: the model may write to what it gets, which others read, or are sent again.
        """
        if not is_on_host:
            data = tensor.data
            if not isinstance(data, np.ndarray) and not isinstance(data, RAW_TYPES):
                data.wait()
                return cls._over(tensor.name, data, tensor.datatype)
        made = cls(tensor.name, tensor.array().copy())
        if tensor.datatype == "BF16":
            made._datatype = "BF16"
        return made

    def _sent(self) -> _Tensor:
        data = self._data
        if isinstance(data, np.ndarray) and not self._datatype:
            is_text = data.dtype == object or data.dtype.kind in "SU"
            return _Tensor.of(self._name, dtypes.as_bytes(data) if is_text else data)
        return _Tensor(self._name, self._datatype, tuple(data.shape), data)

    def _settle(self, stays: bool) -> None:
        """Let the elements be those of now, whatever the model does next: on their device where it `stays`."""
        data = self._data
        if isinstance(data, np.ndarray):
            return
        if not stays:
            self._data = data.array()
            self._datatype = "BF16" if self._datatype == "BF16" else ""
        elif isinstance(data, DeviceTensor):
            self._data = data.lasting()
        else:
            data.wait()

    def to_dlpack(self) -> Any:
        """A DLPack capsule. BYTES have none."""
        return self.__dlpack__()

    def __dlpack__(self, stream: Any = None, **options: Any) -> Any:
        """The elements are complete: it is all one which stream reads them."""
        data = self._data
        if not isinstance(data, np.ndarray):
            return data.__dlpack__(stream=stream, **options)
        if data.dtype.kind in "OSU":
            raise TritonModelException("DLPack does not have support for string tensors.")
        # A read-only array, as one over the wire's bytes is, cannot be exported.
        capsule = (data if data.flags.writeable else data.copy()).__dlpack__(**options)
        return dlpack.relabel(capsule, "BF16") if self._datatype == "BF16" else capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._data.__dlpack_device__()

    def name(self) -> str:
        return self._name

    def shape(self) -> list[int]:
        return list(self._data.shape)

    def as_numpy(self) -> Array:
        """BYTES tensors are object arrays of bytes. Tensors on a GPU, and of BF16, are for DLPack only."""
        if not isinstance(self._data, np.ndarray):
            raise TritonModelException("Tensor is stored in GPU and cannot be converted to NumPy.")
        if self._datatype == "BF16":
            raise TritonModelException(
                "Tensor dtype is BF16 and cannot be converted to NumPy. Use to_dlpack() and from_dlpack() instead."
            )
        return self._data

    def triton_dtype(self) -> int:
        if isinstance(self._data, np.ndarray) and not self._datatype:
            return numpy_to_triton_type(self._data.dtype)
        return int(pb.DataType.Value(dtypes.to_config(self._datatype)))

    def is_cpu(self) -> bool:
        return isinstance(self._data, np.ndarray)


def _text(name: Any) -> str:
    """A name that a model gives: text or, as in Triton, its bytes. Raises TypeError."""
    if isinstance(name, bytes):
        return name.decode()
    if not isinstance(name, str):
        raise TypeError(f"expected text, got a {type(name).__name__}")
    return name


def _tensors(given: Iterable[Tensor]) -> list[Tensor]:
    """A model's tensors. Raises TypeError where it gives no list, TritonModelException for what is no tensor."""
    tensors = list(given)
    for one in tensors:
        if not isinstance(one, Tensor):
            raise TritonModelException(f"expected tensors, got a {type(one).__name__} among them")
    return tensors


def _parameters(given: str | Mapping[Any, Any]) -> dict[str, Any]:
    """Parameters that a model gives. Raises TritonModelException where they are of a type that is none of Triton's.

    But for floats: Triton's protocols have them, and its python backend has not.
    """
    made = json.loads(given) if isinstance(given, str) else dict(given)
    for key, value in made.items():
        if not isinstance(key, str):
            raise TritonModelException(f"Expect parameters keys to have type str, found type {type(key)}")
        if not isinstance(value, bool | int | str | float):
            raise TritonModelException(
                f"Expect parameters values to have type bool/int/str, found type {type(value)} ('{key}')"
            )
    return made


def _tensor_name(name: Any) -> str:
    text = name if type(name) is str else _text(name)
    if not text:
        raise TritonModelException("Tensor name cannot be an empty string.")
    return text


def _of_dlpack(tensor: Any) -> tuple[Array | OnDevice, str]:
    """(the elements, "BF16" or that of a tensor on a device). Raises ValueError."""
    if dlpack.is_capsule(tensor):
        kind = dlpack.describe(tensor).device_type
    elif hasattr(tensor, "__dlpack__") and hasattr(tensor, "__dlpack_device__"):
        kind = int(tensor.__dlpack_device__()[0])
    else:
        raise ValueError(
            "Provided tensor is not supported. Tensor must be a DLPack capsule or have `__dlpack__` and "
            f"`__dlpack_device__` attributes, got a {type(tensor).__name__}"
        )
    if kind == dlpack.CUDA:
        made = DeviceTensor.of_capsule(tensor) if dlpack.is_capsule(tensor) else DeviceTensor.of(tensor)
        return made, made.datatype
    if kind not in (dlpack.CPU, dlpack.CUDA_HOST):
        raise ValueError(f"DLDevice type {kind} is not support by Python backend.")
    capsule = tensor if dlpack.is_capsule(tensor) else _exported(tensor)
    datatype = "BF16" if dlpack.describe(capsule).datatype == "BF16" else ""
    return dlpack.as_array(capsule), datatype


def _exported(tensor: Any) -> Any:
    """A capsule of host memory; of the newer kind where the tensor is read-only, which the older one cannot say."""
    try:
        return tensor.__dlpack__()
    except BufferError:
        return tensor.__dlpack__(max_version=(1, 0))


class PreferredMemory:
    """Where a model would like the outputs of a request it makes."""

    def __init__(self, preferred_memory_type: int = TRITONSERVER_MEMORY_CPU, preferred_device_id: int = 0) -> None:
        if preferred_memory_type not in (TRITONSERVER_MEMORY_CPU, TRITONSERVER_MEMORY_GPU):
            raise TritonModelException(f"PreferredMemory: unknown memory type {preferred_memory_type!r}")
        self.preferred_memory_type = preferred_memory_type
        self.preferred_device_id = preferred_device_id


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


class InferenceResponse:
    """The answer to one request: its outputs, or an error."""

    __slots__ = ("_error", "_outputs", "_parameters")

    def __init__(
        self,
        output_tensors: Sequence[Tensor] = (),
        error: TritonError | str | None = None,
        parameters: str | Mapping[str, Any] | None = None,
    ) -> None:
        self._outputs = _tensors(output_tensors)
        self._error = TritonError(error) if isinstance(error, str) else error
        self._parameters: dict[str, Any] = {}
        if parameters:
            self._parameters = _parameters(parameters)

    def output_tensors(self) -> list[Tensor]:
        return self._outputs

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def parameters(self) -> str:
        return json.dumps(self._parameters)


_CLOSED = "Response sender has been closed."


class InferenceResponseSender:
    """Sends the answers to one request: any number for a decoupled model, one for others."""

    def __init__(
        self,
        call: Call,
        answer_of: Callable[[Call, InferenceResponse], InferResponse | errors.InferError],
        null: InferResponse,
        is_decoupled: bool,
        done: Callable[[], None],
    ) -> None:
        self._call = call
        self._is_decoupled = is_decoupled
        self._answer_of = answer_of
        self._null = null
        self._done = done
        self._lock = threading.Lock()
        self._is_closed = False
        # The one answer of a model that is not decoupled is sent, the final flag may still come.
        self._is_answered = False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        """Send a response, or with TRITONSERVER_RESPONSE_COMPLETE_FINAL the last one, or none. Raises when closed."""
        if response is not None and not isinstance(response, InferenceResponse):
            raise TritonModelException(f"send: expected an InferenceResponse, got a {type(response).__name__}")
        if flags not in (0, TRITONSERVER_RESPONSE_COMPLETE_FINAL):
            raise TritonModelException(f"Unable to send response. Unsupported flag provided: {flags}")
        is_final = bool(flags)
        if response is None and not is_final:
            raise TritonModelException(
                "Inference Response object must be provided when the response flags is set to zero."
            )
        with self._lock:
            if self._is_closed:
                if response is None and self._is_answered:
                    self._is_answered = False
                    return  # its one answer was the final one
                what = "Non-decoupled model cannot send more than one response." if self._is_answered else _CLOSED
                raise TritonModelException(f"Unable to send response. {what}")
            if response is None and not self._is_decoupled:
                raise TritonModelException(
                    "Unable to send response. Non-decoupled model cannot send complete final before sending a response."
                )
            self._is_closed = is_final
            self._is_answered = not self._is_decoupled and not is_final
            answer = self._null if response is None else self._answer_of(self._call, response)
            emit = self._call.emit if self._is_decoupled and not is_final else None
            if emit is not None and not isinstance(answer, errors.InferError):
                emit(answer)
                return
            # Only a decoupled model's caller takes several answers; an error is its last.
            self._is_closed = True
        self._settle(answer)

    def is_closed(self) -> bool:
        return self._is_closed

    def is_cancelled(self) -> bool:
        return self._call.is_cancelled

    def give_up(self) -> bool:
        """Not for models: send nothing any more, another answers; False where it has ended by itself."""
        with self._lock:
            if self._is_closed:
                return False
            self._is_closed = True
        self._done()
        return True

    def fail(self, error: errors.InferError) -> None:
        """Not for models: end the answers with an error, unless they have ended."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._settle(error)

    def _settle(self, answer: InferResponse | errors.InferError) -> None:
        self._done()
        self._call.finish(answer)

    def __del__(self) -> None:
        if not self._is_closed:
            # Not in this thread, which may hold any lock.
            error = errors.Internal(
                f"model '{self._call.request.model_name}' dropped the request without a final answer"
            )
            threading.Thread(target=self.fail, args=(error,), daemon=True).start()


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
        given = _parameters(parameters) if parameters else {}
        if correlation_id is None or flags is None:
            raise TypeError(f"{'flags' if flags is None else 'correlation_id'}: expected a number, got None")
        if correlation_id:
            given["sequence_id"] = correlation_id
        if correlation_id or flags:
            given.update(_flagged(flags))
        if timeout:
            given["timeout"] = timeout
        version = str(model_version) if model_version > 0 else ""
        names = tuple(map(_text, requested_output_names))
        tensors = {tensor.name(): tensor._sent() for tensor in _tensors(inputs)}
        self._request = InferRequest(_text(model_name), tensors, version, _text(request_id), names, given)
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
        """Not for models: a request of a batch. The model has its inputs in host memory where `is_on_host`."""
        made = cls.__new__(cls)
        made._request = call.request
        made._preferred_memory = None
        made._trace = None
        made._held = device_turns.held_here()
        made._is_on_host = is_on_host
        made._tensors = {}
        made._output_names = output_names
        made._call = call
        made._sender = sender
        return made

    def inputs(self) -> list[Tensor]:
        return [tensor for name in self._request.inputs if (tensor := self._input(name)) is not None]

    def _input(self, name: str) -> Tensor | None:
        """The same tensor each time: what a model has written to it is there."""
        made = self._tensors.get(name)
        if made is None:
            given = self._request.inputs.get(name)
            if given is None:
                return None
            made = self._tensors[name] = Tensor._received(given, self._is_on_host)
        return made

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
        given = self._request.parameters
        start = TRITONSERVER_REQUEST_FLAG_SEQUENCE_START if given.get("sequence_start") else 0
        return start | (TRITONSERVER_REQUEST_FLAG_SEQUENCE_END if given.get("sequence_end") else 0)

    def set_flags(self, flags: int) -> None:
        """Those of sequences, in place of what was said before."""
        self._request = replace(self._request, parameters={**self._request.parameters, **_flagged(flags)})

    def timeout(self) -> int:
        """Microseconds; 0 for none."""
        value = self._request.parameters.get("timeout", 0)
        return value if isinstance(value, int) else 0

    def parameters(self) -> str:
        """The request's parameters as a JSON object; those of Triton's own meaning have methods of their own."""
        own = ("sequence_id", "sequence_start", "sequence_end", "priority", "timeout")
        return json.dumps({key: value for key, value in self._request.parameters.items() if key not in own})

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

    def _submit(self, timeout_ns: int | None, takes_several: bool) -> "_Answers":
        if _infer is None:
            raise TritonModelException("no server answers requests in this process")
        timeout_s = None if timeout_ns is None else timeout_ns / 1e9
        answers = _Answers(timeout_s, self._preferred_memory, self._held)
        call = Call(self._request, answers, None, answers.emit if takes_several else None)
        answers.call = call
        if self._trace is not None:
            self._trace._follow(call)
        _infer([call])
        return answers


class _Answers:
    """The answers to a model's own request, in order; a sink."""

    def __init__(
        self,
        timeout_s: float | None,
        preferred: PreferredMemory | None = None,
        held: device_turns.HeldTurn | None = None,
    ) -> None:
        """`held` is the turn of the execution that asks, which it does not need while it waits."""
        self.call: Call | None = None
        self._held = held
        self.ended: Future[None] = Future()
        self.ended.set_running_or_notify_cancel()  # who waits for it may be cancelled, but not the end itself
        self._until_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._preferred = preferred
        self._queue: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()

    def emit(self, response: InferResponse) -> None:
        self._queue.put(response)

    def settle(self, calls: Sequence[Call]) -> None:
        """The last answer of a decoupled model may be an empty one, which the asking model sees, as in Triton."""
        self._queue.put(calls[0].answer)
        self._queue.put(None)
        self.ended.set_result(None)

    def __iter__(self) -> Iterator[InferenceResponse]:
        while True:
            try:
                answer = self._next()
            except queue.Empty:
                assert self.call is not None
                self.call.is_cancelled = True
                _given_up(self.call)
                yield InferenceResponse(error=TritonError("the request ran out of its execution_timeout"))
                return
            if answer is None:
                return
            yield _response_of(answer, self._preferred)

    def _next(self) -> Answer | None:
        """Raises queue.Empty when it takes too long, and DeviceLost where there is no turn any more to go on with."""
        left_s = self.left_s()
        if left_s is not None and left_s <= 0 and not self.ended.done():
            raise queue.Empty
        with contextlib.suppress(queue.Empty):
            return self._queue.get_nowait()
        with device_turns.given_up(self._held):
            return self._queue.get(timeout=left_s)

    def left_s(self) -> float | None:
        """Of the time for all answers; None for any."""
        return None if self._until_s is None else self._until_s - time.monotonic()


def _response_of(answer: Answer, preferred: PreferredMemory | None) -> InferenceResponse:
    """In the asking model's thread: what has to be copied between memories is copied here."""
    if isinstance(answer, errors.InferError):
        return InferenceResponse(error=TritonError.of(answer))
    is_on_host = preferred is not None and preferred.preferred_memory_type == TRITONSERVER_MEMORY_CPU
    tensors = [Tensor._received(tensor, is_on_host) for tensor in answer.outputs]
    if preferred is not None and not is_on_host:
        tensors = [_moved(tensor, preferred.preferred_device_id) for tensor in tensors]
    return InferenceResponse(tensors, parameters=answer.parameters)


def _moved(tensor: Tensor, device: int) -> Tensor:
    """The tensor in the memory of a GPU. BYTES, and all tensors where there is no such GPU, stay in the host's."""
    sent = tensor._sent()
    is_there = tensor.__dlpack_device__() == (dlpack.CUDA, device) if sent.datatype != "BYTES" else True
    if is_there or device >= gpus():
        return tensor
    return Tensor._over(sent.name, DeviceTensor.of_array(sent.array(), sent.datatype, device), sent.datatype)


class ModelConfig:
    """What `auto_complete_config` completes: a model's configuration, as a dictionary in Triton's JSON form."""

    def __init__(self, proto: Any) -> None:
        self._proto = proto

    def as_dict(self) -> dict[str, Any]:
        return as_json(self._proto)

    def add_input(self, spec: Mapping[str, Any]) -> None:
        """Add `{"name", "data_type", "dims"[, "optional"]}`, or check it against what is there."""
        self._add(self._proto.input, "input", spec)

    def add_output(self, spec: Mapping[str, Any]) -> None:
        self._add(self._proto.output, "output", spec)

    def _add(self, field: Any, kind: str, spec: Mapping[str, Any]) -> None:
        unknown = set(spec) - {"name", "data_type", "dims", "optional"}
        if unknown:
            raise ValueError(f"model '{self._proto.name}': {kind} has unexpected properties {sorted(unknown)}")
        for key in ("name", "data_type", "dims"):
            if key not in spec:
                raise ValueError(f"model '{self._proto.name}': {kind} lacks the property '{key}'")
        for known in field:
            if known.name == spec["name"]:
                given = (pb.DataType.Value(spec["data_type"]), list(spec["dims"]))
                if known.data_type and (known.data_type, list(known.dims)) != given:
                    raise ValueError(
                        f"model '{self._proto.name}': {kind} '{known.name}' is configured otherwise than "
                        f"auto_complete_config says: {spec}"
                    )
                known.data_type = given[0]
                known.dims[:] = given[1]
                return
        json_format.ParseDict(dict(spec), field.add())

    def set_max_batch_size(self, size: int) -> None:
        """Where the configuration gives none, or less. Raises ValueError where it asks for more than the model can."""
        if self._proto.max_batch_size > size:
            raise ValueError(
                f"model '{self._proto.name}': configuration specified max_batch_size {self._proto.max_batch_size}, "
                f"auto_complete_config says that the model takes {size}"
            )
        self._proto.max_batch_size = size

    def set_dynamic_batching(self) -> None:
        """Raises ValueError where the configuration has another scheduler."""
        other = self._proto.WhichOneof("scheduling_choice")
        if other not in (None, "dynamic_batching"):
            raise ValueError(
                f"model '{self._proto.name}': Configuration specified scheduling_choice as '{other}', "
                "auto_complete_config sets dynamic_batching"
            )
        self._proto.dynamic_batching.SetInParent()

    def set_model_transaction_policy(self, policy: Mapping[str, bool]) -> None:
        """Raises ValueError where the configuration says that the model is decoupled, and this that it is not."""
        unknown = set(policy) - {"decoupled"}
        if unknown:
            raise ValueError(f"model '{self._proto.name}': model_transaction_policy has unknown {sorted(unknown)}")
        given = self._proto.model_transaction_policy
        is_decoupled = policy.get("decoupled", given.decoupled)
        if given.decoupled and not is_decoupled:
            raise ValueError(
                f"model '{self._proto.name}': trying to change decoupled property, which its configuration sets to "
                "'True': auto_complete_config sets it to 'False'"
            )
        given.decoupled = is_decoupled


class Metric:
    """One metric of a MetricFamily."""

    def __init__(self, value: custom_metrics.Value) -> None:
        self._value = value

    def increment(self, value: float) -> None:
        _counted(self._value.increment, value)

    def set(self, value: float) -> None:
        _counted(self._value.set, value)

    def observe(self, value: float) -> None:
        _counted(self._value.observe, value)

    def value(self) -> float:
        return float(_counted(self._value.value))


class MetricFamily:
    """A family of a model's own metrics, on the server's metrics page."""

    COUNTER, GAUGE, HISTOGRAM = custom_metrics.COUNTER, custom_metrics.GAUGE, custom_metrics.HISTOGRAM

    def __init__(self, name: str, description: str, kind: int) -> None:
        self._family: custom_metrics.Family = _counted(custom_metrics.family, name, description, kind)

    def Metric(  # noqa: N802
        self, labels: Mapping[str, str] | None = None, buckets: Sequence[float] | None = None
    ) -> Metric:
        """`buckets`, upper bounds, are a histogram's. Raises TritonModelException."""
        return Metric(_counted(self._family.metric, labels or {}, buckets))


def _counted(do: Callable[..., Any], *values: Any) -> Any:
    """What metrics are asked for; what they have against it is Triton's exception."""
    try:
        return do(*values)
    except ValueError as error:
        raise TritonModelException(str(error)) from None


class Logger:
    """Triton's model logger, on Python's logging. Raises TypeError for a message that is no text, or another level."""

    class LogLevel(enum.IntEnum):
        """Triton's names and numbers."""

        INFO, WARNING, ERROR, VERBOSE = range(4)

    INFO, WARNING, ERROR, VERBOSE = LogLevel
    _log = logging.getLogger("tutti.backends.python.model")
    _OF_PYTHON: ClassVar = dict(
        zip(LogLevel, (logging.INFO, logging.WARNING, logging.ERROR, logging.DEBUG), strict=True)
    )

    @classmethod
    def log(cls, message: str, level: LogLevel = LogLevel.INFO) -> None:
        if not isinstance(level, cls.LogLevel):
            raise TypeError(f"log: expected a level, as pb_utils.Logger.INFO, got {level!r}")
        cls._log.log(cls._OF_PYTHON[level], "%s", _text(message))

    @classmethod
    def log_info(cls, message: str) -> None:
        cls.log(message, cls.INFO)

    @classmethod
    def log_warn(cls, message: str) -> None:
        cls.log(message, cls.WARNING)

    @classmethod
    def log_error(cls, message: str) -> None:
        cls.log(message, cls.ERROR)

    @classmethod
    def log_verbose(cls, message: str) -> None:
        cls.log(message, cls.VERBOSE)


def load_model(model_name: str, config: str = "", files: Mapping[str, bytes | str] | None = None) -> None:
    """Have the server load a model, or load it anew: as a client's load, with Triton's parameters.

    `config` is a configuration in JSON; `files`, "file:VERSION/FILE" -> content, needs it. Returns when the model
    serves. Raises TritonModelException with the reason, as where load and unload are not allowed.
    """
    contents = {}
    for key, value in (files or {}).items():
        path = _text(key)
        if not path.startswith(_FILE_PREFIX):
            raise TritonModelException(
                f"failed to load '{model_name}': files: expected 'file:VERSION/FILE', got '{path}'"
            )
        contents[path.removeprefix(_FILE_PREFIX)] = value.encode() if isinstance(value, str) else bytes(value)
    with _told_to_models(f"failed to load '{model_name}'"):
        _controlled().load(_text(model_name), _text(config) or None, contents)


def unload_model(model_name: str, unload_dependents: bool = False) -> None:
    """Have the server serve a model no longer; returns before all that is inside it has ended, as in Triton.

    `unload_dependents` unloads an ensemble's models, too. Raises TritonModelException.
    """
    with _told_to_models(f"failed to unload '{model_name}'"):
        _controlled().unload(_text(model_name), bool(unload_dependents))


def is_model_ready(model_name: str, model_version: str = "") -> bool:
    """Whether a model, or one version of it, answers now. Raises TritonModelException for what is no version."""
    with _told_to_models("Failed to check model readiness"):
        return _controlled().is_ready(_text(model_name), _text(model_version))


def _controlled() -> ModelControl:
    if _control is None:
        raise TritonModelException("no server loads models in this process")
    return _control


@contextlib.contextmanager
def _told_to_models(what: str) -> Iterator[None]:
    """Errors of the server's are TritonModelExceptions, which say what has failed once."""
    try:
        yield
    except (errors.TuttiError, ValueError) as error:
        why = errors.sayable(error)
        raise TritonModelException(why if why.startswith(what) else f"{what}: {why}") from None


def get_model_dir() -> str:
    """The folder of the model version that asks, which its code lies in."""
    if len(_model_dirs) == 1:
        return _model_dirs[0]
    frame = sys._getframe(1)
    while frame is not None:
        for folder in _model_dirs:
            if frame.f_code.co_filename.startswith(folder + os.sep):
                return folder
        frame = frame.f_back  # type: ignore[assignment]
    raise TritonModelException("which model asks for its folder cannot be told: ask from its own code")


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return request._input(_text(name))


def get_output_tensor_by_name(response: InferenceResponse, name: str) -> Tensor | None:
    text = _text(name)
    return next((tensor for tensor in response.output_tensors() if tensor.name() == text), None)


def get_input_config_by_name(model_config: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((spec for spec in model_config.get("input", []) if spec["name"] == name), None)


def get_output_config_by_name(model_config: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((spec for spec in model_config.get("output", []) if spec["name"] == name), None)


def using_decoupled_model_transaction_policy(model_config: dict[str, Any]) -> bool:
    return bool(model_config.get("model_transaction_policy", {}).get("decoupled", False))


def triton_to_numpy_type(data_type: int) -> Any:
    """DataType's number -> numpy type."""
    return triton_string_to_numpy(pb.DataType.Name(data_type))


def numpy_to_triton_type(numpy_type: Any) -> int:
    """Numpy type -> DataType's number."""
    name = dtypes.to_config(dtypes.from_numpy(np.dtype(numpy_type)))
    return int(pb.DataType.Value(name))


def triton_string_to_numpy(type_name: str) -> Any:
    """`TYPE_FP32` -> numpy.float32; `TYPE_STRING` -> numpy.object_."""
    return dtypes.NUMPY[dtypes.from_config(type_name)].type


def serialize_byte_tensor(tensor: Array) -> bytes:
    """BYTES elements in wire form."""
    return dtypes.encode_bytes(tensor.reshape(-1))


def deserialize_bytes_tensor(encoded: bytes) -> Array:
    """The inverse: a flat object array of bytes."""
    elements: list[bytes] = []
    at = 0
    while at < len(encoded):
        length = int.from_bytes(encoded[at : at + 4], "little")
        elements.append(encoded[at + 4 : at + 4 + length])
        at += 4 + length
    return np.array(elements, dtype=object)


def outputs_of(response: InferenceResponse) -> dict[str, Tensor]:
    """Not for models: a response's outputs by name."""
    return {tensor._name: tensor for tensor in response._outputs}


def sent(tensor: Tensor) -> _Tensor:
    """Not for models: the tensor as the server has it. Raises InvalidArgument for a dtype Triton has no name for."""
    return tensor._sent()


def join(
    responses: Sequence[Any], names: Sequence[str], wanted: Sequence[np.dtype[Any]], rows: Sequence[int]
) -> list[Array] | None:
    """Not for models: each output of all responses, joined; None where they are not alike, or too large to copy."""
    columns: list[list[Array]] = [[] for _ in names]
    for response, size in zip(responses, rows, strict=True):
        if not isinstance(response, InferenceResponse) or response._error is not None or response._parameters:
            return None
        if len(response._outputs) != len(names):
            return None
        for index, tensor in enumerate(response._outputs):
            array = tensor._data
            if type(array) is not np.ndarray or tensor._datatype or tensor._name != names[index]:
                return None
            if array.dtype != wanted[index] or array.shape[:1] != (size,):
                return None
            columns[index].append(array)
    if any(
        wide.dtype == object or sum([a.nbytes for a in column]) > _MAX_JOINED
        for column in columns
        for wide in column[:1]
    ):
        return None
    try:
        return [np.concatenate(column) for column in columns]
    except ValueError:  # other axes differ
        return None


_MAX_JOINED = 64 * 1024


def detach(responses: Iterable[Any], calls: Sequence[Call]) -> None:
    """Not for models: give responses copies of those arrays that the model could write to again.

    An array that its tensor alone refers to, and that is no view of another, is the tensor's own. What is on a device
    is copied to the host, unless the call takes it there; raises what the device says.
    """
    for response, call in zip(responses, calls, strict=False):  # of how many there must be, another tells
        if isinstance(response, InferenceResponse):
            for tensor in response._outputs:
                if type(tensor._data) is not np.ndarray:
                    if not call.request.outputs or tensor._name in call.request.outputs:
                        tensor._settle(tensor._name in call.request.device_outputs)
                elif tensor._data.base is not None or sys.getrefcount(tensor._data) > _REFERENCES_OF_ITS_OWN:
                    tensor._data = tensor._data.copy()


# The tensor's, and getrefcount's argument.
_REFERENCES_OF_ITS_OWN = 2


def parameters_of(response: InferenceResponse) -> dict[str, Any]:
    """Not for models: a copy of a response's parameters."""
    return dict(response._parameters)
