"""The files of a model's version: which there are, and whether they can be what their backend loads."""

from pathlib import Path

from tutti.core.errors import ConfigError
from tutti.repository import folders
from tutti.repository.backend_records import BackendRecord
from tutti.repository.folders import ModelFolder


def check(folder: ModelFolder, version: int, record: BackendRecord) -> None:
    """Raises ConfigError for a model's file that is missing, or is none: its library would be slow to say less."""
    config = folder.config
    usual = (config.model_filename,) if config.model_filename else record.filenames
    names = [*usual, *filter(None, (config.cpu_filename, config.gpu_filename))]
    paths = {name: folders.file_of(folder.version_path(version) / name) for name in names}
    there = {name: path for name, path in paths.items() if path.is_file()}
    if not there and usual:
        version_file(folder, version, usual[0])
    for name, path in there.items():
        if fault := record.mistaken(path):
            raise ConfigError(f"model '{config.name}': {version}/{name} {fault}")


def model_file(folder: ModelFolder, version: int, default: str) -> Path:
    """The version's model file. Raises ConfigError if it is not there."""
    return version_file(folder, version, folder.config.model_filename or default)


def version_file(folder: ModelFolder, version: int, name: str) -> Path:
    """A file in the version's folder. Raises ConfigError if it is not there."""
    named = folders.file_of(folder.version_path(version) / name)
    try:
        path = named.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself
        path = named
    if not path.is_relative_to(folder.path.resolve()) or not path.is_file():
        raise ConfigError(f"model '{folder.config.name}': version {version} has no file '{name}'{_instead(named)}")
    return path


def _instead(path: Path) -> str:
    """What is there in the place of a file, or beside it."""
    if path.is_symlink():
        return f": it is a link to '{path.readlink()}', and no file of its folder"
    if path.exists():
        return ", but a folder" if path.is_dir() else ", but what is no regular file"
    there = sorted(entry.name for entry in path.parent.iterdir())[:5] if path.parent.is_dir() else []
    return f"; there are {', '.join(map(repr, there))}" if there else ""
