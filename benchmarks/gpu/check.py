"""The part `check`: whether all is right on this device, and stays right when things go wrong.

What the server does not have yet is found out by asking it, and recorded as that.
"""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu import frame, models, onnx_models, repository, served, server
from benchmarks.gpu.context import ROOT, Array, Context, NotThereYetError
from benchmarks.gpu.frame import Line
from benchmarks.gpu.requests import Request

_HERE = "benchmarks.gpu.check"
_MEMORY, _FAULTS = "benchmarks.gpu.check_memory", "benchmarks.gpu.check_faults"
_TOLD = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
# Of the tensors between the steps of the chain: 4 MB.
_WIDTH = 1 << 20


def lines(is_short: bool) -> list[Line]:
    return [
        Line("load and unload", f"{_MEMORY}:load_unload", 120, least_s=20),
        Line("AOTInductor", "benchmarks.gpu.check_compiled:aot_inductor", 330, needs_gpu=True, least_s=60),
        Line("backends against float64", f"{_HERE}:backends", 120, least_s=20),
        Line("an id out of range", f"{_FAULTS}:bad_id", 120, least_s=20),
        Line("an id out of range, with bounds", f"{_FAULTS}:bounded_id", 60, least_s=20),
        Line("ensembles on the device", f"{_HERE}:ensembles", 70, least_s=20),
        Line("CUDA graphs", f"{_HERE}:graphs", 60, needs_gpu=True, least_s=20),
        Line("a kernel that does not end", f"{_FAULTS}:hang", 90, least_s=30),
        Line("out of memory halves the batch", f"{_MEMORY}:halving", 60, needs_gpu=True, least_s=20),
        Line("CUDA shared memory", f"{_MEMORY}:cuda_shared_memory", 60, needs_gpu=True, least_s=15),
        Line("tests marked gpu", f"{_HERE}:run_tests", 240, {"are_of_compiled": False}, least_s=10),
        Line(
            "tests of compiled models", f"{_HERE}:run_tests", 240, {"are_of_compiled": True}, needs_gpu=True, least_s=60
        ),
        Line("a batch that outlasts the engine's patience", f"{_FAULTS}:engine_hang", 180, needs_gpu=True, least_s=120),
    ]


def run_tests(context: Context, are_of_compiled: bool) -> None:
    """All of them; those that fail by name, the others counted. Those that compile models take minutes."""
    found = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    found = [path for path in found if path.parent.name != "benchmarks"]
    files = sorted(str(path) for path in found if (path.name == "test_compiled.py") is are_of_compiled)
    if not files:
        raise NotThereYetError("no test is marked gpu")
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "--continue-on-collection-errors", "--tb=short",
               "-p", "no:cacheprovider", "--timeout=60", "--durations=5", *files]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=frame.environment())
    assert process.stdout is not None
    counts: Counter[str] = Counter()
    for text in process.stdout:
        context.say(text.rstrip())
        told = _TOLD.match(text)
        if told is None:
            continue
        counts[told[2].lower()] += 1
        if told[2] in ("FAILED", "ERROR", "XPASS"):
            context.check(told[1], False)
    is_right = process.wait() in (0, 5) and not counts["failed"] + counts["error"]
    context.check("all", is_right, **counts)


def backends(context: Context) -> None:
    """Each model in each precision beside float64 on the processor: |answer - truth| / |truth|."""
    folder = served.fresh(context, "check-backends")
    root = served.fresh(context, "check-backends/models")
    specs = models.specs(context.is_short)
    precisions = ("fp32", "bf16") if context.is_short else ("fp32", "fp16", "bf16")
    names = ("minilm", "resnet50") if context.is_short else ("minilm", "vit", "resnet50")
    found = {}
    for spec in (specs[name] for name in names):
        for precision in precisions:
            name = repository.add_spec(root, spec, precision, context.device, context.work, context.is_short, 16)
            found[name] = (spec, precision)
    found |= _onnx(context, root, specs["minilm"])
    with server.tutti(root, folder / "server.log") as tutti:
        truths: dict[str, Array] = {}
        for name, (spec, precision) in found.items():
            asked = served.request(spec, name)
            if spec.name not in truths:
                truths[spec.name] = models.reference(spec, [array for _, array in asked.tensors])
            off = models.difference(tutti.infer(asked)[spec.output], truths[spec.name])
            context.check(name, off < served.NEAR[precision], off=off)


def _onnx(context: Context, root: Path, spec: models.Spec) -> dict[str, tuple[models.Spec, str]]:
    import onnxruntime

    if context.is_gpu and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        context.emit("onnxruntime on CUDA", {"note": "not there: this onnxruntime has no CUDA provider"})
        device = "cpu"
    else:
        device = context.device
    name = onnx_models.add_spec(root, spec, "fp32", device, context.work, context.is_short, 16)
    return {name: (spec, "fp32")}


class Widen(torch.nn.Module):
    """x [batch, 1] -> [batch, width], x + a ramp."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("ramp", torch.arange(width) / width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ramp


class Double(torch.nn.Module):
    """2x + 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 + 1


class Mean(torch.nn.Module):
    """[batch, width] -> [batch, 1]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1, keepdim=True)


def ensembles(context: Context) -> None:
    """A chain of three steps on the device, the same with the host between them, and one of several backends."""
    width = 1024 if context.is_short else _WIDTH
    folder = served.fresh(context, "check-ensembles")
    root = served.fresh(context, "check-ensembles/models")
    steps = {"widen": (Widen(width), 1, width), "double": (Double(), width, width), "mean": (Mean(), width, 1)}
    for name, (module, inside, outside) in steps.items():
        repository.add_module(root, name, module, inside, repository.floats("pytorch", context.device, inside, outside))
    # Python models get numpy arrays unless they ask for more: what passes one has been in the host's memory.
    repository.add_python(root, "host", "return x", width, width)
    onnx_models.add_increment(root, "increment", width)
    repository.add_chain(root, "chain", ["widen", "double", "mean"], 1, 1)
    repository.add_chain(root, "through_host", ["widen", "host", "double", "host", "mean"], 1, 1)
    repository.add_chain(root, "mixed", ["widen", "increment", "double", "host", "mean"], 1, 1)
    x = np.array([[3.0], [-5.0]], np.float32)
    truth = 2 * (x + (width - 1) / (2 * width)) + 1
    with server.tutti(root, folder / "server.log") as tutti:
        rates = {}
        for name, more in (("chain", 0.0), ("through_host", 0.0), ("mixed", 2.0)):
            said = tutti.infer(Request(name, [("x", x)]))["y"]
            is_right = bool(np.allclose(said, truth + more, rtol=1e-4))
            row = served.measured(context, tutti, "http", Request(name, [("x", x[:1])]), 8)
            rates[name] = row.get("requests/s", 0.0)
            context.check(name, is_right, **row)
        context.emit(
            "chain over through_host", {"model": "chain", "times": rates["chain"] / max(1e-9, rates["through_host"])}
        )


def graphs(context: Context) -> None:
    """Captured graphs give the same at every batch, and padding is seen by nobody."""
    spec = models.specs(context.is_short)["minilm"]
    folder = served.fresh(context, "check-graphs")
    root = served.fresh(context, "check-graphs/models")
    extra = f"dynamic_batching {{}} {repository.GRAPHS}"
    name = repository.add_spec(root, spec, "fp16", context.device, context.work, context.is_short, 16, extra)
    try:
        with server.tutti(root, folder / "server.log") as tutti:
            for rows in (1, 2, 3, 5, 8, 13, 16):
                arrays = spec.draw(rows, seed=rows)
                names = [one.name for one in spec.inputs]
                asked = Request(name, list(zip(names, arrays, strict=True)), spec.output)
                off = models.difference(tutti.infer(asked)[spec.output], models.reference(spec, arrays))
                context.check(f"{rows} rows", off < served.NEAR["fp16"], off=off)
            told = [line for line in tutti.said().splitlines() if "graph" in line.replace(str(root), "").lower()]
            context.emit("log", {"said": told[-1][:200] if told else "nothing of graphs"})
    except server.StartError as error:
        raise NotThereYetError(str(error)[-300:]) from None
