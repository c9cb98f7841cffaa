"""Simulated time: the same routing and scaling as on a cluster, in less of it."""

import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tutti.app.cli import main
from tutti.core.types import now_ns
from tutti.ray_app.fluid_simulation import simulate_fluid
from tutti.ray_app.scenario import Bursts, Scenario, Stretch
from tutti.ray_app.simulated_controller import Controller
from tutti.ray_app.simulation import simulate
from tutti.ray_app.simulation_result import Latencies

POOL: dict[str, Any] = {"name": "gpu", "replicas": 1, "fixed_ms": 30, "row_ms": 4, "hop_ms": 4, "start_s": 3}
ELASTIC = {**POOL, "replicas": None, "min_replicas": 1, "max_replicas": 4}
# One replica does 16 rows in 94 ms.
MOST_PER_S = 16 / 0.094


def scenario(*trace: Stretch, pools: list[Any] | None = None, **more: Any) -> Scenario:
    return Scenario(pools=[POOL] if pools is None else pools, trace=list(trace), merges=False, **more)


def steady(rate: float, seconds: float = 30) -> Stretch:
    return Stretch(seconds=seconds, rate=rate)


def test_latencies_are_kept_within_a_percent() -> None:
    found = Latencies()
    found.add(np.arange(1, 1001) / 1000)
    assert found.quantile(0.5) == pytest.approx(0.5, rel=0.012)
    assert found.quantile(0.99) == pytest.approx(0.99, rel=0.012)
    assert math.isnan(Latencies().quantile(0.5))


def test_requests_come_at_their_rates() -> None:
    load = scenario(
        Stretch(seconds=100, rate=10),
        Stretch(kind="ramp", seconds=100, rate=10, to=30),
        Stretch(kind="wave", seconds=100, rate=0, to=40),
        bursts=Bursts(every_s=300, seconds=50, factor=2),
    ).load()
    assert [load.rate(second) for second in (50, 150, 250)] == [10, 20, pytest.approx(80)]
    arrivals = list(load.arrivals(random.Random(1)))
    assert len([one for one in arrivals if one < 100]) == pytest.approx(1000, rel=0.15)
    assert len([one for one in arrivals if 100 <= one < 200]) == pytest.approx(2000, rel=0.1)
    assert arrivals == sorted(arrivals)


def test_a_lonely_request_takes_what_it_must() -> None:
    found = simulate(scenario(steady(0.5, 100)))
    assert found.latencies.quantile(0.5) == pytest.approx(0.038, rel=0.02), "30 + 4 + 4 ms"
    assert found.replica_s == {"gpu": pytest.approx(100, rel=0.02)}


def test_four_replicas_share_the_work_from_the_first_request_on() -> None:
    """None is given more than a batch of what others are free for, though nothing is known of any at first."""
    found = simulate(scenario(steady(0.7 * 4 * MOST_PER_S, 20), pools=[{**POOL, "replicas": 4}]))
    assert found.failed == 0
    assert found.latencies.quantile(0.5) < 0.16
    assert found.latencies.quantile(0.99) < 0.25


def test_replicas_follow_a_step_and_go_again() -> None:
    trace = steady(30, 30), steady(250, 60), steady(0, 60)
    found = simulate(scenario(*trace, pools=[{**ELASTIC, "min_replicas": 0}]))
    assert found.failed == 0
    assert found.most["gpu"] in (3, 4), "one more while those who came during the start are served"
    assert found.latencies.quantile(1.0) < 8, "a replica starts within 3 s"
    assert found.replica_s["gpu"] < 30 + 3 * 60 + 3 * 20


def test_a_lower_pool_answers_while_the_first_has_none() -> None:
    late = {**ELASTIC, "min_replicas": 0, "start_s": 10}
    cpu = {**POOL, "name": "cpu", "fixed_ms": 60}
    found = simulate(scenario(steady(20), pools=[late, cpu]))
    assert 100 < found.fallbacks < 350
    assert found.latencies.quantile(0.99) < 0.5
    found = simulate(scenario(steady(20), pools=[late, cpu], fallback="never"))
    assert found.fallbacks == 0
    assert found.latencies.quantile(0.99) > 5


def test_deadlines_that_cannot_be_met_are_refused() -> None:
    found = simulate(scenario(steady(2 * MOST_PER_S, 10), deadline_s=0.5))
    assert found.failed / found.requests == pytest.approx(0.5, abs=0.12)
    assert found.latencies.quantile(0.99) < 0.6


def test_by_half_seconds_comes_to_the_same() -> None:
    given = scenario(
        Stretch(kind="wave", seconds=100, rate=20, to=500), steady(60, 60), pools=[ELASTIC], rows=[1, 1, 2], seed=3
    )
    exact, fluid = simulate(given), simulate_fluid(given)
    assert fluid.requests == pytest.approx(exact.requests, rel=0.03)
    assert fluid.replica_s["gpu"] == pytest.approx(exact.replica_s["gpu"], rel=0.1)
    assert fluid.latencies.quantile(0.5) == pytest.approx(exact.latencies.quantile(0.5), rel=0.1)
    assert fluid.latencies.quantile(0.95) == pytest.approx(exact.latencies.quantile(0.95), rel=0.2)


def test_many_replicas_and_much_time() -> None:
    pool = {**POOL, "replicas": None, "min_replicas": 10, "max_replicas": 10_000, "start_s": 60}
    hours = scenario(Stretch(kind="wave", seconds=4 * 3600, rate=1000, to=1_000_000), pools=[pool])
    found = simulate_fluid(hours)
    assert found.most["gpu"] == pytest.approx(1_000_000 / MOST_PER_S / 0.7, rel=0.05)
    assert found.failed == 0


def test_the_clock_is_real_again_afterwards() -> None:
    simulate(scenario(steady(10, 5)))
    assert abs(now_ns() - time.monotonic_ns()) < 1e9


def test_serves_delays_are_those_of_simulated_time() -> None:
    controller = Controller(Scenario(pools=[ELASTIC], trace=[]).pools[0])
    assert controller.decide(0.0, {"a": 3.2}, 1) == 4, "at once"
    assert controller.decide(1.0, {"a": 0.5}, 4) == 4
    assert controller.decide(15.0, {"a": 0.5}, 4) == 4
    assert controller.decide(16.5, {"a": 0.5}, 4) == 1, "after 15 s"
    assert controller.decide(17.0, {}, 1) == 1, "nobody has told anything"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [20]}, "expected 1 to max_batch_size"),
        ({"pools": []}, "at least 1 item"),
        ({"pools": [{**POOL, "row_ms": 0}]}, "greater than 0"),
        ({"trace": [{"seconds": 1, "rate": 1, "speed": 3}]}, "Extra inputs"),
    ],
)
def test_scenarios_that_are_none(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Scenario(**{"pools": [POOL], "trace": [], **changes})


SCENARIO = """
pools: [{name: gpu, min_replicas: 1, max_replicas: 4, fixed_ms: 30, row_ms: 4}]
trace: TRACE
"""


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, trace = tmp_path / "scenario.yaml", tmp_path / "trace.csv"
    trace.write_text("0,10\n20,40\n30,0\n")
    file.write_text(SCENARIO.replace("TRACE", str(trace)))
    for flags in ([], ["--fluid"]):
        assert main(["cluster", "simulate", str(file), *flags]) == 0
        said = capsys.readouterr().out
        assert "requests in 30 s: 0 failed" in said
        assert "p99 " in said
        assert "pool 'gpu': " in said
    trace.write_text("0,10\n20,x\n")
    assert main(["cluster", "simulate", str(file)]) == 1
    assert f"{trace}:2: expected SECOND,RATE, got '20,x'" in capsys.readouterr().err
    file.write_text("pools: {}")
    assert main(["cluster", "simulate", str(file)]) == 1
    assert "trace: Field required" in capsys.readouterr().err
