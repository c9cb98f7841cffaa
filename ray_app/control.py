"""What the cluster should serve, as changes that every replica applies in order. Pure.

A replica that starts or comes back later has applied none of them: it is told what it has missed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tutti.engine import Override


@dataclass(frozen=True, slots=True)
class Change:
    """One load (with an override), unload (without), or with the name "" a change of the log settings."""

    generation: int
    model: str
    override: Override | None = None
    logs: Mapping[str, Any] | None = None


class Desired:
    """The changes since the start. Only the last one of each model counts."""

    def __init__(self) -> None:
        self.generation = 0
        self._changes: dict[str, Change] = {}

    def record(self, model: str, override: Override | None = None, logs: Mapping[str, Any] | None = None) -> Change:
        self.generation += 1
        self._changes[model] = change = Change(self.generation, model, override, logs)
        return change

    def last(self, model: str) -> Change | None:
        return self._changes.get(model)

    def since(self, generation: int) -> list[Change]:
        """What a replica at `generation` has not applied yet, in order."""
        return sorted((c for c in self._changes.values() if c.generation > generation), key=lambda c: c.generation)
