"""What a scheduler is made of: backends, instances that execute with them, turns, and what calls wait in."""

import contextlib
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Protocol

from tutti.core.types import Call, InferResponse
from tutti.scheduling.batching import BatchLimit, Cut, Decision
from tutti.scheduling.cost import Costs

_log = logging.getLogger(__name__)

Timer = Callable[[float, Callable[[], None]], None]
"""`timer(delay_s, callback)` calls back once after a delay, from any thread. Thread-safe."""

# A batch that has been executed for so long is taken to be stuck, where its instance says nothing else.
HANG_S = 60.0

Answers = Sequence[InferResponse | Exception | None]
Executed = Answers | Callable[[], Answers]


class Backend(Protocol):
    """One model instance's way to execute. Called by one thread at a time.

    `runs_inline`: execute waits for nothing but the processor, so that any thread may call it. `kind` is equal for
    instances that take the same time.
    """

    runs_inline: bool
    kind: str

    def execute(self, calls: Sequence[Call]) -> Executed:
        """One answer per call, in order: an InferError fails only its own call. A raise fails them all.

        None means that the backend settles the call itself, now or later, from any thread. OutOfMemory, raised, means
        that fewer calls at a time might fit. Where making the answers takes time of its own, a function that makes
        them: it is called once, by any thread, maybe while the next batch executes.
        """

    def close(self) -> None: ...


@contextlib.contextmanager
def undone(loaded: Sequence[Backend]) -> Iterator[None]:
    """Where this fails, whatever raises it, nothing stays of what is loaded until then."""
    try:
        yield
    except BaseException:
        for backend in loaded:
            try:
                backend.close()
            except Exception:  # the others are to be closed, too
                _log.exception("what was loaded could not be closed")
        raise


class Instance(Protocol):
    """Executes one batch at a time: settles every call of it, then tells the scheduler `release`.

    Instances that take the same time share their `costs`, and record in it what they execute. Those of the lowest
    `rank` are preferred: others help out. One may have a `cut` (batching.py), which says where its batches end.
    """

    costs: Costs
    rank: int

    def ahead_ns(self, at_ns: int) -> int:
        """How long it will take to begin, since something else is before it."""

    def start(self, batch: list[Call]) -> None:
        """Begin without blocking for long."""

    def close(self) -> None: ...


class Turn(Protocol):
    """An instance's right to execute, where instances share resources that do not suffice for all."""

    def begin(self) -> None:
        """Wait for it."""

    def end(self, goes_on: bool = False) -> None:
        """Give it up; an instance that `goes_on` asks with this for the next."""

    def close(self) -> None: ...


class Waiting(Protocol):
    """What a scheduler queues calls in: a BatchQueue, or one for sequences."""

    rows: int
    calls: int
    max_rows: int
    limit: BatchLimit
    configured_rows: int
    soonest_ns: int
    is_eager: bool

    def has_room(self, call: Call) -> bool: ...
    def rows_ahead(self, call: Call) -> int: ...
    def batch_rows(self) -> int: ...
    def may_grow(self) -> bool: ...
    def more(self, key: Hashable, rows: int) -> Decision: ...
    def push(self, call: Call) -> int: ...
    def take(self, now_ns: int, costs: Costs | None = None, cut: Cut | None = None) -> Decision: ...
    def expire(self, now_ns: int) -> list[Call]: ...
    def drain(self) -> list[Call]: ...
