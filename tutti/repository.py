"""A model repository on disk: which models and versions are there. Reads folders and configs, loads nothing.

Layout, as Triton's: `<repository>/<model>/config.pbtxt` and `<repository>/<model>/<version>/...`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tutti import config
from tutti.config import ModelConfig
from tutti.errors import ConfigError

_MODEL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_VERSION = re.compile(r"[1-9][0-9]*")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model in the repository: its configuration, and the version folders its policy selects."""

    path: Path
    config: ModelConfig
    versions: tuple[int, ...]

    def version_path(self, version: int) -> Path:
        return self.path / str(version)

    def labels(self) -> Mapping[str, tuple[str, ...]]:
        """Output name -> the lines of its label file. Raises ConfigError if a named file is missing."""
        return {spec.name: self._lines(spec.label_filename) for spec in self.config.outputs if spec.label_filename}

    def _lines(self, filename: str) -> tuple[str, ...]:
        path = (self.path / filename).resolve()
        if not path.is_relative_to(self.path.resolve()) or not path.is_file():
            raise ConfigError(f"model '{self.config.name}': output.label_filename: no file '{filename}' in its folder")
        return tuple(path.read_text(encoding="utf-8").splitlines())


def model_names(root: Path) -> list[str]:
    """Names of the model folders, sorted. Raises ConfigError if `root` is no folder."""
    if not root.is_dir():
        raise ConfigError(f"model repository '{root}' is not a folder")
    return sorted(
        path.name
        for path in root.iterdir()
        if path.is_dir()
        and _MODEL_NAME.fullmatch(path.name)
        and ((path / "config.pbtxt").is_file() or _versions(path, "model.onnx"))
    )


def _versions(path: Path, filename: str = "") -> list[int]:
    """The version folders of a model, ascending; only those that have the file."""
    if not path.is_dir():
        return []
    folders = [entry for entry in path.iterdir() if entry.is_dir() and _VERSION.fullmatch(entry.name)]
    return sorted(int(folder.name) for folder in folders if (folder / filename).exists())


def _complete(path: Path, proto: Any) -> None:
    """What config.pbtxt leaves out of an ONNX model, from the newest version's graph, as Triton completes it."""
    is_onnx = proto.backend == "onnxruntime" or proto.platform == "onnxruntime_onnx"
    filename = proto.default_model_filename or "model.onnx"
    versions = _versions(path, filename)
    if (not is_onnx and (proto.backend or proto.platform or proto.HasField("ensemble_scheduling"))) or not versions:
        return
    proto.backend = "onnxruntime"
    if not proto.input or not proto.output:
        from tutti.backends import onnxruntime

        onnxruntime.complete(proto, path / str(versions[-1]) / filename)


def open_model(root: Path, name: str) -> ModelFolder:
    """Read one model's folder. Raises ConfigError for a bad name, a bad config, or when no version is there."""
    if not _MODEL_NAME.fullmatch(name):
        raise ConfigError(f"model '{name}': not a valid model name")
    path = root / name
    if not path.is_dir():
        raise ConfigError(f"model '{name}': no such folder in the repository")
    model_config = config.load(path / "config.pbtxt", partial(_complete, path))
    present = _versions(path)
    versions = model_config.version_policy.select(present)
    if not versions:
        raise ConfigError(f"model '{name}': no version folder that its version_policy selects; found {sorted(present)}")
    return ModelFolder(path, model_config, tuple(versions))
