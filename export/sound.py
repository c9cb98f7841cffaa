"""Sound on its way into a graph: the step that reads files, the same code here for sample data, and whole numbers.

Samples as files have them, INT16 and scaled in the graph, are half of what they are as FP32, on every way they go.
"""

import importlib.util
import io
import sys
import wave
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from tutti.export.errors import ExportError
from tutti.export.graphs import Arrays, Graph, with_arguments
from tutti.export.layout import Entry, step_file
from tutti.export.narrow import Wide
from tutti.repository.model_config import TensorSpec

MAX_BATCH_SIZE = 32
AUDIO_FILE = TensorSpec("AUDIO_FILE", "BYTES", (1,))


# What 1.0 is in INT16: the step is 1 / _FULL, so that -1.0 can be said, and 1.0 is cut to the largest number.
_FULL = 32768


def decoder_step(name: str, rate: int, samples: int = 0, fill: str = "zeros", datatype: str = "FP32") -> Entry:
    """NAME_decoder: a file's bytes -> AUDIO at `rate` Hz; of `samples` samples, filled up with zeros or repetitions.

    `datatype` is FP32, in [-1, 1], or INT16.
    """
    parameters = {"sample_rate": str(rate)}
    if samples:
        parameters |= {"samples": str(samples), "fill": fill}
    audio = TensorSpec("AUDIO", datatype, (samples or -1,))
    files = {"model.py": step_file("audio_decoder")}
    return Entry(f"{name}_decoder", "python", [AUDIO_FILE], [audio], files, MAX_BATCH_SIZE, parameters)


class FromInt16(Wide):
    """INT16 -> FP32 in [-1, 1), exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.tensor(1 / _FULL))

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        return samples.to(self.step.dtype) * self.step


class OfInt16(torch.nn.Module):
    """A module whose first input is samples, given as INT16."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.enter = FromInt16()

    def forward(self, samples: torch.Tensor, *more: torch.Tensor) -> Any:
        return self.inner(self.enter(samples), *more)


def to_int16(samples: Any) -> Any:
    """[-1, 1] FP32 -> INT16."""
    return published("audio_decoder").to_int16(samples)


def from_int16(samples: Any) -> Any:
    """INT16 -> FP32 in [-1, 1)."""
    return samples.astype(np.float32) / _FULL


def in_int16(graph: Graph) -> Graph:
    """The graph with its first input, FP32 samples, in INT16."""
    first, *_ = names = list(graph.example)

    def given(case: Arrays) -> Arrays:
        return {**case, first: to_int16(case[first])}

    def in_fp32(case: Arrays) -> Arrays:
        return {**case, first: from_int16(case[first])}

    reference = graph.reference
    return replace(
        graph,
        module=with_arguments(OfInt16(graph.module), names),
        example={**graph.example, first: torch.from_numpy(to_int16(graph.example[first].numpy()))},
        cases=[given(case) for case in graph.cases],
        reference=None if reference is None else lambda case: reference(in_fp32(case)),
    )


def as_wav(samples: Any, rate: int) -> bytes:
    """A mono file of INT16 samples."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(samples.tobytes())
    return file.getvalue()


def published(step: str) -> ModuleType:
    """The code of a step, as it is published, without the server around it."""
    stub = ModuleType("triton_python_backend_utils")
    before = sys.modules.get(stub.__name__)
    sys.modules[stub.__name__] = stub
    try:
        spec = importlib.util.spec_from_file_location(f"{step}_step", step_file(step))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        if before is None:
            del sys.modules[stub.__name__]
        else:
            sys.modules[stub.__name__] = before
    return module


def read(path: Path, rate: int = 16_000) -> np.ndarray[Any, Any]:
    """[samples] FP32 of a file at `rate` Hz. Raises ExportError for one that is none."""
    decoder: Any = published("audio_decoder")
    try:
        samples, sample_rate = decoder.read_wav(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ExportError(f"--samples: {path}: {error}") from None
    if sample_rate != rate:
        raise ExportError(f"--samples: {path}: expected {rate} Hz, got {sample_rate} Hz")
    return np.asarray(samples, dtype=np.float32)
