"""`tutti doctor`: what this machine has of what tutti needs or could use, and what would mend what it lacks."""

import argparse
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tutti import __version__
from tutti.console.arguments import Parser
from tutti.console.help_format import Help, examples
from tutti.core import extras, locales
from tutti.devices import gpu_presence, nvml
from tutti.repository import backend_records

Verdict = Literal["ok", "note", "bad"]
_CORE = ("numpy", "onnxruntime", "protobuf", "tritonclient", "pygrpc-native", "uvloop", "orjson")
_ENOUGH_FILES = 4096
_SHARED_MEMORY = Path("/dev/shm")
_ENOUGH_SHARED_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: `bad` keeps tutti, or what was asked of it, from working; a `note` is what it could have besides."""

    subject: str
    verdict: Verdict
    text: str


def main(arguments: Sequence[str]) -> int:
    """Print what was found; returns 1 where something is bad."""
    make_parser().parse_args(arguments)
    findings = list(examine())
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        print(f"{finding.verdict:4}  {finding.subject:{width}}  {finding.text}")
    return 1 if any(finding.verdict == "bad" for finding in findings) else 0


def make_parser() -> argparse.ArgumentParser:
    return Parser(
        prog="tutti doctor",
        description="What this machine has of what tutti needs or could use, and what would mend what it lacks. The "
        "exit status is 1 where something keeps it from working.",
        epilog=examples("tutti doctor", "tutti doctor | grep -v ^ok  # what is not as it could be"),
        formatter_class=Help,
    )


def examine() -> Iterator[Finding]:
    for part in (_versions, _libraries, _backends, _devices, _limits, _locale):
        yield from part()


def _versions() -> Iterator[Finding]:
    yield Finding("tutti", "ok", f"{__version__} in {Path(__file__).parents[1]}")
    is_new = sys.version_info >= (3, 11)
    python = f"{platform.python_version()} at {sys.executable}"
    yield Finding("python", "ok" if is_new else "bad", python if is_new else f"{python}; expected 3.11 or newer")
    yield Finding("system", "ok", f"{platform.platform()}, {_cores()} cores, {_memory_gib():.1f} GiB")


def _libraries() -> Iterator[Finding]:
    # The wheel for GPUs serves on the processor, too.
    names = ["onnxruntime-gpu" if name == "onnxruntime" and not extras.version(name) else name for name in _CORE]
    missing = [name for name in names if not extras.version(name)]
    if missing:
        yield Finding("libraries", "bad", f"lacks {', '.join(missing)}: {extras.install()}")
    else:
        yield Finding("libraries", "ok", ", ".join(f"{name} {extras.version(name)}" for name in names))
    if extras.has_two_onnxruntimes():
        yield Finding("onnxruntime", "bad", extras.TWO_ONNXRUNTIMES)
    elif gpu_presence.has_gpu() and not extras.version("onnxruntime-gpu"):
        reason = "the wheel for processors: ONNX models do not execute on the GPU"
        yield Finding("onnxruntime", "note", f"{reason}: {extras.SWAP_ONNXRUNTIME}")
    for extra, needed in extras.NEEDED.items():
        absent = extras.absent(extra)
        has = ", ".join(f"{name} {extras.version(name)}" for name in needed)
        text = f"lacks {', '.join(absent)}: {extras.install(extra)}" if absent else has
        yield Finding(f"extra '{extra}'", "note" if absent else "ok", text)


def _backends() -> Iterator[Finding]:
    yield Finding("backends", "ok", ", ".join(backend_records.BUILT_IN))
    for name, distribution in backend_records.installed().items():
        why = backend_records.broken(name)
        yield Finding(f"backend '{name}'", "bad" if why else "ok", why or f"of {distribution}")
    for name, distribution in backend_records.shadowed().items():
        yield Finding(f"backend '{name}'", "note", f"that of {distribution} is not used: tutti has its own")


def _devices() -> Iterator[Finding]:
    known = nvml.visible_gpus()
    for gpu in known:
        yield Finding(gpu.device, "ok", f"{gpu.name}, {gpu.memory_bytes / 2**30:.0f} GiB")
    if not known:
        is_hidden = gpu_presence.has_gpu()
        text = "a driver shows one, but NVML does not tell of it (nvidia-ml-py, permissions?)" if is_hidden else "none"
        yield Finding("GPUs", "bad" if is_hidden else "note", f"{text}: models execute on the processor")
    compiler = os.environ.get("CXX", "g++")
    where = shutil.which(compiler)
    text = where or f"no {compiler}: models that ask for 'tutti.compile' are served uncompiled"
    yield Finding("C++ compiler", "ok" if where else "note", text)


def _limits() -> Iterator[Finding]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    has_files = hard == resource.RLIM_INFINITY or hard >= _ENOUGH_FILES
    files = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    advice = "" if has_files else "; a connection is one, and a python model's process is several: raise the hard limit"
    yield Finding("open files", "ok" if has_files else "bad", f"{files}{advice}")
    if not _SHARED_MEMORY.is_dir():
        yield Finding("shared memory", "note", f"no {_SHARED_MEMORY}: clients cannot share memory, and Ray is slow")
        return
    free = shutil.disk_usage(_SHARED_MEMORY).free
    is_enough = free >= _ENOUGH_SHARED_BYTES
    advice = "" if is_enough else "; clients that share memory, and Ray, need more (docker run --shm-size=1g)"
    yield Finding("shared memory", "ok" if is_enough else "note", f"{free / 2**30:.2f} GiB free{advice}")


def _locale() -> Iterator[Finding]:
    if locales.has(locales.DEFAULT):
        yield Finding("locale", "ok", locales.DEFAULT)
        return
    need = "ONNX graphs that change the case of texts (StringNormalizer) may need it"
    yield Finding("locale", "note", f"no {locales.DEFAULT}: {need}: {locales.install(locales.DEFAULT)}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
