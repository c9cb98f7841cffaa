"""The memory of batches' inputs on both sides, and the copies between: rows are written once, and copied once.

All inputs of a batch are one stretch of pinned memory and one copy. Memory and events are used again.
"""

import threading

from tutti.devices.arena import Arena
from tutti.devices.interface import Device, DeviceArray, Event, Stream
from tutti.devices.jobs import Part, offsets
from tutti.devices.pipeline import Batch, Pipeline, Slot

_SMALLEST_BLOCK = 4096


class Staging:
    """What one device's engine stages batches with.

    But for `event`, `recycle` and `give_back`, which any thread may call, methods are for the submitting thread.
    """

    def __init__(self, device: Device, owned_bytes: int) -> None:
        self.arena = Arena(device, owned_bytes)
        self._device = device
        self._stream: Stream | None = None
        self._unused: dict[int, list[tuple[Stream, Stream]]] = {}
        self._lock = threading.Lock()
        # By whether they are urgent: that is decided when one is made.
        self._events: dict[bool, list[Event]] = {False: [], True: []}

    def stage(self, batch: Batch) -> None:
        """Write the inputs into pinned memory, and have them copied to the device.

        Raises what the job raises for inputs that must not get there, and what the device raises.
        """
        device = self._device
        stream = self._stream = self._stream or device.stream()
        self.stream_of(batch.pipeline)
        parts = batch.job.stage()
        begins, size = offsets([part.nbytes for part in parts])
        slot = batch.slot = self._slot(batch.pipeline, size)
        batch.inputs = [self._input(batch, slot, part, begin) for part, begin in zip(parts, begins, strict=True)]
        if not size:
            return
        assert slot.host is not None and slot.there is not None
        batch.copy_begins, batch.copied = self.event(), self.event()
        device.record(batch.copy_begins, stream)
        device.copy_in(slot.host, slot.there, size, stream)
        device.record(batch.copied, stream)

    def stream_of(self, pipeline: Pipeline) -> Stream:
        """What the pipeline's batches execute on: made when it is first asked for, and with it that of its copies."""
        if pipeline.stream is None:
            # A removed pipeline's streams are used again: libraries keep workspaces for each, and a device threads.
            unused = self._unused.get(pipeline.priority)
            pair = unused.pop() if unused else (self._device.stream(pipeline.priority), self._device.stream())
            pipeline.stream, pipeline.out_stream = pair
        return pipeline.stream

    def give_back(self, batch: Batch) -> None:
        """Nothing uses the memory of the batch's inputs any more."""
        if batch.slot is not None:
            with self._lock:
                batch.pipeline.slots.append(batch.slot)
            batch.slot = None

    def event(self, is_urgent: bool = False) -> Event:
        """An event that nothing refers to."""
        with self._lock:
            if self._events[is_urgent]:
                return self._events[is_urgent].pop()
        return self._device.event(is_urgent)

    def recycle(self, *events: Event | None, is_urgent: bool = False) -> None:
        """Nothing refers to these events any more."""
        with self._lock:
            self._events[is_urgent] += [event for event in events if event is not None]

    def free(self, pipeline: Pipeline, is_last: bool) -> None:
        """Give the memory of a pipeline back; with the last one, all pinned memory that no answer holds."""
        for slot in pipeline.slots:
            if slot.host is not None:
                self.arena.give(slot.host)
            if slot.there is not None:
                self._device.free_device(slot.there)
        pipeline.slots.clear()
        if pipeline.stream is not None and pipeline.out_stream is not None:
            self._unused.setdefault(pipeline.priority, []).append((pipeline.stream, pipeline.out_stream))
            pipeline.stream = pipeline.out_stream = None
        if is_last:
            self.arena.close()

    def _input(self, batch: Batch, slot: Slot, part: Part, begin: int) -> DeviceArray:
        """One input as the execution will find it; what comes from the host is written to where it is copied from."""
        if part.resident is not None:
            if part.resident.ready is not None:
                batch.awaited.append(part.resident.ready)
            return part.resident.array
        assert slot.host is not None and slot.there is not None
        if part.write is not None and part.nbytes:
            part.write(slot.host.array[begin : begin + part.nbytes])
        return self._device.view(slot.there, begin, part.datatype, part.shape)

    def _slot(self, pipeline: Pipeline, size: int) -> Slot:
        """Memory for `size` bytes of inputs: what an earlier batch had, or, where that is too small, larger."""
        with self._lock:
            slot = pipeline.slots.pop() if pipeline.slots else Slot()
        try:
            self._grow(slot, size)
        except Exception:
            with self._lock:
                pipeline.slots.append(slot)
            raise
        return slot

    def _grow(self, slot: Slot, size: int) -> None:
        if slot.host is None or slot.host.array.nbytes < size:
            if slot.host is not None:
                self.arena.give(slot.host)
                slot.host = None
            slot.host = self.arena.take(size)
        if slot.there is None or slot.there.size < size:
            if slot.there is not None:
                self._device.free_device(slot.there)
                slot.there = None
            slot.there = self._device.device_block(1 << (max(size, _SMALLEST_BLOCK) - 1).bit_length())
