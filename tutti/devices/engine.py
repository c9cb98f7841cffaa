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

from tutti.core.errors import DeviceLost, InferError, OutOfMemory
from tutti.devices import pacing
from tutti.devices.accounting import Accounting
from tutti.devices.arena import Arena
from tutti.devices.executions import LEAD_NS, Executions
from tutti.devices.health import DeviceHealth
from tutti.devices.interface import Device, DeviceArray, Event, Stream
from tutti.devices.jobs import Job, Made, Times, aligned, offsets
from tutti.devices.pipeline import Batch, Execution, Pipeline, Turn
from tutti.devices.staging import Staging

_log = logging.getLogger(__name__)

# Batches of one pipeline between staging and answer.
DEPTH = 4
OWNED_BYTES = 256 << 20
HANG_NS = 60_000_000_000
_LOOK_FOR_HANGS_NS = 1_000_000_000
# So long a core is spent on waiting for a batch that nothing else is under way beside.
_QUICK_NS = 1_500_000
# So long the submitting thread itself looks whether such a batch is done, before it leaves that to another.
_LINGER_NS = 3_000_000


class DeviceEngine:
    """All that executes on one device. Thread-safe."""

    def __init__(
        self, device: Device, health: DeviceHealth, owned_bytes: int = OWNED_BYTES, hang_ns: int = HANG_NS
    ) -> None:
        """`owned_bytes` of pinned memory may be with answers at a time. `hang_ns` is pipelines' default."""
        self.device = device
        self._staging = Staging(device, owned_bytes)
        self._accounting = Accounting()
        # The time of each model, by name, whichever pipelines it has had.
        self.model_ns: dict[str, int] = {}
        self._health = health
        self._hang_ns = hang_ns
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)
        self._pipelines: list[Pipeline] = []
        self._executions = Executions(self._is_there)
        # Batches whose outputs are being copied.
        self._leaving: set[Batch] = set()
        self._alone: deque[Callable[[], None]] = deque()
        self._is_alone = False
        self._copies_end_ns = 0
        self._grant_ns = 0
        self._last_end: tuple[Event, bool] | None = None
        self._is_watched = False
        self._lost = ""
        # Others see devices fail, too: the driver's reports, and models that compute on their own.
        self._end_listening = health.listen(self._failed)

    # What its users do.

    def pipeline(
        self,
        name: str,
        weight: float = 1.0,
        priority: int = 0,
        *,
        hang_ns: int | None = None,
        is_urgent: bool = False,
    ) -> Pipeline:
        """A new user of the device, with its share of it by `weight`, and CUDA's `priority` for its stream."""
        hang_ns = self._hang_ns if hang_ns is None else hang_ns
        pipeline = Pipeline(self, name, weight, priority, hang_ns, is_urgent)
        with self._lock:
            self._pipelines.append(pipeline)
            self._executions.add(pipeline)
        return pipeline

    def pipelines(self) -> list[Pipeline]:
        """Those of now. Takes no lock, which a device that hangs may hold: to copy a list is one step."""
        return list(self._pipelines)

    def submit(self, pipeline: Pipeline, job: Job, is_again: bool = False) -> None:
        """As Pipeline.submit."""
        with self._lock:
            lost = self._lost
            if not is_again:
                pipeline.is_told = False
            if not lost:
                pipeline.open += 1
                batch = Batch(pipeline, job, self.device.now_ns())
                batch.is_paced = pipeline.is_paced
                pipeline.submitted.append(batch)
        if lost:
            job.fail(self._loss(pipeline))
            self.device.alarm(0, lambda: self._offer(pipeline))  # what waits is to be answered, too
        else:
            self.device.post(lambda: self._stage_next(pipeline))

    def ahead_ns(self, now_ns: int) -> int:
        """As Pipeline.ahead_ns."""
        with self._lock:
            return max(0, self._executions.end_ns - now_ns) if self._executions.granted else 0

    def remove(self, pipeline: Pipeline) -> None:
        """As Pipeline.close."""
        with self._idle:
            self._idle.wait_for(lambda: not pipeline.open)
            if pipeline in self._pipelines:
                self._pipelines.remove(pipeline)
                self._executions.remove(pipeline)
        if not self._lost:  # what a lost device holds goes with its process
            is_last = not self._pipelines
            self.device.call(lambda: self._staging.free(pipeline, is_last))

    def close(self) -> None:
        """End the device's thread. No pipeline may have jobs."""
        self._end_listening()
        self.device.post(self._staging.arena.close)
        self.device.close()

    @contextmanager
    def turn(self, pipeline: Pipeline) -> Iterator[None]:
        """Have an execution's turn within the block, for a library that submits and waits by itself. Blocks."""
        turn = self.begin_turn(pipeline)
        try:
            yield
        finally:
            self.end_turn(turn)

    def begin_turn(self, pipeline: Pipeline) -> Turn:
        """As `turn`, without its end. Blocks until it is granted; raises DeviceLost."""
        turn = Turn(pipeline)
        with self._lock:
            if not self._lost:
                pipeline.turns.append(turn)
                self._executions.ask(pipeline)
        self._grant()
        while not self._lost and not turn.granted.wait(timeout=1):
            pass  # a device that is lost grants nothing
        if self._lost:
            raise self._loss(pipeline)
        with self._lock:
            turn.began_ns = self.device.now_ns()
            self._accounting.begin(turn, turn.began_ns)
        return turn

    def end_turn(self, turn: Turn) -> None:
        """What was granted is over. Once for each turn, from any thread."""
        with self._lock:
            now = self.device.now_ns()
            device_ns = self._accounting.end(turn, now)
            if turn in self._executions.granted:
                turn.pipeline.execution.record(1, max(1, now - turn.began_ns))
                self._charge(turn, device_ns)
        self._grant()

    def alone(self, work: Callable[[], None]) -> None:
        """Have `work` run in the submitting thread while nothing else is under way on the device. Does not wait.

        It runs, too, when the device is lost, and then meets what every call meets.
        """
        with self._lock:
            self._alone.append(work)
            if self._lost:
                self._start_alone()
        self._grant()

    def stream_of(self, pipeline: Pipeline) -> Stream:
        """What its batches execute on, for what is to be prepared there. In the submitting thread."""
        return self._staging.stream_of(pipeline)

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
    def busy_ns(self) -> int:
        """How long something has executed on the device, as far as it has ended."""
        return self._accounting.busy_ns

    @property
    def arena(self) -> Arena:
        """The device's pinned memory."""
        return self._staging.arena

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
            self._staging.stage(batch)
        except Exception as error:
            self._drop(batch, self._meant(error, pipeline))
            return
        with self._lock:
            if self._lost:
                return
            self._staged(batch)
        if not self._grant_turns():
            self._offer_all()  # else those that are launched do, later: somebody waits for them

    def _staged(self, batch: Batch) -> None:
        """Learn from a batch's staging, and let it wait for its turn."""
        pipeline, rows = batch.pipeline, batch.job.rows
        pipeline.submitted.popleft()
        now = self.device.now_ns()
        pipeline.host.record(rows, max(1, now - batch.submitted_ns))
        copy_ns = pipeline.copy.mean_ns(rows) if batch.copied is not None else 0
        self._copies_end_ns = max(self._copies_end_ns, now) + copy_ns
        batch.expected_ns = pipeline.execution.mean_ns(rows)
        pipeline.last_rows = rows
        pipeline.staged.append(batch)
        self._executions.ask(pipeline)

    def _launch(self, batch: Batch) -> None:
        if self._lost:
            return
        pipeline, device = batch.pipeline, self.device
        assert pipeline.stream is not None
        try:
            is_lone = self._is_lone(batch)
            batch.is_urgent = pipeline.is_urgent or is_lone
            batch.begins, batch.ends = self._staging.event(), self._staging.event(batch.is_urgent)
            batch.error = self._forward(batch)
            # What was submitted before it failed uses the batch's memory until this is reached.
            device.record(batch.ends, pipeline.stream)
            left = self._copy_out(batch) if batch.error is None else None
            if not is_lone or left is None:
                if left is not None:
                    device.notify(left, pipeline.out_stream, lambda error: self._left(batch, left, error))
                device.notify(batch.ends, pipeline.stream, lambda error: self._executed(batch, error))
        except Exception as error:
            self._lose_by(error)
            return
        try:
            self._offer_all()
        finally:  # what a caller's sink raises must not cost the batch its notice
            if is_lone and left is not None:
                device.linger(left, pipeline.out_stream, _LINGER_NS, lambda error: self._done(batch, left, error))

    def _is_lone(self, batch: Batch) -> bool:
        """Whether it is quick and all there is: waking a thread for its end would add to what its caller waits."""
        return 0 < batch.expected_ns <= _QUICK_NS and sum([pipeline.open for pipeline in self._pipelines]) == 1

    def _forward(self, batch: Batch) -> Exception | None:
        """Submit the execution; returns why it could not be."""
        stream, device = batch.pipeline.stream, self.device
        assert stream is not None and batch.begins is not None
        try:
            for event in (batch.copied, *batch.awaited):
                if event is not None:
                    device.wait(stream, event)
            device.record(batch.begins, stream)
            batch.outputs = device.forward(lambda: self._launched(batch, stream), stream)
        except Exception as error:
            return self._meant(error, batch.pipeline)
        return None

    def _launched(self, batch: Batch, stream: Stream) -> Sequence[DeviceArray]:
        """The job's outputs. Those that stay outlive the batch, and its inputs' memory is the next one's then."""
        outputs = batch.job.launch(batch.inputs, stream)
        there = batch.slot.there if batch.slot is not None else None
        if there is None:
            return outputs
        return [
            self.device.apart(output, there, stream) if batch.job.stays(index) else output
            for index, output in enumerate(outputs)
        ]

    def _copy_out(self, batch: Batch) -> Event | None:
        """Have the outputs that leave copied into pinned memory; returns what is reached then, if any do."""
        device, pipeline = self.device, batch.pipeline
        leaving = [output for index, output in enumerate(batch.outputs) if not batch.job.stays(index)]
        if not leaving:
            return None
        assert batch.ends is not None and pipeline.out_stream is not None
        try:
            begins, size = offsets([device.nbytes(output) for output in leaving])
            batch.out_block = self._staging.arena.take(size)
        except Exception as error:
            batch.error = self._meant(error, pipeline)
            return None
        batch.out_bytes = size
        device.wait(pipeline.out_stream, batch.ends)
        try:
            for output, begin in zip(leaving, begins, strict=True):
                device.copy_out(output, batch.out_block, begin, pipeline.out_stream)
        except Exception as error:  # copies of other outputs may be under way
            batch.error = self._meant(error, pipeline)
        left = self._staging.event(batch.is_urgent)
        device.record(left, pipeline.out_stream)
        with self._lock:
            if self._lost:  # it has failed with all others
                return None
            self._leaving.add(batch)
        return left

    # What the device gives notice of, in threads of its streams.

    def _executed(self, batch: Batch, error: Exception | None) -> None:
        try:
            if error is not None:
                raise error
            with self._lock:
                if self._lost:
                    return
                self._account(batch)
                is_over = batch not in self._leaving
        except Exception as failure:
            self._lose_by(failure)
            return
        if is_over:
            self._end(batch)
        self._grant()

    def _left(self, batch: Batch, left: Event, error: Exception | None) -> None:
        if error is not None:
            self._lose_by(error)
            return
        with self._lock:
            if self._lost:
                return
            self._staging.recycle(left, is_urgent=batch.is_urgent)
            self._leaving.discard(batch)
            is_over = batch not in self._executions.granted  # its execution's notice comes from another thread
        if is_over:
            self._end(batch)
        self._grant()

    def _done(self, batch: Batch, left: Event, error: Exception | None) -> None:
        """A batch that is by itself has executed, and its outputs have left: its caller comes first."""
        try:
            if error is not None:
                raise error
            with self._lock:
                if self._lost:
                    return
                self._account(batch)
                self._staging.recycle(left, is_urgent=batch.is_urgent)
                self._leaving.discard(batch)
        except Exception as failure:
            self._lose_by(failure)
            return
        self._end(batch)
        self._grant()

    def _account(self, batch: Batch) -> None:
        """Learn from a batch that has executed, and charge it to its pipeline: the time that it alone had.

        It may have begun, as far as its stream is concerned, while the device still executed what another had launched.
        """
        pipeline, device = batch.pipeline, self.device
        assert batch.begins is not None and batch.ends is not None
        alone_ns = max(0, device.elapsed_ns(batch.begins, batch.ends))
        if self._last_end is not None:
            event, is_urgent = self._last_end
            alone_ns = max(0, min(alone_ns, device.elapsed_ns(event, batch.ends)))
            if batch.is_paced:
                pipeline.lateness.record(max(0, device.elapsed_ns(event, batch.begins)), alone_ns)
            self._staging.recycle(event, is_urgent=is_urgent)
        self._last_end = batch.ends, batch.is_urgent
        batch.executed_ns = device.now_ns()
        batch.execution_start_ns = max(batch.submitted_ns, batch.executed_ns - alone_ns)
        if batch.error is None:
            pipeline.execution.record(batch.job.rows, max(1, alone_ns))
        if batch.copied is not None and batch.copy_begins is not None:
            pipeline.copy.record(batch.job.rows, max(1, device.elapsed_ns(batch.copy_begins, batch.copied)))
        self._accounting.executed(alone_ns, batch.executed_ns)
        self._charge(batch, alone_ns)
        self._staging.recycle(batch.copy_begins, batch.copied, batch.begins)
        batch.copy_begins = batch.copied = batch.begins = None

    def _charge(self, execution: Execution, device_ns: int) -> None:
        pipeline = execution.pipeline
        pipeline.device_ns += device_ns
        self.model_ns[pipeline.name] = self.model_ns.get(pipeline.name, 0) + device_ns
        self._executions.ended(execution, device_ns, self.device.now_ns())

    def _finish(self, batch: Batch) -> None:
        outputs = batch.outputs
        batch.drop_tensors()
        if batch.error is not None:
            if batch.out_block is not None:
                self._staging.arena.give(batch.out_block)
            del outputs
            batch.job.fail(batch.error)
            return
        whole = self._staging.arena.owned(batch.out_block, batch.out_bytes) if batch.out_block is not None else None
        made: list[Made] = []
        begin = 0
        for index, output in enumerate(outputs):
            if batch.job.stays(index):
                made.append(Made(output, None))
                continue
            assert whole is not None
            size = self.device.nbytes(output)
            made.append(Made(output, whole[begin : begin + size]))
            begin = aligned(begin + size)
        batch.job.finish(made, Times(batch.submitted_ns, batch.execution_start_ns, batch.executed_ns))

    # Decisions, and what they lead to. From any thread.

    def _grant(self) -> None:
        """Launch what may be launched, and let pipelines take other batches."""
        self._grant_turns()
        self._offer_all()

    def _grant_turns(self) -> int:
        """Returns how many batches are launched next."""
        batches = 0
        try:
            with self._lock:
                while (execution := self._next()) is not None:
                    self._executions.grant(execution, self.device.now_ns(), self._copies_end_ns)
                    if isinstance(execution, Turn):
                        execution.granted.set()
                    elif isinstance(execution, Batch):
                        batches += 1
                        self.device.post(lambda batch=execution: self._launch(batch))  # type: ignore[misc]
        except Exception as error:  # events of a device that is lost say so
            self._lose_by(error)
        self._watch()
        return batches

    def _offer_all(self) -> None:
        for pipeline in self.pipelines():
            self._offer(pipeline)

    def _next(self) -> Execution | None:
        if self._lost or self._is_alone or not self._start_alone():
            return None
        decision = self._executions.next(self.device.now_ns(), self._is_shared())
        if not isinstance(decision, int):
            return decision
        if decision and (not self._grant_ns or decision < self._grant_ns):
            self._grant_ns = decision
            self.device.alarm(decision - self.device.now_ns(), self._grant_at_last)
        return None

    def _grant_at_last(self) -> None:
        with self._lock:
            self._grant_ns = 0
        self._grant()

    def _is_there(self, batch: Batch) -> bool:
        return batch.copied is None or self.device.is_reached(batch.copied)

    def _is_shared(self) -> bool:
        """Whether several pipelines have work."""
        held = [execution.pipeline for execution in self._executions.granted if isinstance(execution, Turn)]
        return sum([p.open > 0 or self._executions.is_asking(p) or p in held for p in self._pipelines]) > 1

    def _offer(self, pipeline: Pipeline, is_paced: bool = False) -> None:
        """Let the pipeline take another batch, if it is time. `is_paced` when it has been waited for that."""
        is_full = pipeline.is_full()  # asks others, who may ask this engine
        with self._lock:
            if not self._takes_another(pipeline):
                return
            now = self.device.now_ns()
            cut_ns = now if is_full else self._cut_ns(pipeline, now)
            if cut_ns > now:
                if not pipeline.alarm_ns or cut_ns < pipeline.alarm_ns:
                    pipeline.alarm_ns = cut_ns
                    self.device.alarm(cut_ns - now, lambda: self._alarmed(pipeline))
                return
            pipeline.is_told = True
            pipeline.is_paced = is_paced or pipeline.alarm_ns > 0  # an alarm that is too late, too
        pipeline.is_free()
        pipeline.is_paced = False

    def _alarmed(self, pipeline: Pipeline) -> None:
        with self._lock:
            pipeline.alarm_ns = 0
        self._offer(pipeline, is_paced=True)

    def _takes_another(self, pipeline: Pipeline) -> bool:
        if pipeline.is_told or pipeline not in self._pipelines:
            return False
        return bool(self._lost) or (not pipeline.submitted and not pipeline.staged and pipeline.open < DEPTH)

    def _cut_ns(self, pipeline: Pipeline, now_ns: int) -> int:
        stages = pipeline.stages()
        if self._lost or not self._executions.granted or not stages.execution_ns:
            return now_ns
        end_ns = self._executions.end_ns - (LEAD_NS if self._is_shared() else 0)
        return pacing.latest_cut_ns(stages, self._copies_end_ns, end_ns) - pipeline.lateness.ns

    def _start_alone(self) -> bool:
        """Begin what is to run alone, once nothing is under way; returns whether others may go on."""
        if not self._alone:
            return True
        if not self._executions.granted and not self._leaving and not self._is_alone:
            work = self._alone.popleft()
            self._is_alone = True
            self.device.post(lambda: self._run_alone(work))
        return False

    def _run_alone(self, work: Callable[[], None]) -> None:
        try:
            if not self._lost:
                self._try_alone(self.device.synchronize)
            self._try_alone(work)  # in any case: somebody may wait for it
        finally:
            with self._lock:
                self._is_alone = False
                if self._lost:
                    self._start_alone()
        self._grant()

    def _try_alone(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            if not self.report(error):
                _log.exception("device %s: what was to run alone failed", self.device.name)

    # Endings.

    def _end(self, batch: Batch) -> None:
        """It has executed, and its outputs have left, which may be its inputs' memory."""
        self._staging.give_back(batch)
        try:
            self._finish(batch)
        finally:
            self._forget(batch)

    def _forget(self, batch: Batch) -> None:
        """Its job has been told: what that had executed again is open by now, so that a close waits for it."""
        with self._lock:
            batch.pipeline.open -= 1
            if not batch.pipeline.open:
                self._idle.notify_all()

    def _drop(self, batch: Batch, error: Exception) -> None:
        """A batch that could not be staged."""
        with self._lock:
            if self._lost:
                return  # failed with all others
            batch.pipeline.submitted.remove(batch)
        self._staging.give_back(batch)
        batch.drop_tensors()
        batch.job.fail(error)
        self._forget(batch)
        self._grant()

    def _meant(self, error: Exception, pipeline: Pipeline) -> Exception:
        """What an error means for a batch. Where the device is lost with it, that is told to all."""
        if isinstance(error, InferError):
            return error
        if self.device.is_memory_error(error):
            return OutOfMemory(f"no memory left on {self.device.name}: {error}")
        if self.report(error):
            return self._loss(pipeline)
        return error.with_traceback(None)  # which would keep the batch's tensors

    def _loss(self, pipeline: Pipeline) -> DeviceLost:
        what = f"device {self.device.name} has failed ({self._lost}); its process is replaced, try again later"
        return DeviceLost(f"'{pipeline.name}': {what}")

    def _lose_by(self, error: Exception) -> None:
        """The device is lost with an error of a call that fails on no device that works."""
        if not self._lost:
            self._lose(self.device.fault(error) or f"{type(error).__name__}: {error}")

    def _failed(self, device: str, reason: str) -> None:
        if device == self.device.name:
            self._lose(reason)

    def _lose(self, reason: str) -> None:
        """The device answers no more: say so first, then fail all that is under way."""
        with self._lock:
            if self._lost:
                return
            self._lost = reason
            granted = self._executions.clear()
            turns = [execution for execution in granted if isinstance(execution, Turn)]
            batches = [execution for execution in granted if isinstance(execution, Batch)]
            batches += [batch for batch in self._leaving if batch not in granted]
            for pipeline in self._pipelines:
                batches += [*pipeline.submitted, *pipeline.staged]
                turns += pipeline.turns
                for waiting in (pipeline.submitted, pipeline.staged, pipeline.turns):
                    waiting.clear()  # type: ignore[attr-defined]
            self._leaving.clear()
            self._start_alone()
        self._health.fail(self.device.name, reason)
        for turn in turns:
            turn.granted.set()
        for batch in batches:
            batch.drop_tensors()
            batch.job.fail(self._loss(batch.pipeline))
            self._forget(batch)
        for pipeline in self.pipelines():
            self._offer(pipeline)

    def _watch(self) -> None:
        """Look now and then whether the execution whose turn it is ends."""
        with self._lock:
            granted = self._executions.granted
            hang_ns = granted[0].pipeline.hang_ns if granted else 0
            if self._is_watched or not hang_ns or self._lost:
                return
            self._is_watched = True
        self.device.alarm(min(_LOOK_FOR_HANGS_NS, hang_ns), self._look_for_hang)

    def _look_for_hang(self) -> None:
        with self._lock:
            self._is_watched = False
            granted = self._executions.granted
            first = granted[0] if granted else None
            lasts_ns = self.device.now_ns() - first.turn_ns if first is not None else 0
        if first is not None and first.pipeline.hang_ns and lasts_ns >= first.pipeline.hang_ns:
            self._lose(f"an execution of '{first.pipeline.name}' has not ended after {lasts_ns / 1e9:.0f} s")
        self._watch()

    def _reclaim(self) -> None:
        try:
            self.device.release_cached()
        except Exception as error:
            self.report(error)
