"""A batch of requests, and of answers, as one message between gateway and replica. Pure.

All tensors of a message lie in one buffer, so that a hop costs one copy and a few small objects per request.
"""

from collections.abc import Sequence
from typing import Any

from tutti.types import Answer, InferRequest, InferResponse, Parameters, Raw, Shape, Tensor

_TensorHead = tuple[str, str, Shape, int]
_RequestHead = tuple[str, tuple[str, ...], Parameters, tuple[_TensorHead, ...]]
BatchMessage = tuple[str, str, list[_RequestHead], bytes]
AnswerMessage = tuple[list[Any], bytes]

# Why a replica has not taken a message.
GONE = "gone"
BEHIND = "behind"


def pack_requests(requests: Sequence[InferRequest]) -> BatchMessage:
    """Requests to one model and version."""
    parts: list[Raw] = []
    heads = [(r.id, r.outputs, r.parameters, _pack(r.inputs.values(), parts)) for r in requests]
    return requests[0].model_name, requests[0].model_version, heads, b"".join(parts)


def unpack_requests(message: BatchMessage) -> list[InferRequest]:
    """The inverse; tensors are views of the message."""
    model_name, version, heads, data = message
    view = memoryview(data)
    at = 0
    requests = []
    for request_id, outputs, parameters, tensors in heads:
        unpacked, at = _unpack(tensors, view, at)
        inputs = {tensor.name: tensor for tensor in unpacked}
        requests.append(InferRequest(model_name, inputs, version, request_id, outputs, parameters))
    return requests


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
    at = 0
    answers: list[Answer] = []
    for head in heads:
        if not isinstance(head, tuple):
            answers.append(head)
            continue
        model_name, version, parameters, tensors, is_null = head
        outputs, at = _unpack(tensors, view, at)
        answers.append(InferResponse(model_name, version, outputs, parameters, is_null))
    return answers


def _pack(tensors: Any, parts: list[Raw]) -> tuple[_TensorHead, ...]:
    heads = []
    for tensor in tensors:
        raw = tensor.raw()
        parts.append(raw)
        heads.append((tensor.name, tensor.datatype, tensor.shape, len(raw)))
    return tuple(heads)


def _unpack(heads: Sequence[_TensorHead], view: memoryview, at: int) -> tuple[list[Tensor], int]:
    tensors = []
    for name, datatype, shape, size in heads:
        tensors.append(Tensor(name, datatype, shape, view[at : at + size]))
        at += size
    return tensors, at
