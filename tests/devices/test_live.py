"""What only several threads show, on a device in real time: turns of libraries that wait by themselves, and closing."""

import threading
import time
from collections.abc import Iterator

import pytest

from tests.devices.driving import MS, batch_job
from tests.serving import wait_until
from tutti.core.errors import DeviceLost
from tutti.devices.engine import DeviceEngine
from tutti.devices.health import DeviceHealth
from tutti.devices.simulated import Costs, SimulatedDevice
from tutti.devices.simulated_timeline import LiveTimeline


@pytest.fixture
def engine() -> Iterator[DeviceEngine]:
    engine = DeviceEngine(SimulatedDevice(LiveTimeline(), Costs()), DeviceHealth())
    yield engine
    engine.close()


class Holder:
    """A thread that has a turn until it is let go."""

    def __init__(self, engine: DeviceEngine, name: str) -> None:
        self.pipeline = engine.pipeline(name)
        self.has_turn = threading.Event()
        self.may_go = threading.Event()
        self.error: DeviceLost | None = None
        self._engine = engine
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            with self._engine.turn(self.pipeline):
                self.has_turn.set()
                self.may_go.wait(30)
        except DeviceLost as error:
            self.error = error

    def end(self) -> None:
        self.may_go.set()
        self.thread.join(30)
        assert not self.thread.is_alive()


def test_one_turn_is_granted_ahead_of_the_one_that_runs(engine: DeviceEngine) -> None:
    holders = [Holder(engine, f"model {number}") for number in range(4)]
    wait_until(lambda: sum(holder.has_turn.is_set() for holder in holders) >= 2)
    wait_until(lambda: sum(holder.pipeline.asks() for holder in holders) == 2)
    assert sum(holder.has_turn.is_set() for holder in holders) == 2
    while holders:
        first = next(holder for holder in holders if holder.has_turn.is_set())
        first.end()
        holders.remove(first)
        wait_until(lambda: sum(holder.has_turn.is_set() for holder in holders) == min(2, len(holders)))


def test_a_turn_is_charged_for_what_it_lasts(engine: DeviceEngine) -> None:
    holder = Holder(engine, "model")
    assert holder.has_turn.wait(30)
    start_ns = time.monotonic_ns()
    wait_until(lambda: time.monotonic_ns() - start_ns > 5 * MS)
    holder.end()
    assert holder.pipeline.device_ns >= 5 * MS and engine.busy_ns == holder.pipeline.device_ns


def test_whoever_waits_for_a_turn_is_told_that_the_device_is_lost(engine: DeviceEngine) -> None:
    holders = [Holder(engine, f"model {number}") for number in range(4)]
    wait_until(lambda: sum(holder.has_turn.is_set() for holder in holders) == 2)
    waiting = [holder for holder in holders if not holder.has_turn.is_set()]
    device = engine.device
    assert isinstance(device, SimulatedDevice)
    device.fail("an illegal access")
    assert engine.report(RuntimeError("something")) == "an illegal access"
    for holder in waiting:
        holder.thread.join(30)
        assert holder.error is not None and "an illegal access" in holder.error.message
    for holder in holders:
        holder.end()
    with pytest.raises(DeviceLost), engine.turn(holders[0].pipeline):
        pass


def test_batches_wait_while_a_turn_lasts_and_run_after_it(engine: DeviceEngine) -> None:
    device = engine.device
    assert isinstance(device, SimulatedDevice)
    holders = [Holder(engine, f"model {number}") for number in range(2)]
    wait_until(lambda: all(holder.has_turn.is_set() for holder in holders))
    ended = threading.Event()
    job = batch_job(device, execution_ns=0)
    job.on_end = lambda job: ended.set()
    pipeline = engine.pipeline("batches")
    pipeline.submit(job)
    wait_until(lambda: pipeline.staged)
    assert not ended.is_set()
    for holder in holders:
        holder.end()
    assert ended.wait(30) and job.is_right()


def test_no_turn_is_granted_while_something_runs_alone(engine: DeviceEngine) -> None:
    begun, may_end = threading.Event(), threading.Event()
    granted: list[bool] = []

    def work() -> None:
        begun.set()
        may_end.wait(30)
        granted.append(holder.has_turn.is_set())

    engine.alone(work)
    assert begun.wait(30)
    holder = Holder(engine, "model")
    wait_until(holder.pipeline.asks)
    engine.alone(lambda: None)  # has the engine decide once more
    may_end.set()
    assert holder.has_turn.wait(30)
    assert granted == [False]
    holder.end()


def test_a_pipeline_is_closed_when_its_jobs_have_ended(engine: DeviceEngine) -> None:
    device = engine.device
    assert isinstance(device, SimulatedDevice)
    pipeline = engine.pipeline("model")
    job = batch_job(device, execution_ns=50 * MS)
    pipeline.submit(job)
    pipeline.close()
    assert job.is_right() and not engine.pipelines()
    assert device.used_bytes == device.host_bytes == 0
