"""A burst of requests, and a group of answers, between a front-end process and the engine's. Pure.

Requests that are alike are one entry, their tensors joined input by input, whatever their model: it is the engine that
decides whether they are one call or each its own. Answers that are rows of one batch are one entry, too. So both
processes spend little for a request, and the engine's next to nothing.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tutti.core import rows
from tutti.core.errors import InferError
from tutti.core.types import (
    RAW_TYPES,
    Answer,
    Call,
    Columns,
    InferRequest,
    InferResponse,
    Parameters,
    Raw,
    Shape,
    Sink,
    Spent,
    Tensor,
)
from tutti.frontends.processes.shared_blocks import LARGE_BYTES, Place

Lend = Callable[[Raw], Place | None]
"""Where the other process finds large bytes; None where they must go in band."""
Find = Callable[[Place, int], Raw]
"""Its inverse."""

# (name, datatype, shape and bytes of one request's tensor, where it lies). None: in band, behind the one before it.
Head = tuple[str, str, Shape, int, Place | None]
# Requests are alike if what is left to their deadlines is the same in units of 2**22 ns, about 4 ms.
_PATIENCE_BITS = 22


class Entry(NamedTuple):
    """Requests that are alike, numbered from `first`. `ids` and `left_ns` are empty where none has one."""

    model_name: str
    model_version: str
    first: int
    requests: int
    ids: tuple[str, ...]
    left_ns: tuple[int, ...]
    outputs: tuple[str, ...]
    parameters: Parameters
    heads: tuple[Head, ...]


class Answered(NamedTuple):
    """Answers to the requests numbered from `first`: of `sizes` rows each, joined, or one of any form.

    `spent` tells where their time went in the engine's process, None where nobody knows; `queues_ns`, which is empty
    where all waited as long as the first, for how long each has waited.
    """

    first: int
    sizes: tuple[int, ...]
    # (model, version, parameters, tensors, is_null), or an error.
    head: tuple[str, str, Parameters, tuple[Head, ...], bool] | InferError
    spent: tuple[Any, ...] | None = None
    queues_ns: tuple[int, ...] = ()

    def timed(self, answers: Sequence[Answer]) -> list[tuple[Answer, Spent | None]]:
        """The answers, in their order, each with where its time went."""
        spent = Spent(*self.spent) if self.spent is not None else None
        if spent is None or not self.queues_ns:
            return [(answer, spent) for answer in answers]
        each = {queue_ns: spent._replace(queue_ns=queue_ns) for queue_ns in set(self.queues_ns)}
        return [(answer, each[queue_ns]) for answer, queue_ns in zip(answers, self.queues_ns, strict=True)]


def groups(calls: Sequence[Call], now_ns: int) -> list[list[Call]]:
    """Calls that are alike, in the order of their first ones."""
    if len(calls) == 1:
        return [[calls[0]]]
    grouped: list[list[Call]] = []
    begun: dict[Hashable, list[Call] | None] = {}
    for call in calls:
        key = _key(call, now_ns)
        group = begun.get(key)
        if group is not None:
            group.append(call)
            continue
        grouped.append([call])
        if key not in begun:
            begun[key] = grouped[-1] if _may_join(call.request) else None
    return grouped


def _key(call: Call, now_ns: int) -> Hashable:
    request = call.request
    signature = request.signature
    if signature is None:
        signature = tuple([(t.name, t.datatype, t.shape, len(_raw(t))) for t in request.inputs.values()])
        signature += request.outputs
    # Deadlines that are nearly the same need not keep requests apart.
    patience = (call.deadline_ns - now_ns) >> _PATIENCE_BITS if call.deadline_ns else None
    return request.model_name, request.model_version, signature, patience, bool(request.parameters)


def _may_join(request: InferRequest) -> bool:
    """Whether a request may be joined: without parameters, which may say anything, and small enough to copy."""
    if request.parameters or not request.inputs:
        return False
    return sum([len(_raw(tensor)) for tensor in request.inputs.values()]) < LARGE_BYTES


def _raw(tensor: Tensor) -> Raw:
    """The wire form of a tensor, which keeps it if it had to be made."""
    if not isinstance(tensor.data, RAW_TYPES):
        tensor.data = tensor.raw()
    return tensor.data  # type: ignore[return-value]


def pack(group: Sequence[Call], first: int, now_ns: int, lend: Lend, pieces: list[Raw]) -> Entry:
    """Calls that are alike. Machines' clocks may differ: what travels is the time that is left."""
    request = group[0].request
    if len(group) == 1:
        left: tuple[int, ...] = (max(1, group[0].deadline_ns - now_ns),) if group[0].deadline_ns else ()
        ids: tuple[str, ...] = (request.id,) if request.id else ()
        heads = tuple([_head(tensor, _raw(tensor), lend, pieces) for tensor in request.inputs.values()])
        return Entry(
            request.model_name, request.model_version, first, 1, ids, left, request.outputs, request.parameters, heads
        )
    joined: list[Head] = []
    for name, tensor in request.inputs.items():
        raws = [_raw(call.request.inputs[name]) for call in group]
        assert len(set(map(len, raws))) == 1, "equal signatures say equal sizes"
        pieces += raws
        joined.append((name, tensor.datatype, tensor.shape, len(raws[0]), None))
    ids = tuple([call.request.id for call in group])
    left = tuple([max(1, call.deadline_ns - now_ns) for call in group]) if group[0].deadline_ns else ()
    return Entry(
        request.model_name, request.model_version, first, len(group), ids if any(ids) else (), left,
        request.outputs, request.parameters, tuple(joined),
    )  # fmt: skip


def _head(tensor: Tensor, raw: Raw, lend: Lend, pieces: list[Raw]) -> Head:
    place = lend(raw) if len(raw) >= LARGE_BYTES else None
    if place is None:
        pieces.append(raw)
    return tensor.name, tensor.datatype, tensor.shape, len(raw), place


class Joined:
    """Requests of an entry as the engine has them: the token of a call for several, and what they are one by one."""

    __slots__ = ("_data", "_deadlines", "_entry", "_signature", "first", "gone", "start", "stop")

    def __init__(
        self, entry: Entry, data: Sequence[Raw], deadlines_ns: Sequence[int], signature: Hashable, start: int, stop: int
    ) -> None:
        """The requests from `start` to `stop` of an entry whose tensors are `data`."""
        self._entry = entry
        self._data = data
        self._deadlines = deadlines_ns
        self._signature = signature
        self.start = start
        self.stop = stop
        self.first = entry.first + start
        # Those that nobody waits for any more.
        self.gone: set[int] = set()

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def numbers(self) -> range:
        return range(self.first, self.first + len(self))

    def part(self, start: int, stop: int) -> "Joined":
        """The requests from `start` up to `stop`, which may be beyond the end."""
        stop = min(stop, self.stop)
        return Joined(self._entry, self._data, self._deadlines, self._signature, start, stop)

    @property
    def rows(self) -> int:
        """Rows of each request."""
        return self._entry.heads[0][2][0]

    def call(self, sink: Sink) -> Call:
        """One call for all. Of its deadlines the first one counts: should it fail, they go on one by one."""
        entry, count = self._entry, len(self)
        inputs = {}
        for (name, datatype, shape, size, _), data in zip(entry.heads, self._data, strict=True):
            joined = data[self.start * size : self.stop * size]
            inputs[name] = Tensor(name, datatype, (shape[0] * count, *shape[1:]), joined)
        call = Call(InferRequest(entry.model_name, inputs, entry.model_version, "", entry.outputs), sink, self)
        call.requests = count
        call.is_trial = True
        if entry.left_ns:
            call.deadline_ns = min(self._deadlines[self.start : self.stop])
        return call

    def alone(self, sink: Sink) -> Iterator[Call]:
        """Each as a call of its own; its token is its number."""
        entry = self._entry
        for index in range(self.start, self.stop):
            inputs = {}
            for (name, datatype, shape, size, _), data in zip(entry.heads, self._data, strict=True):
                inputs[name] = Tensor(name, datatype, shape, data[index * size : (index + 1) * size])
            request = InferRequest(
                entry.model_name, inputs, entry.model_version, entry.ids[index] if entry.ids else "", entry.outputs,
                dict(entry.parameters), signature=self._signature,
            )  # fmt: skip
            call = Call(request, sink, entry.first + index)
            call.is_cancelled = call.token in self.gone
            if entry.left_ns:
                call.deadline_ns = self._deadlines[index]
            yield call


@dataclass(slots=True)
class Unpacking:
    """Takes entries out of a frame, one after the other."""

    data: memoryview
    find: Find
    offset: int = 0

    def tensors(self, heads: Sequence[Head]) -> list[Tensor]:
        """The tensors of one request, or of one answer."""
        tensors = []
        for name, datatype, shape, size, place in heads:
            if place is not None:
                raw = self.find(place, size)
            else:
                raw = self.data[self.offset : self.offset + size]
                self.offset += size
            tensors.append(Tensor(name, datatype, shape, raw))
        return tensors

    def single(self, entry: Entry, sink: Sink, now_ns: int) -> Call:
        """The request of an entry that has no other."""
        inputs = {tensor.name: tensor for tensor in self.tensors(entry.heads)}
        request_id = entry.ids[0] if entry.ids else ""
        request = InferRequest(
            entry.model_name, inputs, entry.model_version, request_id, entry.outputs, entry.parameters
        )
        call = Call(request, sink, entry.first)
        call.deadline_ns = now_ns + entry.left_ns[0] if entry.left_ns else 0
        return call

    def entry(self, entry: Entry, now_ns: int, signatures: dict[Hashable, Hashable]) -> Joined:
        """All requests of an entry. Equal signatures are the same object, as long as `signatures` has them."""
        described = tuple([head[:3] for head in entry.heads]), entry.outputs
        signature = signatures.setdefault(described, described)
        deadlines = [now_ns + left for left in entry.left_ns]
        joined: list[Raw] = []
        for _, _, _, size, _ in entry.heads:
            joined.append(self.data[self.offset : self.offset + size * entry.requests])
            self.offset += size * entry.requests
        return Joined(entry, joined, deadlines, signature, 0, entry.requests)

    def answers(self, answered: Answered) -> list[Answer]:
        """In the order of their numbers."""
        sizes, head = answered.sizes, answered.head
        if not isinstance(head, tuple):
            return [head]
        model, version, parameters, heads, is_null = head
        outputs = self.tensors(heads)
        if not sizes:
            return [InferResponse(model, version, outputs, parameters, is_null)]
        answers = _split(model, version, outputs, sizes)
        for answer in answers if parameters else ():
            answer.parameters = dict(parameters)
        return list(answers)


def _split(model: str, version: str, outputs: list[Tensor], sizes: Sequence[int]) -> list[InferResponse]:
    if all(tensor.datatype != "BYTES" for tensor in outputs):
        return rows.parts(model, version, Columns(outputs), sizes)
    parts = zip(*[rows.split(output, sizes) for output in outputs], strict=True)
    return [InferResponse(model, version, list(part)) for part in parts]


def pack_answers(calls: Sequence[Call], lend: Lend, pieces: list[Raw]) -> list[Answered]:
    """The answers of calls whose tokens are numbers, or a Joined's, which has succeeded."""
    packed = []
    start = 0
    while start < len(calls):
        stop, first, sizes = _run(calls, start)
        answer: Any = calls[start].answer
        times, arrived_ns = calls[start].times, calls[start].arrived_ns
        spent = tuple(times.spent(arrived_ns)) if times is not None else None
        if isinstance(answer, InferError):
            packed.append(Answered(first, (), answer, spent))
        else:
            last: Any = calls[stop - 1].answer
            heads = tuple(_heads(answer, last.stop, lend, pieces))
            head = answer.model_name, answer.model_version, answer.parameters, heads, answer.is_null
            queues_ns = _queues_ns(calls[start:stop], spent) if spent is not None and stop - start > 1 else ()
            packed.append(Answered(first, sizes, head, spent, queues_ns))
        start = stop
    return packed


def _queues_ns(calls: Sequence[Call], spent: tuple[Any, ...]) -> tuple[int, ...]:
    """How long each request of a batch has waited; () if all arrived together."""
    first_ns = calls[0].arrived_ns
    if calls[-1].arrived_ns == first_ns:  # they are in the order of their numbers
        return ()
    return tuple([spent[0] + first_ns - call.arrived_ns for call in calls])


def _run(calls: Sequence[Call], start: int) -> tuple[int, int, tuple[int, ...]]:
    """(where the calls end that share the answer of the one at `start`, its number, the rows of each of several).

    They follow one another in their numbers and in the rows of one batch.
    """
    token, answer = calls[start].token, calls[start].answer
    if isinstance(token, Joined):
        return start + 1, token.first, (token.rows,) * len(token)
    if start + 1 == len(calls):
        return start + 1, token, ()
    sizes: list[int] = []
    columns = answer.columns if isinstance(answer, InferResponse) else None
    if columns is not None:
        begin = answer.start  # type: ignore[union-attr]
        for call in calls[start:]:
            other: Any = call.answer
            is_next = call.token == token + len(sizes) and isinstance(other, InferResponse)
            if not is_next or other.columns is not columns or other.start != begin or other.parameters:
                break
            begin = other.stop
            sizes.append(other.stop - other.start)
    return (start + len(sizes), token, tuple(sizes)) if len(sizes) > 1 else (start + 1, token, ())


def _heads(answer: InferResponse, stop: int, lend: Lend, pieces: list[Raw]) -> list[Head]:
    """The heads of a response's outputs, or of the rows of its batch up to `stop`."""
    columns = answer.columns
    if columns is None:
        return [_head(tensor, tensor.raw(), lend, pieces) for tensor in answer.outputs]
    rows = [
        Tensor(t.name, t.datatype, (stop - answer.start, *t.shape[1:]), raw[answer.start * size : stop * size])
        for t, (size, raw) in zip(columns.outputs, columns.raws, strict=True)
    ]
    return [_head(tensor, tensor.raw(), lend, pieces) for tensor in rows]
