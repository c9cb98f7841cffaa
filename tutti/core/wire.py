"""A batch of requests, and of answers, as one message between processes. Pure.

All tensors of a message lie in one buffer, so that a hop costs one copy and a few small objects per request.
"""

from collections.abc import Sequence
from typing import Any

from tutti.core.types import Answer, Call, InferRequest, InferResponse, Parameters, Raw, Shape, Sink, Tensor

_TensorHead = tuple[str, str, Shape, int]
_RequestHead = tuple[str, tuple[str, ...], Parameters, tuple[_TensorHead, ...], int]
BatchMessage = tuple[str, str, list[_RequestHead], bytes]
AnswerMessage = tuple[list[Any], bytes]

# Why a replica has not taken a message.
GONE = "gone"
BEHIND = "behind"


def pack_calls(calls: Sequence[Call], now_ns: int) -> BatchMessage:
    """Calls of one model and version. Machines' clocks differ: what travels is the time that is left."""
    parts: list[Raw] = []
    heads = []
    for call in calls:
        r = call.request
        left_ns = max(1, call.deadline_ns - now_ns) if call.deadline_ns else 0
        heads.append((r.id, r.outputs, r.parameters, _pack(r.inputs.values(), parts), left_ns))
    first = calls[0].request
    return first.model_name, first.model_version, heads, b"".join(parts)


def unpack_calls(message: BatchMessage, sink: Sink, now_ns: int) -> list[Call]:
    """The inverse, with answers for `sink`; tensors are views of the message."""
    model_name, version, heads, data = message
    view = memoryview(data)
    offset = 0
    calls = []
    for request_id, outputs, parameters, tensors, left_ns in heads:
        unpacked, offset = _unpack(tensors, view, offset)
        inputs = {tensor.name: tensor for tensor in unpacked}
        call = Call(InferRequest(model_name, inputs, version, request_id, outputs, parameters), sink)
        call.deadline_ns = now_ns + left_ns if left_ns else 0
        calls.append(call)
    return calls


def pack_answers(answers: Sequence[Answer]) -> AnswerMessage:
    """Responses and errors, in the order of their requests."""
    parts: list[Raw] = []
    heads: list[Any] = []
    for answer in answers:
        if isinstance(answer, InferResponse):
            tensors = _pack(answer.outputs, parts)
            heads.append((answer.model_name, answer.model_version, answer.parameters, tensors, answer.is_null))
        else:
            heads.append(answer)
    return heads, b"".join(parts)


def unpack_answers(message: AnswerMessage) -> list[Answer]:
    """The inverse; tensors are views of the message."""
    heads, data = message
    view = memoryview(data)
    offset = 0
    answers: list[Answer] = []
    for head in heads:
        if not isinstance(head, tuple):
            answers.append(head)
            continue
        model_name, version, parameters, tensors, is_null = head
        outputs, offset = _unpack(tensors, view, offset)
        answers.append(InferResponse(model_name, version, outputs, parameters, is_null))
    return answers


def _pack(tensors: Any, parts: list[Raw]) -> tuple[_TensorHead, ...]:
    heads = []
    for tensor in tensors:
        raw = tensor.raw()
        parts.append(raw)
        heads.append((tensor.name, tensor.datatype, tensor.shape, len(raw)))
    return tuple(heads)


def _unpack(heads: Sequence[_TensorHead], view: memoryview, offset: int) -> tuple[list[Tensor], int]:
    tensors = []
    for name, datatype, shape, size in heads:
        tensors.append(Tensor(name, datatype, shape, view[offset : offset + size]))
        offset += size
    return tensors, offset
