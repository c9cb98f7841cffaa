"""Inputs for a model, from its metadata: real samples for tensors we have samples of, else seeded random numbers."""

import csv
import json
import random
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient.utils import triton_to_np_dtype

Array = np.ndarray[Any, Any]

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "demo" / "samples"
SENTENCES = ROOT / "export" / "data" / "moderation.tsv"
VARIABLE_SIZE = 16
CLIP_S = 2.0
RATE = 16_000


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One input as the server's metadata gives it."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> "TensorInfo":
        return cls(metadata["name"], metadata["datatype"], tuple(int(n) for n in metadata["shape"]))


class Payloads:
    """Draws inputs of one row. Two with the same seed draw the same."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._numbers = np.random.default_rng(seed)
        known = json.loads((SAMPLES / "samples.json").read_text())
        self._images = [(SAMPLES / item["image"]).read_bytes() for item in known["items"]]
        self._clips = [_read_wav(SAMPLES / f"{name}.wav") for name in known["segments_s"]]
        with SENTENCES.open(encoding="utf-8", newline="") as file:
            self._texts = [row["text"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]

    def draw(self, inputs: Sequence[TensorInfo]) -> dict[str, Array]:
        return {tensor.name: self._draw(tensor) for tensor in inputs}

    def _draw(self, tensor: TensorInfo) -> Array:
        if tensor.name == "AUDIO":
            clip = self._random.choice(self._clips)
            start = self._random.randrange(len(clip) - int(CLIP_S * RATE))
            return clip[np.newaxis, start : start + int(CLIP_S * RATE)]
        # A leading -1 is the batch axis: one row.
        shape = (1, *(VARIABLE_SIZE if n == -1 else n for n in tensor.shape[1:]))
        if tensor.datatype == "BYTES":
            source = self._images if tensor.name == "IMAGE" else [text.encode() for text in self._texts]
            array = np.empty(shape, dtype=object)
            array[...] = self._random.choice(source)
            return array
        dtype = triton_to_np_dtype(tensor.datatype)
        if np.issubdtype(dtype, np.floating):
            return self._numbers.random(shape).astype(dtype)
        return self._numbers.integers(0, 2, shape).astype(dtype)


def _read_wav(path: Path) -> Array:
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768
