"""What calls of the builder are given: names, numbers, sizes and values; what does not fit is refused in words.

All raise ConfigError; `subject` is what is spoken of.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tutti.backends import completion
from tutti.core.errors import ConfigError
from tutti.repository import folders as repository


def quoted(name: object) -> str:
    """A tensor's name, in quotes."""
    if not isinstance(name, str) or not name:
        raise ConfigError(f"expected a tensor's name as text, got {name!r:.100}")
    return f"'{name}'"


def folder(path: object) -> Path:
    """The repository's."""
    if not isinstance(path, str | Path):
        raise ConfigError(f"Graph: expected the repository's folder, as build(repository) gets it, got {path!r:.100}")
    return Path(path)


def check_name(name: object, root: Path) -> None:
    """Raises ConfigError for a name that is none, or that of a model which the graph would replace."""
    if not isinstance(name, str) or not repository.is_name(name):
        raise ConfigError(f"Graph: expected a name that a folder can have, got {name!r:.100}")
    if repository.is_model(root, name) and not _may_be_ensemble(root, name):
        raise ConfigError(f"graph '{name}': the repository has a model of that name, which is no ensemble")


def _may_be_ensemble(root: Path, name: str) -> bool:
    try:
        return completion.open_model(root, name).config.is_ensemble
    except ConfigError:  # it may be an ensemble whose mistake is being corrected
        return True


def whole(subject: str, number: object, least: int) -> int:
    """A whole number, of at least so much."""
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise ConfigError(f"{subject}: expected a whole number, {least} or more, got {number!r:.100}")
    return number


def dims(subject: str, dims: object) -> tuple[int, ...]:
    """Sizes of at least 1, or -1 for any."""
    is_list = isinstance(dims, Sequence) and not isinstance(dims, str)
    sizes = list(dims) if isinstance(dims, Sequence) else []
    if not is_list or not all(isinstance(size, int) and (size > 0 or size == -1) for size in sizes):
        raise ConfigError(
            f"{subject}: expected dims as a list of sizes of at least 1, or -1 for any, got {dims!r:.100}"
        )
    return tuple(sizes)


def check_value(subject: str, value: object) -> None:
    """For a default, as config.pbtxt can have one."""
    if not isinstance(value, bool | int | float | str):
        raise ConfigError(f"{subject}: expected a number, text, True or False, got {value!r:.100}")


def check_mappings(subject: str, options: Mapping[str, object]) -> None:
    """For options that are given by name, or not at all."""
    for option, value in options.items():
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"{subject}: {option}: expected them by name, as {{'NAME': ...}}, got {value!r:.100}")
