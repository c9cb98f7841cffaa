"""What the engine asks of a device: memory, streams, events, copies, and one thread that submits.

There are two devices: CUDA through PyTorch (`cuda.py`), and one in virtual time whose costs and faults are given
(`simulated.py`). The engine runs the same on both. Times are nanoseconds, sizes bytes.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tutti.core.dtypes import Array

DeviceArray = Any
"""A tensor in the device's memory, as its own library has it: of PyTorch, or of numpy on the simulated device."""

Notice = Callable[[Exception | None], None]
"""Called once, when what came before an event on its stream has been done, or with why it never will be."""


class HostBlock(Protocol):
    """Pinned host memory, which copies read and write without the processor."""

    array: Array
    """[size] UINT8, over the memory itself."""


class DeviceBlock(Protocol):
    """A stretch of device memory."""

    size: int


class Stream(Protocol):
    """Work in order: nothing on a stream begins before what came earlier on it has ended."""


class Event(Protocol):
    """A point on a stream, with the time at which the device reached it."""


class Device(Protocol):
    """One accelerator. Methods that do not say "from any thread" are called in its submitting thread only.

    Any method may raise what its library raises; `memory_error` and `fault` tell what that means.
    """

    name: str

    def now_ns(self) -> int:
        """The host's clock, as tutti.core.types.now_ns. From any thread."""

    def post(self, work: Callable[[], None]) -> None:
        """Run `work` in the submitting thread, after what was posted before. From any thread; does not wait."""

    def call(self, work: Callable[[], None]) -> None:
        """As `post`, and wait for the work; raises what it raises. From any thread but the submitting one."""

    def alarm(self, delay_ns: int, work: Callable[[], None]) -> None:
        """Run `work` after a delay, in a thread that never waits for the device. From any thread."""

    def close(self) -> None:
        """End the submitting thread, after what was posted. From any thread; no work may be under way."""

    def host_block(self, size: int) -> HostBlock:
        """Pinned memory of `size` bytes or more; any content."""

    def free_host(self, block: HostBlock) -> None:
        """Give pinned memory back. No copy may use it any more."""

    def device_block(self, size: int) -> DeviceBlock:
        """Device memory of `size` bytes or more; any content."""

    def free_device(self, block: DeviceBlock) -> None:
        """Give device memory back. No work may use it any more."""

    def view(self, block: DeviceBlock, offset: int, datatype: str, shape: Sequence[int]) -> DeviceArray:
        """The tensor of `shape` that begins at `offset`, a multiple of 256, of the block."""

    def apart(self, array: DeviceArray, block: DeviceBlock, stream: Stream) -> DeviceArray:
        """The array; where its memory is the block's, a copy, made in the stream's order."""

    def nbytes(self, array: DeviceArray) -> int:
        """What the array's elements take, row-major without gaps."""

    def stream(self, priority: int = 0) -> Stream:
        """A new stream. Kernels of one with a lower `priority` number go first where several wait (CUDA's order)."""

    def event(self, is_urgent: bool = False) -> Event:
        """A new event, not recorded. May be recorded again and again.

        Whoever has to be told that one `is_urgent` has been reached spends a core on waiting, to know it sooner.
        """

    def record(self, event: Event, stream: Stream) -> None:
        """Put the event behind what is on the stream."""

    def wait(self, stream: Stream, event: Event) -> None:
        """Hold what comes next on the stream until the event is reached. The host does not wait."""

    def copy_in(self, source: HostBlock, target: DeviceBlock, size: int, stream: Stream) -> None:
        """Copy the first `size` bytes, in the stream's order."""

    def copy_out(self, source: DeviceArray, target: HostBlock, offset: int, stream: Stream) -> None:
        """Copy the elements, row-major, to `offset` of pinned memory, in the stream's order."""

    def is_reached(self, event: Event) -> bool:
        """Whether a recorded event has been reached. From any thread."""

    def elapsed_ns(self, start: Event, end: Event) -> int:
        """Device time from one reached event to another; negative where `end` was reached first. From any thread."""

    def notify(self, event: Event, stream: Stream, notice: Notice) -> None:
        """Have `notice` called when `event`, the last on `stream`, is reached. From a thread of the stream's own.

        Notices of one stream come in order. None waits for another stream.
        """

    def linger(self, event: Event, stream: Stream, most_ns: int, notice: Notice) -> None:
        """As `notify`, where nothing else is under way: the submitting thread itself waits for the event.

        That saves a thread's waking. Another one waits for it where something is posted meanwhile, or after `most_ns`.
        """

    def forward(self, launch: Callable[[], Any], stream: Stream) -> Any:
        """What `launch` returns, called so that the work it submits goes to the stream."""

    def read(self, array: DeviceArray) -> Array:
        """A copy in host memory of an array that is complete, in numpy's form. Waits. From any thread."""

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""

    def is_memory_error(self, error: BaseException) -> bool:
        """Whether the error means that memory was too small, and nothing worse. From any thread."""

    def fault(self, error: BaseException) -> str:
        """Why the device answers no more; "" where it does. From any thread.

        The device is asked where the error does not tell.
        """

    def release_cached(self) -> None:
        """Give memory that a caching allocator keeps back to the device. Waits for the device; for emergencies."""
