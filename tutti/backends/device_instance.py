"""An instance on a device: it takes a batch while the one before executes, when the device's engine says it is time.

Knows what the scheduler wants of an instance, and what to do with a batch that fails: out of memory in halves; without
those of its requests that are known to be at fault; else alone, request by request, so that only the culprit fails.
"""

import logging
import threading
from collections.abc import Iterable, Sequence
from typing import Protocol

from tutti.backends.on_device import DeviceWork
from tutti.core.errors import Cancelled, DeadlineExceeded, DeviceLost, InferError, InvalidArgument, OutOfMemory
from tutti.core.types import Call, InferRequest, now_ns, settle
from tutti.devices.engine import DeviceEngine
from tutti.devices.interface import DeviceArray, Stream
from tutti.devices.jobs import Made, Part, Times
from tutti.devices.pipeline import Pipeline
from tutti.observing.statistics import BatchTimes, ModelStatistics
from tutti.scheduling.cost import Costs
from tutti.scheduling.delivery import as_infer_error, deliver
from tutti.scheduling.interface import Answers
from tutti.scheduling.scheduler import Scheduler

_log = logging.getLogger(__name__)


class PipelinedBackend(Protocol):
    """A backend whose batches go through a device's engine."""

    engine: DeviceEngine
    pipeline: Pipeline

    def batch(self, requests: Sequence[InferRequest]) -> DeviceWork: ...

    def refusals(self, requests: Sequence[InferRequest]) -> Sequence[InferError | None]:
        """Why each request, looked at by itself, must not be executed; None where nothing is known against it."""

    def close(self) -> None: ...


class DeviceInstance:
    """An Instance (scheduler.py) over a pipeline."""

    def __init__(
        self,
        name: str,
        backend: PipelinedBackend,
        scheduler: Scheduler,
        statistics: ModelStatistics,
        costs: Costs | None = None,
    ) -> None:
        self.name = name
        self.rank = 0
        self.costs = costs or Costs()
        self.scheduler = scheduler
        self.statistics = statistics
        self._backend = backend
        self.device: str = getattr(backend, "device", "")
        self._lock = threading.Lock()
        self._inside = 0
        # It could take a batch, and waits for the clients of the one that executes.
        self._is_held = False
        self._ended_ns = 0
        # From an execution's end to its answers.
        self._leaving_ns = 0
        backend.pipeline.is_free = self._freed
        backend.pipeline.is_full = scheduler.has_full_batch

    def ahead_ns(self, at_ns: int) -> int:
        return self._backend.pipeline.ahead_ns(at_ns)

    def cut(self, calls: Iterable[Call], limit: int) -> int:
        """As batching.Cut."""
        captured = self._backend.pipeline.captured.get(next(iter(calls)).key)
        if captured is None:
            return limit
        return captured.cut((call.rows for call in calls), limit, self.ahead_ns(now_ns()) > 0)

    def start(self, batch: list[Call]) -> None:
        with self._lock:
            self._inside += sum([call.rows for call in batch])
        self._backend.pipeline.submit(self._job(batch))

    def close(self) -> None:
        self._backend.close()

    def _freed(self) -> None:
        """It may take its next batch now.

        Where the clients of what executes will ask again, and batches with them pay, it waits for those.
        """
        stages = self._backend.pipeline.stages()
        idle_ns = stages.host_ns + stages.copy_ns + self._leaving_ns
        with self._lock:
            inside = self._inside
            self._is_held = bool(inside) and self.scheduler.gathers(inside, idle_ns, self._backend.pipeline.execution)
            if self._is_held:
                return
        self.scheduler.release(self)

    def ended(self, rows: int, took_ns: int) -> None:
        """So many rows are answered now."""
        self.scheduler.answers(rows, took_ns)
        self.left(rows)

    def left(self, rows: int) -> None:
        """So many rows are inside no longer."""
        with self._lock:
            self._inside -= rows
            is_held = self._is_held and not self._inside
            if is_held:
                self._is_held = False
        if is_held:
            self.scheduler.when_back(lambda: self.scheduler.release(self))

    def learn(self, batch: Sequence[Call], rows: int, times: Times, ended_ns: int) -> None:
        """What a batch took since its beginning, or the end of the one before it."""
        began_ns = max(times.start_ns, self._ended_ns)
        self._ended_ns = ended_ns
        self._leaving_ns = ended_ns - times.execution_end_ns
        captured = self._backend.pipeline.captured.get(batch[0].key)
        if captured is not None:
            captured.record(rows, max(1, times.execution_end_ns - times.execution_start_ns))
        self.costs.record(batch[0].key, rows, max(1, ended_ns - began_ns))

    def submit_again(self, batch: Sequence[Call], is_last: bool = False) -> None:
        """Execute a part of a batch that failed."""
        self._backend.pipeline.submit(self._job(batch, is_last), is_again=True)

    def _job(self, batch: Sequence[Call], is_last: bool = False) -> "_Job":
        work: DeviceWork
        try:
            work = self._backend.batch([call.request for call in batch])
        except Exception as error:
            work = _Unmade(as_infer_error(self.name, error))
        return _Job(self, batch, work, is_last)

    def refusals(self, batch: Sequence[Call]) -> Sequence[InferError | None]:
        """As the backend's. What cannot be told is left to the requests' own executions."""
        try:
            return self._backend.refusals([call.request for call in batch])
        except Exception:
            _log.debug("instance %s: could not look for culprits", self.name, exc_info=True)
            return [None] * len(batch)

    def refuse(self, calls: Sequence[Call], errors: Sequence[InferError], took_ns: int) -> None:
        """Settle calls that were not executed."""
        self.ended(sum([call.rows for call in calls]), took_ns)
        self._settle(calls, errors)

    def drop(self, calls: Sequence[Call]) -> None:
        """Settle calls that nobody waits for, as a queue does; their clients are not expected back."""
        self.left(sum([call.rows for call in calls]))
        self._settle(calls, [_gone(call) for call in calls])

    def _settle(self, calls: Sequence[Call], errors: Sequence[InferError]) -> None:
        for call, error in zip(calls, errors, strict=True):
            call.answer = error
        self.statistics.record_failures(calls, now_ns())
        try:
            settle(calls)
        except Exception:  # a broken sink must not end the device's thread
            _log.exception("instance %s: could not deliver answers", self.name)

    def reclaim(self) -> None:
        self._backend.engine.reclaim()


class _Unmade:
    """In the place of a batch that could not be made: fails as one that could not be staged."""

    def __init__(self, error: InferError) -> None:
        self._error = error

    def parts(self) -> list[Part]:
        raise self._error

    def launch(self, arrays: Sequence[DeviceArray], stream: Stream) -> Sequence[DeviceArray]:
        raise self._error

    def stays(self, index: int) -> bool:
        return False

    def answers(self, outputs: Sequence[Made]) -> Answers:
        raise self._error

    def failure(self, error: Exception) -> InferError:
        return self._error


class _Job:
    """The engine's job for one batch of calls, or for a part of one. `is_last`: memory has been made for it."""

    def __init__(
        self, instance: DeviceInstance, batch: Sequence[Call], work: DeviceWork, is_last: bool = False
    ) -> None:
        self.rows = sum([call.rows for call in batch])
        self._instance = instance
        self._batch = batch
        self._work = work
        self._is_last = is_last
        self._is_in_vain = False
        self._start_ns = now_ns()

    def stage(self) -> Sequence[Part]:
        """Raises Cancelled where nobody waits any more: a batch may have waited for as long as an execution takes."""
        first = self._batch[0]
        self._is_in_vain = (first.is_cancelled or first.deadline_ns > 0) and self._nobody_waits()
        if self._is_in_vain:
            raise Cancelled("all who asked for it have gone")
        return self._work.parts()

    def _nobody_waits(self) -> bool:
        now = now_ns()
        return all(call.is_cancelled or 0 < call.deadline_ns <= now for call in self._batch)

    def launch(self, inputs: Sequence[DeviceArray], stream: Stream) -> Sequence[DeviceArray]:
        return self._work.launch(inputs, stream)

    def stays(self, index: int) -> bool:
        return self._work.stays(index)

    def finish(self, outputs: Sequence[Made], times: Times) -> None:
        try:
            answers = self._work.answers(outputs)
        except Exception as error:
            self._settle([self._work.failure(error)] * len(self._batch))
            return
        end_ns = now_ns()
        self._instance.learn(self._batch, self.rows, times, end_ns)
        self._instance.scheduler.executed(self._batch)
        batch_times = BatchTimes(times.start_ns, times.execution_start_ns, times.execution_end_ns, end_ns)
        self._instance.ended(self.rows, end_ns - times.start_ns)
        instance = self._instance
        deliver(instance.name, self._batch, answers, batch_times, instance.statistics, instance.device)

    def fail(self, error: Exception) -> None:
        batch = self._batch
        if self._is_in_vain and not isinstance(error, DeviceLost):
            self._instance.drop(batch)
        elif isinstance(error, DeviceLost):
            self._settle([error] * len(batch))
        elif isinstance(error, OutOfMemory):
            self._do_with_less(error)
        elif not (isinstance(error, InvalidArgument) and self._do_without_culprits()):
            self._do_alone(error)

    def _do_alone(self, error: Exception) -> None:
        if len(self._batch) == 1:
            self._settle([self._work.failure(error)])
            return
        for call in self._batch:
            self._instance.submit_again([call])

    def _do_without_culprits(self) -> bool:
        """Refuse the requests that are at fault, and execute the others as one batch; False where none is known."""
        judged = list(zip(self._batch, self._instance.refusals(self._batch), strict=True))
        left = [call for call, refusal in judged if refusal is None]
        refused = [(call, refusal) for call, refusal in judged if refusal is not None]
        if left and refused:
            self._instance.submit_again(left)
        if refused:
            calls, errors = zip(*refused, strict=True)
            self._instance.refuse(calls, errors, now_ns() - self._start_ns)
        return bool(refused)

    def _do_with_less(self, error: OutOfMemory) -> None:
        batch, instance = self._batch, self._instance
        if len(batch) > 1:
            instance.scheduler.ran_out_of_memory(self.rows)
            middle = len(batch) // 2
            instance.submit_again(batch[:middle])
            instance.submit_again(batch[middle:])
        elif not self._is_last:
            instance.reclaim()
            instance.submit_again(batch, is_last=True)
        else:
            self._settle([self._work.failure(error)])

    def _settle(self, answers: Answers) -> None:
        now = now_ns()
        self._instance.ended(self.rows, now - self._start_ns)
        times = BatchTimes(self._start_ns, self._start_ns, now, now)
        deliver(self._instance.name, self._batch, answers, times, self._instance.statistics, self._instance.device)


def _gone(call: Call) -> InferError:
    name = call.request.model_name
    if call.is_cancelled:
        return Cancelled(f"the request to model '{name}' was cancelled by its caller")
    return DeadlineExceeded(f"model '{name}': the request's deadline passed while it waited for the device")
