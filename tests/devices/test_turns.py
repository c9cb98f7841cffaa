"""Turns beside batches: whose is next, what is counted, and what becomes of those who wait."""

import heapq
import threading
from typing import Any

import pytest

from tests.devices.driving import COSTS, MS, batch_job, simulated
from tutti.core.errors import DeviceLost
from tutti.devices import device_turns
from tutti.devices.device_turns import HeldTurn, TurnTaker
from tutti.devices.executions import Executions
from tutti.devices.pipeline import Batch, Execution, Pipeline, Turn


class Sharing:
    """One user with turns and one with batches, each always with work, on a device that does one thing at a time."""

    def __init__(self, weight: float) -> None:
        self.executions = Executions(lambda batch: True)
        owner: Any = None
        self.own_code = Pipeline(owner, "own code", weight, 0, 0)
        self.batches = Pipeline(owner, "batches", 1.0, 0, 0)
        self.took_ns = {self.own_code: 0, self.batches: 0}
        self._lasts_ns = {self.own_code: 20 * MS, self.batches: 2 * MS}
        self._now_ns = self._end_ns = 0
        self._ends: list[tuple[int, int, Execution]] = []
        for pipeline in self.took_ns:
            self.executions.add(pipeline)
            self._ask(pipeline)

    def run(self, until_ns: int) -> None:
        while self._now_ns < until_ns:
            decision = self.executions.next(self._now_ns, is_shared=True)
            if isinstance(decision, int):
                if self._ends and (not decision or self._ends[0][0] <= decision):
                    self._end()
                else:
                    self._now_ns = decision
                continue
            pipeline = decision.pipeline
            self.executions.grant(decision, self._now_ns, 0)
            self._end_ns = max(self._now_ns, self._end_ns) + self._lasts_ns[pipeline]
            heapq.heappush(self._ends, (self._end_ns, id(decision), decision))
            self._ask(pipeline)

    def _ask(self, pipeline: Pipeline) -> None:
        job: Any = None
        if pipeline is self.own_code:
            pipeline.turns.append(Turn(pipeline))
        else:
            batch = Batch(pipeline, job, self._now_ns)
            batch.expected_ns = pipeline.execution.mean_ns(1)
            pipeline.staged.append(batch)
        self.executions.ask(pipeline)

    def _end(self) -> None:
        self._now_ns, _, execution = heapq.heappop(self._ends)
        lasted_ns = self._lasts_ns[execution.pipeline]
        execution.pipeline.execution.record(1, lasted_ns)
        self.executions.ended(execution, lasted_ns, self._now_ns)
        self.took_ns[execution.pipeline] += lasted_ns


@pytest.mark.parametrize(("weight", "share"), [(1.0, 0.5), (2.0, 2 / 3)])
def test_turns_and_batches_share_by_device_time(weight: float, share: float) -> None:
    sharing = Sharing(weight)
    sharing.run(4000 * MS)
    assert sharing.took_ns[sharing.own_code] / sum(sharing.took_ns.values()) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(("turn_ms", "busy_ms"), [(10, 10.0), (2, 3.2)])
def test_time_that_a_turn_and_a_batch_have_together_is_busy_once(turn_ms: int, busy_ms: float) -> None:
    """The batch, staged in 1.2 ms, is launched beside the turn: nobody knows yet how long that takes."""
    device, engine, _ = simulated(COSTS)
    turn = engine.begin_turn(engine.pipeline("own code"))
    engine.pipeline("batches").submit(batch_job(device))
    device.timeline.run(turn_ms * MS)
    engine.end_turn(turn)
    device.timeline.run(20 * MS)
    assert engine.model_ns == {"own code": turn_ms * MS, "batches": 2 * MS}
    assert engine.busy_ns == pytest.approx(busy_ms * MS, abs=0.05 * MS)


def test_a_failure_that_others_report_ends_what_waits() -> None:
    device, engine, health = simulated(COSTS)
    job = batch_job(device)
    engine.pipeline("model").submit(job)
    device.timeline.run(2 * MS)
    health.fail("simulated:1", "another")
    assert not engine.lost
    health.fail("simulated:0", "told from outside")
    assert engine.lost == "told from outside"
    assert len(job.failures) == 1 and isinstance(job.failures[0], DeviceLost)
    with pytest.raises(DeviceLost, match="told from outside"):
        engine.begin_turn(engine.pipeline("late"))
    engine.close()
    health.fail("simulated:2", "nobody listens any more")


def held(folder: str = "/models/m/1") -> tuple[HeldTurn, Any]:
    _, engine, _ = simulated(COSTS)
    return HeldTurn(engine, engine.pipeline("m"), folder), engine


def is_granted(engine: Any) -> bool:
    return bool(engine._executions.granted)


def test_of_several_that_wait_the_last_asks_again() -> None:
    turn, engine = held()
    turn.begin()
    turn.give_up()
    turn.give_up()
    assert not is_granted(engine)
    turn.ask_again()
    assert not is_granted(engine)
    turn.ask_again()
    assert is_granted(engine)
    turn.end()
    assert not is_granted(engine)


def test_who_waits_longer_than_the_execution_asks_for_nothing() -> None:
    turn, engine = held()
    turn.begin()
    turn.give_up()
    turn.end()
    turn.ask_again()
    assert not is_granted(engine)


def test_a_turn_that_comes_too_late_is_given_back() -> None:
    """The execution ends while another of its threads waits for the turn."""
    turn, engine = held()
    turn.begin()
    turn.give_up()
    others = [engine.begin_turn(engine.pipeline("other")) for _ in range(2)]
    asking = threading.Thread(target=turn.ask_again)
    asking.start()
    while not turn._pipeline.turns:
        threading.Event().wait(0.001)
    turn.end()
    for other in others:
        engine.end_turn(other)
    asking.join(30)
    assert not asking.is_alive() and not is_granted(engine)


def test_threads_of_an_execution_that_ask_at_a_time_need_one_turn_for_all() -> None:
    turn, engine = held()
    turn.begin()
    others = []
    asking = []
    for _ in range(3):
        turn.give_up()
        while len(others) < 2:
            others.append(engine.begin_turn(engine.pipeline("other")))
        asking.append(threading.Thread(target=turn.ask_again))
        asking[-1].start()
        while not turn._is_asking:
            threading.Event().wait(0.001)
    engine.end_turn(others.pop())  # the other goes on, maybe until the last of them has its turn
    for thread in asking:
        thread.join(30)
        assert not thread.is_alive()
    turn.end()
    engine.end_turn(others.pop())
    assert not is_granted(engine)


def test_a_model_that_is_known_to_hold_none_takes_none_from_others() -> None:
    _, engine, _ = simulated(COSTS)
    taker = TurnTaker(engine, engine.pipeline("m"), "/models/m/1")
    device_turns.know("/models/other/1")
    code = "def wait(enter):\n    with enter():\n        return check()\n"
    device_turns.know("/models/m/1")
    seen: list[bool] = []
    for folder, is_kept in (("/models/other/1", True), ("/models/m/1", False), ("/somewhere", False)):
        names: dict[str, Any] = {"check": lambda: seen.append(is_granted(engine))}
        exec(compile(code, f"{folder}/model.py", "exec"), names)
        with taker.turn():
            thread = threading.Thread(target=names["wait"], args=(device_turns.given_up,))
            thread.start()
            thread.join(30)
            assert seen.pop() == is_kept
            assert is_granted(engine) == is_kept, "it goes on without"
