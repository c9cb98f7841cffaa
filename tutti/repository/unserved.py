"""What lies in a repository and is not served, and what would make it a model. Looks at names only; loads nothing."""

import difflib
import os
from collections.abc import Iterator
from pathlib import Path

from tutti.core.paths import near as near
from tutti.repository import folders
from tutti.repository.backend_records import BUILT_IN

CONFIG = "config.pbtxt"
# The backend of a file that needs a configuration to be served, and what it is to be called.
_FORMATS = {suffix: (record, name) for record in BUILT_IN.values() for suffix, name in record.suffixes.items()}
# `tutti init` makes a model of them.
_OF_INIT = frozenset([".onnx", ".pt", ".pth", ".pt2"])
# Such a file is found without a configuration.
_TELLING = frozenset(folders.SELF_EXPLANATORY)
_CHECKPOINT = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json")
_EXAMPLE = (
    'input { name: "INPUT__0" data_type: TYPE_FP32 dims: [ 3, 224, 224 ] } '
    'output { name: "OUTPUT__0" data_type: TYPE_FP32 dims: [ 1000 ] }'
)
_MAX_ENTRIES = 1000


def unserved(root: Path) -> list[str]:
    """A sentence for each entry of the repository that looks like a model, and is none as it stands.

    Empty where all is served. Never raises: what cannot be read is left out.
    """
    try:
        models = set(folders.model_names(root))
        if not models and _is_model_folder(root):
            return [f"'{root}' is a model's folder; its repository is the folder above: tutti serve {_above(root)}"]
        entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))[:_MAX_ENTRIES]
    except Exception:
        return []
    told = [_of(path) for path in entries if path.name not in models]
    if not models and not any(told):
        told.append(
            f"'{root}' holds no model; expected NAME/1/model.onnx, NAME/1/model.py, or NAME/{CONFIG} and a file of its "
            f"backend in NAME/1 ('tutti init {root} FILE' makes such a folder of a model's file)"
        )
    return [sentence for sentence in told if sentence]


def _of(path: Path) -> str:
    try:
        return next(_reasons(path), "")
    except OSError:
        return ""


def _reasons(path: Path) -> Iterator[str]:
    """Of one entry, the most telling first."""
    name, where = path.name, f"'{path.name}' is not served: "
    if not path.is_dir():
        if path.suffix in _FORMATS:
            advice = f", or let 'tutti init {path.parent} {path}' make it" if path.suffix in _OF_INIT else ""
            yield f"{where}a model is a folder; put the file at {path.stem}/1/{_FORMATS[path.suffix][1]}{advice}"
        return
    entries = _names(path)
    versions = folders.versions(path)
    if not folders.is_name(name):
        if versions:
            yield f"folder {name!r} is not served: that is no valid model name"
        return
    near = difflib.get_close_matches(CONFIG, entries, 1, cutoff=0.7)
    if near:
        yield f"{where}it has '{near[0]}'; expected {CONFIG}"
    if "config.json" in entries and any(name in entries for name in _CHECKPOINT):
        yield f"{where}it is a checkpoint; 'tutti export text {path} --repository {path.parent}' (or audio, vision)"
    for version in versions:
        for file in _names(path / str(version)):
            yield from _of_file(path, f"{where}{version}/{file} ", version, file)
    for file in entries:
        if Path(file).suffix in _FORMATS or file in _TELLING:
            target = file if file in _TELLING else _FORMATS[Path(file).suffix][1]
            yield f"{where}'{file}' belongs in a version's folder; put it at {name}/1/{target}"
    if any(_is_model_folder(path / entry) for entry in entries):
        yield f"{where}it is a repository of its own: tutti serve {path}"
    if versions:
        yield f"{where}its folder {versions[-1]} has no model of a kind that is known; expected model.onnx, or {CONFIG}"


def _of_file(path: Path, where: str, version: int, file: str) -> Iterator[str]:
    """Of a model's file that needs a configuration."""
    if Path(file).suffix not in _FORMATS:
        return
    record, usual = _FORMATS[Path(file).suffix]
    if usual in _TELLING:
        yield f"{where}should be called {usual}, or be named by default_model_filename in {path.name}/{CONFIG}"
        return
    file_path = path / str(version) / file
    init = (
        f"'tutti init {path.parent} {file_path} --name {path.name} --force' writes it, or "
        if file_path.suffix in _OF_INIT
        else ""
    )
    renamed = "" if file == usual else f' default_model_filename: "{file}"'
    yield (
        f"{where}does not tell its tensors; {init}write {path.name}/{CONFIG}, with names, types and sizes of its own: "
        f'backend: "{record.name}" max_batch_size: 8{renamed} {_EXAMPLE} dynamic_batching {{}}'
    )


def _is_model_folder(path: Path) -> bool:
    if not path.is_dir() or not folders.is_name(path.resolve().name):
        return False
    if os.path.lexists(path / CONFIG):
        return True
    return any(
        name in _TELLING or Path(name).suffix in _FORMATS
        for version in folders.versions(path)
        for name in _names(path / str(version))
    )


def _above(root: Path) -> Path:
    return root.parent if root.name not in ("", ".", "..") else root.resolve().parent


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())[:_MAX_ENTRIES]
