"""What a server and a python model's process tell each other: batches, answers, and tensors in memory that both map.

A message is a pickle. The tensors of a batch lie in one stretch, each aligned: within the message where they are few
bytes, else in an arena. Knows neither end.
"""

import fcntl
import mmap
import os
import socket
import struct
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tutti.core import rows
from tutti.core.types import Answer, Call, Columns, InferRequest, InferResponse, Parameters, Raw, Shape, Tensor

# (name, datatype, shape, where it begins, bytes)
TensorHead = tuple[str, str, Shape, int, int]
# The bytes of a message's tensors, or where in the arena they begin, and how many there are.
Payload = bytes | tuple[int, int]

# Up to here a message is quicker than the arena.
INLINE_BYTES = 32 * 1024
_ALIGNMENT = 64
# Of a message, so much is read at once.
_MOST_READ_BYTES = 1 << 20
_LEAST_READ_BYTES = 64 * 1024
# How `multiprocessing.connection` begins a message: with its size, or that it is large, and then its size.
_HEAD, _LARGE_SIZE = struct.Struct("!i"), struct.Struct("!Q")
_LARGE = _HEAD.pack(-1)
# Beyond it what is read is copied: a model may keep its inputs for as long as it likes.
_MOST_LENT_BYTES = 64 << 20


class Arena:
    """Memory of two processes: one writes to it, the other reads, in place. It never shrinks.

    Its reader tells the writer, with what it says anyway, where the next stretch may begin: behind those that somebody
    still looks at, and at the beginning where there are none.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map: mmap.mmap | None = None
        # The reader's: what it has lent, and where that ends.
        self._lent: list[tuple[weakref.ref[_Stretch], int]] = []

    @classmethod
    def new(cls) -> "Arena":
        """An empty one; that no process shrinks it is sealed, since who reads beyond its end is killed."""
        fd = os.memfd_create("tutti-model", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        return cls(fd)

    def write(self, parts: Sequence[tuple[int, Raw]], begin: int, size: int) -> None:
        """Put each part to its place in the stretch that begins there."""
        view = memoryview(self._mapped(begin + size))[begin:]
        for offset, raw in parts:
            view[offset : offset + len(raw)] = raw

    def read(self, begin: int, size: int) -> memoryview:
        """A stretch, which its reader may write to; nothing else is put there while any view of it is left."""
        memory: Any = np.frombuffer(self._mapped(begin + size), np.uint8, size, begin)
        if begin > _MOST_LENT_BYTES:  # somebody keeps what was read before
            return memoryview(memory.copy())
        stretch: Any = memory.view(_Stretch)
        self._lent.append((weakref.ref(stretch), begin + size))
        return memoryview(stretch)

    def begin(self) -> int:
        """The reader's: where the next stretch may begin."""
        self._lent = [(lent, end) for lent, end in self._lent if lent() is not None]
        end = max((end for _, end in self._lent), default=0)
        return end + -end % mmap.PAGESIZE

    def close(self) -> None:
        """What was lent stays."""
        self._map = None
        os.close(self.fd)

    def _mapped(self, size: int) -> mmap.mmap:
        if self._map is None or len(self._map) < size:
            there_are = os.fstat(self.fd).st_size
            if there_are < size:
                os.ftruncate(self.fd, there_are := 1 << (size - 1).bit_length())
            self._map = mmap.mmap(self.fd, there_are)
        return self._map


class _Stretch(np.ndarray[Any, Any]):
    """Who looks at its memory refers to it: views do not look through a subclass."""


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

    def payload(self, arena: Arena | None = None, begin: int = 0) -> Payload:
        """All of them, as bytes or in the arena's stretch that begins there."""
        if arena is not None and self._size > INLINE_BYTES:
            arena.write(self._parts, begin, self._size)
            return begin, self._size
        joined = bytearray(self._size)
        for offset, raw in self._parts:
            joined[offset : offset + len(raw)] = raw
        return bytes(joined)


def unpacked(payload: Payload, arena: Arena | None = None) -> memoryview:
    """The stretch, of its reader's own: it may be written to."""
    if isinstance(payload, tuple):
        assert arena is not None
        return arena.read(*payload)
    return memoryview(bytearray(payload))


def tensors(heads: Sequence[TensorHead], view: memoryview) -> list[Tensor]:
    """Tensors that are views of a stretch."""
    return [
        Tensor(name, datatype, shape, view[offset : offset + size]) for name, datatype, shape, offset, size in heads
    ]


# (id of the call, id of the request, outputs, parameters, tensors, ns left to its deadline, the trace's context, rows)
CallHead = tuple[int, str, tuple[str, ...], Parameters, tuple[TensorHead, ...], int, str | None, int]
Batch = tuple[str, str, list[CallHead], Payload]


def pack_batch(calls: Sequence[Call], first_id: int, now_ns: int, arena: Arena | None, begin: int = 0) -> Batch:
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
    return first.model_name, first.model_version, heads, packing.payload(arena, begin)


def request_of(model: str, version: str, head: CallHead, view: memoryview) -> InferRequest:
    """The request of a batch's call; its tensors are views of the batch's stretch."""
    inputs = {tensor.name: tensor for tensor in tensors(head[4], view)}
    return InferRequest(model, inputs, version, head[1], head[2], head[3])


# Of a response: (model, version, parameters, tensors, whether it is null); of all of a batch as rows of joined arrays:
# (model, version, the arrays, rows of each).
_ResponseHead = tuple[str, str, Parameters, tuple[TensorHead, ...], bool]
Answers = tuple[str, Any, Payload]


def pack_answers(answers: Sequence[Answer | None], arena: Arena | None = None, begin: int = 0) -> Answers:
    """Answers in the order of their calls; None stays None. Raises for an answer that has no wire form."""
    packing = Packing()
    columns = _columns(answers)
    if columns is not None:
        first = answers[0]
        assert isinstance(first, InferResponse)
        sizes = [answer.stop - answer.start for answer in answers if isinstance(answer, InferResponse)]
        heads = packing.add(columns.outputs)
        return "columns", (first.model_name, first.model_version, heads, sizes), packing.payload(arena, begin)
    packed = [_head(answer, packing) if isinstance(answer, InferResponse) else answer for answer in answers]
    return "each", packed, packing.payload(arena, begin)


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
    """What the answers are all rows of, in order; None where they are not, as one that others share a batch with."""
    first = answers[0] if answers else None
    columns = first.columns if isinstance(first, InferResponse) else None
    if columns is None:
        return None
    row = 0
    for answer in answers:
        if not isinstance(answer, InferResponse) or answer.columns is not columns or answer.parameters:
            return None
        if answer.start != row:
            return None
        row = answer.stop
    return columns if all(output.shape[0] == row for output in columns.outputs) else None


def _as_array(tensor: Tensor) -> Tensor:
    tensor.array()
    return tensor


class Incoming:
    """Messages of a channel, put together as their bytes come: a sender may stop in the midst of one."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._parts: list[bytes] = []
        self._size = 0
        # How many bytes the first message takes, as far as that is known.
        self._wanted = _HEAD.size

    def read(self) -> list[bytes]:
        """The messages that are whole now, without waiting. Raises EOFError and OSError when no more will come."""
        most = max(_LEAST_READ_BYTES, min(_MOST_READ_BYTES, self._wanted - self._size))
        try:
            part = self._channel.recv(most, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        if not part:
            raise EOFError
        self._parts.append(part)
        self._size += len(part)
        return self._whole() if self._size >= self._wanted else []

    def _whole(self) -> list[bytes]:
        data = b"".join(self._parts)
        begin, messages = 0, []
        while (end := _end_of(data, begin)) <= len(data):
            messages.append(data[begin + _head_size(data, begin) : end])
            begin = end
        self._parts, self._size, self._wanted = [data[begin:]], len(data) - begin, end - begin
        return messages


def _head_size(data: bytes, begin: int) -> int:
    """Of a message as `multiprocessing.connection` writes it: of a large one the size has a place of its own."""
    is_large = data[begin : begin + _HEAD.size] == _LARGE
    return _HEAD.size + (_LARGE_SIZE.size if is_large else 0)


def _end_of(data: bytes, begin: int) -> int:
    """Where the message ends that begins there, or at least the part of it that says so."""
    head = begin + _head_size(data, begin)
    if len(data) < head:
        return head
    is_large = head - begin > _HEAD.size
    (size,) = _LARGE_SIZE.unpack_from(data, begin + _HEAD.size) if is_large else _HEAD.unpack_from(data, begin)
    if size < 0:
        raise OSError(f"expected the size of a message, got {size}")
    return head + int(size)
