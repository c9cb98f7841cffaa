"""Which pools of replicas there are, and how large. Pure: sees counts, starts nothing."""

from dataclasses import dataclass
from typing import Literal

from tutti.errors import ConfigError

PoolName = Literal["gpu", "cpu"]


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """One pool: `replicas` actors of `num_cpus` and `num_gpus` each. Every replica holds every model."""

    name: PoolName
    replicas: int
    num_cpus: float
    num_gpus: float


def plan_pools(gpus: float, gpu_replicas: int | None, cpu_replicas: int, num_cpus: float = 0.1) -> tuple[PoolSpec, ...]:
    """Pools in order of preference. `gpu_replicas` None means one for each of the cluster's `gpus`.

    Raises ConfigError when no replica would be left, or more GPUs are asked for than there are.
    """
    wanted = int(gpus) if gpu_replicas is None else gpu_replicas
    if wanted < 0 or cpu_replicas < 0:
        raise ConfigError(
            f"expected 0 or more replicas, got {wanted} for the gpu pool and {cpu_replicas} for the cpu pool"
        )
    if wanted > gpus:
        raise ConfigError(f"the gpu pool: expected at most {gpus:g} replicas, one per GPU of the cluster, got {wanted}")
    if not wanted and not cpu_replicas:
        raise ConfigError("no replicas: the cluster has no GPU and the cpu pool is empty")
    pools = (PoolSpec("gpu", wanted, num_cpus, 1.0), PoolSpec("cpu", cpu_replicas, num_cpus, 0.0))
    return tuple(pool for pool in pools if pool.replicas)
