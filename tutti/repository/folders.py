"""A model repository on disk: which models and versions are there. Reads folders and configs, loads nothing.

Layout, as Triton's: `<repository>/<model>/config.pbtxt` and `<repository>/<model>/<version>/...`.
"""

import difflib
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tutti.core import files, paths
from tutti.core.errors import ConfigError, TuttiError, reason
from tutti.repository import config
from tutti.repository.backend_records import BUILT_IN
from tutti.repository.model_config import ModelConfig

# The files of models that need no config.pbtxt: their backends complete one.
SELF_EXPLANATORY = tuple(record.filenames[0] for record in BUILT_IN.values() if record.completes is not None)
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_OVERRIDE_FILE = re.compile(r"[1-9][0-9]{0,17}(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)+")
_MAX_NAME = 255
_MOST_NAMED = 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model in the repository: its configuration, and the version folders its policy selects."""

    path: Path
    config: ModelConfig
    versions: tuple[int, ...]

    def version_path(self, version: int) -> Path:
        return self.path / str(version)

    def labels(self) -> Mapping[str, tuple[str, ...]]:
        """Output name -> the lines of its label file, as Triton's: ended by "\\n" alone, of any bytes.

        Raises ConfigError if a named file is missing, or cannot be read.
        """
        return {spec.name: self._lines(spec.label_filename) for spec in self.config.outputs if spec.label_filename}

    def _lines(self, filename: str) -> tuple[str, ...]:
        path = self._inside(filename)
        if path is None:
            raise ConfigError(f"model '{self.config.name}': output.label_filename: no file '{filename}' in its folder")
        try:
            lines = files.read_text(path).split("\n")
        except OSError as error:
            problem = f"output.label_filename: cannot read '{filename}': {reason(error)}"
            raise ConfigError(f"model '{self.config.name}': {problem}") from None
        return tuple(lines if lines[-1] else lines[:-1])

    def read(self, subfolder: str, filename: str) -> bytes:
        """A data file of the model's folder. Raises ConfigError if it is not there."""
        path = self._inside(f"{subfolder}/{filename}")
        if path is None:
            raise ConfigError(f"model '{self.config.name}': no file '{subfolder}/{filename}' in its folder")
        try:
            return files.read_bytes(path)
        except OSError as error:
            problem = f"cannot read '{subfolder}/{filename}': {reason(error)}"
            raise ConfigError(f"model '{self.config.name}': {problem}") from None

    def _inside(self, filename: str) -> Path | None:
        """A file of the folder; None where there is none of that name, or it leads out of the folder."""
        if "\0" in filename:
            return None
        path = (self.path / filename).resolve()
        return path if path.is_relative_to(self.path.resolve()) and path.is_file() else None


def model_names(root: Path) -> list[str]:
    """Names of the model folders, sorted. Raises ConfigError if `root` is no folder, or cannot be read."""
    try:
        if not root.is_dir():
            raise ConfigError(f"model repository '{root}' is not a folder{paths.meant(root)}")
        return sorted(path.name for path in root.iterdir() if is_name(path.name) and _is_model(path))
    except OSError as error:
        raise ConfigError(f"model repository '{root}' cannot be read: {reason(error)}") from None


def check_known(root: Path, name: str) -> None:
    """Raises ConfigError for a model that the repository does not have, with what it has: for people at a shell."""
    names = model_names(root)
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names[:_MOST_NAMED]) or 'none'}"
        raise ConfigError(f"model '{name}': there is none of that name in '{root}'; {hint}")


def is_model(root: Path, name: str) -> bool:
    """Whether `model_names` has the name, without a look at the other folders."""
    return is_name(name) and _is_model(root / name)


def _is_model(path: Path) -> bool:
    """One that cannot be read is a model, too: it is to say why it cannot be loaded."""
    try:
        if not path.is_dir():
            return False
        is_configured = os.path.lexists(path / "config.pbtxt")
        return is_configured or any(versions(path, filename) for filename in SELF_EXPLANATORY)
    except OSError:
        return os.path.lexists(path)


def is_name(name: str) -> bool:
    """Whether a folder's name can be a model's: any that can be shown, in one piece of a path and of a log's line."""
    is_plain = name.isprintable() and name == name.strip() and not name.startswith((".", "-"))
    return 0 < len(name) <= _MAX_NAME and is_plain and not set(name) & set("/\\")


def versions(path: Path, filename: str = "") -> list[int]:
    """The version folders of a model, ascending; only those that have the file."""
    if not path.is_dir():
        return []
    folders = [entry for entry in path.iterdir() if entry.is_dir() and _VERSION.fullmatch(entry.name)]
    return sorted(int(folder.name) for folder in folders if (folder / filename).exists())


def file_of(path: Path) -> Path:
    """The file of what is configured as a model: a folder is an ONNX model whose weights are in files of their own."""
    return path / "model.onnx" if path.is_dir() else path


Complete = Callable[[Path, Any], None]
"""Adds to a ModelConfig message what it leaves out and the files of the model's folder tell. Raises ConfigError."""


def open_model(root: Path, name: str, override: str | None, complete: Complete) -> ModelFolder:
    """Read one model's folder; `override` is a configuration in JSON, used in place of its config.pbtxt.

    Raises ConfigError for a bad name, a bad config, when no version is there, and for whatever else cannot be read.
    """
    check_name(name)
    try:
        return _open(root / name, name, override, complete)
    except TuttiError:
        raise
    except Exception as error:  # it may also change while it is read
        raise ConfigError(f"model '{name}': its folder cannot be read: {_named(error)}") from error


def _named(error: Exception) -> str:
    """What an error says, and of which file."""
    where = f"'{error.filename}': " if isinstance(error, OSError) and error.filename else ""
    return where + reason(error)


def _open(path: Path, name: str, override: str | None, complete: Complete) -> ModelFolder:
    if not path.is_dir():
        near = difflib.get_close_matches(name, model_names(path.parent), 1)
        advice = f"; did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"model '{name}': no such folder in the repository{advice}")
    if override is None:
        model_config = config.load(path / "config.pbtxt", partial(complete, path))
    else:
        model_config = config.parse_json(override, name, partial(complete, path))
    present = versions(path)
    selected = model_config.version_policy.select(present)
    if not selected:
        raise ConfigError(f"model '{name}': no version folder that its version_policy selects; found {sorted(present)}")
    return ModelFolder(path, model_config, tuple(selected))


def open_models(
    root: Path, names: Iterable[str] | None, complete: Complete
) -> tuple[list[ModelFolder], dict[str, ConfigError]]:
    """The named models (all, by default) and those that their ensembles use; and why others cannot be read."""
    present = model_names(root)
    waiting, known = list(present if names is None else names), set(present)
    folders: dict[str, ModelFolder] = {}
    failures: dict[str, ConfigError] = {}
    while waiting:
        name = waiting.pop(0)
        if name in folders or name in failures:
            continue
        try:
            folders[name] = open_model(root, name, None, complete)
        except ConfigError as error:
            failures[name] = error
        else:
            waiting += [step.model_name for step in folders[name].config.steps if step.model_name in known]
    return list(folders.values()), failures


def check_name(name: str) -> None:
    """Raises ConfigError for a name that cannot be a model's folder."""
    if not is_name(name):
        raise ConfigError(f"model {name[:100]!r}: not a valid model name")


def write_files(root: Path, name: str, sent: Mapping[str, bytes]) -> None:
    """Make the folder of a model out of what a client sent: `VERSION/FILE` -> content.

    Raises ConfigError for a path that is not a plain file in a version's folder.
    """
    check_name(name)
    for path, content in sent.items():
        match = _OVERRIDE_FILE.fullmatch(path)
        if match is None or ".." in path.split("/"):
            raise ConfigError(f"model '{name}': file {path[:100]!r}: expected VERSION/FILE, as 1/model.onnx")
        target = root / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


Fingerprint = tuple[tuple[str, int, int, int], ...]


def fingerprint(root: Path, name: str) -> Fingerprint:
    """(path, inode, modification time, size) of every file of a model: differs when the model was changed.

    Another file in a file's place may be as old, and as large, as that one.
    """
    return tuple(
        sorted(
            (path, status.st_ino, status.st_mtime_ns, status.st_size)
            for path, status in files.walk(root / name)
            if "__pycache__" not in path
        )
    )
