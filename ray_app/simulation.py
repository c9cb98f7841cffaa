"""Routing and scaling in simulated time, by the gateway's own code and Serve's own arithmetic.

`simulate` takes each request through the router, the schedulers and the meters that gateways use; what is not real are
the clock, the network, and the replicas, which take the time that the scenario says. `simulate_fluid` goes by half
seconds: for days, and thousands of replicas. Its autoscaling is the same; how long requests take at a load it learns
from short simulations of the first kind.
"""

import asyncio
import contextlib
import logging
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from tutti.core import types, wire
from tutti.core.types import Call, InferRequest, InferResponse, Tensor
from tutti.observing.statistics import ModelStatistics
from tutti.ray_app import virtual_time
from tutti.ray_app.autoscaling import METRIC, SERVE_SETTINGS, Demand, Steady, policy, wanted
from tutti.ray_app.fallback import FALLBACK, of_model
from tutti.ray_app.members import PoolStatus
from tutti.ray_app.placement import PATIENCE_S
from tutti.ray_app.pools import Pool
from tutti.ray_app.replica import Description
from tutti.ray_app.router import Router
from tutti.ray_app.scenario import Load, Scenario, SimulatedPool, Stretch
from tutti.repository import config
from tutti.serving import local

Tell = Callable[[float], None]
"""(the share of the time that is simulated, from 0 to 1) -> nothing."""

MODEL = "model"
KEY = f"{MODEL}/1"
# Serve's controller looks this often.
_CONTROL_S = 0.1
_TICK_S = 0.5
# Loads, as shares of what replicas do at most, and numbers of replicas, for which latencies are learned.
_SHARES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
_COUNTS = (1, 2, 4, 8, 16, 32)
_LEARN_REQUESTS = 3000
_WITHOUT_QUEUE = 0.8
_QUANTILES = np.linspace(0.0025, 0.9975, 200)


class Latencies:
    """A histogram of durations between 10 us and 3 hours, in steps of 1%."""

    _LOW_S = 1e-5
    _STEP = math.log(1.01)
    _BINS = 2100

    def __init__(self) -> None:
        self.counts = np.zeros(self._BINS)

    def add(self, seconds: Any, weight: float = 1.0) -> None:
        """One duration, or an array of them."""
        bins = np.log(np.maximum(seconds, self._LOW_S) / self._LOW_S) / self._STEP
        np.add.at(self.counts, np.minimum(bins, self._BINS - 1).astype(int), weight)

    def quantile(self, share: float) -> float:
        """Seconds; nan when there is none."""
        total = self.counts.cumsum()
        if not total[-1]:
            return math.nan
        return float(self._LOW_S * math.exp((np.searchsorted(total, share * total[-1]) + 0.5) * self._STEP))


@dataclass(slots=True)
class Result:
    """What became of a scenario. `replica_s` and `most` are by pool: seconds that replicas were up, most at a time."""

    seconds: float
    requests: float = 0.0
    failed: float = 0.0
    fallbacks: float = 0.0
    latencies: Latencies = field(default_factory=Latencies)
    replica_s: dict[str, float] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)
    # What a row costs, as the gateway has learned at last; seconds.
    row_s: float = 0.0

    def lines(self) -> list[str]:
        """For people."""
        quantiles = ", ".join(
            f"p{share * 100:g} {self.latencies.quantile(share) * 1e3:.1f} ms" for share in (0.5, 0.95, 0.99)
        )
        count = max(1.0, self.requests)
        found = [
            f"{self.requests:,.0f} requests in {self.seconds:,.0f} s: {self.failed:,.0f} failed "
            f"({self.failed / count:.4%}), {self.fallbacks / count:.2%} by a fallback",
            quantiles,
        ]
        for pool, seconds in self.replica_s.items():
            mean = seconds / self.seconds
            most = self.most[pool]
            found.append(
                f"pool '{pool}': {seconds / 3600:,.2f} replica-hours, {mean:,.1f} on average, {most:,} at most"
            )
        return found

    def note(self, pool: str, up: int, for_s: float) -> None:
        self.replica_s[pool] = self.replica_s.get(pool, 0.0) + up * for_s
        self.most[pool] = max(self.most.get(pool, 0), up)


class Controller:
    """Serve's controller for one pool: our policy, then Serve's own limits and delays."""

    def __init__(self, pool: SimulatedPool) -> None:
        from ray.serve import autoscaling_policy
        from ray.serve.config import AutoscalingConfig

        self._apply: Any = autoscaling_policy._apply_default_params
        self._is_elastic = bool(pool.max_replicas)
        self._low, self._high = pool.min_replicas, pool.max_replicas
        self.target = pool.replicas if pool.replicas is not None else (pool.min_replicas if pool.max_replicas else 1)
        self._state: dict[str, Any] = {}
        self._now_s = 0.0
        if self._is_elastic:
            self._config = AutoscalingConfig(
                min_replicas=self._low, max_replicas=self._high, initial_replicas=self.target, **SERVE_SETTINGS
            )

    def decide(self, now_s: float, told: Mapping[str, float], up: int, is_called: bool = False) -> int:
        """The replicas to have, from what those `up` were told; `is_called`: requests wait, and there is none."""
        if not self._is_elastic:
            return self.target
        context: Any = SimpleNamespace(
            aggregated_metrics={METRIC: told} if told else {},
            target_num_replicas=self.target,
            current_num_replicas=up,
            config=self._config,
        )
        desired, _ = policy(context)
        with _time_is(now_s):
            decided, self._state = self._apply(desired, context, self._state)
        if is_called and not self.target:
            decided = max(1, decided)
        self.target = min(max(decided, self._low), self._high)
        return self.target


@contextlib.contextmanager
def _time_is(now_s: float) -> Iterator[None]:
    """Serve's delays go by time.time()."""
    from ray.serve import autoscaling_policy

    real: Any = autoscaling_policy.time
    autoscaling_policy.time = SimpleNamespace(time=lambda: now_s)  # type: ignore[assignment]
    try:
        yield
    finally:
        autoscaling_policy.time = real


class _Message:
    """A hop's batch inside a replica."""

    __slots__ = ("done", "left")

    def __init__(self, left: int, done: "asyncio.Future[None]") -> None:
        self.left = left
        self.done = done


class _Replica:
    """Executes requests in their order, as many rows at a time as the model takes."""

    def __init__(self, name: str, pool: SimulatedPool, most_rows: int, loop: asyncio.AbstractEventLoop) -> None:
        self.name = name
        self.told: deque[tuple[float, float]] = deque()
        self._pool = pool
        self._most_rows = most_rows
        self._loop = loop
        self._waiting: deque[tuple[int, _Message]] = deque()
        self._is_busy = False

    async def execute(self, rows: Sequence[int]) -> None:
        message = _Message(len(rows), self._loop.create_future())
        self._waiting.extend((count, message) for count in rows)
        if not self._is_busy:
            self._next()
        await message.done

    def _next(self) -> None:
        batch: list[_Message] = []
        rows = 0
        while self._waiting and rows + self._waiting[0][0] <= self._most_rows:
            count, message = self._waiting.popleft()
            rows += count
            batch.append(message)
        self._is_busy = bool(batch)
        if batch:
            self._loop.call_later(self._pool.batch_s(rows), self._done, batch)

    def _done(self, batch: Sequence[_Message]) -> None:
        for message in batch:
            message.left -= 1
            if not message.left and not message.done.done():
                message.done.set_result(None)
        self._next()


class _Deployment:
    """What a Serve handle of a pool would be, over simulated replicas."""

    def __init__(self, spec: SimulatedPool, scenario: Scenario, loop: asyncio.AbstractEventLoop) -> None:
        self.spec = spec
        self.replicas: dict[str, _Replica] = {}
        self.controller = Controller(spec)
        self.pool = Pool(
            PoolStatus(spec.name),
            SimpleNamespace(remote=self._infer),
            describe=SimpleNamespace(remote=self._describe),
            apply=SimpleNamespace(remote=self._apply),
            broadcast=lambda _: SimpleNamespace(results_async=self._nothing),
            may_be_empty=bool(spec.max_replicas) and not spec.min_replicas,
            patience_s=120.0 if spec.max_replicas and not spec.min_replicas else PATIENCE_S,
        )
        self.changed: Callable[[list[str], str], None] = lambda *_: None
        self._most_rows = scenario.max_batch_size
        self._loop = loop
        self._starting = 0
        self._made = 0
        self._is_called = False
        self._answers: dict[tuple[int, ...], wire.AnswerMessage] = {}
        for _ in range(self.controller.target):
            self._started(is_first=True)

    def _started(self, is_first: bool = False) -> None:
        if not is_first:
            self._starting -= 1
            if len(self.replicas) >= self.controller.target:
                return  # it is not wanted any more
        self._made += 1
        name = f"{self.spec.name}-{self._made}"
        self.replicas[name] = _Replica(name, self.spec, self._most_rows, self._loop)
        self.changed(list(self.replicas), "")

    def control(self) -> None:
        """What Serve's controller does each time it looks."""
        now = self._loop.time()
        told = {}
        for name, replica in self.replicas.items():
            while replica.told and now - replica.told[0][0] > SERVE_SETTINGS["look_back_period_s"]:
                replica.told.popleft()
            if replica.told:
                told[name] = sum(value for _, value in replica.told) / len(replica.told)
        target = self.controller.decide(now, told, len(self.replicas), self._is_called)
        self._is_called = False
        for _ in range(target - len(self.replicas) - self._starting):
            self._starting += 1
            self._loop.call_later(self.spec.start_s, self._started)
        if len(self.replicas) > target:
            for name in list(self.replicas)[target:]:
                del self.replicas[name]
            self.changed(list(self.replicas), "")

    async def _infer(self, message: wire.BatchMessage, generation: int, to: str = "") -> wire.AnswerMessage | str:
        await asyncio.sleep(self.spec.hop_ms / 2e3)
        replica = self.replicas.get(to)
        if replica is None:
            return wire.GONE
        rows = tuple(head[3][0][2][0] for head in message[2])
        await replica.execute(rows)
        await asyncio.sleep(self.spec.hop_ms / 2e3)
        return self._answer(rows)

    def _answer(self, rows: tuple[int, ...]) -> wire.AnswerMessage:
        known = self._answers.get(rows)
        if known is None:
            zeros = [Tensor.of("y", np.zeros((count, 1), np.float32)) for count in rows]
            known = wire.pack_answers([InferResponse(MODEL, "1", [one]) for one in zeros])
            if len(self._answers) < 1000:
                self._answers[rows] = known
        heads: list[Any] = [(name, version, {}, tensors, is_null) for name, version, _, tensors, is_null in known[0]]
        return heads, known[1]

    async def _describe(self, to: str = "", wanted: float = 0.0, by: str = "") -> Description:
        if not to:
            self._is_called = True
            await asyncio.sleep(self.pool.patience_s)
        replica = self.replicas.get(to)
        if replica is None:
            return Description("", "", (), 0)
        replica.told.append((self._loop.time(), wanted))
        return Description(to, to, (KEY,), 0)

    async def _apply(self, *_: object, **__: object) -> str:
        return ""

    async def _nothing(self) -> None:
        return


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


def model_config(scenario: Scenario) -> config.ModelConfig:
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
    logging.disable(logging.WARNING)  # of replicas that come and go
    try:
        return virtual_time.run(lambda: _simulate(scenario, scenario.load(), progress))
    finally:
        logging.disable(logging.NOTSET)


async def _simulate(scenario: Scenario, load: Load, progress: Tell) -> Result:
    loop = asyncio.get_running_loop()
    rng = random.Random(scenario.seed)
    deployments = {spec.name: _Deployment(spec, scenario, loop) for spec in scenario.pools}
    pools = [one.pool for one in deployments.values()]
    router = Router(pools, loop)

    def watch(name: str, changed: Callable[[list[str], str], None]) -> None:
        deployments[name].changed = changed
        changed(list(deployments[name].replicas), "")

    router.start(watch)
    way = of_model(model_config(scenario), KEY, router, pools, ModelStatistics(), local.loop_timer(loop))
    sink = _Sink(loop)
    result = Result(load.seconds)
    await asyncio.sleep(1.0)  # until the router knows its replicas
    start = loop.time()

    async def control() -> None:
        while True:
            progress(min(1.0, (loop.time() - start) / max(load.seconds, 1e-9)))
            for one in deployments.values():
                one.control()
                result.note(one.spec.name, len(one.replicas), _CONTROL_S if loop.time() - start < load.seconds else 0.0)
            await asyncio.sleep(_CONTROL_S)

    controlling = loop.create_task(control())
    requests = {
        rows: InferRequest(MODEL, {"x": Tensor.of("x", np.zeros((rows, 1), np.float32))}, signature=rows)
        for rows in scenario.rows
    }
    for second in load.arrivals(rng):
        if start + second > loop.time():
            await asyncio.sleep(start + second - loop.time())
        rows = rng.choice(scenario.rows)
        call = Call(requests[rows], sink, start + second)
        call.rows = rows
        call.arrived_ns = types.now_ns()
        if scenario.deadline_s:
            call.deadline_ns = call.arrived_ns + int(scenario.deadline_s * 1e9)
        result.requests += 1
        way([call])
    while len(sink.took_s) + sink.failed < result.requests:
        await asyncio.sleep(0.1)
    await asyncio.sleep(max(0.0, start + load.seconds - loop.time()))
    controlling.cancel()
    result.row_s = way.demand().row_s
    router.stop()
    result.latencies.add(np.array(sink.took_s))
    result.failed = sink.failed
    result.fallbacks = sum(pool.status.fallbacks for pool in pools)
    return result


class _Learned:
    """How long requests take, and what rows cost, at steady loads: by simulations of a few thousand requests each."""

    def __init__(self, scenario: Scenario, pool: SimulatedPool) -> None:
        self._scenario = scenario
        self._pool = pool
        self._most_per_s = pool.rows_per_s(scenario.max_batch_size)
        self._known: dict[tuple[int, int], tuple[Any, float]] = {}

    def at(self, share: float, replicas: int) -> tuple[Any, float]:
        """(durations at _QUANTILES, seconds of a row) with replicas busy for `share` of what they can do."""
        count = max(one for one in _COUNTS if one <= max(1, replicas))
        share = min(max(share, _SHARES[0]), _SHARES[-1])
        high = next(index for index, one in enumerate(_SHARES) if one >= share)
        low = max(0, high - 1)
        part = (share - _SHARES[low]) / (_SHARES[high] - _SHARES[low]) if high > low else 0.0
        (low_s, low_row), (high_s, high_row) = self._learned(low, count), self._learned(high, count)
        return low_s + (high_s - low_s) * part, low_row + (high_row - low_row) * part

    def _learned(self, index: int, count: int) -> tuple[Any, float]:
        known = self._known.get((index, count))
        if known is not None:
            return known
        rate = _SHARES[index] * count * self._most_per_s / self._scenario.mean_rows
        fixed = self._pool.model_copy(update={"replicas": count, "min_replicas": 0, "max_replicas": 0})
        trace = [Stretch(seconds=max(5.0, _LEARN_REQUESTS / rate) if rate < _LEARN_REQUESTS else 2.0, rate=rate)]
        result = simulate(
            self._scenario.model_copy(update={"pools": [fixed], "trace": trace, "bursts": None, "deadline_s": 0.0})
        )
        found = np.array([result.latencies.quantile(one) for one in _QUANTILES])
        self._known[index, count] = found, result.row_s
        return self._known[index, count]


def simulate_fluid(scenario: Scenario, progress: Tell = lambda _share: None) -> Result:
    """By half seconds: requests are an amount that waits, and is served at the pools' pace, first come first served.

    Requests go to the first pool that has replicas; that others help out when it is late is left out.
    """
    load = scenario.load()
    rng = np.random.default_rng(scenario.seed)
    pools = [_FluidPool(scenario, spec) for spec in scenario.pools]
    result = Result(load.seconds)
    waiting: deque[list[float]] = deque()  # [when they came, how many requests]
    backlog = 0.0
    for tick in range(math.ceil(load.seconds / _TICK_S)):
        now = tick * _TICK_S
        progress(now / load.seconds)
        came = load.rate(now) * _TICK_S  # that they come in crowds and gaps is in what was learned
        result.requests += came
        backlog += came
        if came:
            waiting.append([now, came])
        by = next((pool for pool in pools if pool.up), None)
        if by is not None and backlog:
            most = by.up * by.rows_per_s * _TICK_S / scenario.mean_rows
            # Where requests wait here, what was learned is to have no queue of its own.
            took, row_s = by.learned.at(backlog / most if backlog <= most else _WITHOUT_QUEUE, by.up)
            by.row_s = row_s
            left = min(most, backlog)
            backlog -= left
            while left > 1e-9 and waiting:
                arrived, count = waiting[0]
                served = min(left, count)
                left -= served
                waiting[0][1] -= served
                if waiting[0][1] <= 1e-9:
                    waiting.popleft()
                result.latencies.add(took + (now - arrived), served / len(_QUANTILES))
                if by is not pools[0]:
                    result.fallbacks += served
        while scenario.deadline_s and waiting and now - waiting[0][0] > scenario.deadline_s:
            count = waiting.popleft()[1]
            backlog -= count
            result.failed += count
        for pool in pools:
            is_first = pool is pools[0]
            seen, left = (float(rng.poisson(came)) / _TICK_S, backlog) if is_first else (0.0, 0.0)
            rows = Demand(seen * scenario.mean_rows, round(left * scenario.mean_rows), pool.row_s)
            result.note(pool.spec.name, pool.up, _TICK_S)
            pool.control(now, rows, bool(is_first and backlog and not pool.up))
    return result


class _FluidPool:
    """How many replicas a pool has, and gets."""

    def __init__(self, scenario: Scenario, spec: SimulatedPool) -> None:
        self.spec = spec
        self.learned = _Learned(scenario, spec)
        self.rows_per_s = spec.rows_per_s(scenario.max_batch_size)
        self.row_s = 0.0
        self._controller = Controller(spec)
        self._steady = Steady()
        self.up = self._controller.target
        self._starting: deque[tuple[float, int]] = deque()
        self._told: deque[float] = deque(maxlen=max(1, round(SERVE_SETTINGS["look_back_period_s"] / _TICK_S)))

    def control(self, now_s: float, demand: Demand, is_called: bool) -> None:
        while self._starting and self._starting[0][0] <= now_s:
            self.up += self._starting.popleft()[1]
        self._told.append(self._steady.follow(round(now_s * 1e9), wanted([demand])))
        told = {"": sum(self._told) / len(self._told)} if self.up else {}
        target = self._controller.decide(now_s, told, self.up, is_called)
        starting = sum(count for _, count in self._starting)
        if target > self.up + starting:
            self._starting.append((now_s + self.spec.start_s, target - self.up - starting))
        elif target < self.up:
            self.up = target
