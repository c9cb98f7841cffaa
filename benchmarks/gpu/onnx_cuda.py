"""The part `onnxruntime`: MiniLM as ONNX through ONNX Runtime's CUDA provider, from the kit's pieces of it."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu import frame, kept_programs, models, onnx_models, served, server
from benchmarks.gpu.context import Context, NotThereYetError
from benchmarks.gpu.frame import Line

_HERE = "benchmarks.gpu.onnx_cuda"
_ASK = """
import torch, onnxruntime
getattr(onnxruntime, "preload_dlls", lambda: None)()
print(onnxruntime.__version__, *onnxruntime.get_available_providers())
"""


def lines(is_short: bool) -> list[Line]:
    precisions = ("fp32",) if is_short else ("fp16", "fp32")
    clients = [8] if is_short else [64, 1, 256]
    found = [Line("providers", f"{_HERE}:providers", 120)]
    for precision in precisions:
        found.append(Line(f"minilm {precision}", f"{_HERE}:model", 120, {"precision": precision, "clients": clients}))
    return found


def packages(context: Context) -> Path | None:
    """Where the build with CUDA is; none on a processor, whose own build is installed."""
    return kept_programs.installed("onnxruntime", context.work) if context.is_gpu else None


def providers(context: Context) -> None:
    """Which build there is, and what it can execute on."""
    path = packages(context)
    environment = frame.environment()
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), environment["PYTHONPATH"]])
    done = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise NotThereYetError(f"onnxruntime cannot be imported: {done.stderr.strip()[-300:]}")
    version, *names = done.stdout.split()
    wanted = "CUDAExecutionProvider" if context.is_gpu else "CPUExecutionProvider"
    context.check(wanted, wanted in names, version=version)


def model(context: Context, precision: str, clients: list[int]) -> None:
    """Right, and as quick as it is."""
    spec = models.specs(context.is_short)["minilm"]
    folder = served.fresh(context, f"onnxruntime-{precision}")
    root = served.fresh(context, f"onnxruntime-{precision}/models")
    most = 32 if context.is_short else 256
    name = onnx_models.add_spec(root, spec, precision, context.device, context.work, context.is_short, most)
    rows = served.bare(context, "minilm", precision)
    with server.tutti(root, folder / "server.log", first_path=packages(context)) as tutti:
        asked = served.request(spec, name)
        served.check_answer(context, spec, precision, asked, tutti.infer(asked)[spec.output])
        for count in clients:
            for protocol in ("http", "grpc"):
                row = {"model": "minilm onnx", "precision": precision, "protocol": protocol, "clients": count}
                row |= served.measured(context, tutti, protocol, asked, count)
                context.emit(f"{protocol} {count} clients", row | served.beside(row, rows, spec.rows))
