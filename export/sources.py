"""Where a model comes from: a hub id, a local folder, a file inside an installed package, or a bare configuration."""

import ast
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.errors import ExportError


@dataclass(frozen=True, slots=True)
class Source:
    """`location` is a path or a hub id for `from_pretrained`; None means random weights of `config_type`."""

    location: str | None
    config_type: str = ""
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def path(self) -> Path:
        """The location as an existing path. Raises ExportError for anything else."""
        if self.location is None or not Path(self.location).exists():
            raise ExportError(f"expected a local file or folder, got '{self.location or 'config:' + self.config_type}'")
        return Path(self.location)


def resolve(text: str) -> Source:
    """`package:NAME/PATH`, `config:TYPE[,key=value]`, a local path, or else a hub id."""
    if text.startswith("package:"):
        return Source(str(_in_package(text.removeprefix("package:"))))
    if text.startswith("config:"):
        config_type, *pairs = _split(text.removeprefix("config:"))
        return Source(None, config_type, tuple(_option(pair) for pair in pairs))
    return Source(text)


def _in_package(text: str) -> Path:
    name, _, inside = text.partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ExportError(f"package '{name}' is not installed")
    path = Path(spec.submodule_search_locations[0]) / inside
    if not path.exists():
        raise ExportError(f"package '{name}' has no '{inside}'")
    return path


def _split(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[(") - (character in "])")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _option(pair: str) -> tuple[str, Any]:
    key, equals, value = pair.partition("=")
    if not equals or not key:
        raise ExportError(f"config option '{pair}': expected key=value")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
