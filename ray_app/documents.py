"""What people write for clusters in YAML: read, or refused with the file, the place and what was expected."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from tutti.console.arguments import plain
from tutti.core import files, paths
from tutti.core.errors import ConfigError, reason

# So many mistakes of a file are named; the others are only counted.
_MOST_PROBLEMS = 3


def read(path: Path, expected: str) -> dict[str, Any]:
    """The mapping that a file is. Raises ConfigError; `expected` says of what, as in "pools and a list of them"."""
    try:
        content = yaml.safe_load(files.read_utf8(path))
    except OSError as error:
        raise ConfigError(f"{reason(error)}: expected {expected}, in YAML{paths.meant(path)}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise ConfigError(f"{where}no YAML: {plain(error.problem or error.context)}") from None
    except RecursionError:
        raise ConfigError("no YAML: it is nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"no YAML: {plain(' '.join(str(error).split()))}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        kind = "an empty file" if content is None else f"{type(content).__name__}"
        raise ConfigError(
            f"expected {expected}, got {kind if not isinstance(content, dict) else 'keys that are no text'}"
        )
    return content


def problems(error: ValidationError, kinds: Mapping[str, type[BaseModel]]) -> str:
    """What is wrong, by field. `kinds` are the models by the first part of a field's path, "" that of the file."""
    told = [
        _told(problem["loc"], problem["type"], problem["msg"], kinds) for problem in error.errors(include_url=False)
    ]
    more = f"; and {len(told) - _MOST_PROBLEMS} more" if len(told) > _MOST_PROBLEMS else ""
    return "; ".join(told[:_MOST_PROBLEMS]) + more


def _told(where: tuple[int | str, ...], kind: str, message: str, kinds: Mapping[str, type[BaseModel]]) -> str:
    field = plain(".".join(map(str, where)))
    if kind != "extra_forbidden":
        return f"{field}: {message.removeprefix('Value error, ')}" if field else message.removeprefix("Value error, ")
    model = kinds.get(str(where[0]) if len(where) > 1 else "")
    return f"{field}: no such field{_instead(str(where[-1]), model.model_fields if model is not None else ())}"


def _instead(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; expected one of {', '.join(known)}" if known else ""
