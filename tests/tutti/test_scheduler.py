"""The scheduler with instances and a clock held by the test: no threads, no sleeps."""

from collections.abc import Callable, Sequence

from tests.serving import Gather
from tutti.batching import BatchingPolicy, BatchQueue
from tutti.errors import Cancelled, InferError, Internal, Unavailable
from tutti.scheduler import Scheduler, ThreadInstance
from tutti.statistics import ModelStatistics
from tutti.types import Call, InferRequest, InferResponse, settle


class HeldInstance:
    """Keeps its batch until the test lets it finish."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.batches: list[list[Call]] = []
        self.is_closed = False

    def start(self, batch: list[Call]) -> None:
        self.batches.append(batch)

    def finish(self) -> None:
        for call in self.batches[-1]:
            call.answer = InferResponse("m", "1", [])
        settle(self.batches[-1])
        self.scheduler.release(self)

    def close(self) -> None:
        self.is_closed = True


class Timers:
    """A Timer that fires when told."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def __call__(self, delay_s: float, callback: Callable[[], None]) -> None:
        assert delay_s >= 0
        self.waiting.append(callback)


class Settled:
    def __init__(self) -> None:
        self.calls: list[Call] = []

    def settle(self, calls: Sequence[Call]) -> None:
        self.calls.extend(calls)


def make(policy: BatchingPolicy | None, max_rows: int = 100) -> tuple[Scheduler, HeldInstance, Timers]:
    timers = Timers()
    scheduler = Scheduler("m", BatchQueue(policy, max_rows), ModelStatistics(), timers)
    instance = HeldInstance(scheduler)
    scheduler.add(instance)
    return scheduler, instance, timers


def calls(count: int, sink: Settled) -> list[Call]:
    made = [Call(InferRequest("m", {}), sink) for _ in range(count)]
    for number, call in enumerate(made):
        call.arrived_ns = number
    return made


def test_a_batch_forms_only_when_an_instance_is_free() -> None:
    scheduler, instance, _ = make(BatchingPolicy(8))
    sink = Settled()
    first, *later = calls(4, sink)
    scheduler([first])
    for call in later:
        scheduler([call])
    assert instance.batches == [[first]]
    instance.finish()
    assert instance.batches == [[first], later]


def test_calls_beyond_the_queue_are_refused_and_the_others_served() -> None:
    scheduler, instance, _ = make(BatchingPolicy(8), max_rows=2)
    sink = Settled()
    running, *rest = calls(5, sink)
    scheduler([running])
    scheduler(rest)
    assert [type(call.answer) for call in sink.calls] == [Unavailable, Unavailable]
    instance.finish()
    assert instance.batches[-1] == rest[:2]


def test_max_queue_delay_waits_for_the_timer() -> None:
    scheduler, instance, timers = make(BatchingPolicy(8, max_queue_delay_ns=10**15))
    scheduler(calls(3, Settled()))
    assert instance.batches == []
    assert len(timers.waiting) == 1
    scheduler(calls(5, Settled()))
    assert len(instance.batches[0]) == 8


def test_a_cancelled_call_is_answered_and_not_executed() -> None:
    scheduler, instance, _ = make(BatchingPolicy(8))
    sink = Settled()
    running, dropped, kept = calls(3, sink)
    scheduler([running])
    scheduler([dropped, kept])
    dropped.is_cancelled = True
    instance.finish()
    assert isinstance(dropped.answer, Cancelled)
    assert instance.batches[-1] == [kept]


def test_close_refuses_new_calls_and_closes_the_instances() -> None:
    scheduler, instance, _ = make(BatchingPolicy(8))
    scheduler.close(timeout_s=0)
    sink = Settled()
    scheduler(calls(1, sink))
    assert isinstance(sink.calls[0].answer, Unavailable)
    assert instance.is_closed


def test_close_answers_what_still_waits_when_time_is_up() -> None:
    scheduler, _, _ = make(BatchingPolicy(1))
    sink = Settled()
    scheduler(calls(3, sink))
    scheduler.close(timeout_s=0)
    assert [type(call.answer) for call in sink.calls] == [Unavailable, Unavailable]


class FailingBackend:
    def execute(self, calls: Sequence[Call]) -> Sequence[InferResponse | Exception]:
        raise ValueError(f"{len(calls)} requests are too many")

    def close(self) -> None:
        pass


def test_a_backend_that_raises_fails_its_batch_with_an_error_that_names_it() -> None:
    statistics = ModelStatistics()
    scheduler = Scheduler("m", BatchQueue(BatchingPolicy(8), 100), statistics, Timers())
    scheduler.add(ThreadInstance("m_0", FailingBackend(), scheduler, statistics))
    gather = Gather(2)
    made = [Call(InferRequest("m", {}), gather) for _ in range(2)]
    scheduler(made)
    gather.wait()
    for call in made:
        assert isinstance(call.answer, Internal)
        assert "m_0 failed: ValueError" in call.answer.message
    assert statistics.counts.fail.count == 2
    scheduler.close()


class BrokenSink:
    def settle(self, calls: Sequence[Call]) -> None:
        raise RuntimeError("the client is gone")


class EchoBackend:
    def execute(self, calls: Sequence[Call]) -> Sequence[InferResponse | Exception]:
        return [InferResponse("m", "1", []) for _ in calls]

    def close(self) -> None:
        pass


def test_a_sink_that_raises_does_not_end_the_instance() -> None:
    statistics = ModelStatistics()
    scheduler = Scheduler("m", BatchQueue(None, 100), statistics, Timers())
    scheduler.add(ThreadInstance("m_0", EchoBackend(), scheduler, statistics))
    gather = Gather(1)
    good = Call(InferRequest("m", {}), gather)
    scheduler([Call(InferRequest("m", {}), BrokenSink()), good])
    gather.wait()
    assert not isinstance(good.answer, InferError)
    scheduler.close()
