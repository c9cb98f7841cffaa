"""Where a model comes from: a hub id, a local folder, a file inside an installed package, or a bare configuration."""

import ast
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutti.export.errors import ExportError


@dataclass(frozen=True, slots=True)
class Source:
    """`location` is a path or a hub id for `from_pretrained`; None means random weights of `config_type`."""

    location: str | None
    config_type: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    # As it was given.
    given: str = ""

    @property
    def path(self) -> Path:
        """The location as an existing path. Raises ExportError for anything else."""
        if self.location is None or not Path(self.location).exists():
            raise ExportError(f"expected a local file or folder, got '{self.location or 'config:' + self.config_type}'")
        return Path(self.location)

    @property
    def is_local(self) -> bool:
        return self.location is not None and Path(self.location).exists()

    @property
    def provenance(self) -> str:
        """Where the weights are from, for people."""
        if self.location is None:
            return "random weights of a fixed seed: for benchmarks, its answers mean nothing"
        return f"{'local' if self.is_local else 'hub'}: {self.given or self.location}"

    def revision(self) -> str:
        """The commit of a hub id, where it is known; "" for others."""
        if self.location is None or self.is_local:
            return ""
        from transformers import AutoConfig

        try:
            return str(getattr(AutoConfig.from_pretrained(self.location), "_commit_hash", None) or "")
        except (OSError, ValueError) as error:
            raise ExportError(f"transformers cannot load '{self.location}': {error}") from None

    def content(self) -> str:
        """What tells this source from any other: a hash of its files, the hub's commit, or the configuration."""
        if self.location is None:
            return f"{self.config_type} {self.options}"
        if not self.is_local:
            return f"{self.location} {self.revision()}"
        digest = hashlib.sha256()
        for path in sorted(self.path.rglob("*")) if self.path.is_dir() else [self.path]:
            if path.is_file():
                digest.update(str(path.relative_to(self.path)).encode())
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def resolve(text: str) -> Source:
    """`package:NAME/PATH`, `config:TYPE[,key=value]`, a local path, or else a hub id."""
    if text.startswith("package:"):
        return Source(str(_in_package(text.removeprefix("package:"))), given=text)
    if text.startswith("config:"):
        config_type, *pairs = _split(text.removeprefix("config:"))
        return Source(None, config_type, tuple(_option(pair) for pair in pairs), text)
    return Source(text, given=text)


def _in_package(text: str) -> Path:
    name, _, inside = text.partition("/")
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ExportError(f"'package:{text}': package '{name}' is not installed")
    path = Path(spec.submodule_search_locations[0]) / inside
    if not inside or ".." in Path(inside).parts or not path.exists():
        raise ExportError(f"'package:{text}': package '{name}' has no '{inside}'")
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
