"""Imports the module of a backend, or says what it lacks and what installs that. Knows no backend by name."""

import importlib
from pathlib import Path
from typing import Any, Protocol, cast

from tutti.core import extras
from tutti.core.errors import ConfigError
from tutti.core.types import Infer
from tutti.repository import backend_records
from tutti.repository.backend_records import BUILT_IN, BackendRecord
from tutti.repository.folders import ModelFolder
from tutti.scheduling.interface import Backend


class BackendModule(Protocol):
    """What the module of a record has; `complete` where the record says so."""

    def load(self, folder: ModelFolder, version: int, infer: Infer) -> list[Backend]:
        """One backend per configured instance. Raises ConfigError with the reason."""

    def complete(self, proto: Any, path: Path) -> None:
        """Fill in what a ModelConfig message leaves out and the file tells. Raises ConfigError."""


def module_of(record: BackendRecord, model: str) -> BackendModule:
    """Raises ConfigError naming the model where the module, or what it needs, cannot be imported."""
    try:
        return cast(BackendModule, importlib.import_module(record.module))
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        advice = f": {_install(record, record.extras[library])}" if library in record.extras else ""
        raise ConfigError(f"model '{model}': backend: '{record.name}' needs '{error.name}'{advice}") from None
    except (Exception, SystemExit) as error:
        if record.name in BUILT_IN:
            raise
        failure = f"module '{record.module}' of {backend_records.distribution(record.name)} cannot be imported"
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"model '{model}': backend: '{record.name}': {failure}: {reason}") from error


def _install(record: BackendRecord, extra: str) -> str:
    distribution = backend_records.distribution(record.name)
    return f"pip install '{distribution}[{extra}]'" if distribution else extras.install(extra)
