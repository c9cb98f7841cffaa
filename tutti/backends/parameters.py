"""Which parameters of a config.pbtxt are read for a backend: one that nobody reads is refused, as a field is.

A backend's own are in its record. Python models read their own, so theirs may be any; an ensemble's are the ensembles
package's.
"""

import logging
from collections.abc import Sequence

from tutti.core.errors import ConfigError
from tutti.repository.model_config import ModelConfig

_log = logging.getLogger(__name__)

# Read for every backend whose record lists its own. A name that ends in "." stands for all that begin with it: the
# name of a tensor, or of an option, follows.
_COMMON = (
    "tutti.bounds", "tutti.max_dims", "tutti.latency_ms", "tutti.cpu_model_filename", "tutti.gpu_model_filename",
    "tutti.cpu_tolerance", "tutti.hang_timeout_s", "tutti.device_turn", "tutti.fallback", "tutti.memory_mb",
    "tutti.buckets.", "tutti.pad_value.", "tutti.lengths.", "tutti.mask.", "tutti.unpad.", "tutti.compile",
    "tutti.compile.", "tutti.graphs.batch_sizes", "tutti.graphs.max_count",
)  # fmt: skip
# Of Triton's test backends. A model of NVIDIA's quick start, simple_dyna_sequence, has it for a backend that does not
# read it: it changes nothing there, and is to load here.
_OF_NO_BACKEND = ("execute_delay_ms",)
_YES, _NO = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def check(config: ModelConfig, read: Sequence[str] | None) -> None:
    """Raises ConfigError naming a parameter that the model's backend does not read, beside its `own`; None is any."""
    if read is None:
        return
    known = (*read, *_COMMON)
    for key in config.parameters:
        if key in _OF_NO_BACKEND:
            _log.warning("model '%s': parameters.%s: no backend of Triton's or of ours reads it", config.name, key)
        elif not any(_is_of(key, name) for name in known):
            reason = f"the {config.backend} backend does not read it; it reads {', '.join(read) or 'none of its read'}"
            raise ConfigError(f"model '{config.name}': parameters.{key}: {reason}, and tutti's")


def _is_of(key: str, name: str) -> bool:
    return key == name if not name.endswith(".") else key.startswith(name) and key != name


def flag(config: ModelConfig, key: str) -> bool | None:
    """A parameter that is on or off; None where it is not given. Raises ConfigError."""
    text = config.parameters.get(key)
    if text is None:
        return None
    if text.lower() not in (*_YES, *_NO):
        raise ConfigError(f"model '{config.name}': parameters.{key}: expected true or false, got '{text}'")
    return text.lower() in _YES
