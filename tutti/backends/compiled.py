"""Compiled models of the pytorch backend: made on the machine that serves, kept, verified, and else done without.

A model asks for it with parameters of its config.pbtxt, which a stock Triton ignores:

    tutti.compile            "aot_inductor": a library without Python, compiled once (AOTInductor);
                             "torch_compile": what torch.compile compiles with, which launches from Python
    tutti.compile.mode       "default" or "max-autotune-no-cudagraphs", as torch.compile names them
    tutti.compile.tolerance  how far outputs may differ, as a share of their range; by default by datatype
    tutti.compile.timeout_s  how long compiling may take, 1800 by default

On a GPU a model whose only variable dimension is the batch is compiled for its largest batch, too (largest_batch.py).

A model that cannot be compiled, or does something else once it is, is served uncompiled with a warning that says why.
A `model.pt2` that is an AOTInductor package already is loaded as it is.
"""

import importlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from google.protobuf import text_format
from torch.utils import _pytree as pytree

from tutti.backends import artefacts, compiler, largest_batch, verification
from tutti.backends.aot_packages import Package
from tutti.backends.artefacts import CacheError
from tutti.backends.compile_options import Compilation
from tutti.backends.compiler import AOT, JIT, KEPT, LARGEST, PACKAGE, Job, Uncompilable
from tutti.devices.cuda import loading
from tutti.repository.model_config import ModelConfig

_log = logging.getLogger(__name__)

Forward = Callable[..., Any]


def exported(path: Path, device: str) -> Any:
    """The exported program of a file, on the device. Raises what PyTorch raises."""
    program = torch.export.load(str(path))
    if device != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    return program


def entry(config: ModelConfig, compilation: Compilation, path: Path, device: str) -> Path | None:
    """The folder of the compiled model; None, and a warning, where there is none to be had. May take minutes."""
    if device not in compilation.entries:
        compilation.entries[device] = _entry(config, compilation, path, device)
    return compilation.entries[device]


def _entry(config: ModelConfig, compilation: Compilation, path: Path, device: str) -> Path | None:
    key = _key(compilation, path, device)
    rows = largest_batch.rows_of(config, compilation.how, device)
    if rows:
        key["rows"] = str(rows)
    if key["device"] in compilation.failures:
        return None
    text = text_format.MessageToString(config.proto)
    how, mode, timeout_s = compilation.how, compilation.mode, compilation.timeout_s
    job = Job(config.name, text, str(path), how, mode, device, compilation.tolerance, timeout_s)
    try:
        root, name = artefacts.default_root(), _name(key)
        if not compilation.makes:
            return root / name if artefacts.is_whole(root / name, key) else None
        wait_s = timeout_s * (2 if rows else 1)  # who makes the entry compiles twice, if there is a largest batch
        return artefacts.entry(root, name, key, lambda folder: _make(job, folder, rows), wait_s)
    except (CacheError, Uncompilable) as error:
        compilation.failures.add(key["device"])
        refuse(config, device, str(error))
        return None


def refuse(config: ModelConfig, device: str, why: str) -> None:
    """Say that the model is served uncompiled."""
    _log.warning("model '%s': is served uncompiled on %s: %s", config.name, device, why)


def _make(job: Job, folder: Path, rows: int) -> None:
    _log.info("compiling model '%s' for %s with %s: takes minutes the first time", job.model, job.device, job.how)
    began = time.monotonic()
    compiler.compile_apart(job, folder)
    if rows:
        largest_batch.make(replace(job, rows=rows), folder / LARGEST)
    size_mb = artefacts.size(folder) / 1e6
    took_s = time.monotonic() - began
    _log.info("compiled model '%s' for %s in %.0f s: %.1f MB", job.model, job.device, took_s, size_mb)


def _key(compilation: Compilation, path: Path, device: str) -> dict[str, str]:
    """All that decides what is compiled."""
    key = {
        "format": "1",
        "model": artefacts.digest(path),
        "how": compilation.how,
        "mode": compilation.mode,
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none",
        "device": _kind(device),
        "settings": json.dumps(
            {
                name: value
                for name, value in sorted(os.environ.items())
                if name.startswith(("TORCHINDUCTOR_", "TRITON_")) and not name.endswith("_CACHE_DIR")
            }
        ),
    }
    if compilation.how == JIT and device != "cpu":
        key["index"] = device  # which is in the code
    return key


def _kind(device: str) -> str:
    if device == "cpu":
        return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_cpu_flags()}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"


def _cpu_flags() -> str:
    """What the processor can do, which code for this machine makes use of."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((" ".join(sorted(line.split(":", 1)[1].split())) for line in lines if line.startswith("flags")), "")


def _name(key: dict[str, str]) -> str:
    """As "4d0a...-torch2.11.0+cu130-NVIDIA-H100-80GB-HBM3-sm_90"."""
    is_gpu = " sm_" in key["device"]
    kind = key["device"] if is_gpu else "cpu"
    plain = "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in kind)
    return f"{sha256(json.dumps(key).encode()).hexdigest()[:32]}-torch{key['torch'].split()[0]}-{plain}"


def opened(folder: Path, how: str, program: Any, device: str, runners: int) -> Forward:
    """The compiled model of an entry. `program` is the exported one on the device; `runners` may execute at once.

    Raises what PyTorch raises.
    """
    if how == AOT:
        return Package(folder / PACKAGE, device, runners)
    return Kept(folder / KEPT, program)


class Kept:
    """What torch.compile's compiler has kept of an exported program, whose weights it shares."""

    def __init__(self, folder: Path, program: Any) -> None:
        from torch._inductor import CompiledArtifact

        # It changes the process's environment for a moment.
        self._compiled = CompiledArtifact.load(path=str(folder), format="unpacked")
        # Weights, buffers and constants: the first arguments.
        self.weights = _lifted(program)
        self._count = len(program.graph_signature.user_inputs)
        self._outputs = program.call_spec.out_spec

    def __call__(self, *tensors: Any) -> Any:
        if len(tensors) != self._count:
            raise TypeError(f"forward takes {self._count} tensors, got {len(tensors)}")
        return pytree.tree_unflatten(list(self._compiled(*self.weights, *tensors)), self._outputs)


def check_is_stateless(program: Any) -> None:
    """Raises Uncompilable for a program that writes to its buffers or inputs: each copy of it had a state of its own.

    Trying it would change the state, too.
    """
    written = [spec.kind.name for spec in program.graph_signature.output_specs if spec.kind.name != "USER_OUTPUT"]
    # Values that may share memory with an argument of the graph.
    shared: set[Any] = set()
    for node in program.graph_module.graph.nodes:
        if node.op == "placeholder":
            shared.add(node)
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            continue
        values = [node.kwargs.get(spec.name, None) for spec in schema.arguments]
        values[: len(node.args)] = node.args
        pairs = list(zip(schema.arguments, values, strict=True))
        aliased = [spec for spec, value in pairs if spec.alias_info is not None and shared.intersection(_nodes(value))]
        written += [str(node.target) for spec in aliased if spec.alias_info.is_write]
        if aliased and any(result.alias_info is not None for result in schema.returns):
            shared.add(node)
    if written:
        raise Uncompilable(f"forward writes to its buffers or inputs ({written[0]})")


def _nodes(value: Any) -> list[Any]:
    """The nodes that an argument is, or is a list of."""
    return [item for item in (value if isinstance(value, list | tuple) else [value]) if isinstance(item, torch.fx.Node)]


def _lifted(program: Any) -> list[Any]:
    """Weights, buffers and constants, which the graph takes as arguments before the caller's."""
    tensors = []
    for spec in program.graph_signature.input_specs:
        if spec.kind.name != "USER_INPUT":
            kept = program.state_dict if spec.target in program.state_dict else program.constants
            tensors.append(kept[spec.target])
    return tensors


def expectations(
    program: Any, fills: Sequence[verification.Fill], device: str, rows: int = 0
) -> list[tuple[list[Any], Any]]:
    """Small inputs, and what the program makes of them as it is; without those that it does not take.

    With `rows` they are repeated until there are so many. Raises what the program raises when it takes none of them.
    """
    forward = program.module(check_guards=False)
    pairs: list[tuple[list[Any], Any]] = []
    failure: Exception | None = None
    for sample in verification.samples(program, fills, device):
        inputs = [_repeated(tensor, rows) for tensor in sample] if rows else sample
        try:
            with torch.inference_mode():
                pairs.append((inputs, forward(*inputs)))
        except Exception as error:
            failure = error
    if failure is not None and not pairs:
        raise failure
    return pairs


def _repeated(tensor: Any, rows: int) -> Any:
    """The tensor's rows, one after the other and again, until there are so many."""
    return tensor[torch.arange(rows, device=tensor.device) % tensor.shape[0]]


def first_difference(forward: Forward, pairs: Sequence[tuple[list[Any], Any]], allowed: float) -> str:
    """What a compiled model does differently; "" when it does the same."""
    for inputs, expected in pairs:
        with torch.inference_mode():
            outputs = forward(*inputs)
        if difference := verification.difference(expected, outputs, allowed):
            return difference
    return ""


def verified(
    config: ModelConfig,
    compilation: Compilation,
    folder: Path,
    program: Any,
    device: str,
    fills: Sequence[verification.Fill],
    runners: int,
) -> Forward | None:
    """The compiled model of an entry, which does what the program does; None, and a warning, where it does not."""
    try:
        allowed = compilation.tolerance if compilation.tolerance >= 0 else verification.tolerance(program)
        if compilation.how == JIT:
            inductor = importlib.import_module("torch._inductor")  # takes seconds, for which nobody needs to wait
            # Here nothing is compiled: a pool of processes that could would keep cores busy beside who serves.
            inductor.config.compile_threads = 1
        with loading:
            forward = opened(folder, compilation.how, program, device, runners)
            fault = first_difference(forward, expectations(program, fills, device), allowed)
    except Exception as error:
        fault = compiler.one_line(error)
    if fault:
        refuse(config, device, f"{fault} (compiled in {folder})")
        return None
    _log.info("model '%s': executes what was compiled for %s, from %s", config.name, device, folder)
    rows = largest_batch.rows_of(config, compilation.how, device)
    if not rows or not (folder / LARGEST).is_dir():
        return forward
    largest = _verified_largest(config, folder / LARGEST, program, device, fills, rows, allowed)
    return largest_batch.BySize(forward, largest, rows) if largest is not None else forward


def _verified_largest(
    config: ModelConfig,
    folder: Path,
    program: Any,
    device: str,
    fills: Sequence[verification.Fill],
    rows: int,
    allowed: float,
) -> Forward | None:
    """What is compiled for batches of `rows`; None, and a warning, where it does something else."""
    try:
        with loading:
            forward = opened(folder, JIT, program, device, 1)
            fault = first_difference(forward, expectations(program, fills, device, rows), allowed)
    except Exception as error:
        fault = compiler.one_line(error)
    if fault:
        message = "model '%s': batches of %d execute what was compiled for any size on %s: %s (compiled in %s)"
        _log.warning(message, config.name, rows, device, fault, folder)
        return None
    return forward
