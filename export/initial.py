"""What a model's file is, and who makes a draft of it: of ONNX, of PyTorch's files, of a pickle, of a checkpoint."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tutti.core import file_kinds, files
from tutti.core.errors import reason
from tutti.export import fitted, onnx_files, torch_files
from tutti.export.draft import Draft
from tutti.export.errors import ExportError, first_line

_KINDS = {".onnx": "onnx", ".pt2": "exported", ".pt": "scripted", ".pth": "scripted", ".ts": "scripted"}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".onnx")
# Or packed, as joblib does; a pickle of the first protocol is a text that ends with a full stop.
_MAY_BE_PICKLES = ("a pickle", "packed")
_PICKLES = frozenset([".pkl", ".pickle", ".joblib", ".sav", ".p"])
# What joblib appends where it packs, as in model.pkl.gz.
_PACKED = frozenset([".gz", ".z", ".bz2", ".xz", ".lzma", ".lz4"])


def read(
    source: Path, name: str, work: Path, inputs: Sequence[str], max_batch_size: int | None, in_python: bool = False
) -> Draft:
    """What the file is, as a draft. Raises ExportError for what cannot be served, with what would help.

    `in_python` is of pickles: they are served as they are, and not as ONNX.
    """
    if source.is_dir():
        raise ExportError(
            f"'{source}' is a folder without config.json: expected a model's file (.onnx, .pt2, .pt, a pickle), or a "
            f"checkpoint's folder{_candidates(source)}"
        )
    kind = _kind(source)
    if in_python and kind != "pickle":
        raise ExportError(f"--python is for pickles of scikit-learn's: '{source.name}' is none")
    if inputs and kind != "scripted":
        raise ExportError(f"--input is for TorchScript: '{source.name}' tells its own inputs")
    readers: Mapping[str, Callable[[], Draft]] = {
        "onnx": partial(onnx_files.draft, source, name, work),
        "exported": partial(torch_files.exported, source),
        "scripted": partial(torch_files.scripted, source, inputs),
        "pickle": partial(fitted.draft, source, name, work, in_python),
    }
    draft = readers[kind]()
    if max_batch_size == 0 and draft.max_batch_size:
        return draft.unbatched("--max-batch-size 0")
    if max_batch_size and not draft.max_batch_size:
        raise ExportError(
            f"--max-batch-size {max_batch_size}: not all tensors have a free first axis to join rows along"
        )
    return replace(draft, max_batch_size=max_batch_size or draft.max_batch_size)


def _candidates(folder: Path) -> str:
    known = sorted(
        path.name for path in folder.iterdir() if path.suffix in (*_KINDS, *_PICKLES) or is_packed_pickle(path)
    )
    return f"; there are {', '.join(known[:5])} in it" if known else ""


def is_pickle(source: Path) -> bool:
    """By its name."""
    return source.suffix.lower() in _PICKLES or is_packed_pickle(source)


def is_packed_pickle(source: Path) -> bool:
    """By its name, as model.pkl.gz."""
    suffixes = [suffix.lower() for suffix in source.suffixes[-2:]]
    return len(suffixes) == 2 and suffixes[0] in _PICKLES and suffixes[1] in _PACKED


def _kind(source: Path) -> str:
    """By the suffix, and by the first bytes where it may be of two kinds."""
    suffix = source.suffix.lower()
    if is_pickle(source):
        content = file_kinds.of(source)
        may_be = content.startswith(_MAY_BE_PICKLES) or (
            content == "a text" and files.read_bytes(source).endswith(b".")
        )
        if content and not may_be:
            raise ExportError(f"'{source.name}': expected a pickle of scikit-learn's, and it is {content}")
        return "pickle"
    if suffix not in _KINDS:
        known = ", ".join([*_KINDS, *sorted(_PICKLES)])
        content = file_kinds.of(source)
        is_told = f", and it is {content}" if content else ""
        raise ExportError(f"'{source.name}': expected a file that ends with one of {known}{is_told}")
    if mistake := file_kinds.mistaken_for_model(source):
        raise ExportError(f"'{source.name}' is {mistake}")
    if _KINDS[suffix] == "onnx":
        return "onnx"
    if mistake := file_kinds.mistaken_for_program(source):  # before PyTorch is imported
        raise ExportError(f"'{source.name}' {mistake}")
    is_exported = any(name.endswith(file_kinds.OF_EXPORTED) for name in file_kinds.zipped(source))
    return "exported" if is_exported else "scripted"


def checkpoint_kind(folder: Path) -> str:
    """text, vision or audio: by what prepares its inputs. Raises ExportError where that is not told."""
    names = {path.name for path in folder.iterdir()}
    if "config.json" in names:
        _json(folder / "config.json")
    for path in sorted(folder.iterdir()):
        if path.suffix in _WEIGHTS and (content := file_kinds.of(path)) and "LFS" in content:
            raise ExportError(f"'{path}' is {content}")
    preparing = "preprocessor_config.json"
    settings = _json(folder / preparing) if preparing in names else {}
    if "sampling_rate" in settings or "feature_size" in settings:
        return "audio"
    if "image_mean" in settings or "image_processor_type" in settings or "crop_size" in settings:
        return "vision"
    if names & {"tokenizer.json", "tokenizer_config.json", "vocab.txt"}:
        return "text"
    raise ExportError(
        f"'{folder}' has no tokenizer and no {preparing}: say what it is with tutti export audio, text or vision"
    )


def _json(path: Path) -> dict[str, Any]:
    """Raises ExportError for what is no object."""
    try:
        value = json.loads(files.read_utf8(path))
    except OSError as error:
        raise ExportError(f"'{path}': {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise ExportError(f"'{path}': no JSON: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise ExportError(f"'{path}': expected an object, got {type(value).__name__}")
    return value
