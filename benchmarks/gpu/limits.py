"""The part `limits`: what the card can do, and what a bare loop reaches with each model at each batch.

Floors are of `floor.py`; 32 bits are torch's defaults (no TF32 in products of matrices, TF32 in convolutions).
"""

import functools
import shutil
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu import bare, floor, models
from benchmarks.gpu.context import Context, Figures, NotThereYetError
from benchmarks.gpu.frame import Line

_HERE = "benchmarks.gpu.limits"
_MIB = 1 << 20


def lines(is_short: bool) -> list[Line]:
    """The card first, then what `served` is compared with, then the rest."""
    found = [Line("the card", f"{_HERE}:card", 60)]
    names = list(models.SPECS)
    if is_short:
        kinds = [*((name, "fp32") for name in names), ("minilm", "bf16")]
        return found + [_model(name, precision, [1, 8]) for name, precision in kinds] + [_compiled("minilm", [1])]
    pictures_and_texts, speech = names[:3], names[3:]
    batches = list(models.BATCHES)
    found += [_model(name, "fp16", batches) for name in pictures_and_texts]
    found += [_compiled(name, batches) for name in pictures_and_texts]
    found += [_model(name, "fp16", batches) for name in speech]
    found += [_model(name, "fp32", batches) for name in names]
    found += [_compiled(name, batches) for name in speech]
    return found


def _model(name: str, precision: str, batches: list[int]) -> Line:
    arguments = {"name": name, "precision": precision, "batches": batches}
    return Line(f"{name} {precision}", f"{_HERE}:model", 60, arguments, least_s=12)


def _compiled(name: str, batches: list[int]) -> Line:
    arguments = {"name": name, "precision": "fp16", "batches": batches[-1:], "is_compiled": True}
    return Line(f"{name} fp16 compiled", f"{_HERE}:model", 120, arguments, needs_gpu=True, least_s=40)


def card(context: Context) -> None:
    """Copies in both directions, from pinned and ordinary memory; launches; large products."""
    if context.is_gpu:
        _copies(context)
        _launches(context)
    _products(context)


def _copies(context: Context) -> None:
    peaks: dict[str, float] = {}
    for size in (64 << 10, _MIB, 16 * _MIB, 256 * _MIB):
        there = torch.empty(size, dtype=torch.uint8, device=context.device)
        for kind in ("pinned", "pageable"):
            here = torch.ones(size, dtype=torch.uint8, pin_memory=kind == "pinned")
            into = size / _timed(functools.partial(there.copy_, here, non_blocking=True), context)
            back = size / _timed(functools.partial(here.copy_, there, non_blocking=True), context)
            context.emit(f"copy {size >> 10} KiB {kind}", {"in GB/s": into / 1e9, "out GB/s": back / 1e9})
            if kind == "pinned":
                peaks = {"in": into, "out": back}  # of the largest, at last
    for direction, rate in peaks.items():
        context.emit(f"peak {direction}", {"peak": direction, "per_s": rate, "GB/s": rate / 1e9})
    source = torch.rand(1 << 30, device=context.device)
    target = torch.empty_like(source)
    rate = 2 * source.numel() * 4 / _timed(functools.partial(target.copy_, source), context)
    context.emit("memory, read and written", {"peak": "memory", "per_s": rate, "TB/s": rate / 1e12})


def _launches(context: Context) -> None:
    """An operation that does nothing to speak of: submitted, waited for, and in a graph of a hundred."""
    x = torch.zeros(1, device=context.device)
    count = 2000
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        x.add_(1)
    submitted = time.perf_counter() - began
    torch.cuda.synchronize()
    executed = time.perf_counter() - began
    context.emit("launch", {"submitted us": 1e6 * submitted / count, "executed us": 1e6 * executed / count})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(100):
            x.add_(1)
    context.emit("graph of 100", {"replay us": 1e6 * _timed(graph.replay, context)})


def _products(context: Context) -> None:
    """On random numbers: zeros are quicker."""
    size = 8192 if context.is_gpu else 512
    kinds = ("bf16", "fp16", "tf32", "fp32") if context.is_gpu else ("fp32",)
    for kind in kinds:
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        dtype = models.PRECISIONS.get(kind, torch.float32)
        a, b = (torch.randn(size, size, device=context.device, dtype=dtype) for _ in range(2))
        rate = 2 * size**3 / _timed(functools.partial(torch.matmul, a, b), context)
        context.emit(f"product {size} {kind}", {"peak": kind, "per_s": rate, "TFLOP/s": rate / 1e12})
    torch.backends.cuda.matmul.allow_tf32 = False


def _timed(run: Callable[[], Any], context: Context) -> float:
    """Seconds of one of many, by events; the median of five rounds of a fiftieth of a second and more."""
    if not context.is_gpu:
        run()
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    count = max(1, min(2000, int(0.02 / max(1e-6, time.perf_counter() - began))))
    rounds: list[float] = []
    for _ in range(5):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            run()
        stop.record()
        stop.synchronize()
        rounds.append(float(start.elapsed_time(stop)) / 1e3 / count)
    return sorted(rounds)[2]


def model(context: Context, name: str, precision: str, batches: list[int], is_compiled: bool = False) -> None:
    """A row for each batch: one at a time, overlapped, and overlapped with graphs; beside the floor."""
    spec = models.specs(context.is_short)[name]
    if is_compiled and shutil.which("g++") is None:
        raise NotThereYetError("torch.compile needs g++")
    peaks, _ = floor.peaks(context.out, context.work)
    seconds = 0.05 if context.is_short else 0.4
    has_caches = name == "whisper_decoder"
    module = None
    for batch in batches:
        if module is None or has_caches:
            module = models.build(spec, precision, batch, context.device)
        run = torch.compile(module, dynamic=False) if is_compiled else module
        row: Figures = {"model": name, "precision": precision, "batch": batch, "compiled": is_compiled}
        try:
            row |= _measured(context, run, models.as_tensors(spec.draw(batch)), seconds)
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
        if context.is_gpu:
            work = floor.work(spec, precision, batch)
            least_s = work.floor_s(peaks, precision)
            rate = max((value for key, value in row.items() if key.endswith(" rows/s")), default=0.0)
            row |= {
                "floor ms": 1e3 * least_s,
                "of floor": least_s * rate / batch,
                "bound": work.bound(peaks, precision),
            }
        context.emit(f"batch {batch}", row)


def _measured(context: Context, run: Callable[..., Any], inputs: list[torch.Tensor], seconds: float) -> Figures:
    loop = bare.Loop(run, inputs, context.device)
    row: Figures = {"alone ms": 1e3 * loop.one_s(seconds / 2), "overlapped rows/s": loop.rate(seconds)}
    if not context.is_gpu:
        return row
    try:
        loop.capture()
    except torch.OutOfMemoryError:
        return row
    row |= {"graph alone ms": 1e3 * loop.one_s(seconds / 2), "graph rows/s": loop.rate(seconds)}
    return row
