"""A machine's device memory in host memory, and processes that share it by handles, as CUDA has it.

Whatever CUDA leaves undefined, or kills the process for, fails the test here: access outside of an allocation, access
to one that is not open, closing twice, memory that is freed while another process has it open.
"""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tutti.core.errors import InvalidArgument
from tutti.core.types import Raw
from tutti.devices.ipc import HANDLE_BYTES, ForeignMemory

GUARD = b"\xa5" * 4096


@dataclass(eq=False)
class Allocation:
    """Memory of a process on a device, between guards."""

    owner: "Process"
    device: int
    size: int
    handle: bytes
    memory: bytearray = field(init=False)
    is_freed: bool = False
    openings: Counter["Process"] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.memory = bytearray(GUARD + bytes(self.size) + GUARD)

    def get(self, offset: int = 0, size: int | None = None) -> bytes:
        size = self.size - offset if size is None else size
        assert 0 <= offset <= offset + size <= self.size, f"access to {offset}, {size} of {self.size}"
        assert not self.is_freed
        start = len(GUARD) + offset
        return bytes(self.memory[start : start + size])

    def set(self, data: Raw, offset: int = 0) -> None:
        self.get(offset, len(data))
        start = len(GUARD) + offset
        self.memory[start : start + len(data)] = data

    def is_intact(self) -> bool:
        """Whether nothing outside of it was written."""
        ends = self.memory[: len(GUARD)], self.memory[-len(GUARD) :]
        return ends == (GUARD, GUARD) and len(self.memory) == self.size + 2 * len(GUARD)

    def free(self) -> None:
        assert not +self.openings, "another process has it open"
        self.is_freed = True


class Machine:
    def __init__(self, devices: int = 2) -> None:
        self.devices = devices
        self.lock = threading.Lock()
        self.allocations: dict[bytes, Allocation] = {}

    def process(self) -> "Process":
        return Process(self)


class Process:
    """One process of a machine: allocates and exports as a client does, and is the Ipc of a server."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        # Called in the midst of each copy and each opening, for tests of what happens meanwhile.
        self.before_copy: Callable[[], None] = lambda: None
        self.before_open: Callable[[], None] = lambda: None
        self.reads: list[tuple[int, int]] = []

    def allocate(self, size: int, device: int = 0) -> Allocation:
        with self._machine.lock:
            number = len(self._machine.allocations) + 1
            handle = number.to_bytes(4, "little").ljust(HANDLE_BYTES, b"\x7f")
            made = self._machine.allocations[handle] = Allocation(self, device, size, handle)
            return made

    def open(self, handle: bytes, device: int) -> ForeignMemory:
        assert len(handle) == HANDLE_BYTES
        self.before_open()
        with self._machine.lock:
            if not 0 <= device < self._machine.devices:
                raise InvalidArgument(f"device_id {device}: expected 0 to {self._machine.devices - 1}")
            found = self._machine.allocations.get(handle)
            if found is None or found.is_freed or found.owner is self:
                raise InvalidArgument(f"the handle cannot be opened on cuda:{device}")
            found.openings[self] += 1
            return ForeignMemory(device, int.from_bytes(handle[:4], "little") << 32, found.size)

    def read(self, memory: ForeignMemory, offset: int, size: int) -> bytearray:
        self.before_copy()
        self.reads.append((offset, size))
        return bytearray(self._opened(memory).get(offset, size))

    def write(self, memory: ForeignMemory, offset: int, data: Raw) -> None:
        self.before_copy()
        self._opened(memory).set(data, offset)

    def close(self, memory: ForeignMemory) -> None:
        with self._machine.lock:
            self._opened(memory).openings[self] -= 1

    def _opened(self, memory: ForeignMemory) -> Allocation:
        handle = (memory.address >> 32).to_bytes(4, "little").ljust(HANDLE_BYTES, b"\x7f")
        found = self._machine.allocations[handle]
        assert found.openings[self] > 0, "not open"
        return found
