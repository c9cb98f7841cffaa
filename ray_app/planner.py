"""Pools for a repository and a number of GPUs, models packed by their memory, with the reasons. Pure.

First-fit decreasing (Johnson, 1973): the largest model first, each to the first group of models with room for it. Each
group lives together in every replica of one pool.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tutti.core.errors import ConfigError
from tutti.ray_app.placement import PoolSpec, home
from tutti.repository.model_config import ModelConfig

# A model takes twice the size of its files on a GPU: weights, and as much for results. Its parameter overrides this.
WORKING_FACTOR = 2.0
MEMORY = "tutti.memory_mb"
# Memory that the runtime itself takes in each process.
CONTEXT_MB = 600.0
_CPUS_PER_GPU = 2.0


@dataclass(frozen=True, slots=True)
class Planned:
    """Pools in order of preference, and for each model what was decided and why."""

    pools: tuple[PoolSpec, ...]
    why: Mapping[str, str]


def memory_mb(config: ModelConfig, file_bytes: int) -> float:
    """What a model takes on a GPU. Raises ConfigError for a parameter that is no number."""
    setting = config.parameters.get(MEMORY)
    if setting is None:
        return file_bytes * WORKING_FACTOR / 1e6
    try:
        megabytes = float(setting)
    except ValueError:
        megabytes = 0.0
    if not 0 < megabytes < float("inf"):
        problem = f"expected megabytes, got '{setting[:50]}'"
        raise ConfigError(f"model '{config.name}': parameters.{MEMORY}: {problem}")
    return megabytes


def plan(
    configs: Mapping[str, ModelConfig], file_bytes: Mapping[str, int], gpus: int, gpu_mb: float, cpu_replicas: int
) -> Planned:
    """Raises ConfigError for a model that fits no GPU, or more groups of models than there are GPUs."""
    models = [model for model in configs.values() if not model.is_ensemble]
    on_gpu = [model for model in models if gpus and not _is_for_cpus(model)]
    sizes = {model.name: memory_mb(model, file_bytes[model.name]) for model in on_gpu}
    groups: list[list[str]] = []
    room_mb: list[float] = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        if sizes[name] + CONTEXT_MB > gpu_mb:
            problem = (
                f"expected at most {gpu_mb - CONTEXT_MB:,.0f} MB, which a GPU has for models, got {sizes[name]:,.0f} MB"
            )
            raise ConfigError(f"model '{name}': {problem}")
        number = next((number for number, room in enumerate(room_mb) if sizes[name] <= room), len(groups))
        if number == len(groups):
            groups.append([])
            room_mb.append(gpu_mb - CONTEXT_MB)
        groups[number].append(name)
        room_mb[number] -= sizes[name]
    if len(groups) > gpus:
        problem = f"expected {len(groups)} GPUs or more, one for each group of models that fit together, got {gpus}"
        raise ConfigError(f"{problem}: {'; '.join(', '.join(group) for group in groups)}")
    pools = [
        PoolSpec(
            "gpu" if len(groups) == 1 else f"gpu{number + 1}",
            gpus // len(groups) + (number < gpus % len(groups)),
            _CPUS_PER_GPU,
            1.0,
            tuple(sorted(group)),
        )
        for number, group in enumerate(groups)
    ]
    if cpu_replicas:
        pools.append(PoolSpec("cpu", cpu_replicas, 1.0, 0.0))
    if not pools:
        raise ConfigError("no pools: there are neither GPUs nor replicas on CPUs")
    return Planned(tuple(pools), _reasons(configs, sizes, pools, room_mb))


def _is_for_cpus(config: ModelConfig) -> bool:
    """What says nothing of GPUs goes there where its backend can: python models as a rule prepare and decode."""
    kinds = {group.kind for group in config.instance_groups}
    return kinds == {"cpu"} or (config.gpus == "asked" and "gpu" not in kinds)


def _reasons(
    configs: Mapping[str, ModelConfig], sizes: Mapping[str, float], pools: Sequence[PoolSpec], room_mb: Sequence[float]
) -> dict[str, str]:
    why = {}
    for name, config in configs.items():
        try:
            place = home(config, pools, lambda step, _: configs[step])
        except ConfigError as error:
            why[name] = str(error)
            continue
        where = " and ".join(place.pools) or "in segments"
        if name in sizes:
            number = next(index for index, pool in enumerate(pools) if name in pool.models)
            others = len(pools[number].models) - 1
            why[name] = f"{where}: {sizes[name]:,.0f} MB, with {others} others; {room_mb[number]:,.0f} MB are left"
        else:
            why[name] = f"{where}: {place.why}"
    return why
