"""What is submitted to a device for a batch whose turn it is, its execution and the copies of its outputs; and its end.

The submitting thread waits for none of it. An error belongs to the batch; what was submitted before the error still
uses the memory of the batch.
"""

from collections.abc import Callable, Sequence

from tutti.devices.interface import Device, DeviceArray, Event, Stream
from tutti.devices.jobs import Made, Times, aligned, offsets
from tutti.devices.pipeline import Batch, Pipeline
from tutti.devices.staging import Staging


class Launching:
    """Of one device. `meant` says what an error means for a batch of a pipeline."""

    def __init__(self, device: Device, staging: Staging, meant: Callable[[Exception, Pipeline], Exception]) -> None:
        self._device = device
        self._staging = staging
        self._meant = meant

    def forward(self, batch: Batch) -> Exception | None:
        """Submit the execution; returns why it could not be."""
        stream, device = batch.pipeline.stream, self._device
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
        """The job's outputs. An output that stays is moved out of the inputs' memory, which the next batch gets."""
        outputs = batch.job.launch(batch.inputs, stream)
        there = batch.slot.there if batch.slot is not None else None
        if there is None:
            return outputs
        return [
            self._device.apart(output, there, stream) if batch.job.stays(index) else output
            for index, output in enumerate(outputs)
        ]

    def copy_out(self, batch: Batch) -> Event | None:
        """Have the outputs that leave copied into pinned memory; returns what is reached then, if any do."""
        device, pipeline = self._device, batch.pipeline
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
        return left

    def finish(self, batch: Batch) -> None:
        """Tell the job what has become of it. In the thread that was given notice."""
        if batch.error is not None:
            batch.drop_tensors()
            if batch.out_block is not None:
                self._staging.arena.give(batch.out_block)
            batch.job.fail(batch.error)
            return
        times = Times(batch.submitted_ns, batch.execution_start_ns, batch.executed_ns)
        batch.job.finish(self._outputs(batch), times)

    def _outputs(self, batch: Batch) -> list[Made]:
        """What a batch has made, each output on the device or in pinned memory; the batch holds it no longer."""
        arena = self._staging.arena
        on_device = batch.outputs
        batch.drop_tensors()
        whole = arena.owned(batch.out_block, batch.out_bytes) if batch.out_block is not None else None
        outputs: list[Made] = []
        begin = 0
        for index, output in enumerate(on_device):
            if batch.job.stays(index):
                outputs.append(Made(output, None))
                continue
            assert whole is not None
            size = self._device.nbytes(output)
            outputs.append(Made(output, whole[begin : begin + size]))
            begin = aligned(begin + size)
        return outputs
