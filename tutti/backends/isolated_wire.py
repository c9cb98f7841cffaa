"""What a server and a python model's process tell each other: batches, answers, and tensors in memory that both map.

A message is a pickle. The tensors of a batch lie in one stretch, each aligned: within the message where they are few
bytes, else in an arena. Knows neither end.
"""

import mmap
import os
from collections.abc import Iterable, Sequence
from typing import Any

from tutti import rows
from tutti.types import Answer, Call, Columns, InferRequest, InferResponse, Parameters, Raw, Shape, Tensor

# (name, datatype, shape, where it begins, bytes)
TensorHead = tuple[str, str, Shape, int, int]
# The bytes of a message's tensors, or how many of them are in the arena.
Payload = bytes | int

# Up to here a message is quicker than the arena.
INLINE_BYTES = 32 * 1024
_ALIGNMENT = 64
_SEALS = ("F_ADD_SEALS", "F_SEAL_SHRINK")


class Arena:
    """Memory of two processes: one of them writes to it while the other does not read. It never shrinks."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map: mmap.mmap | None = None

    @classmethod
    def new(cls) -> "Arena":
        """An empty one; that no process shrinks it is sealed, since who reads beyond its end is killed."""
        import fcntl

        fd = os.memfd_create("tutti-model", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        if all(hasattr(fcntl, name) for name in _SEALS):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        return cls(fd)

    def write(self, parts: Sequence[tuple[int, Raw]], size: int) -> None:
        """Put each part to its place."""
        view = self._mapped(size)
        for at, raw in parts:
            view[at : at + len(raw)] = bytes(raw) if isinstance(raw, memoryview) and raw.format != "B" else raw

    def read(self, size: int) -> bytearray:
        """A copy of the first bytes, which the reader may write to."""
        return bytearray(self._mapped(size)[:size])

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None
        os.close(self.fd)

    def _mapped(self, size: int) -> memoryview:
        if self._map is None or len(self._map) < size:
            there_are = os.fstat(self.fd).st_size
            if there_are < size:
                os.ftruncate(self.fd, there_are := 1 << (size - 1).bit_length())
            self._map = mmap.mmap(self.fd, there_are)
        return memoryview(self._map)


class Packing:
    """Tensors on their way into one stretch."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, Raw]] = []
        self._size = 0

    def add(self, tensors: Iterable[Tensor]) -> tuple[TensorHead, ...]:
        """Where each is to lie. Raises what a tensor raises that has no wire form; none is added then."""
        raws = [(tensor, tensor.raw()) for tensor in tensors]
        heads = []
        for tensor, raw in raws:
            self._size += -self._size % _ALIGNMENT
            heads.append((tensor.name, tensor.datatype, tuple(tensor.shape), self._size, len(raw)))
            self._parts.append((self._size, raw))
            self._size += len(raw)
        return tuple(heads)

    def payload(self, arena: Arena | None = None) -> Payload:
        """All of them, as bytes or in the arena."""
        if arena is not None and self._size > INLINE_BYTES:
            arena.write(self._parts, self._size)
            return self._size
        joined = bytearray(self._size)
        for at, raw in self._parts:
            joined[at : at + len(raw)] = raw
        return bytes(joined)


def unpacked(payload: Payload, arena: Arena | None = None) -> memoryview:
    """The stretch, a copy of its reader's own that may be written to."""
    if isinstance(payload, int):
        assert arena is not None
        return memoryview(arena.read(payload))
    return memoryview(bytearray(payload))


def tensors(heads: Sequence[TensorHead], view: memoryview) -> list[Tensor]:
    """Tensors that are views of a stretch."""
    return [Tensor(name, datatype, shape, view[at : at + size]) for name, datatype, shape, at, size in heads]


# (id of the call, id of the request, outputs, parameters, tensors, ns left to its deadline, the trace's context, rows)
CallHead = tuple[int, str, tuple[str, ...], Parameters, tuple[TensorHead, ...], int, str | None, int]
Batch = tuple[str, str, list[CallHead], Payload]


def pack_batch(calls: Sequence[Call], first_id: int, now_ns: int, arena: Arena | None) -> Batch:
    """Calls of one model and version; their ids count from the first."""
    packing = Packing()
    heads: list[CallHead] = []
    for number, call in enumerate(calls, first_id):
        r = call.request
        left_ns = max(1, call.deadline_ns - now_ns) if call.deadline_ns else 0
        context = getattr(call.trace, "context", None)
        inputs = packing.add(r.inputs.values())
        heads.append((number, r.id, r.outputs, r.parameters, inputs, left_ns, context, call.rows))
    first = calls[0].request
    return first.model_name, first.model_version, heads, packing.payload(arena)


def request_of(model: str, version: str, head: CallHead, view: memoryview) -> InferRequest:
    """The request of a batch's call; its tensors are views of the batch's stretch."""
    inputs = {tensor.name: tensor for tensor in tensors(head[4], view)}
    return InferRequest(model, inputs, version, head[1], head[2], head[3])


# Of a response: (model, version, parameters, tensors, whether it is null); of all of a batch as rows of joined arrays:
# (model, version, the arrays, rows of each).
_ResponseHead = tuple[str, str, Parameters, tuple[TensorHead, ...], bool]
Answers = tuple[str, Any, Payload]


def pack_answers(answers: Sequence[Answer | None], arena: Arena | None = None) -> Answers:
    """Answers in the order of their calls; None stays None. One that has no wire form raises."""
    packing = Packing()
    columns = _columns(answers)
    if columns is not None:
        first = answers[0]
        assert isinstance(first, InferResponse)
        sizes = [answer.stop - answer.start for answer in answers if isinstance(answer, InferResponse)]
        heads = packing.add(columns.outputs)
        return "columns", (first.model_name, first.model_version, heads, sizes), packing.payload(arena)
    packed = [_head(answer, packing) if isinstance(answer, InferResponse) else answer for answer in answers]
    return "each", packed, packing.payload(arena)


def unpack_answers(message: Answers, arena: Arena | None = None) -> list[Answer | None]:
    """The inverse."""
    form, heads, payload = message
    view = unpacked(payload, arena)
    if form == "columns":
        model, version, joined, sizes = heads
        return list(rows.parts(model, version, Columns([_as_array(t) for t in tensors(joined, view)]), sizes))
    return [_response(head, view) if isinstance(head, tuple) else head for head in heads]


def _head(answer: InferResponse, packing: Packing) -> _ResponseHead:
    heads = packing.add(answer.outputs)
    return answer.model_name, answer.model_version, answer.parameters, heads, answer.is_null


def _response(head: _ResponseHead, view: memoryview) -> InferResponse:
    model, version, parameters, heads, is_null = head
    return InferResponse(model, version, tensors(heads, view), parameters, is_null)


def _columns(answers: Sequence[Answer | None]) -> Columns | None:
    """What all answers are consecutive rows of; None where they are not."""
    first = answers[0] if answers else None
    columns = first.columns if isinstance(first, InferResponse) else None
    if columns is None or any(not isinstance(a, InferResponse) or a.columns is not columns for a in answers):
        return None
    return columns


def _as_array(tensor: Tensor) -> Tensor:
    tensor.array()
    return tensor
