"""What an engine is given and tells: loaders, what a client's load overrides, and lines of the repository's index."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from tutti.observing.statistics import ModelStatistics
from tutti.repository.folders import ModelFolder
from tutti.repository.model_config import ModelConfig
from tutti.serving.model import Served

Loader = Callable[[ModelFolder, int, ModelStatistics], Served]
"""Makes one version of a model executable. May block. Raises ConfigError with the reason if it cannot."""


@dataclass(frozen=True, slots=True)
class Override:
    """What a client's load gives in place of the repository's: a configuration in JSON, and a version's files.

    `files` are "VERSION/FILE" -> content; with them nothing but the name is taken from the repository.
    """

    config: str | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


Propagate = Callable[[str, Override | None, ModelConfig | None], None]
"""Tells the processes behind this one of a load, before it is done here; of an unload with None. Raises TuttiError."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One line of the repository index. `version` "" when no version could be told; `state` "" for never loaded."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE", "LOADING", "UNLOADING", ""]
    reason: str = ""
