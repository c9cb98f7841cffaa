"""The sequence batcher: requests with one correlation id go, one at a time and in order, to one instance.

Direct: a sequence keeps its row of the instance's batch for life. Oldest: the heads of an instance's sequences are
batched as in dynamic batching. Start, end, readiness and correlation id reach the model as control inputs, and
tensors named as state are kept here between requests.
"""

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tutti.core import dtypes
from tutti.core.errors import Cancelled, DeadlineExceeded, InferError, InvalidArgument, Unavailable
from tutti.core.types import RAW_TYPES, Call, InferRequest, InferResponse, Tensor, now_ns, settle, settle_all
from tutti.observing.statistics import ModelStatistics
from tutti.repository.model_config import ModelConfig, SequenceControl, SequencePolicy, SequenceState
from tutti.scheduling.batching import BatchLimit, BatchQueue, Cut, Decision
from tutti.scheduling.cost import Costs
from tutti.scheduling.delivery import as_infer_error
from tutti.scheduling.interface import Timer
from tutti.scheduling.scheduler import Scheduler

SequenceId = int | str


def sequence_id(request: InferRequest) -> SequenceId:
    """The request's correlation id. Raises InvalidArgument when it has none."""
    key = request.parameters.get("sequence_id", 0)
    if not key or isinstance(key, bool | float):
        problem = (
            f"inference request to model '{request.model_name}' must specify a non-zero or non-empty correlation ID"
        )
        raise InvalidArgument(problem)
    return key


def check_starts(request: InferRequest) -> None:
    """Raises InvalidArgument for the first request of a sequence that does not say so."""
    if not request.parameters.get("sequence_start"):
        key = request.parameters.get("sequence_id")
        raise InvalidArgument(
            f"inference request for sequence {key} to model '{request.model_name}' must specify the START flag on the "
            "first request of the sequence"
        )


def control_tensor(control: SequenceControl, is_on: bool, sequence: SequenceId, is_batched: bool) -> Tensor:
    """A control input of one row: shape [1, 1], or [1] of an unbatched model."""
    shape = (1, 1) if is_batched else (1,)
    if control.kind == "corrid" and control.datatype == "BYTES":
        array = np.full(shape, str(sequence).encode() if is_on else b"", dtype=object)
    elif control.kind == "corrid":
        array = np.full(shape, sequence if is_on else 0, dtypes.NUMPY[control.datatype])
    else:
        array = np.full(shape, control.on if is_on else control.off, dtypes.NUMPY[control.datatype])
    return Tensor(control.name, control.datatype, shape, array)


class SlotQueue:
    """What the direct strategy queues calls in: one waits per slot, `call.key` is (slot, shapes).

    A batch has a row for every slot up to the last that has a call; slots without one are filled with `filler`s.
    """

    def __init__(self, policy: SequencePolicy, max_rows: int, filler: Callable[[Call], Call]) -> None:
        self.rows = 0
        self.calls = 0
        self.max_rows = max_rows
        self.limit = BatchLimit()  # slots are rows: a batch cannot shrink
        self.configured_rows = policy.slots
        self.soonest_ns = 0
        self.is_eager = False
        self._policy = policy
        self._filler = filler
        self._by_slot: dict[int, Call] = {}

    def has_room(self, call: Call) -> bool:
        return True  # a sequence has one request here at a time

    def rows_ahead(self, call: Call) -> int:
        return 0

    def may_grow(self) -> bool:
        return False

    def more(self, key: Hashable, rows: int) -> Decision:
        return Decision([])

    def batch_rows(self) -> int:
        return self.configured_rows

    def push(self, call: Call) -> int:
        assert isinstance(call.key, tuple)
        self._by_slot[call.key[0]] = call
        self.rows += 1
        self.calls += 1
        return 0

    def take(self, now_ns: int, costs: Costs | None = None, cut: Cut | None = None) -> Decision:
        if not self._by_slot:
            return Decision([], [])
        oldest = min(self._by_slot.values(), key=lambda call: call.arrived_ns)
        delay_ns = self._policy.batching.max_queue_delay_ns if self._policy.batching is not None else 0
        is_sparse = len(self._by_slot) < self._policy.min_slot_utilization * self._policy.slots
        if is_sparse and now_ns - oldest.arrived_ns < delay_ns:
            return Decision([], [], oldest.arrived_ns + delay_ns)
        assert isinstance(oldest.key, tuple)
        shapes = oldest.key[1]
        chosen = {slot: call for slot, call in self._by_slot.items() if call.key == (slot, shapes)}
        for slot in chosen:
            del self._by_slot[slot]
        self.rows -= len(chosen)
        self.calls -= len(chosen)
        if self._policy.batching is None:
            return Decision(list(chosen.values()), [])
        batch = [chosen.get(slot) or self._filler(oldest) for slot in range(max(chosen) + 1)]
        return Decision(batch, [])

    def expire(self, now_ns: int) -> list[Call]:
        return []

    def drain(self) -> list[Call]:
        calls = list(self._by_slot.values())
        self._by_slot.clear()
        self.rows = self.calls = 0
        return calls


class _Nobody:
    """The sink of fillers."""

    def settle(self, calls: Sequence[Call]) -> None:
        pass


@dataclass(eq=False)
class Lane:
    """One instance's scheduler, and its free slots."""

    scheduler: Scheduler
    free: list[int]


@dataclass(eq=False)
class _Sequence:
    """One active sequence. Without a lane it waits for a slot."""

    id: SequenceId
    lane: Lane | None = None
    slot: int = 0
    waiting: deque[Call] = field(default_factory=deque)
    is_busy: bool = False
    used_ns: int = 0
    states: dict[str, Tensor] = field(default_factory=dict)


class SequenceBatcher:
    """An `Infer` over one lane per instance, and the sink of their calls."""

    def __init__(
        self,
        config: ModelConfig,
        initial_states: dict[str, Tensor],
        timer: Timer,
        statistics: ModelStatistics,
    ) -> None:
        """`initial_states` are the first values of the state inputs, one row each."""
        assert config.sequences is not None
        self._config = config
        self._policy = config.sequences
        self._initial_states = initial_states
        self._timer = timer
        self._statistics = statistics
        self._lock = threading.Lock()
        self._lanes: list[Lane] = []
        self._active: dict[SequenceId, _Sequence] = {}
        self._backlog: deque[_Sequence] = deque()
        self._queued = 0
        # When to look for those that have waited until their deadlines; and whether to find that out.
        self._look_ns = 0
        self._is_to_look = False
        self._is_sweeping = False
        self._is_closing = False

    def add(self, make_scheduler: Callable[["BatchQueue | SlotQueue"], Scheduler]) -> Scheduler:
        """A lane for one more instance; the caller gives its scheduler that instance."""
        waiting: BatchQueue | SlotQueue
        if self._policy.is_direct:
            waiting = SlotQueue(self._policy, self._config.max_queued_rows, self._filler)
        else:
            waiting = BatchQueue(self._policy.batching, self._config.max_queued_rows)
        scheduler = make_scheduler(waiting)
        self._lanes.append(Lane(scheduler, list(range(self._policy.slots - 1, -1, -1))))
        return scheduler

    def __call__(self, calls: Sequence[Call]) -> None:
        failed: list[Call] = []
        touched: list[_Sequence] = []
        with self._lock:
            for call in calls:
                try:
                    touched.append(self._accept(call))
                except InferError as error:
                    call.answer = error
                    failed.append(call)
        if failed:
            self._statistics.record_failures(failed, now_ns())
            settle(failed)
        self._go_on(touched)
        if self._is_to_look:
            self._is_to_look = False
            self._expire()

    def settle(self, calls: Sequence[Call]) -> None:
        """A lane's calls come back: keep their states, hand the answers over, and go on."""
        touched: list[_Sequence] = []
        outers: list[Call] = []
        with self._lock:
            for inner in calls:
                outer, sequence, is_end = inner.token
                answer = inner.answer
                if isinstance(answer, InferResponse):
                    try:
                        answer = self._keep_states(sequence, outer, answer)
                    except Exception as error:  # as states on a device that has failed
                        answer = as_infer_error(f"model '{self._config.name}': a state", error)
                outer.answer, outer.times = answer, inner.times
                outers.append(outer)
                touched += self._finished(sequence, is_end)
        settle(outers)
        self._go_on(touched)

    def close(self) -> None:
        """Let what executes end; refuse what waits for it."""
        with self._lock:
            self._is_closing = True
            left = [call for sequence in self._active.values() for call in sequence.waiting]
            for sequence in self._active.values():
                sequence.waiting.clear()
        settle_all(left, Unavailable(f"model '{self._config.name}' is being unloaded"))
        for lane in self._lanes:
            lane.scheduler.close()

    def refuse_waiting(self, error: InferError) -> None:
        """Settle what waits, here and in the lanes, with an error."""
        with self._lock:
            left = [call for sequence in self._active.values() for call in sequence.waiting]
            for sequence in self._active.values():
                sequence.waiting.clear()
            self._queued -= len(left)
        for call in left:
            call.answer = error
        if left:
            self._statistics.record_failures(left, now_ns())
            settle(left)
        for lane in self._lanes:
            lane.scheduler.refuse_waiting(error)

    def executing(self, at_ns: int) -> list[tuple[float, bool]]:
        """As a scheduler's, of all lanes."""
        return [batch for lane in self._lanes for batch in lane.scheduler.executing(at_ns)]

    def queued_calls(self) -> int:
        return self._queued + sum(lane.scheduler.queued_calls() for lane in self._lanes)

    def _accept(self, call: Call) -> _Sequence:
        """Put a call behind its sequence's earlier ones."""
        name = self._config.name
        key = sequence_id(call.request)
        if self._is_closing:
            raise Unavailable(f"model '{name}' is being unloaded")
        if call.rows != 1:
            why = "due to requirements of sequence batcher"
            raise InvalidArgument(
                f"inference request to model '{name}' must specify batch-size 1 {why}, got {call.rows}"
            )
        if self._queued >= self._config.max_queued_rows:
            raise Unavailable(f"model '{name}' has a full queue ({self._queued} requests): try again later")
        sequence = self._active.get(key)
        if sequence is None:
            check_starts(call.request)
            self._check_id(key)
            sequence = self._active[key] = _Sequence(key)
            if not self._place(sequence):
                self._backlog.append(sequence)
        sequence.waiting.append(call)
        self._queued += 1
        is_held_up = sequence.lane is None or sequence.is_busy
        if is_held_up and call.deadline_ns and not 0 < self._look_ns <= call.deadline_ns:
            self._is_to_look = True
        return sequence

    def _check_id(self, key: SequenceId) -> None:
        """Whether the model's correlation id control can hold the id."""
        for control in self._policy.controls:
            if control.kind != "corrid" or control.datatype == "BYTES":
                continue
            limits = np.iinfo(dtypes.NUMPY[control.datatype])
            if not isinstance(key, int) or not limits.min <= key <= limits.max:
                raise InvalidArgument(
                    f"model '{self._config.name}': correlation ID {str(key)[:100]!r}: expected {control.datatype}, "
                    f"as its control input '{control.name}' has it"
                )

    def _place(self, sequence: _Sequence) -> bool:
        lane = max(self._lanes, key=lambda lane: len(lane.free))
        if not lane.free:
            return False
        sequence.lane, sequence.slot = lane, lane.free.pop()
        sequence.used_ns = now_ns()
        if not self._is_sweeping:
            self._is_sweeping = True
            self._timer(self._policy.idle_ns / 1e9, self._sweep)
        return True

    def _go_on(self, touched: Sequence[_Sequence]) -> None:
        """Send on the next request of each sequence that has none on its way."""
        ready: dict[int, tuple[Lane, list[Call]]] = {}
        gone: list[Call] = []
        with self._lock:
            for sequence in touched:
                if sequence.lane is None or sequence.is_busy:
                    continue
                while sequence.waiting:
                    outer = sequence.waiting.popleft()
                    self._queued -= 1
                    if outer.is_cancelled:
                        gone.append(outer)
                        continue
                    sequence.is_busy = True
                    lane = sequence.lane
                    ready.setdefault(id(lane), (lane, []))[1].append(self._inner(sequence, outer))
                    break
        if gone:
            settle_all(gone, Cancelled(f"the request to model '{self._config.name}' was cancelled by its caller"))
        for lane, calls in ready.values():
            lane.scheduler(calls)

    def _inner(self, sequence: _Sequence, outer: Call) -> Call:
        request = outer.request
        parameters = request.parameters
        is_start, is_end = bool(parameters.get("sequence_start")), bool(parameters.get("sequence_end"))
        if is_start:
            sequence.states = dict(self._initial_states)
        inputs = {**request.inputs, **self._controls(sequence.id, start=is_start, end=is_end, ready=True)}
        inputs.update(sequence.states)
        outputs = request.outputs
        if outputs:
            outputs = tuple(dict.fromkeys((*outputs, *(state.output_name for state in self._policy.states))))
        inner_request = InferRequest(request.model_name, inputs, request.model_version, request.id, outputs, parameters)
        inner = Call(inner_request, self, (outer, sequence, is_end), outer.emit)
        inner.deadline_ns = outer.deadline_ns
        inner.arrived_ns = outer.arrived_ns
        inner.trace = outer.trace
        shapes: Hashable = outer.key
        if sequence.states:
            shapes = (outer.key, tuple(tensor.shape for tensor in sequence.states.values()))
        inner.key = (sequence.slot, shapes) if self._policy.is_direct else shapes
        return inner

    def _controls(self, sequence: SequenceId, start: bool, end: bool, ready: bool) -> dict[str, Tensor]:
        is_on = {"start": start, "end": end, "ready": ready, "corrid": ready}
        return {
            control.name: control_tensor(control, is_on[control.kind], sequence, self._config.is_batched)
            for control in self._policy.controls
        }

    def _expire(self) -> None:
        """Answer those that have waited here for as long as their callers do, and look again when others will have.

        A sequence whose first request has expired before it had a slot is gone, with what waits behind that.
        """
        gone: list[Call] = []
        with self._lock:
            now = now_ns()
            self._look_ns = 0
            for sequence in list(self._active.values()):
                gone += self._expired(sequence, now)
            waiting = [
                call.deadline_ns for sequence in self._active.values() for call in sequence.waiting if call.deadline_ns
            ]
            if waiting:
                self._look_ns = min(waiting)
                self._timer((self._look_ns - now) / 1e9, self._expire)
        if gone:
            error = DeadlineExceeded(f"model '{self._config.name}': the request's deadline passed while it waited")
            for call in gone:
                call.answer = error
            self._statistics.record_failures(gone, now_ns())
            settle(gone)

    def _expired(self, sequence: _Sequence, at_ns: int) -> list[Call]:
        """What of a sequence's waiting calls is to be answered now; under the lock."""
        late = [call for call in sequence.waiting if call.deadline_ns and call.deadline_ns <= at_ns]
        if not late:
            return []
        if sequence.lane is None and sequence.waiting[0] in late:
            late = list(sequence.waiting)
            self._backlog.remove(sequence)
            del self._active[sequence.id]
        for call in late:
            sequence.waiting.remove(call)
        self._queued -= len(late)
        return late

    def _filler(self, call: Call) -> Call:
        """A row that nobody waits for, for a slot without a request."""
        inputs = {**call.request.inputs, **self._controls(0, start=False, end=False, ready=False)}
        filler = Call(InferRequest(call.request.model_name, inputs, call.request.model_version), _Nobody())
        filler.arrived_ns = call.arrived_ns
        filler.rows = 0
        return filler

    def _keep_states(self, sequence: _Sequence, outer: Call, answer: InferResponse) -> InferResponse:
        if not self._policy.states:
            return answer
        by_name = {tensor.name: tensor for tensor in answer.outputs}
        for state in self._policy.states:
            output = by_name.get(state.output_name)
            if output is not None:
                data = bytes(output.data) if isinstance(output.data, RAW_TYPES) else output.array().copy()
                sequence.states[state.input_name] = Tensor(state.input_name, output.datatype, output.shape, data)
        asked = outer.request.outputs
        shown = [spec.name for spec in self._config.outputs if not asked or spec.name in asked]
        outputs = [by_name[name] for name in shown if name in by_name]
        return InferResponse(answer.model_name, answer.model_version, outputs, answer.parameters, answer.is_null)

    def _finished(self, sequence: _Sequence, is_end: bool) -> list[_Sequence]:
        """Sequences that may go on, now that a request of this one has its answer."""
        sequence.is_busy = False
        sequence.used_ns = now_ns()
        if sequence.waiting:
            return [sequence]
        return self._release(sequence) if is_end else []

    def _release(self, sequence: _Sequence) -> list[_Sequence]:
        """Forget a sequence; its slot goes to the one that has waited longest."""
        if self._active.get(sequence.id) is sequence:
            del self._active[sequence.id]
        lane = sequence.lane
        assert lane is not None
        lane.free.append(sequence.slot)
        if not self._backlog:
            return []
        follower = self._backlog.popleft()
        self._place(follower)
        return [follower]

    def _sweep(self) -> None:
        """Forget the sequences that have been idle for too long."""
        touched: list[_Sequence] = []
        with self._lock:
            now = now_ns()
            idle = [s for s in self._active.values() if s.lane is not None and not s.is_busy and not s.waiting]
            for sequence in idle:
                if now - sequence.used_ns >= self._policy.idle_ns:
                    touched += self._release(sequence)
            self._is_sweeping = any(s.lane is not None for s in self._active.values()) and not self._is_closing
            if self._is_sweeping:
                self._timer(self._policy.idle_ns / 2e9, self._sweep)
        self._go_on(touched)


def zeros(state: SequenceState, is_batched: bool) -> Tensor:
    """The first value of a state that has no file."""
    shape = (1, *state.initial_dims) if is_batched else state.initial_dims
    if state.datatype == "BYTES":
        return Tensor(state.input_name, "BYTES", shape, np.full(shape, b"", dtype=object))
    return Tensor(state.input_name, state.datatype, shape, np.zeros(shape, dtypes.NUMPY[state.datatype]))
