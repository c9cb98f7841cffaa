"""What a device's engine executes, as its users see it: jobs, their inputs and their outputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tutti.core.dtypes import Array
from tutti.core.types import Shape
from tutti.devices.interface import DeviceArray, Event, Stream

_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Resident:
    """A tensor on the device, complete once `ready` is reached there; None: it is complete."""

    array: DeviceArray
    ready: Event | None = None


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
    """One output of a batch: its bytes in pinned memory, [nbytes] UINT8; None where it stays on the device."""

    array: DeviceArray
    host: Array | None


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


def aligned(size: int) -> int:
    """The least multiple of what tensors are aligned to that is not below `size`."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def offsets(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where stretches of these sizes begin, one after the other and aligned, and where the last one ends."""
    begins = []
    end = 0
    for size in sizes:
        begins.append(end)
        end = aligned(end + size)
    return begins, end
