"""Random schedules with faults at every stage, on a simulated device.

`python -m tests.devices.test_schedules 100000` runs the long form.
"""

import logging
import random
import sys

import numpy as np
import pytest

from tests.devices.driving import MS, NumberJob
from tutti.core.errors import DeviceLost, InvalidArgument, OutOfMemory
from tutti.devices.arena import COPIED_BYTES
from tutti.devices.engine import DeviceEngine
from tutti.devices.health import DeviceHealth
from tutti.devices.pipeline import Pipeline
from tutti.devices.simulated import Costs, FaultKind, SimulatedDevice
from tutti.devices.simulated_timeline import Timeline

FAULTS: tuple[FaultKind, ...] = ("memory", "launch", "copy", "sticky", "hang")


class Schedule:
    """One random run: a few pipelines, each with jobs that come when they like."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        costs = Costs(
            submit_ns=rng.choice((0, 20_000)),
            copy_ns=rng.choice((0, 10_000)),
            copy_in_ns_per_byte=rng.choice((0.0, 5.0, 500.0)),
            copy_out_ns_per_byte=rng.choice((0.0, 5.0, 500.0)),
            wake_ns=rng.choice((0, 50_000)),
        )
        self.device = SimulatedDevice(Timeline(), costs)
        self.health = DeviceHealth()
        owned = rng.choice((0, 1 << 17, 1 << 24))
        self.engine = DeviceEngine(self.device, self.health, owned_bytes=owned, hang_ns=20_000 * MS)
        self.jobs: list[NumberJob] = []
        self.plans: list[FaultKind] = [kind for kind in FAULTS if rng.random() < 0.15]
        for kind in self.plans:
            self.device.plan(kind, after=rng.randrange(12))
        for number in range(rng.randint(1, 3)):
            pipeline = self.engine.pipeline(f"model {number}", weight=rng.choice((1.0, 3.0)))
            self._schedule(pipeline)
        if rng.random() < 0.2:
            self.device.timeline.schedule(
                rng.randrange(20 * MS), lambda: self.engine.alone(lambda: self.device.spend(MS))
            )

    def _schedule(self, pipeline: Pipeline) -> None:
        rng = self.rng
        waiting: list[NumberJob] = []
        state = {"free": True}

        def give() -> None:
            if waiting and state["free"]:
                state["free"] = False
                pipeline.submit(waiting.pop(0))

        def freed() -> None:
            assert not state["free"], "said to be free twice"
            state["free"] = True
            give()

        pipeline.is_free = freed
        for _ in range(rng.randint(1, 10)):
            job = self._job()
            arrives = rng.choice((0, rng.randrange(20 * MS)))

            def arrive(job: NumberJob = job) -> None:
                waiting.append(job)
                give()

            def again(job: NumberJob = job) -> None:
                pipeline.submit(job, is_again=True)

            self.jobs.append(job)
            self.device.timeline.schedule(arrives, again if rng.random() < 0.1 else arrive)

    def _job(self) -> NumberJob:
        rng = self.rng
        rows = rng.choice((1, 2, 8, COPIED_BYTES // 8 + 1))
        numbers = np.arange(rows, dtype=np.int64) + rng.randrange(1 << 40)
        job = NumberJob(self.device, numbers, rng.choice((0, 10_000, MS)), rng.choice((0, 30_000)))
        job.stays_there = rng.random() < 0.15
        job.is_in_place = rng.random() < 0.2
        if rng.random() < 0.06:
            job.refuse = InvalidArgument("an id is out of range")
        elif rng.random() < 0.06:
            job.refuse_rows = InvalidArgument("an id is out of range")
        elif rng.random() < 0.06:
            job.error = ValueError("a shape is not liked")
        return job

    def run(self) -> None:
        self.device.timeline.run()
        failed = [job for job in self.jobs if job.failures]
        is_lost = bool(self.health.failures())
        for job in self.jobs:
            assert len(job.answers) + len(job.failures) == 1, "answered exactly once"
            assert job.failures or job.is_right(), "no other's rows"
        for job in failed:
            (error,) = job.failures
            own = job.refuse or job.refuse_rows or job.error
            planned = "memory" in self.plans and isinstance(error, OutOfMemory)
            planned |= "copy" in self.plans and isinstance(error, TypeError)
            planned |= "launch" in self.plans and isinstance(error, RuntimeError)
            assert error is own or planned or (is_lost and isinstance(error, DeviceLost))
        assert not is_lost or {"sticky", "hang"} & set(self.plans)
        for pipeline in self.engine.pipelines():
            pipeline.close()
        self._check_memory(is_lost)

    def _check_memory(self, is_lost: bool) -> None:
        for job in self.jobs:
            assert job.failures or job.is_right(), "an answer stays what it was while it is kept"
            job.answers.clear()
            job.made = ()
        if not is_lost:
            assert self.device.used_bytes == 0
            assert self.engine.arena.owned_bytes() == 0
            self.engine.arena.close()
            assert self.device.host_bytes == self.engine.arena.bytes == 0


@pytest.mark.parametrize("part", range(8))
def test_every_call_is_answered_once_with_its_own_rows(part: int) -> None:
    for seed in range(part * 125, part * 125 + 125):
        Schedule(seed).run()


if __name__ == "__main__":
    logging.disable()
    for number in range(int(sys.argv[1])):
        try:
            Schedule(number).run()
        except BaseException:
            print(f"seed {number}", flush=True)
            raise
        if number % 10_000 == 0:
            print(number, flush=True)
