"""Routing and scaling in simulated time by half seconds: for days, and thousands of replicas.

Requests are an amount that waits, and is served at the pools' pace, first come first served. Autoscaling is as in
`simulation`; how long requests take at a load is learned from short simulations of that kind. That pools help out when
the first is late is left out.
"""

import math
from collections import deque
from typing import Any

import numpy as np

from tutti.ray_app.autoscaling import SERVE_SETTINGS, Demand, Steady, wanted
from tutti.ray_app.scenario import Scenario, SimulatedPool, Stretch
from tutti.ray_app.simulated_controller import Controller
from tutti.ray_app.simulation import Tell, simulate
from tutti.ray_app.simulation_result import Result

_TICK_S = 0.5
# Loads, as shares of what replicas do at most, and numbers of replicas, for which latencies are learned.
_SHARES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
_COUNTS = (1, 2, 4, 8, 16, 32)
_LEARN_REQUESTS = 3000
_WITHOUT_QUEUE = 0.8
_QUANTILES = np.linspace(0.0025, 0.9975, 200)


def simulate_fluid(scenario: Scenario, progress: Tell = lambda _share: None) -> Result:
    """The scenario by half seconds, telling the share that is done.

    Requests go to the first pool that has replicas.
    """
    load = scenario.load()
    rng = np.random.default_rng(scenario.seed)
    pools = [_FluidPool(scenario, spec) for spec in scenario.pools]
    result = Result(load.seconds)
    backlog = _Backlog()
    for tick in range(math.ceil(load.seconds / _TICK_S)):
        now_s = tick * _TICK_S
        progress(now_s / load.seconds)
        requests = load.rate(now_s) * _TICK_S  # an even flow: bursts are part of the learned latencies
        result.requests += requests
        backlog.add(now_s, requests)
        pool = next((pool for pool in pools if pool.up), None)
        if pool is not None and backlog.requests:
            _serve(scenario, pool, backlog, now_s, result, is_fallback=pool is not pools[0])
        if scenario.deadline_s:
            result.failed += backlog.expire(now_s, scenario.deadline_s)
        _scale(scenario, pools, requests, backlog.requests, now_s, rng, result)
    return result


def _serve(
    scenario: Scenario, pool: "_FluidPool", backlog: "_Backlog", now_s: float, result: Result, is_fallback: bool
) -> None:
    """What a pool does in one tick."""
    most = pool.up * pool.rows_per_s * _TICK_S / scenario.mean_rows
    # A backlog is counted here, so that the learned latencies must not include a queue, too.
    share = backlog.requests / most if backlog.requests <= most else _WITHOUT_QUEUE
    durations_s, pool.row_s = pool.latencies.under_load(share, pool.up)
    for arrived_s, count in backlog.take(most):
        result.latencies.add(durations_s + (now_s - arrived_s), count / len(_QUANTILES))
        if is_fallback:
            result.fallbacks += count


def _scale(
    scenario: Scenario,
    pools: list["_FluidPool"],
    requests: float,
    waiting: float,
    now_s: float,
    rng: np.random.Generator,
    result: Result,
) -> None:
    """Let each pool's controller decide. All demand is the first pool's."""
    for pool in pools:
        is_first = pool is pools[0]
        arrivals_per_s, left = (float(rng.poisson(requests)) / _TICK_S, waiting) if is_first else (0.0, 0.0)
        demand = Demand(arrivals_per_s * scenario.mean_rows, round(left * scenario.mean_rows), pool.row_s)
        result.note(pool.spec.name, pool.up, _TICK_S)
        pool.control(now_s, demand, bool(is_first and waiting and not pool.up))


class _Backlog:
    """Requests that wait, as amounts that came at the same time."""

    def __init__(self) -> None:
        self.requests = 0.0
        # [when they came in seconds, how many of them are left]
        self._waiting: deque[list[float]] = deque()

    def add(self, arrived_s: float, count: float) -> None:
        self.requests += count
        if count:
            self._waiting.append([arrived_s, count])

    def take(self, most: float) -> list[tuple[float, float]]:
        """Up to `most` requests, the oldest first: (when they came, how many)."""
        left = min(most, self.requests)
        self.requests -= left
        taken = []
        while left > 1e-9 and self._waiting:
            arrived_s, count = self._waiting[0]
            served = min(left, count)
            left -= served
            self._waiting[0][1] -= served
            if self._waiting[0][1] <= 1e-9:
                self._waiting.popleft()
            taken.append((arrived_s, served))
        return taken

    def expire(self, now_s: float, deadline_s: float) -> float:
        """Drop those that have waited for longer than `deadline_s`; returns how many."""
        expired = 0.0
        while self._waiting and now_s - self._waiting[0][0] > deadline_s:
            expired += self._waiting.popleft()[1]
        self.requests -= expired
        return expired


class LearnedLatencies:
    """How long requests take, and what rows cost, at steady loads: by simulations of a few thousand requests each."""

    def __init__(self, scenario: Scenario, pool: SimulatedPool) -> None:
        self._scenario = scenario
        self._pool = pool
        self._most_per_s = pool.rows_per_s(scenario.max_batch_size)
        self._known: dict[tuple[int, int], tuple[Any, float]] = {}

    def under_load(self, share: float, replicas: int) -> tuple[Any, float]:
        """(durations at _QUANTILES, seconds of a row) with replicas busy for `share` of what they can do."""
        count = max(known for known in _COUNTS if known <= max(1, replicas))
        share = min(max(share, _SHARES[0]), _SHARES[-1])
        high = next(index for index, known in enumerate(_SHARES) if known >= share)
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
        durations_s = np.array([result.latencies.quantile(share) for share in _QUANTILES])
        self._known[index, count] = durations_s, result.row_s
        return self._known[index, count]


class _FluidPool:
    """How many replicas a pool has, and gets."""

    def __init__(self, scenario: Scenario, spec: SimulatedPool) -> None:
        self.spec = spec
        self.latencies = LearnedLatencies(scenario, spec)
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
