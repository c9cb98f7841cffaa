"""One user of a device, its batches on their way, and what their stages have taken."""

import threading
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Protocol

from tutti.devices import pacing
from tutti.devices.interface import DeviceArray, DeviceBlock, Event, HostBlock, Stream
from tutti.devices.jobs import Job
from tutti.scheduling.captured_sizes import CapturedSizes
from tutti.scheduling.cost import LatencyModel


class Owner(Protocol):
    """The engine, as its pipelines see it."""

    def submit(self, pipeline: "Pipeline", job: Job, is_again: bool) -> None: ...
    def ahead_ns(self, now_ns: int) -> int: ...
    def remove(self, pipeline: "Pipeline") -> None: ...


class Slot:
    """The memory of one batch's inputs, on both sides."""

    def __init__(self) -> None:
        self.host: HostBlock | None = None
        self.there: DeviceBlock | None = None


class Execution:
    """What waits for its turn to execute, or executes. `turn_ns`: since when nothing else is before it."""

    def __init__(self, pipeline: "Pipeline", expected_ns: int = 0) -> None:
        self.pipeline = pipeline
        self.expected_ns = expected_ns
        self.turn_ns = 0


class Turn(Execution):
    """The execution of a library that submits by itself, in its own thread, and waits for the end there."""

    def __init__(self, pipeline: "Pipeline") -> None:
        super().__init__(pipeline, pipeline.execution.mean_ns(1))
        self.granted = threading.Event()
        self.began_ns = 0


class Batch(Execution):
    """A job between its submission and its end, and the events that tell how far it is."""

    def __init__(self, pipeline: "Pipeline", job: Job, now_ns: int) -> None:
        super().__init__(pipeline)
        self.job = job
        self.submitted_ns = now_ns
        self.slot: Slot | None = None
        self.inputs: list[DeviceArray] = []
        self.awaited: list[Event] = []
        self.copy_begins: Event | None = None
        self.copied: Event | None = None
        self.begins: Event | None = None
        self.ends: Event | None = None
        self.outputs: Sequence[DeviceArray] = ()
        self.out_block: HostBlock | None = None
        self.out_bytes = 0
        # Cut as late as the pipeline's stages allow, no earlier.
        self.is_paced = False
        # Threads spend cores on waiting for it.
        self.is_urgent = False
        self.execution_start_ns = 0
        self.executed_ns = 0
        self.error: Exception | None = None

    def drop_tensors(self) -> None:
        """Their memory may be needed at once."""
        self.outputs, self.inputs, self.awaited = (), [], []


class Pipeline:
    """One user of the device, as an instance of a model: its batches execute in order, on a stream of its own.

    `is_free` is called when it takes another batch, from any thread; then it is given one by `submit`, once. `is_full`
    says whether that would be as large as batches become: to wait for more is in vain then. One that `is_urgent` has
    threads spend cores on waiting, to be told sooner.
    """

    def __init__(
        self, owner: Owner, name: str, weight: float, priority: int, hang_ns: int, is_urgent: bool = False
    ) -> None:
        """An execution that has not ended `hang_ns` after its turn came is taken for one that never will; 0: never."""
        self.name = name
        # For metrics: the model's version, and what it has on the device, in bytes, by what may be others', too.
        self.version = ""
        self.memory: dict[int, int] = {}
        self.weight = weight
        self.priority = priority
        self.hang_ns = hang_ns
        self.is_urgent = is_urgent
        self.is_free: Callable[[], None] = lambda: None
        self.is_full: Callable[[], bool] = lambda: False
        self.device_ns = 0
        self.stream: Stream | None = None
        self.out_stream: Stream | None = None
        # Free to take a batch, and has said so; when an alarm looks again.
        self.is_told = True
        self.alarm_ns = 0
        # While it is told so by an alarm.
        self.is_paced = False
        self.lateness = pacing.Lateness()
        self.submitted: deque[Batch] = deque()
        self.staged: deque[Batch] = deque()
        self.turns: deque[Turn] = deque()
        self.open = 0
        self.last_rows = 0
        self.slots: list[Slot] = []
        self.host = LatencyModel()
        self.copy = LatencyModel()
        self.execution = LatencyModel()
        # Of batches with such a key, where they are executed in some sizes only.
        self.captured: Mapping[Hashable, CapturedSizes] = {}
        self._owner = owner

    def submit(self, job: Job, is_again: bool = False) -> None:
        """Execute a job after those before it. From any thread; does not wait.

        `is_again` for parts of a batch that failed: the pipeline was not asked whether it takes them.
        """
        self._owner.submit(self, job, is_again)

    def ahead_ns(self, now_ns: int) -> int:
        """How long until what is submitted now would begin to execute, for what is before it."""
        return self._owner.ahead_ns(now_ns)

    def close(self) -> None:
        """Wait until all jobs have ended, then give the memory back."""
        self._owner.remove(self)

    def asks(self) -> bool:
        """Whether something of it waits for its turn."""
        return bool(self.staged or self.turns)

    def take(self) -> Execution:
        """What of it is next, which waits no longer."""
        return self.staged.popleft() if self.staged else self.turns.popleft()

    def stages(self) -> pacing.Stages:
        """What a batch as the last one is expected to take."""
        rows = self.last_rows
        return pacing.Stages(self.host.mean_ns(rows), self.copy.mean_ns(rows), self.execution.mean_ns(rows))
