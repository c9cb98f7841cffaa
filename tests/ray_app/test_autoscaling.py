"""How many replicas a pool needs, as arithmetic, and replicas that follow load on a real cluster."""

import asyncio
import itertools
import math
import random
import re
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc.aio as grpcclient

from tests.models import Repository
from tests.serving import Served, serving, wait_until
from tutti.ray_app import autoscaling
from tutti.ray_app.autoscaling import DRAIN_S, METRIC, UTILIZATION, Demand, Meter, Misses, Steady, row_s, wanted
from tutti.scheduling.cost import LatencyModel

SECOND = 1_000_000_000


def test_the_meter_counts_the_last_second() -> None:
    meter = Meter()
    for tenth in range(20):
        meter.arrived(tenth * SECOND // 10, 3)
        meter.arrived(tenth * SECOND // 10 + 1000, 2)
    assert meter.rows_per_s(19 * SECOND // 10) == pytest.approx(50, abs=5)
    assert meter.rows_per_s(5 * SECOND) == 0


def test_a_row_costs_what_it_does_in_the_largest_batch() -> None:
    model = LatencyModel()
    assert row_s(model, 16) == 0
    model.record(1, 10_000_000)
    assert row_s(model, 16) == pytest.approx(0.01), "one size tells nothing of others"
    model.record(4, 16_000_000)
    assert row_s(model, 16) == pytest.approx((10 + 15 * 2) / 16 / 1000)


def test_wanted_is_work_and_what_waits_over_what_replicas_are_to_be_busy() -> None:
    assert wanted([]) == 0
    assert wanted([Demand(0, 0, 0.01)]) == 0
    assert wanted([Demand(100, 0, 0.01)]) == pytest.approx(1 / UTILIZATION)
    assert wanted([Demand(100, 0, 0.01), Demand(0, 200, 0.01)]) == pytest.approx((1 + 2 / DRAIN_S) / UTILIZATION)
    assert wanted([Demand(5, 0, 0)]) == 1, "what is not known yet needs a replica to tell"


def test_missed_deadlines_are_work_that_was_not_seen() -> None:
    work = wanted([Demand(100, 0, 0.01)])
    assert wanted([Demand(100, 0, 0.01, late=0.01)]) == pytest.approx(1.1 * work)
    assert wanted([Demand(100, 0, 0.01, late=0.9)]) == pytest.approx(2 * work), "and not without end"


def test_misses_count_where_there_were_enough_replicas_and_fade() -> None:
    misses = Misses()
    misses.count(1 * SECOND, 0, 100, has_enough=True)
    misses.count(2 * SECOND, 50, 200, has_enough=False)
    assert misses.share == 0, "replicas were still to come"
    misses.count(3 * SECOND, 60, 300, has_enough=True)
    assert misses.share == pytest.approx(0.1)
    misses.count(4 * SECOND, 65, 305, has_enough=True)
    assert misses.share == pytest.approx(0.1, rel=0.03), "five requests tell nothing"
    misses.count(33 * SECOND, 65, 1000, has_enough=True)
    assert misses.share == pytest.approx(0.05, rel=0.03)


def test_noise_starts_no_replicas_and_steps_are_followed_at_once() -> None:
    steady, rng = Steady(), random.Random(1)
    assert steady.follow(0, 0.7) == 0.7, "from nothing at once"
    told = [steady.follow(tick * SECOND // 4, max(0.0, rng.gauss(5.8, 0.7))) for tick in range(1, 400)]
    assert told[0] > 4, "a step"
    changes = [math.ceil(one) for one in told[80:]]
    assert set(changes) <= {6, 7}
    assert sum(a != b for a, b in itertools.pairwise(changes)) < 20
    assert steady.follow(100 * SECOND, 48.0) == 48.0
    assert steady.follow(101 * SECOND, 2.0) == 2.0, "a step down"
    assert steady.follow(102 * SECOND, 0.0) == 0.0


def context(told: dict[str, float], target: int = 3) -> Any:
    return SimpleNamespace(aggregated_metrics={METRIC: told} if told else {}, target_num_replicas=target)


def test_the_policy_takes_what_the_gateways_say() -> None:
    assert autoscaling.policy(context({"a": 2.5, "b": 1.0})) == (2.5, {})
    assert autoscaling.policy(context({})) == (3, {})


SLEEPER = """
    import time
    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
    time.sleep(0.02)
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", x + 1)])
"""
# A batch of one takes 20 ms: a replica does 50 a second.
CONFIG = """
    backend: "python" max_batch_size: 1
    input { name: "x" data_type: TYPE_FP32 dims: 1 } output { name: "y" data_type: TYPE_FP32 dims: 1 }
"""


def gauge(served: Served, name: str) -> float:
    with urllib.request.urlopen(f"http://{served.metrics}/metrics", timeout=10) as page:
        found = re.search(rf'^{name}{{pool="elastic"}} (\S+)', page.read().decode(), re.MULTILINE)
    assert found
    return float(found[1])


async def load(served: Served, rate: float, replicas: int) -> list[str]:
    """Open loop, until there are so many replicas, however long a machine takes for it; returns what failed."""
    client = grpcclient.InferenceServerClient(served.grpc)
    failures: list[str] = []
    looking = asyncio.create_task(
        asyncio.to_thread(wait_until, lambda: gauge(served, "tutti_pool_replicas") >= replicas, 100)
    )

    async def ask() -> None:
        tensor = grpcclient.InferInput("x", [1, 1], "FP32")
        tensor.set_data_from_numpy(np.ones((1, 1), np.float32))
        try:
            answer = await client.infer("sleeper", [tensor], client_timeout=120)
            assert answer.as_numpy("y").tolist() == [[2.0]]
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")

    start = time.monotonic()
    tasks = set()
    for number in itertools.count():
        await asyncio.sleep(max(0.0, start + number / rate - time.monotonic()))
        tasks.add(asyncio.create_task(ask()))
        if looking.done():
            break
    await asyncio.gather(looking, *tasks)
    await client.close()
    return failures


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_replicas_follow_load_from_none_and_back(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "models")
    repository.add_python("sleeper", CONFIG, SLEEPER)
    file = tmp_path / "placement.yaml"
    file.write_text("pools: [{name: elastic, min_replicas: 0, max_replicas: 4}]")
    with serving(repository.root, tmp_path / "log", "--ray", "--placement", str(file)) as served:
        assert gauge(served, "tutti_pool_replicas") == 0
        assert asyncio.run(load(served, 15, 1)) == [], "the first wait for a replica to start"
        assert asyncio.run(load(served, 110, 3)) == []
        wait_until(lambda: gauge(served, "tutti_pool_replicas") == 0, timeout_s=90)
        assert asyncio.run(load(served, 15, 1)) == []
