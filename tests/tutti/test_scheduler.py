"""The scheduler with instances and a clock held by the test: no threads, no sleeps."""

import threading
from collections.abc import Callable, Sequence

from tests.serving import Gather
from tutti.core.errors import Cancelled, DeadlineExceeded, InferError, Internal, OutOfMemory, Unavailable
from tutti.core.types import Call, InferRequest, InferResponse, now_ns, settle
from tutti.observing.statistics import ModelStatistics
from tutti.repository.policies import BatchingPolicy
from tutti.scheduling.batching import BatchQueue
from tutti.scheduling.cost import Costs
from tutti.scheduling.ordering import InOrder
from tutti.scheduling.scheduler import Scheduler
from tutti.scheduling.thread_instance import ThreadInstance


class HeldInstance:
    """Keeps its batch until the test lets it finish."""

    def __init__(self, scheduler: Scheduler, costs: Costs | None = None, rank: int = 0) -> None:
        self.scheduler = scheduler
        self.rank = rank
        self.ahead = 0
        self.costs = costs or Costs()
        self.batches: list[list[Call]] = []
        self.is_closed = False

    def ahead_ns(self, at_ns: int) -> int:
        return self.ahead

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
    runs_inline = False
    kind = "cpu"

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
    runs_inline = False
    kind = "cpu"

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


MS = 1_000_000


def learned(rows: int, ms: int) -> Costs:
    costs = Costs()
    for _ in range(20):
        costs.record(None, rows, ms * MS)
    return costs


def with_deadline(call: Call, ms: int) -> Call:
    call.deadline_ns = now_ns() + ms * MS
    return call


def test_what_cannot_finish_in_time_is_refused_at_once_and_says_why() -> None:
    scheduler, instance, _ = make(BatchingPolicy(4))
    instance.costs = learned(4, 1000)
    sink = Settled()
    first, *queued = calls(5, sink)
    scheduler([first, *queued])
    in_time, late = (with_deadline(call, ms) for call, ms in zip(calls(2, sink), (60_000, 1500), strict=True))
    scheduler([late])
    assert sink.calls == [late]
    assert isinstance(late.answer, Unavailable)
    assert "1500 ms are left" in late.answer.message or "1499 ms are left" in late.answer.message
    scheduler([in_time])
    assert sink.calls == [late], "what can finish in time waits"


def test_an_idle_instance_tries_whatever_is_known() -> None:
    """Otherwise one slow execution would keep a model from ever being tried again."""
    scheduler, instance, _ = make(BatchingPolicy(4))
    instance.costs = learned(1, 1000)
    call = with_deadline(calls(1, Settled())[0], 2000)
    scheduler([call])
    assert instance.batches == [[call]]


def test_a_deadline_that_has_passed_is_answered_so() -> None:
    scheduler, _, _ = make(BatchingPolicy(4))
    sink = Settled()
    scheduler([with_deadline(calls(1, sink)[0], -1)])
    assert [type(call.answer) for call in sink.calls] == [DeadlineExceeded]


def test_a_deadline_that_passes_in_the_queue_is_answered_though_no_instance_is_free() -> None:
    scheduler, _, timers = make(BatchingPolicy(4))
    sink = Settled()
    scheduler(calls(1, Settled()))
    waiting = with_deadline(calls(1, sink)[0], 20)
    scheduler([waiting])
    threading.Event().wait(0.03)
    timers.waiting.pop()()
    assert isinstance(waiting.answer, DeadlineExceeded)


def test_a_slow_instance_is_left_idle_while_a_quick_one_will_be_done_earlier() -> None:
    scheduler = Scheduler("m", BatchQueue(BatchingPolicy(4), 100), ModelStatistics(), Timers())
    quick, slow = HeldInstance(scheduler, learned(4, 100)), HeldInstance(scheduler, learned(4, 10_000))
    scheduler.add(slow)
    scheduler.add(quick)
    sink = Settled()
    made = calls(5, sink)
    scheduler(made)
    assert (len(quick.batches), len(slow.batches)) == (1, 0)
    quick.finish()
    assert (len(quick.batches), len(slow.batches)) == (2, 0)


def test_a_slow_instance_helps_where_the_queue_is_long() -> None:
    scheduler = Scheduler("m", BatchQueue(BatchingPolicy(4), 1000), ModelStatistics(), Timers())
    quick, slow = HeldInstance(scheduler, learned(4, 100)), HeldInstance(scheduler, learned(4, 1000))
    scheduler.add(slow)
    scheduler.add(quick)
    scheduler(calls(100, Settled()))
    assert (len(quick.batches), len(slow.batches)) == (1, 1)


def ranked(spill: float, *others: Costs) -> tuple[Scheduler, HeldInstance, list[HeldInstance]]:
    """A preferred instance, and those that may help out."""
    scheduler = Scheduler("m", BatchQueue(BatchingPolicy(4), 1000), ModelStatistics(), Timers(), spill)
    preferred = HeldInstance(scheduler, learned(4, 100))
    helpers = [HeldInstance(scheduler, costs, rank=1) for costs in others]
    for instance in (*helpers, preferred):
        scheduler.add(instance)
    return scheduler, preferred, helpers


def test_one_that_is_preferred_is_taken_while_it_is_free_though_another_is_quicker() -> None:
    scheduler, preferred, (helper,) = ranked(1.0, learned(4, 10))
    scheduler(calls(4, Settled()))
    assert (len(preferred.batches), len(helper.batches)) == (1, 0)


def test_others_help_out_within_their_share_where_the_preferred_one_is_late() -> None:
    scheduler, preferred, helpers = ranked(0.5, *[learned(4, 200)] * 4)
    scheduler(calls(100, Settled()))
    assert len(preferred.batches) == 1
    assert sum(len(one.batches) for one in helpers) == 2
    next(one for one in helpers if one.batches).finish()
    assert sum(len(one.batches) for one in helpers) == 3


def test_others_do_not_help_out_where_they_may_not() -> None:
    scheduler, preferred, (helper,) = ranked(0.0, learned(4, 10))
    scheduler(calls(100, Settled()))
    assert (len(preferred.batches), len(helper.batches)) == (1, 0)


def test_without_a_preferred_one_the_others_take_all() -> None:
    scheduler, preferred, (helper,) = ranked(0.0, learned(4, 10))
    scheduler.remove(preferred)
    scheduler(calls(4, Settled()))
    assert len(helper.batches) == 1


def test_what_waits_goes_elsewhere_when_the_instance_it_waited_for_is_removed() -> None:
    scheduler, preferred, (helper,) = ranked(0.0, learned(4, 10))
    sink = Settled()
    made = calls(8, sink)
    scheduler(made)
    assert (len(preferred.batches), len(helper.batches)) == (1, 0)
    scheduler.remove(preferred)
    assert helper.batches == [made[4:]]
    preferred.finish()
    helper.finish()
    assert len(sink.calls) == 8
    scheduler(calls(1, Settled()))
    assert (len(preferred.batches), len(helper.batches)) == (1, 2), "it gets no more"
    scheduler.close(timeout_s=0.0)


def test_an_unknown_helper_is_tried_once_and_only_in_need() -> None:
    scheduler, preferred, (first, second) = ranked(1.0, Costs(), Costs())
    scheduler(calls(8, Settled()))
    assert (len(preferred.batches), len(first.batches) + len(second.batches)) == (1, 0)
    scheduler(calls(40, Settled()))
    assert len(first.batches) + len(second.batches) == 1


def test_of_equal_instances_the_one_with_less_before_it_is_taken() -> None:
    scheduler = Scheduler("m", BatchQueue(BatchingPolicy(4), 1000), ModelStatistics(), Timers())
    one, other = HeldInstance(scheduler, learned(4, 100)), HeldInstance(scheduler, learned(4, 100))
    one.ahead = 50_000_000
    scheduler.add(other)
    scheduler.add(one)
    scheduler(calls(1, Settled()))
    assert (len(one.batches), len(other.batches)) == (0, 1)


def test_waiting_calls_can_be_refused() -> None:
    scheduler, instance, _ = make(BatchingPolicy(4))
    scheduler(calls(4, Settled()))
    sink = Settled()
    scheduler(calls(3, sink))
    scheduler.refuse_waiting(Unavailable("nobody is there"))
    assert [str(call.answer) for call in sink.calls] == ["nobody is there"] * 3
    instance.finish()
    assert len(instance.batches) == 1


class SmallDevice:
    """Fails for batches of more than two requests, as a device with little memory does."""

    runs_inline = False
    kind = "gpu"

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def execute(self, calls: Sequence[Call]) -> Sequence[InferResponse | Exception]:
        self.sizes.append(len(calls))
        if len(calls) > 2:
            raise OutOfMemory("the device has no room")
        return [InferResponse("m", "1", []) for _ in calls]

    def close(self) -> None:
        pass


def test_out_of_memory_halves_the_batch_and_fails_nobody() -> None:
    statistics, device = ModelStatistics(), SmallDevice()
    waiting = BatchQueue(BatchingPolicy(8), 1000)
    scheduler = Scheduler("m", waiting, statistics, Timers())
    gather = Gather(16)
    made = [Call(InferRequest("m", {}), gather) for _ in range(16)]
    scheduler(made)
    scheduler.add(ThreadInstance("m_0", device, scheduler, statistics))
    gather.wait()
    assert not any(isinstance(call.answer, InferError) for call in made)
    assert device.sizes[:4] == [8, 4, 2, 2]
    assert waiting.limit.rows == 2
    scheduler.close()


class InlineBackend(EchoBackend):
    runs_inline = True

    def __init__(self) -> None:
        self.threads: list[str] = []

    def execute(self, calls: Sequence[Call]) -> Sequence[InferResponse | Exception]:
        self.threads.append(threading.current_thread().name)
        return super().execute(calls)


def test_what_is_known_to_be_quick_runs_in_the_callers_thread() -> None:
    statistics, backend = ModelStatistics(), InlineBackend()
    scheduler = Scheduler("m", BatchQueue(BatchingPolicy(8), 100), statistics, Timers())
    scheduler.add(ThreadInstance("m_0", backend, scheduler, statistics))
    for _ in range(3):
        gather = Gather(1)
        scheduler([Call(InferRequest("m", {}), gather)])
        gather.wait()
        scheduler_is_free = threading.Event()
        scheduler_is_free.wait(0.01)
    assert backend.threads == ["m_0", threading.current_thread().name, threading.current_thread().name]
    scheduler.close()


def test_order_is_kept_where_a_settling_submits_again() -> None:
    """As an ensemble does that uses one model twice."""
    answered: list[str] = []

    class Ensemble:
        def settle(self, calls: Sequence[Call]) -> None:
            for call in calls:
                answered.append(call.request.id)
                if call.request.id == "first":
                    ordered([Call(InferRequest("m", {}, id="second"), self)])

    def at_once(calls: Sequence[Call]) -> None:
        for call in calls:
            call.finish(InferResponse("m", "1", []))

    ordered = InOrder(at_once)
    done = threading.Thread(target=lambda: ordered([Call(InferRequest("m", {}, id="first"), Ensemble())]), daemon=True)
    done.start()
    done.join(5)
    assert answered == ["first", "second"]


def test_an_answer_that_cannot_be_handed_over_holds_up_no_other() -> None:
    """Those behind it have their answers already, and no other call may come that would hand them over."""
    gather = Gather(1)

    class Broken:
        def settle(self, calls: Sequence[Call]) -> None:
            raise RuntimeError("nobody there")

    def backwards(calls: Sequence[Call]) -> None:
        for call in reversed(calls):
            call.finish(InferResponse("m", "1", []))

    InOrder(backwards)([Call(InferRequest("m", {}), Broken()), Call(InferRequest("m", {}), gather)])
    gather.wait()
