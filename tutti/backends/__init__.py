"""Backends, one file each: a `load` that makes a model's instances. Each imports its library only when used."""

import importlib
from pathlib import Path
from typing import Protocol, cast

from tutti.config import ModelConfig
from tutti.errors import ConfigError
from tutti.repository import ModelFolder
from tutti.scheduler import Backend

SUPPORTED = ("onnxruntime", "python")


class BackendModule(Protocol):
    def load(self, folder: ModelFolder, version: int) -> list[Backend]:
        """One backend per configured instance. Raises ConfigError with the reason."""


def load(folder: ModelFolder, version: int) -> list[Backend]:
    """The instances of one model version. Raises ConfigError when its backend is missing or refuses it."""
    name = folder.config.backend
    if name not in SUPPORTED:
        raise ConfigError(f"model '{folder.config.name}': backend: '{name}' is not one of {', '.join(SUPPORTED)}")
    module = cast(BackendModule, importlib.import_module(f"tutti.backends.{name}"))
    return module.load(folder, version)


def instance_count(config: ModelConfig) -> int:
    return sum(group.count * max(1, len(group.gpus)) for group in config.instance_groups)


def model_file(folder: ModelFolder, version: int, default: str) -> Path:
    """The version's model file. Raises ConfigError if it is not there."""
    name = folder.config.model_filename or default
    path = (folder.version_path(version) / name).resolve()
    if not path.is_relative_to(folder.path.resolve()) or not path.is_file():
        raise ConfigError(f"model '{folder.config.name}': version {version} has no file '{name}'")
    return path
