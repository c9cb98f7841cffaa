"""Whether a variant answers as the reference does: several batches and lengths, every output. Pure but for numpy."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tutti.export.graphs import Arrays, Limits

_ROWS_SHOWN = 8


@dataclass(slots=True)
class Worst:
    """Where an output was farthest off: the case's inputs, and the values around the place."""

    output: str
    shapes: str
    error: float
    expected: list[float]
    got: list[float]
    inputs: str


@dataclass(slots=True)
class Comparison:
    """What was seen of one variant of one graph over all cases. Errors are absolute; `scale` is the outputs' range."""

    graph: str
    variant: str
    limits: Limits
    cases: int = 0
    max_abs: float = 0.0
    p99_abs: float = 0.0
    max_rel: float = 0.0
    p99_rel: float = 0.0
    cosine: float = 1.0
    top1: float = 1.0
    rows: int = 0
    worst: Worst | None = None
    failures: list[str] = field(default_factory=list)
    precision: str = ""
    note: str = ""

    @property
    def is_well(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        decisions = f", {self.top1:.1%} of {self.rows} decisions" if self.rows else ""
        return (
            f"{self.cases} cases, max abs error {self.max_abs:.1e}, least cosine {self.cosine:.6f}{decisions} "
            f"(tolerated: {self.limits.max_error:.0e} of the range, {self.limits.cosine})"
        )


class Comparer:
    """Collects what a variant answers."""

    def __init__(self, graph: str, variant: str, limits: Limits, decision: str = "") -> None:
        self._found = Comparison(graph, variant, limits)
        self._decision = decision
        self._errors: list[npt.NDArray[Any]] = []
        self._relative: list[npt.NDArray[Any]] = []
        self._right = 0
        self._decided = 0

    def case(self, inputs: Arrays, expected: Arrays, got: Arrays) -> None:
        """One case: every output that was asked for."""
        self._found.cases += 1
        for name, right in expected.items():
            self._output(name, inputs, np.asarray(right), np.asarray(got[name]))

    def failed(self, reason: str) -> None:
        """It could not be executed, or is not what it should be."""
        self._found.failures.append(reason)

    @property
    def is_well(self) -> bool:
        """So far."""
        return self._found.is_well

    def _output(self, name: str, inputs: Arrays, right: npt.NDArray[Any], got: npt.NDArray[Any]) -> None:
        shapes = ", ".join(f"{key} {list(array.shape)}" for key, array in inputs.items())
        where = f"output '{name}' on {shapes}"
        if right.shape != got.shape:
            self.failed(f"{where}: expected shape {list(right.shape)}, got {list(got.shape)}")
            return
        right, got = right.astype(np.float64), got.astype(np.float64)
        if not np.isfinite(got).all():
            self.failed(f"{where}: {int((~np.isfinite(got)).sum())} values are not finite")
            return
        off = np.abs(right - got)
        scale = max(1.0, float(np.abs(right).max(initial=0.0)))
        self._errors.append(off.reshape(-1))
        self._relative.append((off / np.maximum(np.abs(right), 1e-3 * scale)).reshape(-1))
        self._note_worst(name, shapes, inputs, right, got, off)
        limits = self._found.limits
        error = float(off.max(initial=0.0))
        if error > limits.max_error * scale:
            self.failed(
                f"{where}: differs from PyTorch by {error:.2e}, tolerated are {limits.max_error:.0e} of {scale:.3g}"
            )
        cosine = _least_cosine(right, got)
        self._found.cosine = min(self._found.cosine, cosine)
        if cosine < limits.cosine:
            self.failed(f"{where}: a row has cosine {cosine:.5f} with PyTorch's, expected at least {limits.cosine}")
        if name == self._decision and right.ndim > 1 and right.shape[-1] > 1:
            self._decide(right, got, off, scale)

    def _decide(self, right: npt.NDArray[Any], got: npt.NDArray[Any], off: npt.NDArray[Any], scale: float) -> None:
        """A row whose two best are closer than the error says nothing; in 16 bits, closer than what is tolerated."""
        best = np.sort(right, axis=-1)
        margin, agrees = best[..., -1] - best[..., -2], right.argmax(-1) == got.argmax(-1)
        if self._found.variant in ("fp32", "torch"):
            agrees = agrees | (margin <= 2 * off.max(axis=-1))
        elif self._found.variant in ("torch-fp16", "torch-bf16"):
            agrees = agrees | (margin <= self._found.limits.max_error * scale)
        self._decided += right[..., 0].size
        self._right += int(agrees.sum())

    def _note_worst(
        self, name: str, shapes: str, inputs: Arrays, right: npt.NDArray[Any], got: npt.NDArray[Any], off: Any
    ) -> None:
        if not off.size or not off.ndim or (self._found.worst is not None and off.max() <= self._found.worst.error):
            return
        place = [int(index) for index in np.unravel_index(int(off.argmax()), off.shape)]
        row = place[0]
        around = slice(max(0, place[-1] - _ROWS_SHOWN // 2), place[-1] + _ROWS_SHOWN // 2)
        index: Any = (*place[:-1], around)
        shown = "; ".join(f"{key}[{row}]: {_short(array, int(row))}" for key, array in inputs.items())
        expected, value = right[index].tolist(), got[index].tolist()
        self._found.worst = Worst(name, shapes, float(off.max()), expected, value, shown)

    def result(self) -> Comparison:
        comparison = self._found
        if self._errors:
            errors, relative = np.concatenate(self._errors), np.concatenate(self._relative)
            if errors.size:
                comparison.max_abs, comparison.p99_abs = float(errors.max()), float(np.quantile(errors, 0.99))
                comparison.max_rel, comparison.p99_rel = float(relative.max()), float(np.quantile(relative, 0.99))
        if self._decided:
            comparison.rows, comparison.top1 = self._decided, self._right / self._decided
            if comparison.top1 < comparison.limits.top1:
                comparison.failures.append(
                    f"output '{self._decision}': {comparison.top1:.1%} of {self._decided} decisions are PyTorch's, "
                    f"expected at least {comparison.limits.top1:.1%}"
                )
        return comparison


def _least_cosine(right: npt.NDArray[Any], got: npt.NDArray[Any]) -> float:
    """Of rows; one that is near zero in the reference has no direction."""
    if right.ndim < 2 or not right.size:
        return 1.0
    right, got = right.reshape(len(right), -1), got.reshape(len(got), -1)
    lengths = np.linalg.norm(right, axis=1) * np.linalg.norm(got, axis=1)
    is_long = np.linalg.norm(right, axis=1) > 1e-3
    if not is_long.any():
        return 1.0
    return float(((right * got).sum(1)[is_long] / np.maximum(lengths[is_long], 1e-30)).min())


def _short(array: npt.NDArray[Any], row: int) -> str:
    flat = np.asarray(array[row] if array.ndim and row < len(array) else array).reshape(-1)
    values = ", ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in flat[:12].tolist())
    return f"{values}{', ...' if flat.size > 12 else ''} ({flat.size} values)"
