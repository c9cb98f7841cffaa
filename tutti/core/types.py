"""What flows through the server: tensors, requests, answers, and the one callable type that serves them.

Everything that serves is an `Infer`: it takes calls that arrived together and settles each on its own. A model, an
ensemble and a pool of replicas all are one, so they compose. Knows nothing of protocols, threads or Ray.
"""

import math
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from tutti.core import dtypes
from tutti.core.dtypes import Array
from tutti.core.errors import InferError, InvalidArgument

Shape = tuple[int, ...]
Parameters = dict[str, bool | int | float | str]
Raw = bytes | bytearray | memoryview
RAW_TYPES = (bytes, bytearray, memoryview)  # isinstance is quicker with a tuple


class OnDevice(Protocol):
    """Elements in a device's memory, row-major and without gaps. Nobody writes to them.

    Whoever reads them through DLPack names its stream, which then waits for them, or calls `wait` first.
    """

    @property
    def shape(self) -> Shape: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def device(self) -> str:
        """As "cuda:0"."""

    def wait(self) -> None:
        """Return once the elements are there. Raises what the device says, where the work before them has failed."""

    def array(self) -> Array:
        """A copy in host memory, in numpy's form of its datatype (see dtypes.NUMPY). Waits, and raises as `wait`."""

    def __dlpack__(self, **options: Any) -> Any: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


@dataclass(slots=True)
class Tensor:
    """A named tensor whose data is the wire's bytes, a numpy array or a device's memory.

    The host's forms are made on demand. Wire bytes are row-major and little-endian; BYTES elements carry a 4-byte
    length each, and are never on a device.
    """

    name: str
    datatype: str
    shape: Shape
    data: Raw | Array | OnDevice

    @classmethod
    def of(cls, name: str, array: Array) -> "Tensor":
        """A tensor over `array`, without a copy. Raises InvalidArgument for a dtype Triton has no name for."""
        return cls(name, dtypes.from_numpy(array.dtype), array.shape, array)

    def array(self) -> Array:
        """The numpy view (object array of bytes for BYTES), which replaces what is on a device.

        Raises InvalidArgument if data and shape disagree.
        """
        data = self.data
        if isinstance(data, np.ndarray):
            return data
        if not isinstance(data, RAW_TYPES):
            self.data = array = data.array().reshape(self.shape)
            return array
        if self.datatype == "BYTES":
            try:
                decoded = dtypes.decode_bytes(memoryview(data), math.prod(self.shape))
            except InvalidArgument as error:
                raise InvalidArgument(f"tensor '{self.name}': {error.message}") from None
            elements = np.empty(len(decoded), dtype=object)
            elements[:] = decoded
            self.data = array = elements.reshape(self.shape)
        else:
            self.data = array = np.frombuffer(data, dtypes.NUMPY[self.datatype]).reshape(self.shape)
        return array

    def raw(self) -> Raw:
        """The wire form. No copy for a C-contiguous array or for bytes."""
        if isinstance(self.data, RAW_TYPES):
            return self.data
        array = self.array()
        if self.datatype == "BYTES":
            return dtypes.encode_bytes(array.reshape(-1))
        if array.size == 0:
            return b""
        flat: Any = np.ascontiguousarray(array).reshape(-1)
        return memoryview(flat).cast("B")


@dataclass(frozen=True, slots=True)
class SharedRegion:
    """A stretch of registered shared memory; bytes."""

    name: str
    offset: int
    byte_size: int


@dataclass(slots=True)
class InferRequest:
    """One inference request. `model_version` "" means the version policy's newest; `outputs` () means all.

    `classes` are the outputs wanted as their top classes, and how many; `shared_outputs` those to be written to
    shared memory. Both are the front-end's business: what executes a request does not see them. `device_outputs` are
    those that the caller takes from a device's memory, should they be made there; others come in host memory. Requests
    with equal `signature`s, where it is not None, have equal names, datatypes, shapes and sizes in bytes, and ask for
    the same outputs.
    """

    model_name: str
    inputs: dict[str, Tensor]
    model_version: str = ""
    id: str = ""
    outputs: tuple[str, ...] = ()
    parameters: Parameters = field(default_factory=dict)
    classes: Mapping[str, int] = field(default_factory=dict)
    shared_outputs: Mapping[str, SharedRegion] = field(default_factory=dict)
    signature: Hashable = None
    device_outputs: frozenset[str] = frozenset()


class Columns:
    """The outputs of one batch, joined along the first axis; each of its requests has a stretch of rows.

    No output is BYTES. `memo` is for what an encoder works out once for the whole batch.
    """

    __slots__ = ("memo", "outputs", "raws")

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        self.outputs = outputs
        self.memo: dict[Hashable, Any] = {}
        # (a row's bytes, all bytes) of each output.
        self.raws = [(len(raw) // max(1, t.shape[0]), raw) for t in outputs for raw in [memoryview(t.raw())]]

    def part(self, start: int, stop: int) -> list[Tensor]:
        """The outputs of the rows from `start` to `stop`, without a copy."""
        return [
            Tensor(t.name, t.datatype, (stop - start, *t.shape[1:]), raw[start * size : stop * size])
            for t, (size, raw) in zip(self.outputs, self.raws, strict=True)
        ]


class InferResponse:
    """The answer to one request; outputs in the model's order, whatever order they were asked for in.

    `is_null` marks the end of a decoupled model's answers that carries no answer of its own. Where `columns` is set the
    outputs are its rows from `start` to `stop`: who can use them so need not ask for `outputs`.
    """

    __slots__ = ("_outputs", "columns", "is_null", "model_name", "model_version", "parameters", "start", "stop")

    def __init__(
        self,
        model_name: str,
        model_version: str,
        outputs: list[Tensor],
        parameters: Parameters | None = None,
        is_null: bool = False,
    ) -> None:
        self.model_name = model_name
        self.model_version = model_version
        self.parameters: Parameters = {} if parameters is None else parameters
        self.is_null = is_null
        self.columns: Columns | None = None
        self.start = self.stop = 0
        self._outputs: list[Tensor] | None = outputs

    @classmethod
    def of_part(cls, model_name: str, model_version: str, columns: Columns, start: int, stop: int) -> "InferResponse":
        self = cls.__new__(cls)
        self.model_name = model_name
        self.model_version = model_version
        self.parameters = {}
        self.is_null = False
        self.columns = columns
        self.start = start
        self.stop = stop
        self._outputs = None
        return self

    @property
    def outputs(self) -> list[Tensor]:
        if self._outputs is None:
            assert self.columns is not None
            self._outputs = self.columns.part(self.start, self.stop)
        return self._outputs

    @outputs.setter
    def outputs(self, outputs: list[Tensor]) -> None:
        self._outputs = outputs
        self.columns = None

    def tensor(self, name: str) -> Tensor:
        return next(output for output in self.outputs if output.name == name)


Answer = InferResponse | InferError
Emit = Callable[[InferResponse], None]


class Spent(NamedTuple):
    """Where a request's time went, as far as is known; nanoseconds.

    `rows` are those of the batch that it was executed in, 0 where that is not known. `steps` are an ensemble's: (name,
    queued, computed, rows of its largest batch). Those that ran beside each other are in both sums, which may exceed
    what the request took. `replica` names the one that it was executed by, as gpu-4711 of the pool gpu in process 4711.
    """

    queue_ns: int = 0
    compute_ns: int = 0
    rows: int = 0
    is_cached: bool = False
    steps: tuple[tuple[str, int, int, int], ...] = ()
    replica: str = ""

    def spent(self, arrived_ns: int) -> "Spent":
        return self


class Times(Protocol):
    """When a batch, or an ensemble's steps, were executed: from it follows where the time of each request went."""

    def spent(self, arrived_ns: int) -> Spent:
        """Of a request that arrived then, by the clock of now_ns."""


class Trace(Protocol):
    """Collects what happened to one call, and when."""

    def record(self, activity: str, ns: int) -> None:
        """`ns` is of the clock of now_ns."""

    def note(self, what: str, value: object) -> None:
        """A fact about the call, as `batch_rows`: numbers, texts, and lists of them."""

    def follow(self, call: "Call") -> None:
        """`call`, which has not been handed on yet, is made for the traced one: it is traced as a step of it."""


class Sink(Protocol):
    """Where settled calls go. Called from any thread, once per group of calls settled together."""

    def settle(self, calls: Sequence["Call"]) -> None: ...


class Call:
    """A request on its way: who asked, and the answer once there is one.

    `token` belongs to the sink. `rows` and `key` are set by the model that queues the call: calls with equal keys
    may share a batch. `level` and `expires_ns` (0: never) are set by the queue from its policy. Setting
    `is_cancelled` is all a caller does to cancel: a queue then drops the call, its batch-mates unaffected.
    `deadline_ns` (0: none), of the clock of now_ns, is when its caller stops waiting: what cannot end by then is
    refused.

    A caller that can take more than one answer sets `emit`: a decoupled model hands it each answer but the last,
    which settles the call as ever. `trace` collects timestamps where the call is traced. `times` tells of an executed
    call when that was, None where nobody knows. `requests` is how many
    requests it stands for, to statistics. One that `is_trial` goes on as its requests, one by one, should it fail: its
    own failure is not counted.
    """

    __slots__ = (
        "answer", "arrived_ns", "deadline_ns", "emit", "expires_ns", "is_cancelled", "is_trial", "key", "level",
        "request", "requests", "rows", "sink", "times", "token", "trace",
    )  # fmt: skip

    def __init__(self, request: InferRequest, sink: Sink, token: Any = None, emit: Emit | None = None) -> None:
        self.request = request
        self.sink = sink
        self.token = token
        self.emit = emit
        self.answer: Answer | None = None
        self.rows = 1
        self.requests = 1
        self.key: Hashable = None
        self.arrived_ns = 0
        self.level = 0
        self.expires_ns = 0
        self.deadline_ns = 0
        self.is_cancelled = False
        self.is_trial = False
        self.trace: Trace | None = None
        self.times: Times | None = None

    def finish(self, answer: Answer) -> None:
        """Settle this call alone."""
        self.answer = answer
        self.sink.settle([self])


class Infer(Protocol):
    """Takes calls that arrived together; each is settled exactly once, at any time, from any thread. Never raises."""

    def __call__(self, calls: Sequence[Call]) -> None: ...


class ModelControl(Protocol):
    """What python models may have their server do to models. From any thread; blocks. Raises TuttiError."""

    def load(self, name: str, config: str | None, files: Mapping[str, bytes]) -> None:
        """Load a model anew: with a configuration in JSON, and with files, "VERSION/FILE" -> content, where given."""

    def unload(self, name: str, with_dependents: bool) -> None:
        """Serve a model no longer; what is inside it is not waited for."""

    def is_ready(self, name: str, version: str) -> bool:
        """Whether a version, "" for the newest, answers now. False for a model that is not there."""


def control_of(infer: Infer) -> ModelControl | None:
    """The control that comes with what answers a model's own requests."""
    control: ModelControl | None = getattr(infer, "control", None)
    return control


def settle(calls: Sequence[Call]) -> None:
    """Hand answered calls to their sinks, one trip per sink. What a sink raises comes after the others have theirs."""
    first = calls[0].sink
    if len(calls) == 1 or all(call.sink is first for call in calls):
        first.settle(calls)
        return
    groups: dict[int, list[Call]] = {}
    for call in calls:
        groups.setdefault(id(call.sink), []).append(call)
    failure: Exception | None = None
    for group in groups.values():
        try:
            group[0].sink.settle(group)
        except Exception as error:
            failure = failure or error
    if failure is not None:
        raise failure


def settle_all(calls: Iterable[Call], error: InferError) -> None:
    """Settle every call with the same error."""
    failed = list(calls)
    for call in failed:
        call.answer = error
    if failed:
        settle(failed)


# On Ray, of a response: the pool of replicas that it came from. HTTP has it as a header, too.
POOL_PARAMETER = "tutti_pool"
# On Ray, of a request: false has it wait for the first of its model's pools.
FALLBACK_PARAMETER = "tutti_fallback"

_clock: Callable[[], int] = time.monotonic_ns


def now_ns() -> int:
    """The clock of queues and statistics: monotonic nanoseconds."""
    return _clock()


def set_clock(clock: Callable[[], int] = time.monotonic_ns) -> None:
    """Have now_ns tell another time, for all of the process: a simulation's."""
    global _clock
    _clock = clock
