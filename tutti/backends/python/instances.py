"""What an instance of a python model is: its name, its device, and whether it takes turns there."""

import dataclasses
import logging
from pathlib import Path

from tutti.backends import device_options, placement
from tutti.backends.python import isolated
from tutti.core.errors import ConfigError
from tutti.devices.device_turns import TurnTaker
from tutti.devices.nvml import gpu_count
from tutti.devices.process_engines import engine_of
from tutti.repository.model_config import InstanceGroup, ModelConfig

_log = logging.getLogger(__name__)

ON_HOST_PARAMETER = "FORCE_CPU_ONLY_INPUT_TENSORS"


def device_of(group: InstanceGroup, number: int) -> str:
    """Where an instance is: "cpu", or as "cuda:0"."""
    gpus = gpu_count()
    return f"cuda:{number}" if number < gpus and instance_kind(group, gpus) == "GPU" else "cpu"


def _may_take_turns(config: ModelConfig, group: InstanceGroup) -> bool:
    """Whether instances of the group take turns, where there is a GPU. A decoupled model computes when it likes.

    KIND_AUTO is a GPU where there is one, as in Triton: for models that only prepare text, too, by their default. So it
    is KIND_GPU that says that a model computes there, or the parameter.
    """
    says = device_options.says_turns(config)
    computes = says if says is not None else group.kind == "gpu"
    return computes and group.kind != "cpu" and not config.is_decoupled


def check_options(config: ModelConfig, is_isolated: bool) -> None:
    """Raises ConfigError for a limit that nothing would keep."""
    device_options.hang_timeout_s(config)
    device_options.says_turns(config)
    if is_isolated or not config.parameters.get(device_options.HANG_PARAMETER):
        return
    if not any(_may_take_turns(config, group) for group in config.instance_groups):
        name = f"model '{config.name}': parameters.{device_options.HANG_PARAMETER}"
        reason = f"is for models in processes of their own (no parameters.{isolated.PARAMETER} 'no')"
        raise ConfigError(f"{name}: {reason}, and for KIND_GPU, whose instances take turns: nothing else is noticed")


def turn_taker(config: ModelConfig, group: InstanceGroup, number: int, path: Path) -> TurnTaker | None:
    """What has the turns of an instance; None where it takes none."""
    # A group that was KIND_AUTO comes back as another one from being placed.
    configured = group if group in config.instance_groups else dataclasses.replace(group, kind="auto")
    device = device_of(group, number)
    if device == "cpu" or not _may_take_turns(config, configured):
        return None
    try:
        engine = engine_of(device)
    except Exception as error:  # the model may compute there with another library
        _log.warning(
            "model '%s' takes no turns on %s: that needs a PyTorch that can use it: %s", config.name, device, error
        )
        return None
    hang_ns = device_options.hang_ns(config, device_options.OWN_CODE_HANG_TIMEOUT_S)
    pipeline = engine.pipeline(config.name, device_options.weight(config), hang_ns=hang_ns)
    return TurnTaker(engine, pipeline, str(path.parent))


def instance_name(config: ModelConfig, index: int) -> str:
    """As Triton names it: the group's name, which without one is the model's and the group's number, and its own."""
    for number, group in enumerate(config.instance_groups):
        count = len(placement.instances(dataclasses.replace(config, instance_groups=(group,))))
        if index < count:
            return f"{group.name or f'{config.name}_{number}'}_{index % group.count}"
        index -= count
    raise IndexError(f"model '{config.name}' has no such instance")


def instance_kind(group: InstanceGroup, gpus: int) -> str:
    """ "GPU", "CPU" or "MODEL" for an instance group. KIND_AUTO is a GPU where there are any, and all that it lists.

    As Triton's core resolves it (NormalizeInstanceGroup in model_config_utils.cc), whose python backend prefers GPUs.
    """
    if group.kind == "auto":
        return "GPU" if gpus and all(device < gpus for device in group.gpus) else "CPU"
    return "MODEL" if group.kind == "model" else "GPU" if group.kind == "gpu" else "CPU"


def takes_inputs_on_host(model: ModelConfig) -> bool:
    """Whether the model is to have all inputs in host memory. Raises ConfigError."""
    text = model.parameters.get(ON_HOST_PARAMETER, "yes")
    if text not in ("yes", "no"):
        raise ConfigError(f"model '{model.name}': parameters.{ON_HOST_PARAMETER}: expected 'yes' or 'no', got '{text}'")
    return text == "yes"
