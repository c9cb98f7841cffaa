"""On which device each instance of a model is, by its instance groups. Knows no backend."""

from collections.abc import Sequence
from dataclasses import replace

from tutti.core.errors import ConfigError
from tutti.devices.nvml import gpu_count
from tutti.repository.model_config import InstanceGroup, ModelConfig


def instances(
    config: ModelConfig, can_use_gpus: bool = True, gpus: int | None = None
) -> list[tuple[InstanceGroup, int]]:
    """Each instance's group and device: as in Triton, `count` on each GPU listed, on every GPU where none is.

    Where there are GPUs that the backend can use, KIND_AUTO comes back as "gpu". `gpus` is how many there are, by
    default those that this process sees; without any the backend decides what to make of the kind. Raises ConfigError
    for a GPU that does not exist.
    """
    there_are = gpu_count() if gpus is None else gpus
    placed: list[tuple[InstanceGroup, int]] = []
    for index, group in enumerate(config.instance_groups):
        numbers: Sequence[int] = group.gpus or (0,)
        if group.kind in ("cpu", "model"):
            numbers = (0,)
        elif can_use_gpus and there_are:
            _check_gpus(config.name, index, group, there_are)
            numbers = group.gpus or range(there_are)
            group = replace(group, kind="gpu")
        placed += [(group, number) for number in numbers for _ in range(group.count)]
    return placed


def _check_gpus(model: str, index: int, group: InstanceGroup, there_are: int) -> None:
    for number in group.gpus:
        if not 0 <= number < there_are:
            expected = f"expected numbers below {there_are}, as many GPUs as this process sees"
            raise ConfigError(f"model '{model}': instance_group[{index}].gpus: {expected}, got {number}")
