"""Which pools of replicas there are, and which models live in which. Pure: sees configurations and counts.

Pools stand in order of preference. A model lives in every pool that lists it and that has what it needs; a request goes
to the first of them, to the others when that one is not up. An ensemble runs whole where all its models prefer the same
pool, and is cut into segments otherwise.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from tutti.core.errors import ConfigError, TuttiError
from tutti.repository.model_config import ModelConfig

# Requests wait this long when a pool has lost its last replica.
PATIENCE_S = 30.0
# The share of a core that a gateway is scheduled with.
GATEWAY_CPUS = 0.1

ConfigOf = Callable[[str, str], ModelConfig]
"""(model name, version) -> its configuration. Raises a TuttiError when there is none."""

_NAME = re.compile(r"[a-z][a-z0-9_]{0,30}")


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """One pool: `replicas` actors of `num_cpus` and `num_gpus` each, for models whose names match one of `models`."""

    name: str
    replicas: int
    num_cpus: float
    num_gpus: float
    models: tuple[str, ...] = ("*",)
    # With `max_replicas` the pool is autoscaled between these, and begins with `replicas`.
    min_replicas: int = 0
    max_replicas: int = 0

    @property
    def has_gpu(self) -> bool:
        return self.num_gpus > 0

    @property
    def may_be_empty(self) -> bool:
        return bool(self.max_replicas) and not self.min_replicas

    @property
    def patience_s(self) -> float:
        """How long requests wait for a replica: one that has to be started takes its time.

        One that takes a dead one's place is there in five seconds, or twenty on a busy machine.
        """
        return 120.0 if self.may_be_empty else PATIENCE_S

    def names(self, model: str) -> bool:
        """Whether it lists the model, not just everything."""
        return any(pattern != "*" and fnmatchcase(model, pattern) for pattern in self.models)


@dataclass(frozen=True, slots=True)
class Home:
    """The pools a model lives in, in order of preference, and why. An ensemble without any is cut."""

    pools: tuple[str, ...]
    why: str


def plan_pools(gpus: float, gpu_replicas: int | None, cpu_replicas: int, num_cpus: float = 0.1) -> tuple[PoolSpec, ...]:
    """The pools where no others are asked for. `gpu_replicas` None means one for each of the cluster's `gpus`.

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


def check_pools(pools: Sequence[PoolSpec], gpus: float) -> tuple[PoolSpec, ...]:
    """Pools as somebody wrote them. Raises ConfigError naming the pool and what is wrong."""
    if not pools:
        raise ConfigError("pools: expected at least one")
    for pool in pools:
        where = f"pool '{pool.name}'"
        if not _NAME.fullmatch(pool.name):
            raise ConfigError(f"{where}: expected a name of a-z, 0-9 and _, that begins with a letter")
        if pool.num_cpus < 0 or pool.num_gpus < 0:
            raise ConfigError(f"{where}: expected no negative num_cpus or num_gpus")
        if pool.max_replicas:
            if not 0 <= pool.min_replicas <= pool.replicas <= pool.max_replicas:
                raise ConfigError(f"{where}: expected 0 <= min_replicas <= replicas <= max_replicas")
        elif pool.replicas < 1 or pool.min_replicas:
            raise ConfigError(f"{where}: expected 1 or more replicas, or max_replicas")
        if not pool.models:
            raise ConfigError(f"{where}: models: expected at least one name or pattern")
    twice = {pool.name for pool in pools if sum(pool.name == other.name for other in pools) > 1}
    if twice:
        raise ConfigError(f"pool '{min(twice)}' is there twice")
    needed = sum(pool.replicas * pool.num_gpus for pool in pools)
    if needed > gpus:
        raise ConfigError(f"pools: their replicas need {needed:g} GPUs, the cluster has {gpus:g}")
    return tuple(pools)


def check_cpus(pools: Sequence[PoolSpec], gateways: int, cpus: float) -> None:
    """Raises ConfigError where not all replicas find room: Serve would wait for it without an end."""
    needed = sum(pool.replicas * pool.num_cpus for pool in pools) + gateways * GATEWAY_CPUS
    if needed > cpus + 1e-6:
        asked = " and ".join(f"{pool.replicas} of {pool.num_cpus:g} in {pool.name}" for pool in pools if pool.replicas)
        raise ConfigError(
            f"pools: their replicas need {needed:g} CPUs with the gateways ({asked}), the cluster has {cpus:g}: "
            "ask for fewer replicas, or a smaller num_cpus in a placement file"
        )


def home(config: ModelConfig, pools: Sequence[PoolSpec], config_of: ConfigOf) -> Home:
    """Where a model lives. Raises ConfigError with the reasons when no pool takes it."""
    if config.is_ensemble:
        return _home_of_ensemble(config, pools, config_of, (config.name,))
    return _home_of_model(config, pools)


def models_for(pool: PoolSpec, pools: Sequence[PoolSpec], configs: dict[str, ModelConfig]) -> list[str]:
    """What of a repository a pool's replicas load, ensembles that run whole in it among them."""

    def config_of(name: str, version: str) -> ModelConfig:
        if name not in configs:
            raise ConfigError(f"model '{name}' is not there")
        return configs[name]

    names = []
    for name, config in configs.items():
        try:
            is_here = pool.name in home(config, pools, config_of).pools
        except ConfigError:
            continue  # the gateway reports it
        if is_here:
            names.append(name)
    return names


def _home_of_model(config: ModelConfig, pools: Sequence[PoolSpec]) -> Home:
    kinds = {group.kind for group in config.instance_groups}
    needs_gpu = ("gpu" in kinds and not config.cpu_filename) or config.gpus == "required"
    wants_cpu = kinds == {"cpu"}
    takers: list[str] = []
    refused: list[str] = []
    for pool in pools:
        if not (pool.names(config.name) or "*" in pool.models):
            refused.append(f"{pool.name} does not list it")
        elif needs_gpu and not pool.has_gpu:
            refused.append(f"{pool.name} has no GPU, which it needs")
        elif wants_cpu and pool.has_gpu and not pool.names(config.name):
            refused.append(f"{pool.name} is for GPUs, and its instances are KIND_CPU")
        else:
            takers.append(pool.name)
    if not takers and wants_cpu:  # a GPU pool is better than none
        takers = [pool.name for pool in pools if "*" in pool.models]
        refused = ["there is no pool without GPUs for it"]
    if not takers:
        raise ConfigError(f"model '{config.name}': no pool takes it: {'; '.join(refused)}")
    return Home(tuple(takers), "; ".join(refused) or "every pool takes it")


def _home_of_ensemble(
    config: ModelConfig, pools: Sequence[PoolSpec], config_of: ConfigOf, path: tuple[str, ...]
) -> Home:
    homes: dict[str, Home] = {}
    for step in config.steps:
        try:
            model = config_of(step.model_name, step.version)
        except TuttiError as error:
            return Home((), f"its model '{step.model_name}' is not available: {error}")
        if not model.is_ensemble:
            homes[step.model_name] = _home_of_model(model, pools)
        elif model.name not in path:
            homes[step.model_name] = _home_of_ensemble(model, pools, config_of, (*path, model.name))
    first = {place.pools[:1] for place in homes.values()}
    common = [pool.name for pool in pools if all(pool.name in place.pools for place in homes.values())]
    if len(first) == 1 and common:
        return Home(tuple(common), f"all its models prefer {common[0]}")
    where = ", ".join(f"'{name}' in {place.pools[0] if place.pools else 'several'}" for name, place in homes.items())
    return Home((), f"its models prefer different pools: {where}")
