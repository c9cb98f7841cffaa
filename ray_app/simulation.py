"""Routing and scaling in simulated time, by the gateway's own code and Serve's own arithmetic.

Each request goes through the router, the schedulers and the meters that gateways use; what is not real are the clock,
the network, and the replicas, which take the time that the scenario says.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Sequence

import numpy as np

from tutti.core import types
from tutti.core.types import Call, Infer, InferRequest, InferResponse, Tensor
from tutti.observing.statistics import ModelStatistics
from tutti.ray_app import virtual_time
from tutti.ray_app.fallback import FALLBACK, of_model
from tutti.ray_app.router import Router
from tutti.ray_app.scenario import Load, Scenario
from tutti.ray_app.simulated_deployment import KEY, MODEL, Deployment
from tutti.ray_app.simulation_result import Result
from tutti.repository import config
from tutti.repository.model_config import ModelConfig
from tutti.serving import local

Tell = Callable[[float], None]
"""(the share of the time that is simulated, from 0 to 1) -> nothing."""

# Serve's controller looks this often.
_CONTROL_S = 0.1


class _Sink:
    """Takes answers, and how long they took."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.took_s: list[float] = []
        self.failed = 0
        self._loop = loop

    def settle(self, calls: Sequence[Call]) -> None:
        now = self._loop.time()
        for call in calls:
            if isinstance(call.answer, InferResponse):
                self.took_s.append(now - call.token)
            else:
                self.failed += 1


def model_config(scenario: Scenario) -> ModelConfig:
    """The configuration of the scenario's model, which the gateway's code goes by."""
    backend = "onnxruntime" if scenario.merges else "python"
    text = f"""
        backend: "{backend}" max_batch_size: {scenario.max_batch_size} dynamic_batching {{}}
        input {{ name: "x" data_type: TYPE_FP32 dims: 1 }} output {{ name: "y" data_type: TYPE_FP32 dims: 1 }}
        parameters {{ key: "{FALLBACK}" value {{ string_value: "{scenario.fallback}" }} }}
    """
    return config.parse(text, MODEL)


def simulate(scenario: Scenario, progress: Tell = lambda _share: None) -> Result:
    """Every request of it, telling the share that is done. Not for many: a few tens of thousands take a second."""
    logging.disable(logging.WARNING)  # nobody wants to read of simulated replicas that come and go
    try:
        return virtual_time.run(lambda: _simulate(scenario, scenario.load(), progress))
    finally:
        logging.disable(logging.NOTSET)


async def _simulate(scenario: Scenario, load: Load, progress: Tell) -> Result:
    loop = asyncio.get_running_loop()
    deployments = {spec.name: Deployment(spec, scenario, loop) for spec in scenario.pools}
    pools = [deployment.pool for deployment in deployments.values()]
    router = Router(pools, loop)

    def watch(name: str, changed: Callable[[list[str], str], None]) -> None:
        deployments[name].changed = changed
        changed(list(deployments[name].replicas), "")

    router.start(watch)
    way = of_model(model_config(scenario), KEY, router, pools, ModelStatistics(), local.loop_timer(loop))
    sink = _Sink(loop)
    result = Result(load.seconds)
    await asyncio.sleep(1.0)  # until the router knows its replicas
    start_s = loop.time()
    controlling = loop.create_task(_control_forever(list(deployments.values()), load.seconds, result, progress))
    await _send_all(scenario, load, way, sink, result)
    while len(sink.took_s) + sink.failed < result.requests:
        await asyncio.sleep(0.1)
    await asyncio.sleep(max(0.0, start_s + load.seconds - loop.time()))
    controlling.cancel()
    result.row_s = way.demand().row_s
    router.stop()
    result.latencies.add(np.array(sink.took_s))
    result.failed = sink.failed
    result.fallbacks = sum(pool.status.fallbacks for pool in pools)
    return result


async def _control_forever(deployments: Sequence[Deployment], seconds: float, result: Result, progress: Tell) -> None:
    """What Serve's controller does; notes replicas while the load lasts, and tells the share of it that is over."""
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    while True:
        elapsed_s = loop.time() - start_s
        progress(min(1.0, elapsed_s / max(seconds, 1e-9)))
        for deployment in deployments:
            deployment.control()
            noted_s = _CONTROL_S if elapsed_s < seconds else 0.0
            result.note(deployment.spec.name, len(deployment.replicas), noted_s)
        await asyncio.sleep(_CONTROL_S)


async def _send_all(scenario: Scenario, load: Load, way: Infer, sink: _Sink, result: Result) -> None:
    """Send every request at its time."""
    loop = asyncio.get_running_loop()
    rng = random.Random(scenario.seed)
    start_s = loop.time()
    requests = {
        rows: InferRequest(MODEL, {"x": Tensor.of("x", np.zeros((rows, 1), np.float32))}, signature=rows)
        for rows in scenario.rows
    }
    for second in load.arrivals(rng):
        if start_s + second > loop.time():
            await asyncio.sleep(start_s + second - loop.time())
        rows = rng.choice(scenario.rows)
        call = Call(requests[rows], sink, start_s + second)
        call.rows = rows
        call.arrived_ns = types.now_ns()
        if scenario.deadline_s:
            call.deadline_ns = call.arrived_ns + int(scenario.deadline_s * 1e9)
        result.requests += 1
        way([call])
