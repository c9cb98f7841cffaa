"""A device in virtual time: the costs of copies, launches, kernels and memory are given, and so are its faults.

Its memory is ordinary memory, and data moves when the simulated copy ends, not when it is submitted: whoever uses a
block too early, or too late, sees wrong bytes. Freed blocks are overwritten. Everything runs in the thread that calls
`Timeline.run`, in the order of virtual time; the submitting thread is simulated too, with time of its own.

On a LiveTimeline it is a device for programs that compute on the processor as soon as they are launched: data moves
when it is submitted then, and only the times are simulated. `TUTTI_SIMULATED_GPUS=N` gives the process N of them in
the place of GPUs, for tests, and to try a repository that needs some.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tutti.core.dtypes import NUMPY, Array
from tutti.devices.interface import Notice
from tutti.devices.simulated_parts import DeviceBlock, Event, HostBlock, Operation, Stream, Unit
from tutti.devices.simulated_timeline import LiveTimeline, Timeline
from tutti.devices.threads import run_and_wait

_FREED = 0xEE
SIMULATED = "TUTTI_SIMULATED_GPUS"


def simulated_gpus() -> int:
    """How many GPUs this process simulates."""
    text = os.environ.get(SIMULATED, "0")
    return int(text) if text.isdecimal() else 0


class SimulatedMemoryError(Exception):
    """The simulated device has no memory left."""


class SimulatedFault(Exception):
    """The simulated device has failed for good."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What things take; nanoseconds, and nanoseconds a byte. `wake_ns` is until a thread sees that an event is reached,
    for which it sleeps.

    Copies in share one engine, copies out another, and executions one more, which takes streams in turn of their
    arrival: full batches do not overlap on a device. `forward_ns` is what each launch executes, beside its kernels.
    """

    submit_ns: int = 0
    forward_ns: int = 0
    copy_ns: int = 0
    copy_in_ns_per_byte: float = 0.0
    copy_out_ns_per_byte: float = 0.0
    wake_ns: int = 0


FaultKind = Literal["memory", "launch", "copy", "sticky", "hang"]


class SimulatedDevice:
    """A Device (interface.py) on a timeline, with `memory_bytes` of memory."""

    def __init__(
        self, timeline: Timeline, costs: Costs, name: str = "simulated:0", memory_bytes: int = 1 << 40
    ) -> None:
        self.name = name
        self.timeline = timeline
        self._is_live = isinstance(timeline, LiveTimeline)
        self.costs = costs
        self.memory_bytes = memory_bytes
        self.used_bytes = 0
        self.host_bytes = 0
        self.execution = Unit()
        self._copies_in = Unit()
        self._copies_out = Unit()
        self._host_free_ns = 0
        self._posted: deque[Callable[[], None]] = deque()
        self._is_posted = False
        self._is_at_work = False
        self._fault = ""
        self._notices: list[tuple[Event, Notice]] = []
        # Faults to come, by how many kernels, or allocations, are still to go before them.
        self._planned: dict[FaultKind, int] = {}

    # The host.

    def now_ns(self) -> int:
        """Within posted work, what that has spent is over."""
        return max(self.timeline.now_ns, self._host_free_ns) if self._is_at_work else self.timeline.now_ns

    def post(self, work: Callable[[], None]) -> None:
        # From any thread: what was posted is looked at in the timeline's.
        self._posted.append(work)
        if self._is_live:
            self.timeline.schedule(0, self._run_next)
        else:
            self._run_next()

    def call(self, work: Callable[[], None]) -> None:
        """In virtual time, all that is due is done meanwhile."""
        if isinstance(self.timeline, LiveTimeline):
            run_and_wait(self.post, work)
        else:
            self.post(work)
            self.timeline.run()

    def alarm(self, delay_ns: int, work: Callable[[], None]) -> None:
        self.timeline.after(delay_ns, work)

    def spend(self, ns: float) -> None:
        """The submitting thread is at work for so long."""
        self._host_free_ns = max(self._host_free_ns, self.timeline.now_ns) + int(ns)

    def close(self) -> None:
        """End a live timeline."""
        if isinstance(self.timeline, LiveTimeline):
            self.timeline.end()

    def _run_next(self) -> None:
        if self._posted and not self._is_posted:
            self._is_posted = True
            self.timeline.schedule(self._host_free_ns, self._run_posted)

    def _run_posted(self) -> None:
        # What the work submits reaches the device when the work's own time is over.
        self._is_posted = False
        self._is_at_work = True
        try:
            self._posted.popleft()()
        finally:
            self._is_at_work = False
            self._run_next()

    # Memory.

    def host_block(self, size: int) -> HostBlock:
        self.host_bytes += size
        return HostBlock(size)

    def free_host(self, block: Any) -> None:
        self.host_bytes -= block.array.nbytes
        block.array[:] = _FREED

    def device_block(self, size: int) -> DeviceBlock:
        self._check()
        if self._is_due("memory") or self.used_bytes + size > self.memory_bytes:
            raise SimulatedMemoryError(f"{size} bytes were asked for, {self.memory_bytes - self.used_bytes} are free")
        self.used_bytes += size
        return DeviceBlock(size)

    def free_device(self, block: Any) -> None:
        self.used_bytes -= block.size
        block.memory[:] = _FREED

    def view(self, block: Any, offset: int, datatype: str, shape: Sequence[int]) -> Array:
        size = math.prod(shape) * NUMPY[datatype].itemsize
        array: Array = block.memory[offset : offset + size].view(NUMPY[datatype]).reshape(shape)
        return array

    def apart(self, array: Array, block: Any, stream: Any) -> Array:
        if not np.may_share_memory(array, block.memory):
            return array
        copy = np.empty_like(array)
        self._submit(stream, self._timed(self.execution, 0, lambda: np.copyto(copy, array)))
        return copy

    def nbytes(self, array: Any) -> int:
        return int(array.nbytes)

    # Streams.

    def stream(self, priority: int = 0) -> Stream:
        return Stream()

    def event(self, is_urgent: bool = False) -> Event:
        return Event(0 if is_urgent else self.costs.wake_ns)

    def record(self, event: Any, stream: Any) -> None:
        self._check()
        event.record()
        number = event.number

        def reach(ended: Callable[[], None]) -> None:
            event.reach(self.timeline.now_ns, number)
            ended()

        self._submit(stream, reach)

    def wait(self, stream: Any, event: Any) -> None:
        number = event.number

        def hold(ended: Callable[[], None]) -> None:
            if event.number != number or event.reached_ns is not None:
                ended()
            else:
                event.waiting.append(ended)

        self._submit(stream, hold)

    def copy_in(self, source: Any, target: Any, size: int, stream: Any) -> None:
        def move() -> None:
            target.memory[:size] = source.array[:size]

        takes_ns = self.costs.copy_ns + int(size * self.costs.copy_in_ns_per_byte)
        self._submit(stream, self._timed(self._copies_in, takes_ns, move))

    def copy_out(self, source: Any, target: Any, offset: int, stream: Any) -> None:
        def move() -> None:
            flat = np.ascontiguousarray(source).reshape(-1).view(np.uint8)
            target.array[offset : offset + flat.nbytes] = flat

        if self._is_due("copy"):
            raise TypeError("a copy refuses its arguments")
        takes_ns = self.costs.copy_ns + int(source.nbytes * self.costs.copy_out_ns_per_byte)
        self._submit(stream, self._timed(self._copies_out, takes_ns, move))

    def kernel(self, stream: Any, takes_ns: int, compute: Callable[[], None]) -> None:
        """Execute for so long; `compute` reads and writes memory when the execution ends."""
        self._check()
        if self._is_due("launch"):
            raise RuntimeError("a kernel refuses its arguments")
        if self._is_due("sticky"):
            self._submit(stream, self._timed(self.execution, takes_ns, lambda: self.fail("device-side assert")))
        elif self._is_due("hang"):
            self.execution.free_ns = 1 << 62
            self._submit(stream, lambda ended: None)
        else:
            self._submit(stream, self._timed(self.execution, takes_ns, compute))

    def is_reached(self, event: Any) -> bool:
        self._check()
        return event.reached_ns is not None

    def elapsed_ns(self, start: Any, end: Any) -> int:
        self._check()
        return int(end.reached_ns - start.reached_ns)

    def notify(self, event: Any, stream: Any, notice: Notice) -> None:
        entry = (event, notice)
        self._notices.append(entry)

        def reached() -> None:
            if entry in self._notices:
                self._notices.remove(entry)
                self.timeline.after(event.wake_ns, lambda: notice(None))

        if event.reached_ns is not None:
            reached()
        else:
            event.waiting.append(reached)

    def linger(self, event: Any, stream: Any, most_ns: int, notice: Notice) -> None:
        self.notify(event, stream, notice)

    def forward(self, launch: Callable[[], Any], stream: Any) -> Any:
        self.spend(self.costs.submit_ns)
        outputs = launch()
        if self.costs.forward_ns:
            self.kernel(stream, self.costs.forward_ns, _nothing)
        return outputs

    def read(self, array: Any) -> Array:
        return np.array(array)

    def synchronize(self) -> None:
        """In virtual time nothing may wait: the engine asks for this only when nothing is under way."""
        self._check()

    # Faults.

    def plan(self, kind: FaultKind, after: int = 0) -> None:
        """Fail in this way after so many more kernels, or allocations of device memory."""
        self._planned[kind] = after

    def fail(self, reason: str) -> None:
        """Fail for good, now: every wait for an event ends with an error."""
        self._fault = self._fault or reason
        notices, self._notices = self._notices, []
        for _, notice in notices:
            self.timeline.after(self.costs.wake_ns, lambda notice=notice: notice(SimulatedFault(reason)))  # type: ignore[misc]

    def is_memory_error(self, error: BaseException) -> bool:
        return isinstance(error, SimulatedMemoryError)

    def fault(self, error: BaseException) -> str:
        if self._is_live and (isinstance(error, IndexError) or "index out of range" in str(error)):
            # What a processor notices, as an id that an embedding lacks, is an assertion's failure on a device.
            self.fail("device-side assert triggered: index out of range")
        return self._fault

    def release_cached(self) -> None:
        """Nothing is kept back."""

    def _is_due(self, kind: FaultKind) -> bool:
        left = self._planned.get(kind)
        if left is None:
            return False
        self._planned[kind] = left - 1
        if left:
            return False
        del self._planned[kind]
        return True

    def _check(self) -> None:
        if self._fault:
            raise SimulatedFault(self._fault)

    def _submit(self, stream: Any, operation: Operation) -> None:
        """Put an operation on a stream once the submitting thread's time is there."""
        self._check()
        if self._is_live or self._host_free_ns <= self.timeline.now_ns:
            stream.add(operation)
        else:
            self.timeline.schedule(self._host_free_ns, lambda: stream.add(operation))

    def _timed(self, unit: Unit, takes_ns: int, move: Callable[[], None]) -> Operation:
        if self._is_live:
            move()
            move = _nothing

        def begin(ended: Callable[[], None]) -> None:
            def end() -> None:
                if not self._fault:
                    move()
                if not self._fault:
                    ended()

            self.timeline.schedule(unit.take(self.timeline.now_ns, takes_ns), end)

        return begin


def _nothing() -> None:
    """What has been done already."""
