"""Loads a model by its backend: finds the record, checks files and parameters, and imports the module that does it.

What a model's configuration asks of every backend alike is put around its instances here. Knows no backend by name.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from tutti.backends import model_files, parameters
from tutti.backends.shaped import Padded, Reshaped
from tutti.backends.wrapped import Wrapped, around
from tutti.core import extras
from tutti.core.errors import ConfigError
from tutti.core.types import Infer
from tutti.repository import backend_records
from tutti.repository.backend_records import BUILT_IN, BackendRecord
from tutti.repository.config import ModelConfig
from tutti.repository.folders import ModelFolder
from tutti.scheduling.scheduler import Backend, undone


class BackendModule(Protocol):
    """What the module of a record has."""

    def load(self, folder: ModelFolder, version: int, infer: Infer) -> list[Backend]:
        """One backend per configured instance. Raises ConfigError with the reason."""


def load(folder: ModelFolder, version: int, infer: Infer) -> list[Backend]:
    """The instances of one model version; `infer` answers what they ask of other models.

    Raises ConfigError when its backend is missing or refuses it.
    """
    config = folder.config
    record = backend_records.find(config.backend, config.name)
    if record is None:
        choice = backend_records.choice(config.backend)
        raise ConfigError(f"model '{config.name}': backend: '{config.backend}' is not one of {choice}")
    model_files.check(folder, version, record)
    module = _module(config, record)
    parameters.check(config, record.parameters)
    loaded = module.load(folder, version, infer)
    with undone(loaded):
        for wraps in _wrappers(config):
            loaded = [around(wraps(config, backend), backend) for backend in loaded]
    return loaded


def _wrappers(config: ModelConfig) -> Sequence[Callable[[ModelConfig, Backend], Wrapped]]:
    """What is put around the instances of a model, the innermost first."""
    is_reshaped = any(spec.reshape is not None for spec in (*config.inputs, *config.outputs))
    return [*([Reshaped] if is_reshaped else []), *([Padded] if config.padding.inputs else [])]


def _module(config: ModelConfig, record: BackendRecord) -> BackendModule:
    """Raises ConfigError where it is not to be imported."""
    try:
        return cast(BackendModule, importlib.import_module(record.module))
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        advice = f": {_install(record, record.extras[library])}" if library in record.extras else ""
        raise ConfigError(f"model '{config.name}': backend: '{record.name}' needs '{error.name}'{advice}") from None
    except (Exception, SystemExit) as error:
        if record.name in BUILT_IN:
            raise
        what = f"module '{record.module}' of {backend_records.distribution(record.name)} cannot be imported"
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"model '{config.name}': backend: '{record.name}': {what}: {reason}") from error


def _install(record: BackendRecord, extra: str) -> str:
    distribution = backend_records.distribution(record.name)
    return f"pip install '{distribution}[{extra}]'" if distribution else extras.install(extra)
