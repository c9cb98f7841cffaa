"""What a device would serve: the scheduler and the device engine themselves, in virtual time, with given costs.

Clients wait for their answers and ask again at once, as those of most benchmarks do. Nothing here is an estimate of the
engine: it is the engine. What is estimated are the costs: of copies, of executions by rows, of the host.
"""

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tutti.backends.device_instance import DeviceInstance
from tutti.core import types
from tutti.core.dtypes import Array
from tutti.core.errors import InferError, Internal
from tutti.core.types import Call, InferRequest, InferResponse
from tutti.devices.engine import DeviceEngine
from tutti.devices.health import DeviceHealth
from tutti.devices.jobs import Made, Part
from tutti.devices.simulated import Costs, SimulatedDevice
from tutti.devices.simulated_timeline import Timeline
from tutti.observing.statistics import ModelStatistics
from tutti.repository.policies import BatchingPolicy
from tutti.scheduling.batching import BatchQueue
from tutti.scheduling.captured_sizes import CapturedSizes
from tutti.scheduling.interface import Answers
from tutti.scheduling.scheduler import Scheduler

_SECOND = 1_000_000_000
_SIMULATION = threading.Lock()
_KEY = "simulated"


@dataclass(frozen=True, slots=True)
class Workload:
    """Clients of one model on one device; nanoseconds and bytes.

    An execution takes `execution_ns` and `row_ns` for each row; with `captured` sizes, for each of the next of them.
    The host takes `host_ns` for each batch and `host_row_ns` for each row of it. A request is on its way for
    `request_ns` (decoding, encoding, the way there and back), give or take a share of `spread`.
    """

    clients: int
    rows: int
    max_batch_size: int
    execution_ns: int
    row_ns: float
    bytes_in: int
    bytes_out: int
    host_ns: int = 100_000
    host_row_ns: float = 0.0
    request_ns: int = 0
    spread: float = 0.0
    captured: tuple[int, ...] = ()
    costs: Costs = field(default_factory=Costs)
    seconds: float = 2.0

    def takes_ns(self, rows: int) -> int:
        """What the execution of a batch takes."""
        executed = next((size for size in self.captured if size >= rows), rows)
        return int(self.execution_ns + executed * self.row_ns)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Requests a second, latencies in ms, mean rows of a batch, and the share of time that the device executes."""

    rate: float
    p50_ms: float
    p99_ms: float
    batch_rows: float
    busy: float


def predict(workload: Workload) -> Prediction:
    """Run the workload in virtual time. One at a time in a process: the clock of queues is its."""
    with _SIMULATION:
        simulation = _Simulation(workload)
        types.set_clock(simulation.device.now_ns)
        try:
            return simulation.run()
        finally:
            types.set_clock()


class _Simulation:
    def __init__(self, workload: Workload) -> None:
        self.timeline = Timeline()
        self.device = SimulatedDevice(self.timeline, workload.costs)
        self.engine = DeviceEngine(self.device, DeviceHealth(), hang_ns=0)
        self.pipeline = self.engine.pipeline("simulated")
        if workload.captured:
            times = {size: workload.takes_ns(size) for size in workload.captured}
            self.pipeline.captured = {_KEY: CapturedSizes(workload.captured, times)}
        self.workload = workload
        self.latencies: list[tuple[int, int]] = []
        self.batches: list[int] = []
        self._asked: dict[int, int] = {}
        self._random = random.Random(0)
        statistics = ModelStatistics()
        policy = BatchingPolicy(workload.max_batch_size)
        queue = BatchQueue(policy, workload.max_batch_size * 64 + workload.clients * workload.rows)
        self.scheduler = Scheduler("simulated", queue, statistics, self._timer)
        self.scheduler.add(DeviceInstance("simulated_0", self, self.scheduler, statistics))

    def run(self) -> Prediction:
        end_ns = int(self.workload.seconds * _SECOND)
        for client in range(self.workload.clients):
            self._ask(client)
        self.timeline.run(end_ns)
        begin_ns = end_ns // 4  # until then it learns
        took = np.array([latency for at_ns, latency in self.latencies if at_ns >= begin_ns] or [0])
        rate = len(took) / ((end_ns - begin_ns) / _SECOND)
        p50, p99 = np.percentile(took, [50, 99]) / 1e6
        rows = float(np.mean(self.batches[len(self.batches) // 4 :] or [0]))
        return Prediction(rate, float(p50), float(p99), rows, self.engine.busy_ns / end_ns)

    # A backend whose batches go through the engine.

    def batch(self, requests: Sequence[InferRequest]) -> "_Work":
        self.batches.append(len(requests) * self.workload.rows)
        return _Work(self, len(requests))

    def refusals(self, requests: Sequence[InferRequest]) -> list[InferError | None]:
        return [None] * len(requests)

    def close(self) -> None:
        self.pipeline.close()

    # The clients, which are the sink of their calls.

    def settle(self, calls: Sequence[Call]) -> None:
        now = self.timeline.now_ns
        for call in calls:
            assert isinstance(call.answer, InferResponse), call.answer
            self.latencies.append((now, now - self._asked[call.token]))
            self.timeline.after(self._way_ns(), lambda client=call.token: self._ask(client))  # type: ignore[misc]

    def _way_ns(self) -> int:
        return int(self.workload.request_ns * (1 + self.workload.spread * self._random.uniform(-1, 1)))

    def _ask(self, client: int) -> None:
        self._asked[client] = self.timeline.now_ns
        call = Call(InferRequest("simulated", {}), self, client)
        call.rows, call.key, call.arrived_ns = self.workload.rows, _KEY, self.timeline.now_ns
        self.scheduler([call])

    def _timer(self, delay_s: float, callback: Any) -> None:
        self.timeline.after(int(delay_s * _SECOND), callback)


class _Work:
    """A batch of so many requests."""

    def __init__(self, simulation: _Simulation, requests: int) -> None:
        self._simulation = simulation
        self._requests = requests
        self._rows = requests * simulation.workload.rows

    def parts(self) -> list[Part]:
        size = max(1, self._rows * self._simulation.workload.bytes_in)
        return [Part("UINT8", (size,), size, self._write)]

    def _write(self, host: Array) -> None:
        workload = self._simulation.workload
        self._simulation.device.spend(workload.host_ns + self._rows * workload.host_row_ns)

    def launch(self, arrays: Sequence[Any], stream: Any) -> list[Any]:
        workload = self._simulation.workload
        self._simulation.device.kernel(stream, workload.takes_ns(self._rows), lambda: None)
        return [np.empty(max(1, self._rows * workload.bytes_out), np.uint8)]

    def stays(self, index: int) -> bool:
        return False

    def answers(self, outputs: Sequence[Made]) -> Answers:
        return [InferResponse("simulated", "1", [])] * self._requests

    def failure(self, error: Exception) -> InferError:
        return Internal(str(error))
