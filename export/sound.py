"""Audio files: the step that reads them where models are served, and the same code here, for sample data."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from export.errors import ExportError
from export.layout import Entry, step_file
from tutti.config import TensorSpec

MAX_BATCH_SIZE = 32
AUDIO_FILE = TensorSpec("AUDIO_FILE", "BYTES", (1,))


def decoder_step(name: str, rate: int, samples: int = 0, fill: str = "zeros") -> Entry:
    """NAME_decoder: a file's bytes -> AUDIO at `rate` Hz; of `samples` samples, filled up with zeros or repetitions."""
    parameters = {"sample_rate": str(rate)}
    if samples:
        parameters |= {"samples": str(samples), "fill": fill}
    audio = TensorSpec("AUDIO", "FP32", (samples or -1,))
    files = {"model.py": step_file("audio_decoder")}
    return Entry(f"{name}_decoder", "python", [AUDIO_FILE], [audio], files, MAX_BATCH_SIZE, parameters)


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
        samples, own = decoder.read_wav(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ExportError(f"--samples: {path}: {error}") from None
    if own != rate:
        raise ExportError(f"--samples: {path}: expected {rate} Hz, got {own} Hz")
    return np.asarray(samples, dtype=np.float32)
