"""What to type once something is published: how it is served, and how it is asked. It reads configurations only."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from tutti.repository import config
from tutti.repository.model_config import ModelConfig

# Where `tutti serve` listens.
URL = "http://127.0.0.1:8000"
# Inputs that take a whole file: its name in an example.
_FILES = {"AUDIO_FILE": "sound.wav", "IMAGE": "picture.png"}


def following(repository: Path, models: Sequence[str]) -> list[str]:
    """Lines for a person: one serves the repository, one asks the ensemble of `models`, or else the last of them."""
    configs = [config.load(repository / name / "config.pbtxt") for name in models]
    asked = next((config for config in configs if config.is_ensemble), configs[-1])
    return [f"serve it:  tutti serve {shlex.quote(str(repository))}", f"ask it:    {_ask(asked)}"]


def _ask(asked: ModelConfig) -> str:
    """A command for a shell: with a text, or a file of one's own; for tensors of numbers that of their shapes."""
    url = f"{URL}/v2/models/{asked.name}"
    names = [spec.name for spec in asked.inputs]
    if any(spec.datatype != "BYTES" for spec in asked.inputs):
        return f"curl -s {url}"
    if len(names) == 1 and names[0] in _FILES:
        header = "-H 'Inference-Header-Content-Length: 0'"
        return f"curl -s --output - --data-binary @{_FILES[names[0]]} {header} {url}/infer"
    return f"curl -s {url}/generate -d {shlex.quote(json.dumps(dict.fromkeys(names, 'a text')))}"
