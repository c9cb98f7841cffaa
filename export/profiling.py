"""How long a graph's variants take, by batch and length, and what to make of it under a latency goal."""

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tutti.export import onnx
from tutti.export.graphs import Arrays, Graph
from tutti.export.variants import Result

_REPEATS = 5
_BUDGET_S = 0.3
# A size is preferred if a row costs no more than this beyond the cheapest.
_NEAR = 1.1


@dataclass(frozen=True, slots=True)
class Measured:
    """A variant's median time for a batch of rows of one length (1: there are none), on a device."""

    variant: str
    device: str
    rows: int
    length: int
    ms: float


@dataclass(frozen=True, slots=True)
class Recommended:
    """What a configuration gets: `latency` is what a scheduler begins with, "rows:ms" of the usual length.

    `longest_ms` is what a batch of the most rows takes whose rows are of the longest length that was measured.
    """

    max_batch_size: int
    preferred: tuple[int, ...]
    latency: str
    instances: int
    queue_delay_us: int
    usual_length: int
    longest_ms: float


def measure(result: Result) -> list[Measured]:
    """Of the variants that ONNX Runtime executes here, on the processor."""
    graph = result.graph
    measurements = []
    for variant in ("fp32", "fp16", "int8"):
        built = result.built.get(variant)
        if built is None or not built.comparison.is_well or variant == "fp16":
            continue  # processors execute 16 bits as 32: its time there says nothing
        loaded = onnx.session(built.path)
        for case, length in _lengths(graph):
            rows = 1
            while rows <= graph.max_batch_size:
                measurements.append(Measured(variant, "cpu", rows, length, _time_ms(loaded, _repeated(case, rows))))
                rows *= 2
    return measurements


def _lengths(graph: Graph) -> list[tuple[Arrays, int]]:
    """A row of each length that the cases have, at most four of them: (inputs, length)."""
    by_length: dict[int, Arrays] = {}
    for case in graph.cases:
        first = next(iter(case.values()))
        length = first.shape[1] if graph.axes.get(next(iter(case)), {}).get(1) and first.ndim > 1 else 1
        by_length.setdefault(int(length), {name: array[:1] for name, array in case.items()})
    lengths = sorted(by_length)
    step = max(1, len(lengths) // 4)
    return [(by_length[length], length) for length in lengths[::-1][::step][:4]]


def _repeated(case: Arrays, rows: int) -> dict[str, Any]:
    return {name: np.repeat(array, rows, axis=0) for name, array in case.items()}


def _time_ms(loaded: Any, case: Arrays) -> float:
    onnx.run(loaded, case)
    took: list[float] = []
    until = time.perf_counter() + _BUDGET_S
    while len(took) < _REPEATS and (not took or time.perf_counter() < until):
        start = time.perf_counter()
        onnx.run(loaded, case)
        took.append((time.perf_counter() - start) * 1e3)
    return statistics.median(took)


def recommend(measured: Sequence[Measured], variant: str, goal_ms: float) -> Recommended:
    """For the usual length, the middle one of those that were measured.

    A request may find a batch under way and then go in the next one: two batches fit into the goal. Batches of longer
    rows take longer; to hold them to the goal too would leave nothing to batch of the others.
    """
    of_variant = [measurement for measurement in measured if measurement.variant == variant] or list(measured)
    lengths = sorted({measurement.length for measurement in of_variant})
    usual = lengths[len(lengths) // 2]
    times = {measurement.rows: measurement.ms for measurement in of_variant if measurement.length == usual}
    fitting = [rows for rows, ms in times.items() if 2 * ms <= goal_ms] or [min(times)]
    most = max(fitting)
    cheapest = min(times[rows] / rows for rows in fitting)
    preferred = tuple(sorted(rows for rows in fitting if rows > 1 and times[rows] / rows <= _NEAR * cheapest))
    latency = ",".join(f"{rows}:{ms:.3f}" for rows, ms in times.items())
    longest_ms = max(
        measurement.ms for measurement in of_variant if measurement.rows == most and measurement.length == lengths[-1]
    )
    # Sessions use all cores; on a GPU two instances overlap copies with execution.
    return Recommended(most, preferred, latency, max(1, (os.cpu_count() or 1) // 2), 0, usual, longest_ms)
