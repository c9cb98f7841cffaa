"""The device engine in virtual time: what it promises of overlap, shares, failures and memory."""

import dataclasses
import itertools

import numpy as np
import pytest

from tests.devices.driving import BYTES, COSTS, MS, ROWS, WIDTH, Feeder, NumberJob, batch_job, simulated
from tutti.devices.jobs import Resident
from tutti.devices.offers import DEPTH
from tutti.devices.pipeline import Pipeline
from tutti.devices.simulated import Costs, SimulatedDevice
from tutti.devices.simulated_timeline import Timeline


def test_one_batch_alone_takes_the_sum_of_its_stages() -> None:
    device, engine, _ = simulated(COSTS)
    job = batch_job(device)
    engine.pipeline("model").submit(job)
    device.timeline.run()
    assert job.is_right()
    assert job.ended_ns <= 1.05 * 3.7 * MS


def test_at_saturation_executions_follow_each_other() -> None:
    device, engine, _ = simulated(COSTS)
    feeder = Feeder(device, engine.pipeline("model"), lambda: batch_job(device), 2000 * MS)
    device.timeline.run()
    ended = [job.ended_ns for job in feeder.jobs]
    assert all(job.is_right() for job in feeder.jobs)
    steady = [end for end in ended if 100 * MS < end < 1900 * MS]
    per_batch_ns = (steady[-1] - steady[0]) / (len(steady) - 1)
    assert per_batch_ns <= 2 * MS / 0.97
    assert turns_per_batch_ns() / per_batch_ns >= 1.7


def turns_per_batch_ns() -> float:
    """What a batch takes where it holds the device from its first copy to its last, with two instances."""
    device = SimulatedDevice(Timeline(), COSTS)
    ended: list[int] = []
    waiting = [0, 0]  # both instances

    def begin() -> None:
        if len(ended) < 200 and waiting:
            waiting.pop()
            job = batch_job(device)
            device.post(lambda: hold(job))

    def hold(job: NumberJob) -> None:
        stream, event = device.stream(), device.event()
        (part,) = job.stage()
        host, there = device.host_block(part.nbytes), device.device_block(part.nbytes)
        # The rows are joined in ordinary memory before the turn, while the other instance has it.
        assert part.write is not None
        device.copy_in(host, there, part.nbytes, stream)
        (output,) = job.launch([device.view(there, 0, "INT64", part.shape)], stream)
        device.copy_out(output, host, 0, stream)
        device.record(event, stream)

        def done(_: Exception | None) -> None:
            ended.append(device.timeline.now_ns)
            waiting.append(0)
            begin()

        device.notify(event, stream, done)

    begin()
    device.timeline.run()
    return (ended[-1] - ended[20]) / (len(ended) - 21)


@pytest.mark.parametrize(("copy_in", "execution", "copy_out"), [(3, 2, 0.5), (0.5, 2, 3), (0.05, 0.02, 0.01)])
def test_the_slowest_stage_decides(copy_in: float, execution: float, copy_out: float) -> None:
    costs = dataclasses.replace(
        COSTS,
        copy_in_ns_per_byte=COSTS.copy_in_ns_per_byte * copy_in,
        copy_out_ns_per_byte=COSTS.copy_out_ns_per_byte * copy_out * 2,
    )
    device, engine, _ = simulated(costs)
    make = lambda: dataclasses.replace(batch_job(device), execution_ns=int(execution * MS), host_ns=30_000)  # noqa: E731
    feeder = Feeder(device, engine.pipeline("model"), make, 1000 * MS)
    device.timeline.run()
    assert all(job.is_right() for job in feeder.jobs)
    steady = [job.ended_ns for job in feeder.jobs if 100 * MS < job.ended_ns < 900 * MS]
    per_batch_ns = (steady[-1] - steady[0]) / (len(steady) - 1)
    assert per_batch_ns <= max(copy_in, execution, copy_out, 0.03) * MS * 1.05


def test_two_models_share_by_device_time() -> None:
    device, engine, _ = simulated(COSTS)
    long, short = engine.pipeline("long"), engine.pipeline("short")
    Feeder(device, long, lambda: batch_job(device), 2000 * MS)
    Feeder(device, short, lambda: batch_job(device, execution_ns=1_300_000), 2000 * MS)
    device.timeline.run()
    assert long.device_ns / (long.device_ns + short.device_ns) == pytest.approx(0.5, abs=0.03)
    assert engine.busy_ns == pytest.approx(2000 * MS, rel=0.03)


def test_weights_are_shares() -> None:
    device, engine, _ = simulated(COSTS)
    heavy, light = engine.pipeline("heavy", weight=3), engine.pipeline("light")
    Feeder(device, heavy, lambda: batch_job(device), 4000 * MS)
    Feeder(device, light, lambda: batch_job(device), 4000 * MS)
    device.timeline.run()
    assert heavy.device_ns / (heavy.device_ns + light.device_ns) == pytest.approx(0.75, abs=0.04)


def test_a_batch_is_cut_as_late_as_staging_allows() -> None:
    device, engine, _ = simulated(COSTS)
    pipeline = engine.pipeline("model")
    feeder = Feeder(device, pipeline, lambda: batch_job(device), 1000 * MS)
    device.timeline.run()
    waits = [job.times.execution_start_ns - job.times.start_ns for job in feeder.jobs[100:400] if job.times is not None]
    # Host and copy take 1.2 ms: what is cut earlier waits for the execution before it.
    assert max(waits) <= 1.5 * MS


def per_batch_ns(late_ns: int, is_full: bool) -> float:
    """Of a pipeline at saturation, where all alarms are so late."""
    device, engine, _ = simulated(COSTS)
    alarm = device.alarm
    device.alarm = lambda delay_ns, work: alarm(delay_ns + late_ns, work)  # type: ignore[method-assign]
    pipeline = engine.pipeline("model")
    pipeline.is_full = lambda: is_full
    feeder = Feeder(device, pipeline, lambda: batch_job(device), 2000 * MS)
    device.timeline.run()
    assert all(job.is_right() for job in feeder.jobs)
    steady = [job.ended_ns for job in feeder.jobs if 200 * MS < job.ended_ns < 1900 * MS]
    return (steady[-1] - steady[0]) / (len(steady) - 1)


def test_alarms_that_are_late_are_set_earlier() -> None:
    assert per_batch_ns(MS // 2, is_full=False) <= 1.03 * 2 * MS
    assert per_batch_ns(0, is_full=False) <= 1.03 * 2 * MS


def test_a_batch_that_is_full_is_cut_at_once() -> None:
    assert per_batch_ns(100 * MS, is_full=True) <= 1.03 * 2 * MS


def test_a_quick_model_does_not_wait_for_a_slow_ones_copies() -> None:
    device, engine, _ = simulated(dataclasses.replace(COSTS, copy_out_ns_per_byte=20 * MS / 256))
    slow, quick = batch_job(device), batch_job(device, execution_ns=MS // 10)
    quick.numbers = quick.numbers[:1]
    engine.pipeline("slow").submit(slow)
    device.timeline.run(4 * MS)
    engine.pipeline("quick").submit(quick)
    device.timeline.run()
    assert slow.is_right() and quick.is_right()
    copies_ns = (20 + 20 / 8) * MS  # one engine copies out, in order
    assert quick.ended_ns <= 3.2 * MS + copies_ns + MS


def test_a_hang_is_told_with_its_model_and_everybody_is_answered() -> None:
    device, engine, health = simulated(COSTS)
    stuck, waiting, other = batch_job(device), batch_job(device), batch_job(device)
    pipeline = engine.pipeline("stuck")
    device.plan("hang")
    pipeline.submit(stuck)
    device.timeline.run(2 * MS)
    pipeline.submit(waiting, is_again=True)
    engine.pipeline("other").submit(other)
    device.timeline.run(400 * MS)
    assert "'stuck' has not ended" in health.reason("simulated:0")
    for job in (stuck, waiting, other):
        assert len(job.failures) == 1 and not job.answers
        assert "simulated:0 has failed" in str(job.failures[0])


def test_a_model_that_goes_on_does_not_hide_one_that_hangs() -> None:
    device, engine, health = simulated(COSTS)
    device.plan("hang", after=20)
    Feeder(device, engine.pipeline("a"), lambda: batch_job(device), 1000 * MS)
    Feeder(device, engine.pipeline("b"), lambda: batch_job(device), 1000 * MS)
    device.timeline.run(2000 * MS)
    assert "has not ended" in health.reason("simulated:0")


def test_nobody_is_told_of_what_comes_after_the_loss() -> None:
    device, engine, health = simulated(COSTS)
    pipeline = engine.pipeline("model")
    device.plan("sticky")
    first, second = batch_job(device), batch_job(device)
    pipeline.submit(first)
    device.timeline.run()
    pipeline.submit(second)
    device.timeline.run()
    assert len(first.failures) == len(second.failures) == 1
    assert health.reason("simulated:0") == engine.lost == "device-side assert"


def test_a_batch_that_fails_leaves_the_next_ones_right() -> None:
    device, engine, _ = simulated(COSTS)
    pipeline = engine.pipeline("model")
    counter = itertools.count()

    def make() -> NumberJob:
        job = batch_job(device, seed=next(counter))
        job.error = ValueError("shapes") if next(counter) % 7 == 3 else None
        return job

    feeder = Feeder(device, pipeline, make, 200 * MS)
    device.timeline.run()
    assert any(job.error for job in feeder.jobs)
    for job in feeder.jobs:
        assert job.is_right() if job.error is None else len(job.failures) == 1
    pipeline.close()
    assert device.used_bytes == 0


def test_an_output_that_stays_is_the_next_steps_input() -> None:
    device, engine, _ = simulated(COSTS)
    first = batch_job(device)
    first.stays_there = True
    engine.pipeline("first").submit(first)
    device.timeline.run()
    assert first.is_right()
    second = batch_job(device)
    second.numbers = first.answers[0][0]
    second.resident = Resident(first.made[0].array)
    start_ns = device.timeline.now_ns
    engine.pipeline("second").submit(second)
    device.timeline.run()
    assert second.is_right()
    assert second.ended_ns - start_ns <= 2.6 * MS  # no copy in


@pytest.mark.parametrize(("copy_out", "stays"), [(0.5, False), (5.0, False), (0.5, True)])
def test_what_runs_alone_waits_for_all_and_holds_all(copy_out: float, stays: bool) -> None:
    device, engine, _ = simulated(dataclasses.replace(COSTS, copy_out_ns_per_byte=copy_out * MS / BYTES))
    pipeline = engine.pipeline("model")
    feeder = Feeder(device, pipeline, lambda: dataclasses.replace(batch_job(device), stays_there=stays), 300 * MS)
    under_way: list[int] = []
    executes: list[bool] = []

    def look() -> None:
        executes.append(device.execution.free_ns > device.timeline.now_ns)

    def work() -> None:
        under_way.append(pipeline.open - len(pipeline.submitted) - len(pipeline.staged))
        look()
        device.spend(5 * MS)
        device.timeline.after(4 * MS, look)

    device.timeline.run(50 * MS)
    engine.alone(work)
    device.timeline.run()
    assert under_way == [0] and executes == [False, False]
    assert all(job.is_right() for job in feeder.jobs) and len(feeder.jobs) > 40


def test_what_runs_alone_runs_on_a_device_that_is_found_to_have_failed() -> None:
    device, engine, health = simulated(COSTS)
    seen: list[str] = []
    device.fail("gone")
    engine.alone(lambda: seen.append(engine.lost))
    engine.alone(lambda: seen.append("again"))
    device.timeline.run()
    assert seen == ["gone", "again"]
    assert health.reason(device.name) == "gone"


def test_what_is_to_run_alone_runs_when_the_device_is_lost_too() -> None:
    device, engine, _ = simulated(COSTS)
    pipeline = engine.pipeline("model")
    Feeder(device, pipeline, lambda: batch_job(device), 100 * MS)
    done: list[str] = []
    device.timeline.schedule(49 * MS, lambda: engine.alone(lambda: done.append("before")))
    device.timeline.schedule(49 * MS, lambda: device.fail("an illegal access"))
    device.timeline.run()
    engine.alone(lambda: done.append("after"))
    device.timeline.run()
    assert done == ["before", "after"]


def test_memory_errors_are_the_jobs_business() -> None:
    device, engine, health = simulated(Costs(), memory_bytes=1024)
    pipeline = engine.pipeline("model")
    job = batch_job(device)
    pipeline.submit(job)
    device.timeline.run()
    assert [type(error).__name__ for error in job.failures] == ["OutOfMemory"]
    assert not health.failures()


def test_an_output_in_its_inputs_memory_is_right_while_it_is_copied() -> None:
    device, engine, _ = simulated(dataclasses.replace(COSTS, copy_out_ns_per_byte=5 * MS / BYTES))
    counter = itertools.count()

    def make() -> NumberJob:
        return dataclasses.replace(batch_job(device, seed=next(counter)), is_in_place=True)

    feeder = Feeder(device, engine.pipeline("model"), make, 100 * MS)
    device.timeline.run()
    assert len(feeder.jobs) > 15 and all(job.is_right() for job in feeder.jobs)


def test_an_output_in_its_inputs_memory_that_stays_is_not_overwritten() -> None:
    device, engine, _ = simulated(COSTS)
    counter = itertools.count()

    def make() -> NumberJob:
        return dataclasses.replace(batch_job(device, seed=next(counter)), is_in_place=True, stays_there=True)

    feeder = Feeder(device, engine.pipeline("model"), make, 100 * MS)
    device.timeline.run()
    assert len(feeder.jobs) > 30 and all(job.is_right() for job in feeder.jobs)


@pytest.mark.parametrize("stage", ["error", "refuse"])
def test_a_pipeline_that_closes_waits_for_what_a_failed_batch_is_given_anew(stage: str) -> None:
    device, engine, _ = simulated(COSTS)
    pipeline = engine.pipeline("model")
    part = batch_job(device, seed=1)
    open_while_failing: list[int] = []

    def fail(job: NumberJob) -> None:
        open_while_failing.append(pipeline.open)
        pipeline.submit(part, is_again=True)

    job = batch_job(device)
    setattr(job, stage, ValueError("shapes"))
    job.on_end = fail
    pipeline.submit(job)
    device.timeline.run()
    assert open_while_failing == [1]  # with 0 a close in another thread would go on
    assert part.is_right() and not pipeline.open


def test_an_urgent_pipeline_is_told_at_once() -> None:
    """Others sleep, and take `wake_ns` to notice; the two do not get each other's events."""
    wake_ns = MS // 10
    device, engine, _ = simulated(dataclasses.replace(COSTS, wake_ns=wake_ns))
    ended = {}
    for _ in range(3):
        for is_urgent in (False, True):
            pipeline = engine.pipeline("model", is_urgent=is_urgent)
            for _ in range(4):
                begin_ns = device.timeline.now_ns
                job = batch_job(device)
                pipeline.submit(job, is_again=True)
                device.timeline.run()
                assert job.is_right()
                ended[is_urgent] = job.ended_ns - begin_ns
            pipeline.close()
    assert ended[False] - ended[True] == wake_ns


@pytest.mark.parametrize(("execution_ns", "is_lone", "wakes"), [(MS, True, 0), (MS, False, 1), (3 * MS, True, 1)])
def test_a_quick_batch_by_itself_is_told_at_once(execution_ns: int, is_lone: bool, wakes: int) -> None:
    """A core is spent on that for so short a time, and for so few."""
    wake_ns = MS // 10
    device, engine, _ = simulated(dataclasses.replace(COSTS, wake_ns=wake_ns))
    pipeline, other = engine.pipeline("model"), engine.pipeline("other")
    for _ in range(2):  # of the first one nothing is known
        job = batch_job(device, execution_ns=execution_ns)
        pipeline.submit(job)
        device.timeline.run()
    begin_ns, last = device.timeline.now_ns, batch_job(device, execution_ns=execution_ns)
    pipeline.submit(last)
    if not is_lone:
        other.submit(batch_job(device, execution_ns=execution_ns))
    device.timeline.run()
    assert last.ended_ns - begin_ns - execution_ns - 1.7 * MS == pytest.approx(wakes * wake_ns, abs=wake_ns / 4)


def test_streams_are_used_again() -> None:
    device, engine, _ = simulated(COSTS)
    streams = set()
    for _ in range(5):
        pipeline = engine.pipeline("model")
        pipeline.submit(batch_job(device))
        device.timeline.run()
        streams.add((id(pipeline.stream), id(pipeline.out_stream)))
        pipeline.close()
    assert len(streams) == 1


def test_what_is_on_the_device_is_read_when_it_is_complete() -> None:
    device, engine, _ = simulated(COSTS)
    there = np.zeros(ROWS * WIDTH, np.int64).reshape(ROWS, WIDTH)
    stream, ready = device.stream(), device.event()
    job = batch_job(device)
    device.kernel(stream, 7 * MS, lambda: np.copyto(there, job.numbers))
    device.record(ready, stream)
    job.resident = Resident(there, ready)
    engine.pipeline("model").submit(job)
    device.timeline.run()
    assert job.is_right() and job.ended_ns > 9 * MS


def test_events_are_used_again() -> None:
    device, engine, _ = simulated(COSTS)
    created: list[object] = []
    event = device.event
    device.event = lambda is_urgent=False: created.append(device) or event()  # type: ignore[func-returns-value, method-assign]
    feeder = Feeder(device, engine.pipeline("model"), lambda: batch_job(device), 500 * MS)
    device.timeline.run()
    assert len(feeder.jobs) > 200 and len(created) <= 6 * (DEPTH + 1)


@pytest.mark.parametrize("question", range(6))
def test_a_device_that_is_lost_while_it_is_asked_answers_everybody(question: int) -> None:
    device, engine, health = simulated(COSTS)
    is_reached, asked = device.is_reached, itertools.count()

    def ask(event: object) -> bool:
        if next(asked) == question:
            device.fail("an illegal access")
        return is_reached(event)

    device.is_reached = ask  # type: ignore[method-assign]
    jobs = [batch_job(device, seed=seed) for seed in range(4)]
    for number, job in enumerate(jobs):
        engine.pipeline(f"model {number}").submit(job)
    device.timeline.run()
    assert next(asked) > question and health.failures()
    assert all(len(job.answers) + len(job.failures) == 1 for job in jobs)


@pytest.mark.parametrize(("execution", "copy_out"), [(0.1, 5.0), (5.0, 0.1)])
def test_a_pipeline_takes_a_batch_when_none_of_its_own_waits_and_few_are_under_way(
    execution: float, copy_out: float
) -> None:
    device, engine, _ = simulated(dataclasses.replace(COSTS, copy_out_ns_per_byte=copy_out * MS / BYTES))
    pipeline = engine.pipeline("model")
    taken: list[tuple[int, int]] = []

    def make() -> NumberJob:
        taken.append((pipeline.open, len(pipeline.submitted) + len(pipeline.staged)))
        return dataclasses.replace(batch_job(device), execution_ns=int(execution * MS))

    Feeder(device, pipeline, make, 100 * MS)
    device.timeline.run()
    assert {waiting for _, waiting in taken} == {0}
    assert max(under_way for under_way, _ in taken) == DEPTH - 1


def test_a_batch_that_fails_teaches_nothing() -> None:
    device, engine, _ = simulated(COSTS)
    pipeline = engine.pipeline("model")
    for error in (None, ValueError("shapes")):
        pipeline.submit(dataclasses.replace(batch_job(device), error=error))
        device.timeline.run()
        assert pipeline.execution.mean_ns(ROWS) == 2 * MS


def test_the_device_does_not_wait_until_the_host_has_noticed() -> None:
    device, engine, _ = simulated(dataclasses.replace(COSTS, wake_ns=100_000, submit_ns=50_000))
    feeder = Feeder(device, engine.pipeline("model"), lambda: batch_job(device), 500 * MS)
    device.timeline.run()
    ended = [job.ended_ns for job in feeder.jobs if 100 * MS < job.ended_ns < 450 * MS]
    assert (ended[-1] - ended[0]) / (len(ended) - 1) <= 2 * MS / 0.97


def test_only_who_is_quick_and_alone_is_waited_for_by_the_submitting_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    device, engine, _ = simulated(dataclasses.replace(COSTS, wake_ns=MS // 10))
    lingered: list[int] = []
    linger = SimulatedDevice.linger
    monkeypatch.setattr(SimulatedDevice, "linger", lambda *given: (lingered.append(device.now_ns()), linger(*given))[1])
    quick, slow = engine.pipeline("quick"), engine.pipeline("slow")

    def together(*pairs: tuple[Pipeline, int]) -> int:
        """How many of such executions, under way together, were."""
        lingered.clear()
        jobs = [batch_job(device, execution_ns=execution_ns) for _, execution_ns in pairs]
        for (pipeline, _), job in zip(pairs, jobs, strict=True):
            pipeline.submit(job, is_again=True)
        device.timeline.run()
        assert all(job.is_right() and len(job.answers) == 1 for job in jobs)
        return len(lingered)

    assert together((quick, MS // 2)) == 0  # it is not known to be quick yet
    assert together((quick, MS // 2)) == 1
    assert together((quick, MS // 2), (quick, MS // 2)) == 0
    assert together((slow, 2 * MS)) == together((slow, 2 * MS)) == 0
    assert together((quick, MS // 2), (slow, 2 * MS)) == 0
    assert together((quick, MS // 2)) == 1
    for pipeline in (quick, slow):
        pipeline.close()
