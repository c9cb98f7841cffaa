"""Executes affine models: a file {"scale": 2, "offset": 1}, `repeat` times over."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tutti.backends.interface import (
    Array,
    Backend,
    ConfigError,
    Infer,
    JoinedBackend,
    ModelConfig,
    ModelFolder,
    instances,
    model_file,
)


def load(folder: ModelFolder, version: int, infer: Infer) -> list[Backend]:
    """An instance for each that is configured. Raises ConfigError."""
    scale, offset = _read(model_file(folder, version, "affine.json"), folder.config.name)
    placed = instances(folder.config, can_use_gpus=False)
    return [AffineBackend(folder.config, str(version), scale, offset) for _ in placed]


def complete(proto: Any, path: Path) -> None:
    """Fill in the tensors that a configuration leaves out: they are always the same."""
    for tensors, name in ((proto.input, "x"), (proto.output, "y")):
        if not tensors:
            tensors.add(name=name, data_type="TYPE_FP32", dims=[-1])


class AffineBackend(JoinedBackend):
    library = "affine"

    def __init__(self, config: ModelConfig, version: str, scale: float, offset: float) -> None:
        super().__init__(config, version)
        self._scale, self._offset = scale, offset
        self._repeat = int(config.parameters.get("repeat", "1"))

    def run(self, names: Sequence[str], feed: Mapping[str, Array]) -> Sequence[Array]:
        y = feed["x"]
        for _ in range(self._repeat):
            y = self._scale * y + self._offset
        return [y for _ in names]


def _read(path: Path, model: str) -> tuple[float, float]:
    try:
        numbers = json.loads(path.read_bytes())
        return numbers["scale"], numbers["offset"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"model '{model}': {path.name}: expected scale and offset in JSON: {error!r}") from None
