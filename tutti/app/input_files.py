"""Inputs as people give them to a command: `NAME=VALUE`, with JSON, text or `@FILE`. Knows no model but its inputs.

A file is read by what is in it, not by its name: .npy, JSON, WAV (PCM) for numbers, anything for BYTES. What cannot be
a tensor as it stands is told with what would make it one.
"""

import io
import json
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tutti.core import files
from tutti.core.dtypes import NUMPY, Array
from tutti.core.errors import ConfigError, reason
from tutti.core.types import Tensor
from tutti.repository.model_config import TensorSpec
from tutti.repository.unserved import near

_MOST_NAMES = 20
# What a file begins with, what that is, and how it becomes a tensor.
_KINDS = (
    (b"\xff\xd8\xff", "a JPEG picture"), (b"\x89PNG", "a PNG picture"), (b"GIF8", "a GIF picture"),
    (b"BM", "a BMP picture"), (b"fLaC", "FLAC audio"), (b"OggS", "Ogg audio"), (b"ID3", "MP3 audio"),
    (b"\xff\xfb", "MP3 audio"), (b"PK\x03\x04", "a zip or .npz file"), (b"\x80", "a pickle"), (b"%PDF", "a PDF"),
)  # fmt: skip
_CURES = {
    "picture": "decode it to the model's size and save that with numpy.save, or ask a model that takes the file itself",
    "PDF": "that is no tensor",
    "audio": "convert it: ffmpeg -i {name} -ar 16000 -ac 1 {stem}.wav",
    "file": "save one array with numpy.save",
    "pickle": "pickles are not read; save the array with numpy.save",
}


def tensors(specs: Sequence[TensorSpec], is_batched: bool, texts: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
    """One row of each input, and what a person should know of how files were read.

    Raises ConfigError for a name that is none, a value or file that does not fit, and an input that is missing.
    """
    by_name = {spec.name: spec for spec in specs}
    tensors: dict[str, Tensor] = {}
    notes: list[str] = []
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or name not in by_name:
            raise ConfigError(f"'{text[:60]}': expected INPUT=VALUE, with one of {usage(specs)}")
        if name in tensors:
            raise ConfigError(f"input '{name}' is given twice")
        spec = by_name[name]
        array, note = _array(spec, value)
        if is_batched and array.ndim == len(spec.dims):
            array = array[np.newaxis]
        tensors[name] = Tensor(name, spec.datatype, array.shape, array)
        notes += [note] if note else []
    lacking = [spec for spec in specs if spec.name not in tensors and not spec.is_optional]
    if lacking:
        names = ", ".join(f"'{spec.name}'" for spec in lacking)
        raise ConfigError(f"missing input {names}: expected {usage(lacking)}")
    return tensors, notes


def usage(specs: Sequence[TensorSpec]) -> str:
    """Inputs with what each takes, as a person may type it."""
    return ", ".join(f"{spec.name}={_example(spec)}" for spec in specs[:_MOST_NAMES])


def _example(spec: TensorSpec) -> str:
    expected = f"{spec.datatype} {list(spec.dims)}" + (", optional" if spec.is_optional else "")
    return f"TEXT or @FILE ({expected})" if spec.datatype == "BYTES" else f"JSON or @FILE ({expected})"


def _array(spec: TensorSpec, value: str) -> tuple[Array, str]:
    if value.startswith("@"):
        return _of_file(spec, Path(value[1:]))
    if spec.datatype == "BYTES":
        return _element(spec, value.encode("utf-8", "surrogateescape")), ""
    if Path(value).suffix and Path(value).is_file():
        raise ConfigError(f"input '{spec.name}': to read the file write {spec.name}=@{value}")
    try:
        return _of_json(spec, value), ""
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"input '{spec.name}': expected numbers in JSON, or @FILE, got '{value[:40]}': {error}"
        ) from None


def _of_file(spec: TensorSpec, path: Path) -> tuple[Array, str]:
    try:
        data = files.read_bytes(path)
    except OSError as error:
        hint = f"; did you mean {near(path)}?" if not path.exists() and near(path) else ""
        raise ConfigError(f"input '{spec.name}': '{path}' cannot be read: {reason(error)}{hint}") from None
    if spec.datatype == "BYTES":
        return _element(spec, data), ""
    try:
        return _numbers(spec, path, data)
    except (ValueError, TypeError, OverflowError, EOFError, RecursionError, wave.Error) as error:
        raise ConfigError(f"input '{spec.name}': '{path}' is not {spec.datatype}: {error}") from None


def _numbers(spec: TensorSpec, path: Path, data: bytes) -> tuple[Array, str]:
    if data.startswith(b"\x93NUMPY"):
        return _cast(spec, _of_npy(data)), ""
    if data.startswith(b"RIFF") and data[8:12] == b"WAVE":
        return _of_wav(spec, path, data)
    kind = next((kind for begin, kind in _KINDS if data.startswith(begin)), "")
    if kind:
        cure = _CURES[kind.rpartition(" ")[2]].format(name=path.name, stem=path.stem)
        takes = f"input '{spec.name}' takes {spec.datatype} {list(spec.dims)}"
        raise ConfigError(f"{takes}, and '{path}' is {kind}: {cure}")
    try:
        return _of_json(spec, data.decode()), ""
    except (ValueError, TypeError, RecursionError) as error:
        problem = f"expected an .npy file, a .wav file or numbers in JSON: {error}"
        raise ConfigError(f"input '{spec.name}': '{path}': {problem}") from None


def _of_npy(data: bytes) -> Array:
    try:
        array: Array = np.load(io.BytesIO(data), allow_pickle=False)
    except ValueError as error:
        problem = (
            "it has Python objects, expected numbers" if b"'|O'" in data[:200] else f"it is cut off or damaged: {error}"
        )
        raise ValueError(problem) from None
    return array


def _of_wav(spec: TensorSpec, path: Path, data: bytes) -> tuple[Array, str]:
    """PCM, one channel: in [-1, 1] for an input of floats, as it is for whole numbers."""
    with wave.open(io.BytesIO(data)) as file:
        width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
        raw = file.readframes(file.getnframes())
    if width not in (1, 2, 4):
        raise ValueError(f"its samples have {8 * width} bits, expected 8, 16 or 32")
    samples: Array = np.frombuffer(raw, {1: "u1", 2: "<i2", 4: "<i4"}[width]).reshape(-1, channels)
    note = f"{spec.name}: {path.name}, {len(samples) / rate:.1f} s of {rate} Hz"
    note += f", {channels} channels mixed to one" if channels > 1 else ""
    if NUMPY[spec.datatype].kind != "f":
        if channels > 1:
            raise ValueError(f"it has {channels} channels, expected one")
        return _cast(spec, samples[:, 0]), note
    floats = samples.astype(np.float32) - (128 if width == 1 else 0)
    return _cast(spec, (floats / 2.0 ** (8 * width - 1)).mean(axis=1)), note


def _of_json(spec: TensorSpec, text: str) -> Array:
    array = _cast(spec, np.array(json.loads(text)))
    return array if array.ndim else array.reshape((1,) * len(spec.dims))


def _cast(spec: TensorSpec, array: Array) -> Array:
    if array.dtype.kind not in "biuf":
        raise ValueError(f"its elements are {array.dtype}, expected numbers")
    if spec.datatype == "BF16":
        return (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    wanted = NUMPY[spec.datatype]
    with np.errstate(invalid="ignore"):
        cast: Array = array.astype(wanted)
    if wanted.kind != "f" and not (cast == array).all():
        odd = array[cast != array].reshape(-1)[0]
        raise ValueError(f"its element {odd} does not fit")
    return cast


def _element(spec: TensorSpec, data: bytes) -> Any:
    element = np.empty((1,) * max(1, len(spec.dims)), dtype=object)
    element.reshape(-1)[0] = data
    return element
