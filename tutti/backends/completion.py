"""What a configuration leaves out, as the backends read it from a model's file: Triton completes the same.

A repository is opened here wherever models are to be served, or shown as they would be.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tutti.core import file_kinds, files
from tutti.core.errors import ConfigError
from tutti.repository import folders
from tutti.repository.folders import ModelFolder, file_of, versions

# What is completed, by backend: the file that is read where the configuration names none.
_FILES = {"onnxruntime": "model.onnx", "python": "model.py"}
_PLATFORMS = {"onnxruntime_onnx": "onnxruntime"}


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
    backend = proto.backend or _PLATFORMS.get(proto.platform, "")
    if not backend and not proto.platform and not proto.HasField("ensemble_scheduling"):
        backend = next((name for name, file in _FILES.items() if versions(path, file)), "")
    filename = proto.default_model_filename or _FILES.get(backend, "")
    if not filename or _leaves(filename):
        return
    present = versions(path, filename)
    if not present:
        return
    proto.backend = backend
    file = file_of(path / str(present[-1]) / filename)
    if what := file_kinds.mistaken_for_model(file):
        raise ConfigError(f"model '{path.name}': {present[-1]}/{filename}: it is {what.removeprefix('it is ')}")
    if backend == "onnxruntime" and (not proto.input or not proto.output):
        from tutti.backends import onnxruntime

        onnxruntime.complete(proto, file)
    elif backend == "python" and b"auto_complete_config" in files.read_bytes(file):
        from tutti.backends.python import model

        model.complete(proto, file)


def _leaves(filename: str) -> bool:
    """Whether a configured name points out of a version's folder."""
    return Path(filename).is_absolute() or ".." in Path(filename).parts
