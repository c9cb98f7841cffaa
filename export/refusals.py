"""What of an export's options cannot be: told before a library is imported, or a file is looked for elsewhere."""

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path

from tutti.console.arguments import plain, shown
from tutti.core import file_kinds, paths
from tutti.core.errors import TuttiError
from tutti.export import families, labelled
from tutti.export.names import VARIANTS
from tutti.repository import folders

# "organisation/name" or "name", as on the hub.
_HUB_ID = re.compile(r"[\w][\w.-]{0,95}(/[\w][\w.-]{0,95})?", re.ASCII)
_CAPABILITY = re.compile(r"(SM)?[0-9]{2,3}[a-z]?", re.IGNORECASE)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".onnx", ".ckpt")
_FILES = (*_WEIGHTS, ".pth", ".jit", ".json", ".zip", ".gz")


def wrong(options: argparse.Namespace) -> str:
    """The first of them, with the flag; "" where there is none."""
    return next(filter(None, _all(options)), "")


def _all(options: argparse.Namespace) -> Iterator[str]:
    yield _variants(options)
    yield _names(options)
    yield _folders(options)
    yield _data(options)
    yield from families.registered()[options.kind].mistakes(options)
    yield _source(options.source)


def _variants(options: argparse.Namespace) -> str:
    unknown = sorted(set(options.variants) - set(VARIANTS))
    if unknown:
        return f"--variants: expected some of {', '.join(VARIANTS)}, got {shown(unknown[0])}"
    if options.compute_capability and "tensorrt" not in (*options.variants, options.format):
        return "--compute-capability needs --format tensorrt, or tensorrt among --variants"
    if options.compute_capability and not _CAPABILITY.fullmatch(options.compute_capability):
        return f"--compute-capability: expected one as SM89, got {shown(options.compute_capability)}"
    if options.gpu == "bf16" and options.format != "torch":
        return f"--gpu bf16 needs --format torch, got --format {options.format}: its processors compute no bfloat16"
    return ""


def _names(options: argparse.Namespace) -> str:
    for flag, name in (("--name", options.name), ("--ensemble", options.ensemble or "none")):
        if not folders.is_name(name):
            return f"{flag}: expected what a folder can be called, got {shown(name)}"
    return ""


def _folders(options: argparse.Namespace) -> str:
    """Where it is to be written."""
    try:
        paths.check_writable(options.repository)
    except TuttiError as error:
        return f"--repository: {error}"
    report: Path | None = options.report
    if report is not None and report.is_dir():
        return f"--report {shown(report)}: expected a file, and that is a folder"
    if report is not None and not report.parent.is_dir():
        return f"--report {shown(report)}: there is no folder {shown(report.parent)}"
    return ""


def _data(options: argparse.Namespace) -> str:
    """What it is to be tried on, or trained with."""
    samples: Path | None = options.samples
    if samples is not None:
        takes_texts = families.registered()[options.kind].takes_texts
        if not (samples.is_file() if takes_texts else samples.is_dir()):
            expected = "a text file" if takes_texts else "a folder"
            return f"--samples {shown(samples)}: expected {expected}{paths.meant(samples)}"
    if getattr(options, "labelled", None) is not None:
        try:
            labelled.read(options.labelled)
        except TuttiError as error:
            return str(error)
    return ""


def _source(text: str) -> str:
    """Of what is neither there nor can be on the hub."""
    if text.startswith(("package:", "config:")):
        return ""
    path = Path(text)
    if not text or not text.isprintable():
        return f"SOURCE: expected a hub id, a file or a folder, got {shown(text)}"
    if path.is_dir():
        for file in sorted(entry for entry in path.iterdir() if entry.suffix in _WEIGHTS):
            if "LFS" in (content := file_kinds.of(file)):
                return f"{plain(file)} is {content}"
        if (path / "config.json").is_file() and not any(file.suffix in _WEIGHTS for file in path.rglob("*")):
            return f"{shown(text)} has no weights: expected model.safetensors, or another of {', '.join(_WEIGHTS)}"
        return ""
    if path.is_file():
        content = file_kinds.mistaken_for_model(path)
        return f"{shown(text)} is {content}" if content and "safetensors" not in content else ""
    if os.path.lexists(path):
        return f"{shown(text)}: {file_kinds.of(path)}"
    if not _HUB_ID.fullmatch(text) or path.suffix in _FILES or ".." in text:
        return f"no file or folder {shown(text)}, and no id of the hub's looks so{paths.meant(path)}"
    return ""
