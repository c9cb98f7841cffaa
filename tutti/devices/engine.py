"""Keeps a device busy: while a batch executes the next one is staged, and the one before is answered.

Rows are written once, into pinned memory that is used again; copies in, executions and copies out run on streams of
their own, ordered by events. The submitting thread never waits for the device: the device gives notice. Executions are
launched a little ahead, whose is next goes by the device time that its users have had, and copies need no turn. A
pipeline says that it takes another batch as late as staging allows, so that the batch is as large as the queue permits.

What a batch is, who waits for it and what to do about errors is its job's business. Knows no model and no request.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from tutti.cost import LatencyModel
from tutti.devices import pacing
from tutti.devices.arena import Arena
from tutti.devices.health import DeviceHealth
from tutti.devices.interface import Device, DeviceArray, DeviceBlock, Event, HostBlock, Stream
from tutti.devices.sharing import Shares
from tutti.dtypes import Array
from tutti.errors import DeviceLost, InferError, OutOfMemory
from tutti.types import Shape

_log = logging.getLogger(__name__)

_ALIGNMENT = 256
# Batches of one pipeline between staging and answer.
DEPTH = 4
# Executions are launched ahead of the one that runs: one in any case, and of short ones as many as take this long.
_AHEAD_NS = 1_000_000
_MOST_AHEAD = 8
# Whose turn is next is decided so long before the device would wait for it.
_LEAD_NS = 300_000
OWNED_BYTES = 256 << 20
HANG_NS = 60_000_000_000
_LOOK_FOR_HANGS_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Resident:
    """A tensor on the device, complete once `ready` is reached there; None: it is complete."""

    array: DeviceArray
    ready: Event | None


@dataclass(frozen=True, slots=True)
class Part:
    """One input of a batch: `nbytes` that `write` puts into pinned memory, or what is on the device already."""

    datatype: str
    shape: Shape
    nbytes: int = 0
    write: Callable[[Array], None] | None = None
    resident: Resident | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """One output of a batch: its bytes in pinned memory, [nbytes] UINT8, or, where it was to stay, on the device."""

    array: DeviceArray
    host: Array | None
    resident: Resident | None = None


@dataclass(frozen=True, slots=True)
class Times:
    """When a batch was taken, and when its execution began and ended, on the host's clock; ns."""

    start_ns: int
    execution_start_ns: int
    execution_end_ns: int


class Job(Protocol):
    """One batch on its way. `stage` and `launch` are called once, in the submitting thread; then one of the others."""

    rows: int

    def stage(self) -> Sequence[Part]:
        """The inputs. Raises InferError for what must not reach the device."""

    def launch(self, inputs: Sequence[DeviceArray], stream: Stream) -> Sequence[DeviceArray]:
        """Submit the execution to the stream, which is the library's current one; returns its outputs."""

    def stays(self, index: int) -> bool:
        """Whether output `index` stays on the device."""

    def finish(self, outputs: Sequence[Made], times: Times) -> None:
        """It is done. From any thread; must not raise."""

    def fail(self, error: Exception) -> None:
        """It could not be done. From any thread; must not raise."""


class _Slot:
    """The memory of one batch's inputs, on both sides."""

    def __init__(self) -> None:
        self.host: HostBlock | None = None
        self.there: DeviceBlock | None = None


class _Batch:
    """A job between its submission and its end, and the events that tell how far it is."""

    def __init__(self, pipeline: "Pipeline", job: Job, now_ns: int) -> None:
        self.pipeline = pipeline
        self.job = job
        self.submitted_ns = now_ns
        self.slot: _Slot | None = None
        self.inputs: list[DeviceArray] = []
        self.awaited: list[Event] = []
        self.copy_begins: Event | None = None
        self.copied: Event | None = None
        self.begins: Event | None = None
        self.ends: Event | None = None
        self.outputs: Sequence[DeviceArray] = ()
        self.out_block: HostBlock | None = None
        self.out_bytes = 0
        self.expected_ns = 0
        self.turn_ns = 0
        self.execution_start_ns = 0
        self.executed_ns = 0
        self.error: Exception | None = None


class Pipeline:
    """One user of the device, as an instance of a model: its batches execute in order, on a stream of its own.

    `is_free` is called when it takes another batch, from any thread; then it is given one by `submit`, once.
    """

    def __init__(self, engine: "DeviceEngine", name: str, weight: float, priority: int) -> None:
        self.name = name
        self.weight = weight
        self.priority = priority
        self.is_free: Callable[[], None] = lambda: None
        self.device_ns = 0
        self._engine = engine
        self.stream: Stream | None = None
        self.out_stream: Stream | None = None
        # Free to take a batch, and has said so.
        self.is_told = True
        self.is_alarmed = False
        self.submitted: deque[_Batch] = deque()
        self.staged: deque[_Batch] = deque()
        self.open = 0
        self.last_rows = 0
        self.slots: list[_Slot] = []
        self.host = LatencyModel()
        self.copy = LatencyModel()
        self.execution = LatencyModel()

    def submit(self, job: Job, is_again: bool = False) -> None:
        """Execute a job after those before it. From any thread; does not wait.

        `is_again` for parts of a batch that failed: the pipeline was not asked whether it takes them.
        """
        self._engine.submit(self, job, is_again)

    def ahead_ns(self, now_ns: int) -> int:
        """How long until what is submitted now would begin to execute, for what is before it."""
        return self._engine.ahead_ns(now_ns)

    def expected_stages(self, rows: int) -> pacing.Stages:
        return pacing.Stages(self.host.mean_ns(rows), self.copy.mean_ns(rows), self.execution.mean_ns(rows))

    def close(self) -> None:
        """Wait until all jobs have ended, then give the memory back."""
        self._engine.remove(self)


class _Turn:
    """A user of the device that submits by itself, in its own thread, and waits for its end there."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.expected_ns = 0
        self.turn_ns = 0
        self.granted = threading.Event()


class DeviceEngine:
    """All that executes on one device. Thread-safe."""

    def __init__(
        self, device: Device, health: DeviceHealth, owned_bytes: int = OWNED_BYTES, hang_ns: int = HANG_NS
    ) -> None:
        """An execution that has not ended after `hang_ns` is taken for one that never will; 0: never."""
        self.device = device
        self.arena = Arena(device, owned_bytes)
        self.busy_ns = 0
        self._health = health
        self._hang_ns = hang_ns
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)
        self._shares = Shares()
        self._pipelines: list[Pipeline] = []
        self._asking: dict[Pipeline, None] = {}
        self._turns: deque[_Turn] = deque()
        # What was granted and has not ended executing, in order.
        self._granted: deque[_Batch | _Turn] = deque()
        # Batches whose outputs are being copied.
        self._leaving: set[_Batch] = set()
        self._alone: deque[Callable[[], None]] = deque()
        self._is_alone = False
        self._copy_stream: Stream | None = None
        self._copies_end_ns = 0
        self._executions_end_ns = 0
        self._turns_end_ns = 0
        self._grant_ns = 0
        self._last_end: Event | None = None
        self._events: list[Event] = []
        self._is_watched = False
        self._lost = ""

    # Pipelines.

    def pipeline(self, name: str, weight: float = 1.0, priority: int = 0) -> Pipeline:
        """A new user of the device, with its share of it by `weight`."""
        pipeline = Pipeline(self, name, weight, priority)
        with self._lock:
            self._pipelines.append(pipeline)
            self._shares.add(pipeline, weight)
        return pipeline

    def pipelines(self) -> list[Pipeline]:
        with self._lock:
            return list(self._pipelines)

    def submit(self, pipeline: Pipeline, job: Job, is_again: bool = False) -> None:
        with self._lock:
            lost = self._lost
            if not is_again:
                pipeline.is_told = False
            if not lost:
                pipeline.open += 1
                pipeline.submitted.append(_Batch(pipeline, job, self.device.now_ns()))
        if lost:
            job.fail(self._loss(pipeline))
            self.device.alarm(0, lambda: self._offer(pipeline))  # what waits is to be answered, too
        else:
            self.device.post(lambda: self._stage_next(pipeline))

    def ahead_ns(self, now_ns: int) -> int:
        with self._lock:
            return max(0, self._executions_end_ns - now_ns) if self._granted else 0

    def remove(self, pipeline: Pipeline) -> None:
        with self._idle:
            self._idle.wait_for(lambda: not pipeline.open)
            if pipeline in self._pipelines:
                self._pipelines.remove(pipeline)
                self._shares.remove(pipeline)
        if not self._lost:  # what a lost device holds goes with its process
            self.device.call(lambda: self._free(pipeline))

    def close(self) -> None:
        """End the device's thread. No pipeline may have jobs."""
        self.device.post(self.arena.close)
        self.device.close()

    @contextmanager
    def turn(self, pipeline: Pipeline) -> Iterator[None]:
        """Have an execution's turn within the block, for a library that submits and waits by itself. Blocks."""
        turn = _Turn(pipeline)
        with self._lock:
            if self._lost:
                raise self._loss(pipeline)
            self._turns.append(turn)
            turn.expected_ns = pipeline.execution.mean_ns(1)
            self._ask(pipeline)
        self._grant()
        turn.granted.wait()
        if self._lost:
            raise self._loss(pipeline)
        start_ns = self.device.now_ns()
        try:
            yield
        finally:
            self._end_turn(turn, start_ns)

    def alone(self, work: Callable[[], None]) -> None:
        """Have `work` run in the submitting thread while nothing else is under way on the device. Does not wait.

        It runs, too, when the device is lost, and then meets what every call meets.
        """
        with self._lock:
            self._alone.append(work)
            if self._lost:
                self._start_alone()
        self._grant()

    def reclaim(self) -> None:
        """Give memory that the library's allocator keeps back to the device."""
        self.device.post(self._reclaim)

    def report(self, error: BaseException) -> str:
        """What a library's own thread has met: why the device is lost with it, "" where it is not."""
        reason = self.device.fault(error)
        if reason:
            self._lose(reason)
        return reason

    @property
    def lost(self) -> str:
        """Why the device answers no more; "" while it does."""
        return self._lost

    # The way of a batch, in the submitting thread.

    def _stage_next(self, pipeline: Pipeline) -> None:
        with self._lock:
            if self._lost or not pipeline.submitted:
                return
            batch = pipeline.submitted[0]
        try:
            self._stage(batch)
        except Exception as error:
            failure = self._meant(error, pipeline)
            self._drop(batch, failure)
            return
        with self._lock:
            if self._lost:
                return
            pipeline.submitted.popleft()
            now = self.device.now_ns()
            pipeline.host.record(batch.job.rows, max(1, now - batch.submitted_ns))
            copy_ns = pipeline.copy.mean_ns(batch.job.rows) if batch.copied is not None else 0
            self._copies_end_ns = max(self._copies_end_ns, now) + copy_ns
            batch.expected_ns = pipeline.execution.mean_ns(batch.job.rows)
            pipeline.last_rows = batch.job.rows
            pipeline.staged.append(batch)
            self._ask(pipeline)
        self._grant()

    def _stage(self, batch: _Batch) -> None:
        """Write the inputs into pinned memory, and have them copied to the device."""
        pipeline, device = batch.pipeline, self.device
        self._make_streams(pipeline)
        parts = batch.job.stage()
        offsets, size = _offsets([part.nbytes for part in parts])
        slot = batch.slot = self._slot(pipeline, size)
        batch.inputs = [self._input(batch, slot, part, offset) for part, offset in zip(parts, offsets, strict=True)]
        if not size:
            return
        assert slot.host is not None and slot.there is not None and self._copy_stream is not None
        batch.copy_begins, batch.copied = self._event(), self._event()
        device.record(batch.copy_begins, self._copy_stream)
        device.copy_in(slot.host, slot.there, size, self._copy_stream)
        device.record(batch.copied, self._copy_stream)

    def _input(self, batch: _Batch, slot: _Slot, part: Part, offset: int) -> DeviceArray:
        """One input as the execution will find it; what comes from the host is written to where it is copied from."""
        if part.resident is not None:
            if part.resident.ready is not None:
                batch.awaited.append(part.resident.ready)
            return part.resident.array
        assert slot.host is not None and slot.there is not None
        if part.write is not None and part.nbytes:
            part.write(slot.host.array[offset : offset + part.nbytes])
        return self.device.view(slot.there, offset, part.datatype, part.shape)

    def _launch(self, batch: _Batch) -> None:
        if self._lost:
            return
        pipeline, device = batch.pipeline, self.device
        assert pipeline.stream is not None and pipeline.out_stream is not None
        failure: Exception | None = None
        batch.begins, batch.ends = self._event(), self._event()
        try:
            for event in (batch.copied, *batch.awaited):
                if event is not None:
                    device.wait(pipeline.stream, event)
            device.record(batch.begins, pipeline.stream)
            batch.outputs = device.forward(lambda: batch.job.launch(batch.inputs, pipeline.stream), pipeline.stream)
        except Exception as error:
            failure = self._meant(error, pipeline)
        batch.error = failure
        try:
            # What was submitted before it failed uses the batch's memory until this is reached.
            device.record(batch.ends, pipeline.stream)
            if failure is None:
                self._copy_out(batch)
            device.notify(batch.ends, pipeline.stream, lambda error: self._executed(batch, error))
        except Exception as error:
            if not self._lost:
                self._lose(device.fault(error) or f"{type(error).__name__}: {error}")

    def _copy_out(self, batch: _Batch) -> None:
        """Have the outputs that leave copied into pinned memory, and notice given of it."""
        device, pipeline = self.device, batch.pipeline
        leaving = [output for index, output in enumerate(batch.outputs) if not batch.job.stays(index)]
        if not leaving:
            return
        assert batch.ends is not None and pipeline.out_stream is not None
        try:
            offsets, size = _offsets([device.nbytes(output) for output in leaving])
            batch.out_block = self.arena.take(size)
        except Exception as error:
            batch.error = self._meant(error, pipeline)
            return
        batch.out_bytes = size
        device.wait(pipeline.out_stream, batch.ends)
        try:
            for output, offset in zip(leaving, offsets, strict=True):
                device.copy_out(output, batch.out_block, offset, pipeline.out_stream)
        except Exception as error:  # copies of other outputs may be under way
            batch.error = self._meant(error, pipeline)
        left = self._event()
        device.record(left, pipeline.out_stream)
        with self._lock:
            self._leaving.add(batch)
        device.notify(left, pipeline.out_stream, lambda error: self._left(batch, left, error))

    # What the device gives notice of, in threads of its streams.

    def _executed(self, batch: _Batch, error: Exception | None) -> None:
        if error is not None:
            self._lose(self.device.fault(error) or str(error))
            return
        pipeline = batch.pipeline
        with self._lock:
            if self._lost:
                return
            self._account(batch)
            self._granted.remove(batch)
            if batch.slot is not None:
                pipeline.slots.append(batch.slot)
                batch.slot = None
            is_over = batch not in self._leaving
            self._recycle(batch)
            if is_over:
                self._close(batch)
        if is_over:
            self._finish(batch)
        self._grant()

    def _left(self, batch: _Batch, left: Event, error: Exception | None) -> None:
        if error is not None:
            self._lose(self.device.fault(error) or str(error))
            return
        with self._lock:
            if self._lost:
                return
            self._events.append(left)
            self._leaving.discard(batch)
            is_over = batch not in self._granted  # its execution's notice may come later: another thread gives it
            if is_over:
                self._close(batch)
        if is_over:
            self._finish(batch)
        self._grant()

    def _finish(self, batch: _Batch) -> None:
        if batch.error is not None:
            if batch.out_block is not None:
                self.arena.give(batch.out_block)
            batch.outputs, batch.inputs = (), []  # their memory may be needed at once, to do it in parts
            batch.job.fail(batch.error)
            return
        whole = self.arena.owned(batch.out_block, batch.out_bytes) if batch.out_block is not None else None
        made: list[Made] = []
        at = 0
        for index, output in enumerate(batch.outputs):
            if batch.job.stays(index):
                made.append(Made(output, None, Resident(output, None)))
                continue
            assert whole is not None
            size = self.device.nbytes(output)
            made.append(Made(output, whole[at : at + size]))
            at = _aligned(at + size)
        times = Times(batch.submitted_ns, batch.execution_start_ns, batch.executed_ns)
        batch.outputs, batch.inputs = (), []
        batch.job.finish(made, times)

    # Decisions. Under the lock, but for what they lead to.

    def _ask(self, pipeline: Pipeline) -> None:
        if pipeline not in self._asking:
            self._shares.asks(pipeline)
            self._asking[pipeline] = None

    def _grant(self) -> None:
        """Launch what may be launched, and let pipelines take other batches."""
        while True:
            with self._lock:
                next_up = self._next()
                if next_up is None:
                    break
                self._expect(next_up)
            if isinstance(next_up, _Turn):
                next_up.granted.set()
            else:
                self.device.post(lambda batch=next_up: self._launch(batch))  # type: ignore[misc]
        self._watch()
        for pipeline in self.pipelines():
            self._offer(pipeline)

    def _next(self) -> "_Batch | _Turn | None":
        if self._lost or self._is_alone or not self._start_alone():
            return None
        if not self._asking or not self._may_launch():
            return None
        pipeline = self._choose()
        turn = next((turn for turn in self._turns if turn.pipeline is pipeline), None)
        next_up: _Batch | _Turn
        if pipeline.staged:
            next_up = pipeline.staged.popleft()
        else:
            assert turn is not None
            self._turns.remove(turn)
            next_up = turn
        if not pipeline.staged and not any(other.pipeline is pipeline for other in self._turns):
            del self._asking[pipeline]
        return next_up

    def _start_alone(self) -> bool:
        """Begin what is to run alone, once nothing is under way; returns whether others may go on."""
        if not self._alone:
            return True
        if not self._granted and not self._leaving:
            work = self._alone.popleft()
            self._is_alone = True
            self.device.post(lambda: self._run_alone(work))
        return False

    def _run_alone(self, work: Callable[[], None]) -> None:
        try:
            if not self._lost:
                self.device.synchronize()
            work()
        except Exception as error:
            reason = self.device.fault(error)
            if reason:
                self._lose(reason)
            else:
                _log.exception("device %s: what was to run alone failed", self.device.name)
        finally:
            with self._lock:
                self._is_alone = False
                if self._lost:
                    self._start_alone()
        self._grant()

    def _may_launch(self) -> bool:
        """Whether another execution may be launched behind those that have not ended.

        Where several pipelines have work, only shortly before those end: until then a pipeline that is to have its
        share, and has just ended a batch, gets another one staged.
        """
        count = len(self._granted)
        if not count:
            return True
        if count >= (2 if isinstance(self._granted[-1], _Turn) else _MOST_AHEAD):
            return False
        last_ns = sum([entry.expected_ns for entry in self._granted]) - self._granted[0].expected_ns
        if not self._is_shared() or not self._granted[-1].expected_ns:
            return count < 2 or 0 < last_ns < _AHEAD_NS
        left_ns = self._executions_end_ns - self.device.now_ns()
        if left_ns <= _LEAD_NS:
            return True
        self._grant_at(self._executions_end_ns - _LEAD_NS)
        return False

    def _is_shared(self) -> bool:
        return sum([pipeline.open > 0 or pipeline in self._asking for pipeline in self._pipelines]) > 1

    def _grant_at(self, when_ns: int) -> None:
        if not self._grant_ns or when_ns < self._grant_ns:
            self._grant_ns = when_ns
            self.device.alarm(when_ns - self.device.now_ns(), self._grant_now)

    def _grant_now(self) -> None:
        with self._lock:
            self._grant_ns = 0
        self._grant()

    def _choose(self) -> Pipeline:
        """By share, of those whose inputs are there; of all, where none are."""
        there = [pipeline for pipeline in self._asking if self._is_there(pipeline)]
        chosen = self._shares.choose(there or self._asking)
        assert isinstance(chosen, Pipeline)
        return chosen

    def _is_there(self, pipeline: Pipeline) -> bool:
        copied = pipeline.staged[0].copied if pipeline.staged else None
        return copied is None or self.device.is_reached(copied)

    def _expect(self, entry: "_Batch | _Turn") -> None:
        """The entry will execute after those before it."""
        now = self.device.now_ns()
        if not self._granted:
            entry.turn_ns = now
        self._granted.append(entry)
        self._shares.charge(entry.pipeline, entry.expected_ns)
        begins_ns = max(now, self._executions_end_ns if len(self._granted) > 1 else now)
        if isinstance(entry, _Batch) and entry.copied is not None and not self.device.is_reached(entry.copied):
            begins_ns = max(begins_ns, self._copies_end_ns)
        self._executions_end_ns = begins_ns + entry.expected_ns

    def _account(self, batch: _Batch) -> None:
        """Learn from a batch that has executed, and charge it to its pipeline: the time that it alone had.

        It may have begun, as far as its stream is concerned, while the device still executed what another had launched.
        """
        pipeline, device = batch.pipeline, self.device
        assert batch.begins is not None and batch.ends is not None
        span_ns = max(0, device.elapsed_ns(batch.begins, batch.ends))
        alone_ns = span_ns
        if self._last_end is not None:
            alone_ns = max(0, min(span_ns, device.elapsed_ns(self._last_end, batch.ends)))
            self._events.append(self._last_end)
        self._last_end = batch.ends
        batch.executed_ns = device.now_ns()
        batch.execution_start_ns = max(batch.submitted_ns, batch.executed_ns - alone_ns)
        self._charge(batch, alone_ns)
        if batch.error is None:
            pipeline.execution.record(batch.job.rows, max(1, alone_ns))
        if batch.copied is not None and batch.copy_begins is not None:
            pipeline.copy.record(batch.job.rows, max(1, device.elapsed_ns(batch.copy_begins, batch.copied)))

    def _charge(self, entry: "_Batch | _Turn", device_ns: int) -> None:
        self._shares.charge(entry.pipeline, device_ns - entry.expected_ns)
        entry.pipeline.device_ns += device_ns
        self.busy_ns += device_ns
        now = self.device.now_ns()
        rest = [other for other in self._granted if other is not entry]
        self._executions_end_ns = now + sum([other.expected_ns for other in rest])
        if rest and not rest[0].turn_ns:
            rest[0].turn_ns = now

    def _end_turn(self, turn: _Turn, start_ns: int) -> None:
        with self._lock:
            if turn in self._granted:
                now = self.device.now_ns()
                self._charge(turn, now - max(start_ns, self._turns_end_ns))
                self._turns_end_ns = now
                turn.pipeline.execution.record(1, max(1, now - start_ns))
                self._granted.remove(turn)
        self._grant()

    def _offer(self, pipeline: Pipeline) -> None:
        """Let the pipeline take another batch, if it is time."""
        with self._lock:
            if not self._takes_another(pipeline):
                return
            now = self.device.now_ns()
            cut_ns = self._cut_ns(pipeline, now)
            if cut_ns > now:
                if not pipeline.is_alarmed:
                    pipeline.is_alarmed = True
                    self.device.alarm(cut_ns - now, lambda: self._alarmed(pipeline))
                return
            pipeline.is_told = True
        pipeline.is_free()

    def _alarmed(self, pipeline: Pipeline) -> None:
        with self._lock:
            pipeline.is_alarmed = False
        self._offer(pipeline)

    def _takes_another(self, pipeline: Pipeline) -> bool:
        if pipeline.is_told or pipeline not in self._pipelines:
            return False
        return bool(self._lost) or (not pipeline.submitted and not pipeline.staged and pipeline.open < DEPTH)

    def _cut_ns(self, pipeline: Pipeline, now_ns: int) -> int:
        stages = pipeline.expected_stages(pipeline.last_rows)
        if not self._granted or not stages.execution_ns:
            return now_ns
        executions_end_ns = self._executions_end_ns - (_LEAD_NS if self._is_shared() else 0)
        return pacing.latest_cut_ns(stages, self._copies_end_ns, executions_end_ns)

    # Endings.

    def _close(self, batch: _Batch) -> None:
        batch.pipeline.open -= 1
        if not batch.pipeline.open:
            self._idle.notify_all()

    def _drop(self, batch: _Batch, error: Exception) -> None:
        """A batch that could not be staged."""
        with self._lock:
            if self._lost:
                return  # failed with all others
            batch.pipeline.submitted.remove(batch)
            self._close(batch)
            if batch.slot is not None:
                batch.pipeline.slots.append(batch.slot)
        batch.job.fail(error)
        self._grant()

    def _meant(self, error: Exception, pipeline: Pipeline) -> Exception:
        """What an error means for a batch. Where the device is lost with it, that is told to all."""
        if isinstance(error, InferError):
            return error
        if self.device.is_memory_error(error):
            return OutOfMemory(f"no memory left on {self.device.name}: {error}")
        reason = self.device.fault(error)
        if reason:
            self._lose(reason)
            return self._loss(pipeline)
        return error.with_traceback(None)  # which would keep the batch's tensors

    def _loss(self, pipeline: Pipeline) -> DeviceLost:
        what = f"device {self.device.name} has failed ({self._lost}); its process is replaced, try again later"
        return DeviceLost(f"'{pipeline.name}': {what}")

    def _lose(self, reason: str) -> None:
        """The device answers no more: say so first, then fail all that is under way."""
        with self._lock:
            if self._lost:
                return
            self._lost = reason
            batches: list[_Batch] = []
            for pipeline in self._pipelines:
                batches += [*pipeline.submitted, *pipeline.staged]
                pipeline.submitted.clear()
                pipeline.staged.clear()
            batches += [entry for entry in self._granted if isinstance(entry, _Batch)]
            batches += [batch for batch in self._leaving if batch not in self._granted]
            turns = [*self._turns, *(entry for entry in self._granted if isinstance(entry, _Turn))]
            self._granted.clear()
            self._leaving.clear()
            self._turns.clear()
            self._asking.clear()
            self._start_alone()
        self._health.fail(self.device.name, reason)
        for turn in turns:
            turn.granted.set()
        for batch in batches:
            batch.outputs, batch.inputs = (), []
            batch.job.fail(self._loss(batch.pipeline))
        with self._lock:
            for batch in batches:
                self._close(batch)
        for pipeline in self.pipelines():
            self._offer(pipeline)

    def _watch(self) -> None:
        """Look now and then whether the execution whose turn it is ends."""
        with self._lock:
            if self._is_watched or not self._hang_ns or not self._granted or self._lost:
                return
            self._is_watched = True
        self.device.alarm(min(_LOOK_FOR_HANGS_NS, self._hang_ns), self._look_for_hang)

    def _look_for_hang(self) -> None:
        with self._lock:
            self._is_watched = False
            entry = self._granted[0] if self._granted else None
            lasts_ns = self.device.now_ns() - entry.turn_ns if entry is not None else 0
        if entry is not None and lasts_ns >= self._hang_ns:
            self._lose(f"an execution of '{entry.pipeline.name}' has not ended after {lasts_ns / 1e9:.0f} s")
        self._watch()

    # Memory, in the submitting thread.

    def _make_streams(self, pipeline: Pipeline) -> None:
        if self._copy_stream is None:
            self._copy_stream = self.device.stream()
        if pipeline.stream is None:
            pipeline.stream = self.device.stream(pipeline.priority)
            pipeline.out_stream = self.device.stream()

    def _slot(self, pipeline: Pipeline, size: int) -> _Slot:
        """Memory for `size` bytes of inputs: what an earlier batch had, or, where that is too small, larger."""
        with self._lock:
            slot = pipeline.slots.pop() if pipeline.slots else _Slot()
        try:
            if slot.host is None or slot.host.array.nbytes < size:
                if slot.host is not None:
                    self.arena.give(slot.host)
                    slot.host = None
                slot.host = self.arena.take(size)
            if slot.there is None or slot.there.size < size:
                if slot.there is not None:
                    self.device.free_device(slot.there)
                    slot.there = None
                slot.there = self.device.device_block(1 << max(12, (size - 1).bit_length()))
        except Exception:
            with self._lock:
                pipeline.slots.append(slot)
            raise
        return slot

    def _event(self) -> Event:
        with self._lock:
            if self._events:
                return self._events.pop()
        return self.device.event()

    def _recycle(self, batch: _Batch) -> None:
        """Give the events of a batch that has executed back; its last one is still compared with."""
        self._events += [event for event in (batch.copy_begins, batch.copied, batch.begins) if event is not None]
        batch.copy_begins = batch.copied = batch.begins = None

    def _free(self, pipeline: Pipeline) -> None:
        for slot in pipeline.slots:
            if slot.host is not None:
                self.arena.give(slot.host)
            if slot.there is not None:
                self.device.free_device(slot.there)
        pipeline.slots.clear()
        if not self._pipelines:
            self.arena.close()

    def _reclaim(self) -> None:
        try:
            self.device.release_cached()
        except Exception as error:
            self._meant(error, Pipeline(self, self.device.name, 1.0, 0))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _offsets(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each stretch begins, one after the other and aligned, and where the last one ends."""
    offsets = []
    at = 0
    for size in sizes:
        offsets.append(at)
        at = _aligned(at + size)
    return offsets, at
