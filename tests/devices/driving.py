"""Jobs on a simulated device: each row is a number, and its output is a function of it that nobody else has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tutti.core.dtypes import Array
from tutti.core.errors import DeviceLost
from tutti.devices.engine import DeviceEngine
from tutti.devices.health import DeviceHealth
from tutti.devices.jobs import Made, Part, Times
from tutti.devices.pipeline import Pipeline
from tutti.devices.simulated import Costs, SimulatedDevice
from tutti.devices.simulated_timeline import Timeline

MS = 1_000_000


@dataclass(eq=False)
class NumberJob:
    """Rows of `width` INT64 numbers; the output of x is x * factor + 1. Answers are kept with their times."""

    device: SimulatedDevice
    numbers: Array
    execution_ns: int
    host_ns: int = 0
    factor: int = 3
    stays_there: bool = False
    # Its output is the memory of its input, as of a model that hands an input on.
    is_in_place: bool = False
    resident: Any = None
    error: Exception | None = None
    on_end: Callable[["NumberJob"], None] = lambda job: None
    answers: list[Any] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    ended_ns: int = 0
    times: Times | None = None
    refuse: Exception | None = None
    # The same, found when the rows are written.
    refuse_rows: Exception | None = None
    made: Sequence[Made] = ()

    @property
    def rows(self) -> int:
        return len(self.numbers)

    def stage(self) -> Sequence[Part]:
        if self.refuse is not None:
            raise self.refuse
        if self.resident is not None:
            return [Part("INT64", self.numbers.shape, resident=self.resident)]
        return [Part("INT64", self.numbers.shape, self.numbers.nbytes, self._write)]

    def _write(self, host: Array) -> None:
        self.device.spend(self.host_ns)
        if self.refuse_rows is not None:
            raise self.refuse_rows
        host[:] = self.numbers.reshape(-1).view(np.uint8)

    def launch(self, inputs: Sequence[Any], stream: Any) -> Sequence[Any]:
        if self.error is not None:
            raise self.error
        (numbers,) = inputs
        output = numbers if self.is_in_place else np.zeros_like(numbers)

        def compute() -> None:
            output[:] = numbers * self.factor + 1

        self.device.kernel(stream, self.execution_ns, compute)
        return [output]

    def stays(self, index: int) -> bool:
        return self.stays_there

    def finish(self, outputs: Sequence[Made], times: Times) -> None:
        self.made = outputs
        self.times = times
        self.answers.append([output.array if output.host is None else output.host for output in outputs])
        self._end()

    def fail(self, error: Exception) -> None:
        self.failures.append(error)
        self._end()

    def _end(self) -> None:
        self.ended_ns = self.device.timeline.now_ns
        self.on_end(self)

    def is_right(self) -> bool:
        """Answered once, with the outputs of its own rows."""
        if len(self.answers) != 1 or self.failures:
            return False
        output = self.answers[0][0]
        array = output if self.stays_there else output.view(np.int64).reshape(self.numbers.shape)
        return bool((array == self.numbers * self.factor + 1).all())


def simulated(costs: Costs, **options: Any) -> tuple[SimulatedDevice, DeviceEngine, DeviceHealth]:
    health = DeviceHealth()
    device = SimulatedDevice(Timeline(), costs, **options)
    return device, DeviceEngine(device, health, hang_ns=200 * MS), health


class Feeder:
    """A pipeline that always has work: gives it a job whenever it takes one, until `until_ns` or the device is lost."""

    def __init__(
        self, device: SimulatedDevice, pipeline: Pipeline, make: Callable[[], NumberJob], until_ns: float
    ) -> None:
        self.jobs: list[NumberJob] = []
        self._device = device
        self._pipeline = pipeline
        self._make = make
        self._until_ns = until_ns
        pipeline.is_free = self._give
        self._give()

    def _give(self) -> None:
        is_lost = bool(self.jobs) and any(isinstance(error, DeviceLost) for error in self.jobs[-1].failures)
        if self._device.timeline.now_ns < self._until_ns and not is_lost:
            self.jobs.append(self._make())
            self._pipeline.submit(self.jobs[-1])


# The batch of the promise: host .2, copy in 1, execution 2, copy out .5 ms.
ROWS, WIDTH = 8, 4
BYTES = ROWS * WIDTH * 8
COSTS = Costs(copy_in_ns_per_byte=1 * MS / BYTES, copy_out_ns_per_byte=0.5 * MS / BYTES)


def batch_job(device: SimulatedDevice, seed: int = 0, execution_ns: int = 2 * MS) -> NumberJob:
    numbers = np.random.default_rng(seed).integers(0, 1 << 40, (ROWS, WIDTH))
    return NumberJob(device, numbers, execution_ns, host_ns=200_000)
