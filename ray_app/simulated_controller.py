"""Serve's controller in simulated time: our policy, then Serve's own limits and delays, by Serve's own code.

Knows one pool, and nothing of requests.
"""

import contextlib
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from tutti.ray_app.autoscaling import METRIC, SERVE_SETTINGS, policy
from tutti.ray_app.scenario import SimulatedPool


class Controller:
    """Decides how many replicas one pool is to have."""

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
    """Replace the clock of Serve's autoscaling: its delays go by time.time()."""
    from ray.serve import autoscaling_policy

    real: Any = autoscaling_policy.time
    autoscaling_policy.time = SimpleNamespace(time=lambda: now_s)  # type: ignore[assignment]
    try:
        yield
    finally:
        autoscaling_policy.time = real
