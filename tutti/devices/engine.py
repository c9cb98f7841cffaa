"""Keeps a device busy: while a batch executes the next one is staged, and the one before is answered.

Rows are written once, into pinned memory that is used again; copies in, executions and copies out run on streams of
their own, ordered by events. The submitting thread never waits for the device: the device gives notice. Executions are
launched a little ahead, whose is next goes by the device time that its users have had, and copies need no turn. A
pipeline says that it takes another batch as late as staging allows, so that the batch is as large as the queue permits.

What a batch is, who waits for it and what to do about errors is its job's business. Knows no model and no request.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tutti.core.errors import InferError, OutOfMemory
from tutti.devices.arena import Arena
from tutti.devices.executions import Executions
from tutti.devices.granting import Granting
from tutti.devices.health import DeviceHealth
from tutti.devices.interface import Device, Event, Stream
from tutti.devices.jobs import Job
from tutti.devices.launching import Launching
from tutti.devices.loss import Loss
from tutti.devices.offers import Offers
from tutti.devices.pipeline import Batch, Execution, Pipeline, Turn
from tutti.devices.staging import Staging
from tutti.devices.timing import Timing

OWNED_BYTES = 256 << 20
HANG_NS = 60_000_000_000
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
        # The time of each model, by name, whichever pipelines it has had.
        self.model_ns: dict[str, int] = {}
        self._health = health
        self._hang_ns = hang_ns
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)
        self._loss = loss = Loss(device.name)
        self._staging = Staging(device, owned_bytes)
        self._timing = Timing(device, self._staging)
        self._executions = Executions(lambda batch: batch.copied is None or device.is_reached(batch.copied))
        # Batches whose outputs are being copied.
        self._leaving: set[Batch] = set()
        self._launching = Launching(device, self._staging, self._meant)
        self._offers = Offers(device, self._lock, loss, self._executions, self._timing)
        self._granting = Granting(
            device, self._lock, loss, self._executions, self._leaving, self._timing, self._offers, self
        )
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
            self._offers.pipelines.append(pipeline)
            self._executions.add(pipeline)
        return pipeline

    def pipelines(self) -> list[Pipeline]:
        """The pipelines of now. Takes no lock, which a device that hangs may hold: to copy a list is one step."""
        return list(self._offers.pipelines)

    def submit(self, pipeline: Pipeline, job: Job, is_again: bool = False) -> None:
        """As Pipeline.submit."""
        with self._lock:
            lost = self._loss.reason
            if not is_again:
                pipeline.is_told = False
            if not lost:
                pipeline.open += 1
                batch = Batch(pipeline, job, self.device.now_ns())
                batch.is_paced = pipeline.is_paced
                pipeline.submitted.append(batch)
        if lost:
            job.fail(self._loss.error(pipeline))
            self.device.alarm(0, lambda: self._offers.offer(pipeline))  # what waits is to be answered, too
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
            if pipeline in self._offers.pipelines:
                self._offers.pipelines.remove(pipeline)
                self._executions.remove(pipeline)
        if not self._loss.reason:  # what a lost device holds goes with its process
            is_last = not self._offers.pipelines
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
            if not self._loss.reason:
                pipeline.turns.append(turn)
                self._executions.ask(pipeline)
        self._granting.grant()
        while not self._loss.reason and not turn.granted.wait(timeout=1):
            pass  # a device that is lost grants nothing
        if self._loss.reason:
            raise self._loss.error(pipeline)
        with self._lock:
            turn.began_ns = self.device.now_ns()
            self._timing.accounting.begin(turn, turn.began_ns)
        return turn

    def end_turn(self, turn: Turn) -> None:
        """What was granted is over. Once for each turn, from any thread."""
        with self._lock:
            now = self.device.now_ns()
            device_ns = self._timing.accounting.end(turn, now)
            if turn in self._executions.granted:
                turn.pipeline.execution.record(1, max(1, now - turn.began_ns))
                self._charge(turn, device_ns)
        self._granting.grant()

    def alone(self, work: Callable[[], None]) -> None:
        """Have `work` run in the submitting thread while nothing else is under way on the device. Does not wait.

        It runs, too, when the device is lost, and then meets what every call meets.
        """
        self._granting.exclusive.add(work)
        self._granting.grant()

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
            self.lose(reason)
        return reason

    @property
    def busy_ns(self) -> int:
        """How long something has executed on the device, as far as it has ended."""
        return self._timing.accounting.busy_ns

    @property
    def arena(self) -> Arena:
        """The device's pinned memory."""
        return self._staging.arena

    @property
    def lost(self) -> str:
        """Why the device answers no more; "" while it does."""
        return self._loss.reason

    # The way of a batch, in the submitting thread.

    def _stage_next(self, pipeline: Pipeline) -> None:
        with self._lock:
            if self._loss.reason or not pipeline.submitted:
                return
            batch = pipeline.submitted[0]
        try:
            self._staging.stage(batch)
        except Exception as error:
            self._drop(batch, self._meant(error, pipeline))
            return
        with self._lock:
            if self._loss.reason:
                return
            pipeline.submitted.popleft()
            self._timing.staged(batch)
            pipeline.staged.append(batch)
            self._executions.ask(pipeline)
        if not self._granting.grant_turns():
            self._offers.offer_all()  # else those that are launched do, later: somebody waits for them

    def launch(self, batch: Batch) -> None:
        """Submit a batch whose turn it is. In the submitting thread."""
        if self._loss.reason:
            return
        pipeline, device = batch.pipeline, self.device
        assert pipeline.stream is not None
        try:
            is_lone = self._is_lone(batch)
            batch.is_urgent = pipeline.is_urgent or is_lone
            batch.begins, batch.ends = self._staging.event(), self._staging.event(batch.is_urgent)
            batch.error = self._launching.forward(batch)
            # What was submitted before it failed uses the batch's memory until this is reached.
            device.record(batch.ends, pipeline.stream)
            left = self._copied_out(batch) if batch.error is None else None
            if not is_lone or left is None:
                if left is not None:
                    device.notify(left, pipeline.out_stream, lambda error: self._left(batch, left, error))
                device.notify(batch.ends, pipeline.stream, lambda error: self._executed(batch, error))
        except Exception as error:
            self.lose_by(error)
            return
        try:
            self._offers.offer_all()
        finally:  # what a caller's sink raises must not cost the batch its notice
            if is_lone and left is not None:
                device.linger(left, pipeline.out_stream, _LINGER_NS, lambda error: self._done(batch, left, error))

    def _copied_out(self, batch: Batch) -> Event | None:
        """What is reached when the outputs that leave have left; None where none do, or all have failed meanwhile."""
        left = self._launching.copy_out(batch)
        if left is None:
            return None
        with self._lock:
            if self._loss.reason:
                return None
            self._leaving.add(batch)
        return left

    def _is_lone(self, batch: Batch) -> bool:
        """Whether it is quick and all there is: waking a thread for its end would add to what its caller waits."""
        return 0 < batch.expected_ns <= _QUICK_NS and sum([pipeline.open for pipeline in self._offers.pipelines]) == 1

    # What the device gives notice of, in threads of its streams.

    def _executed(self, batch: Batch, error: Exception | None) -> None:
        try:
            if error is not None:
                raise error
            with self._lock:
                if self._loss.reason:
                    return
                self._charge(batch, self._timing.executed(batch))
                is_over = batch not in self._leaving
        except Exception as failure:
            self.lose_by(failure)
            return
        if is_over:
            self._end(batch)
        self._granting.grant()

    def _left(self, batch: Batch, left: Event, error: Exception | None) -> None:
        if error is not None:
            self.lose_by(error)
            return
        with self._lock:
            if self._loss.reason:
                return
            self._staging.recycle(left, is_urgent=batch.is_urgent)
            self._leaving.discard(batch)
            is_over = batch not in self._executions.granted  # its execution's notice comes from another thread
        if is_over:
            self._end(batch)
        self._granting.grant()

    def _done(self, batch: Batch, left: Event, error: Exception | None) -> None:
        """A batch that is by itself has executed, and its outputs have left: its caller comes first."""
        try:
            if error is not None:
                raise error
            with self._lock:
                if self._loss.reason:
                    return
                self._charge(batch, self._timing.executed(batch))
                self._staging.recycle(left, is_urgent=batch.is_urgent)
                self._leaving.discard(batch)
        except Exception as failure:
            self.lose_by(failure)
            return
        self._end(batch)
        self._granting.grant()

    def _charge(self, execution: Execution, device_ns: int) -> None:
        pipeline = execution.pipeline
        pipeline.device_ns += device_ns
        self.model_ns[pipeline.name] = self.model_ns.get(pipeline.name, 0) + device_ns
        self._executions.ended(execution, device_ns, self.device.now_ns())

    # Endings.

    def _end(self, batch: Batch) -> None:
        """It has executed, and its outputs have left, which may be its inputs' memory."""
        self._staging.give_back(batch)
        try:
            self._launching.finish(batch)
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
            if self._loss.reason:
                return  # failed with all others
            batch.pipeline.submitted.remove(batch)
        self._staging.give_back(batch)
        batch.drop_tensors()
        batch.job.fail(error)
        self._forget(batch)
        self._granting.grant()

    def _meant(self, error: Exception, pipeline: Pipeline) -> Exception:
        """What an error means for a batch. Where the device is lost with it, that is told to all."""
        if isinstance(error, InferError):
            return error
        if self.device.is_memory_error(error):
            return OutOfMemory(f"no memory left on {self.device.name}: {error}")
        if self.report(error):
            return self._loss.error(pipeline)
        return error.with_traceback(None)  # which would keep the batch's tensors

    def lose_by(self, error: Exception) -> None:
        """The device is lost with an error of a call that fails on no device that works."""
        if not self._loss.reason:
            self.lose(self.device.fault(error) or f"{type(error).__name__}: {error}")

    def _failed(self, device: str, reason: str) -> None:
        if device == self.device.name:
            self.lose(reason)

    def lose(self, reason: str) -> None:
        """The device answers no more: say so first, then fail all that is under way."""
        with self._lock:
            if self._loss.reason:
                return
            self._loss.reason = reason
            granted = self._executions.clear()
            turns = [execution for execution in granted if isinstance(execution, Turn)]
            batches = [execution for execution in granted if isinstance(execution, Batch)]
            batches += [batch for batch in self._leaving if batch not in granted]
            for pipeline in self._offers.pipelines:
                batches += [*pipeline.submitted, *pipeline.staged]
                turns += pipeline.turns
                for waiting in (pipeline.submitted, pipeline.staged, pipeline.turns):
                    waiting.clear()  # type: ignore[attr-defined]
            self._leaving.clear()
            self._granting.exclusive.start()
        self._health.fail(self.device.name, reason)
        for turn in turns:
            turn.granted.set()
        for batch in batches:
            batch.drop_tensors()
            batch.job.fail(self._loss.error(batch.pipeline))
            self._forget(batch)
        self._offers.offer_all()

    def _reclaim(self) -> None:
        try:
            self.device.release_cached()
        except Exception as error:
            self.report(error)
