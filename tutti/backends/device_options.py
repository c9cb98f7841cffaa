"""What a model's parameters say of its use of a device: how long an execution may last, and whether it takes turns."""

import math

from tutti.core.errors import ConfigError
from tutti.repository.model_config import ModelConfig

HANG_PARAMETER = "tutti.hang_timeout_s"
TURN_PARAMETER = "tutti.device_turn"
# Libraries execute. A model's own code may have to do more the first time, as compiling itself.
HANG_TIMEOUT_S = 60.0
OWN_CODE_HANG_TIMEOUT_S = 300.0
# Weights of `optimization.priority`: what a model gets of a device that it shares.
_WEIGHTS = {0: 1.0, 1: 2.0, 2: 0.5}


def hang_timeout_s(config: ModelConfig, default_s: float = HANG_TIMEOUT_S) -> float:
    """How long an execution may last; 0 for any time. Raises ConfigError."""
    text = config.parameters.get(HANG_PARAMETER, "") or str(default_s)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        expected = f"expected seconds, 0 for no limit, got '{text}'"
        raise ConfigError(f"model '{config.name}': parameters.{HANG_PARAMETER}: {expected}")
    return seconds


def hang_ns(config: ModelConfig, default_s: float = HANG_TIMEOUT_S) -> int:
    """The same for a device's engine."""
    return math.ceil(hang_timeout_s(config, default_s) * 1e9)


def weight(config: ModelConfig) -> float:
    """The model's share of a device, by `optimization.priority`."""
    return _WEIGHTS.get(config.proto.optimization.priority, 1.0)


def says_turns(config: ModelConfig) -> bool | None:
    """Whether the model's executions are to take turns; None where it does not say. Raises ConfigError."""
    text = config.parameters.get(TURN_PARAMETER, "")
    if text not in ("", "yes", "no"):
        raise ConfigError(f"model '{config.name}': parameters.{TURN_PARAMETER}: expected 'yes' or 'no', got '{text}'")
    return text == "yes" if text else None
