"""When a pipeline is told that it takes another batch: as late as staging allows, so that the batch is a large one."""

from contextlib import AbstractContextManager

from tutti.devices import pacing
from tutti.devices.executions import LEAD_NS, Executions
from tutti.devices.interface import Device
from tutti.devices.loss import Loss
from tutti.devices.pipeline import Pipeline
from tutti.devices.timing import Timing

# Batches of one pipeline between staging and answer.
DEPTH = 4


class Offers:
    """Of one device. `lock` is the engine's."""

    def __init__(
        self,
        device: Device,
        lock: AbstractContextManager[object],
        loss: Loss,
        executions: Executions,
        timing: Timing,
    ) -> None:
        self.pipelines: list[Pipeline] = []
        self._device = device
        self._lock = lock
        self._loss = loss
        self._executions = executions
        self._timing = timing

    def offer_all(self) -> None:
        for pipeline in list(self.pipelines):
            self.offer(pipeline)

    def offer(self, pipeline: Pipeline, is_paced: bool = False) -> None:
        """Let the pipeline take another batch, if it is time. `is_paced` when it has been waited for that."""
        is_full = pipeline.is_full()  # asks others, who may ask the engine
        with self._lock:
            if not self._takes_another(pipeline):
                return
            now = self._device.now_ns()
            cut_ns = now if is_full else self._cut_ns(pipeline, now)
            if cut_ns > now:
                if not pipeline.alarm_ns or cut_ns < pipeline.alarm_ns:
                    pipeline.alarm_ns = cut_ns
                    self._device.alarm(cut_ns - now, lambda: self._alarmed(pipeline))
                return
            pipeline.is_told = True
            pipeline.is_paced = is_paced or pipeline.alarm_ns > 0  # an alarm that is too late, too
        pipeline.is_free()
        pipeline.is_paced = False

    def _alarmed(self, pipeline: Pipeline) -> None:
        with self._lock:
            pipeline.alarm_ns = 0
        self.offer(pipeline, is_paced=True)

    def _takes_another(self, pipeline: Pipeline) -> bool:
        if pipeline.is_told or pipeline not in self.pipelines:
            return False
        return bool(self._loss.reason) or (not pipeline.submitted and not pipeline.staged and pipeline.open < DEPTH)

    def _cut_ns(self, pipeline: Pipeline, now_ns: int) -> int:
        stages = pipeline.stages()
        if self._loss.reason or not self._executions.granted or not stages.execution_ns:
            return now_ns
        end_ns = self._executions.end_ns - (LEAD_NS if self._executions.are_shared(self.pipelines) else 0)
        return pacing.latest_cut_ns(stages, self._timing.copies_end_ns, end_ns) - pipeline.lateness.ns
