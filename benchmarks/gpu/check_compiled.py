"""Of the part `check`: whether AOTInductor compiles on this machine; where its process crashes, if it does."""

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu import served
from benchmarks.gpu.context import Context
from tutti.backends import compiler

_TEXT = """backend: "pytorch" max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: [ 64 ] } output { name: "y" data_type: TYPE_FP32 dims: [ 8 ] }"""
# As it is done, and in ways that leave out what may be to blame: other processes, and tuning on the card.
_WAYS: Sequence[tuple[str, dict[str, str]]] = (
    ("as served", {}),
    ("without processes of its own", {"TORCHINDUCTOR_COMPILE_THREADS": "1"}),
    ("each launch waited for", {"CUDA_LAUNCH_BLOCKING": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}),
)
_TIMEOUT_S = 100.0
_MOST_LINES = 60


def aot_inductor(context: Context) -> None:
    """A small model: why it is not compiled, and the stack of a crash. The first way that works is enough."""
    folder = served.fresh(context, "check-compiled")
    module = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.GELU(), torch.nn.Linear(32, 8)).eval()
    rows = torch.export.Dim("rows", min=1, max=8)
    path = folder / "model.pt2"
    torch.export.save(torch.export.export(module, (torch.zeros(4, 64),), dynamic_shapes=({0: rows},)), path)
    for name, environment in _WAYS:
        os.environ.update(environment)  # this line's process is its own
        if _try(context, name, path):
            return


def _try(context: Context, name: str, path: Path) -> bool:
    device = "cpu" if not context.is_gpu else "cuda:0"
    job = compiler.Job("small", _TEXT, str(path), compiler.AOT, compiler.MODES[0], device, -1.0, _TIMEOUT_S)
    began = time.monotonic()
    why, stack = "", ""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        try:
            compiler.compile_apart(job, Path(folder))
        except compiler.Uncompilable as error:
            why, stack = str(error), crash(error.log)
    context.check(name, not why, s=time.monotonic() - began, why=why, stack=stack)
    return not why


def crash(log: str) -> str:
    """What faulthandler has written, with the lines before it; else the end of the log. In one line, for tables."""
    lines = log.splitlines()
    at = next((index for index, line in enumerate(lines) if line.startswith("Fatal Python error: ")), None)
    start = max(0, len(lines) - _MOST_LINES) if at is None else max(0, at - 5)
    return " / ".join([line.strip() for line in lines[start : start + _MOST_LINES] if line.strip()])
