"""What a model's parameters ask of compiling, and what has come of it on each device. Knows no library."""

import math
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from tutti.backends.compiler import AOT, JIT, MODES
from tutti.core.errors import ConfigError
from tutti.repository.model_config import ModelConfig

PARAMETER = "tutti.compile"
_TIMEOUT_S = 1800.0


@dataclass
class Compilation:
    """What a model's parameters ask for; a `tolerance` below 0 is the datatype's own."""

    how: str
    mode: str = MODES[0]
    tolerance: float = -1.0
    timeout_s: float = _TIMEOUT_S
    # Whether it may be made now, or is only taken where it has been.
    makes: bool = True
    # The entry of each device, None where there is none to be had.
    entries: dict[str, Path | None] = field(default_factory=dict)
    # The kinds of devices on which it has failed: it would on the next of them, too.
    failures: set[str] = field(default_factory=set)


def wanted(config: ModelConfig, path: Path, makes: bool = True) -> Compilation | None:
    """How the model's file is to be compiled; None for not at all. Raises ConfigError for a value that is none.

    Without `makes` what has not been compiled before is not.
    """
    options = {key: value for key, value in config.parameters.items() if key.startswith(f"{PARAMETER}.")}
    unknown = [key for key in options if key.removeprefix(f"{PARAMETER}.") not in ("mode", "tolerance", "timeout_s")]
    if unknown:
        raise _bad(config, unknown[0], "there are mode, tolerance and timeout_s")
    how = config.parameters.get(PARAMETER, "")
    if not how:
        if options:
            raise _bad(config, next(iter(options)), f"needs {PARAMETER}")
        return None
    if how not in (AOT, JIT):
        raise _bad(config, PARAMETER, f"expected '{AOT}' or '{JIT}', got '{how}'")
    if path.suffix != ".pt2":
        raise _bad(config, PARAMETER, f"expected a torch.export package (.pt2), got {path.name}: TorchScript is none")
    mode = options.get(f"{PARAMETER}.mode", MODES[0])
    if mode not in MODES:
        why = ": it records CUDA graphs of its own" if mode in ("reduce-overhead", "max-autotune") else ""
        raise _bad(config, f"{PARAMETER}.mode", f"expected {' or '.join(MODES)}, got '{mode}'{why}")
    numbers = (_number(config, "tolerance", -1.0), _number(config, "timeout_s", _TIMEOUT_S))
    return None if is_package(path) else Compilation(how, mode, *numbers, makes)


def _number(config: ModelConfig, name: str, default: float) -> float:
    text = config.parameters.get(f"{PARAMETER}.{name}")
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise _bad(config, f"{PARAMETER}.{name}", f"expected a number of at least 0, got '{text}'")
    return value


def _bad(config: ModelConfig, key: str, why: str) -> ConfigError:
    return ConfigError(f"model '{config.name}': parameters.{key}: {why}")


def is_package(path: Path) -> bool:
    """Whether the file is an AOTInductor package, with no exported program in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False
    parts = [name.partition("/")[2] for name in names]
    return any(name.startswith("data/aotinductor/") for name in parts) and not any(
        name.startswith("models/") for name in parts
    )
