"""What a configuration leaves out, as the backends read it from a model's file: Triton completes the same.

A repository is opened here wherever models are to be served, or shown as they would be.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tutti.backends import importing
from tutti.core.errors import ConfigError
from tutti.repository import backend_records, config, folders
from tutti.repository.backend_records import BUILT_IN, BackendRecord
from tutti.repository.folders import ModelFolder, file_of, versions


def open_model(root: Path, name: str, override: str | None = None) -> ModelFolder:
    """One model, its configuration completed; `override` is one in JSON, used in place of its config.pbtxt.

    Raises ConfigError, as `folders.open_model` does.
    """
    return folders.open_model(root, name, override, complete)


def open_models(root: Path, names: Iterable[str] | None = None) -> tuple[list[ModelFolder], dict[str, ConfigError]]:
    """The named models (all, by default) and those that their ensembles use; and why others cannot be read."""
    return folders.open_models(root, names, complete)


def complete(path: Path, proto: Any) -> None:
    """Add to a ModelConfig message what it leaves out and the newest version's file can tell.

    `path` is the model's folder. Raises ConfigError for a file that is none.
    """
    record = config.backend_of(proto, path.name)
    if proto.backend and not proto.HasField("ensemble_scheduling"):
        backend_records.known(proto.backend, path.name)  # else what it would have completed is what is missed
    if not (proto.backend or proto.platform or proto.HasField("ensemble_scheduling")):
        record = _by_file(path)
    completes = record.completes if record is not None else None
    usual = record.filenames[:1] if record is not None and completes is not None else ()
    filename = proto.default_model_filename or "".join(usual)
    present = [] if not filename or _leaves(filename) else versions(path, filename)
    if not present:
        return
    file = file_of(path / str(present[-1]) / filename)
    if record is not None and (fault := record.mistaken(file)):
        raise ConfigError(f"model '{path.name}': {present[-1]}/{filename}: it {fault}")
    if record is None or completes is None:
        return
    proto.backend = record.name
    if completes(proto, file):
        importing.module_of(record, path.name).complete(proto, file)


def _by_file(path: Path) -> BackendRecord | None:
    """The backend of a model whose configuration names none."""
    completing = (record for record in BUILT_IN.values() if record.completes is not None)
    return next((record for record in completing if versions(path, record.filenames[0])), None)


def _leaves(filename: str) -> bool:
    """Whether a configured name points out of a version's folder."""
    return Path(filename).is_absolute() or ".." in Path(filename).parts
