"""Whether an exported graph answers as PyTorch does: several batch sizes and lengths, every output."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from export.errors import ParityError

Arrays = Mapping[str, npt.NDArray[Any]]
Reference = Callable[[Arrays], Arrays]


@dataclass(frozen=True, slots=True)
class Report:
    """How far the graph is from the reference over all cases."""

    cases: int
    max_abs_error: float
    tolerance: float

    def __str__(self) -> str:
        return f"{self.cases} cases, max abs error {self.max_abs_error:.1e} (tolerance {self.tolerance:.0e})"


def check(path: Path, reference: Reference, cases: Sequence[Arrays], tolerance: float) -> Report:
    """Run every case through the graph and the reference.

    Raises ParityError naming the output, the input shapes and the error when one differs by more than `tolerance`,
    in shape, or is not finite.
    """
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_outputs()]
    inputs = {node.name for node in session.get_inputs()}
    worst = 0.0
    for case in cases:
        expected = reference(case)
        got = session.run(names, {name: array for name, array in case.items() if name in inputs})
        for name, array in zip(names, got, strict=True):
            worst = max(worst, _difference(path, name, case, expected[name], array, tolerance))
    return Report(len(cases), worst, tolerance)


def _difference(path: Path, name: str, case: Arrays, expected: Any, got: Any, tolerance: float) -> float:
    shapes = ", ".join(f"{key} {list(array.shape)}" for key, array in case.items())
    where = f"{path.name}: output '{name}' on {shapes}"
    if expected.shape != got.shape:
        raise ParityError(f"{where}: expected shape {list(expected.shape)}, got {list(got.shape)}")
    error = float(np.max(np.abs(expected.astype(np.float64) - got.astype(np.float64)), initial=0.0))
    if not np.isfinite(error) or error > tolerance:
        raise ParityError(f"{where}: differs from PyTorch by {error:.2e}, tolerated are {tolerance:.0e}")
    return error
