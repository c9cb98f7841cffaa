"""What the stages of batches take: their pipelines learn it, and it is counted for the device.

A batch is charged with the time that it alone had: it may have begun, as far as its stream is concerned, while the
device still executed what another had launched. With the engine's lock held.
"""

from tutti.devices.accounting import Accounting
from tutti.devices.interface import Device, Event
from tutti.devices.pipeline import Batch
from tutti.devices.staging import Staging


class Timing:
    """Of one device."""

    def __init__(self, device: Device, staging: Staging) -> None:
        self.accounting = Accounting()
        # When all inputs that are staged are expected to be on the device.
        self.copies_end_ns = 0
        self._device = device
        self._staging = staging
        self._last_end: tuple[Event, bool] | None = None

    def staged(self, batch: Batch) -> None:
        """Its inputs are written, and being copied; it is told what its execution is expected to take."""
        pipeline, rows = batch.pipeline, batch.job.rows
        now = self._device.now_ns()
        pipeline.host.record(rows, max(1, now - batch.submitted_ns))
        copy_ns = pipeline.copy.mean_ns(rows) if batch.copied is not None else 0
        self.copies_end_ns = max(self.copies_end_ns, now) + copy_ns
        batch.expected_ns = pipeline.execution.mean_ns(rows)
        pipeline.last_rows = rows

    def executed(self, batch: Batch) -> int:
        """Learn from a batch that has executed, and use its events again; returns the time that it alone had."""
        pipeline, device = batch.pipeline, self._device
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
        self.accounting.executed(alone_ns, batch.executed_ns)
        self._staging.recycle(batch.copy_begins, batch.copied, batch.begins)
        batch.copy_begins = batch.copied = batch.begins = None
        return alone_ns
