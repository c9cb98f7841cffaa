"""What python models may ask of the engine that serves them: to load and unload others, and whether these are ready."""

from collections.abc import Mapping
from typing import Protocol

from tutti.core.errors import NotFound, Unavailable
from tutti.serving.interface import Override
from tutti.serving.model import Model


class Controlled(Protocol):
    """What of an engine is asked."""

    def load(self, name: str, override: Override | None = None, drain_s: float = 0) -> None: ...
    def unload(self, name: str, with_dependents: bool = False, drain_s: float = 0) -> None: ...
    def model(self, name: str, version: str = "") -> Model: ...


class ControlByModels:
    """Control of models by python models, which may be inside what they unload: nothing is waited for to drain."""

    def __init__(self, engine: Controlled, refusal: str) -> None:
        self._engine = engine
        self._refusal = refusal

    def load(self, name: str, config: str | None, files: Mapping[str, bytes]) -> None:
        self._check()
        self._engine.load(name, Override(config, files), drain_s=0)

    def unload(self, name: str, with_dependents: bool) -> None:
        self._check()
        self._engine.unload(name, with_dependents, drain_s=0)

    def is_ready(self, name: str, version: str) -> bool:
        try:
            model = self._engine.model(name, version)
        except NotFound:
            return False
        return model.is_ready() and not model.is_stuck()

    def _check(self) -> None:
        if self._refusal:
            raise Unavailable(self._refusal)
