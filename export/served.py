"""The last look before publishing: what was staged is served in this process, and asked as clients will ask it.

From raw text, pictures or sounds to answers, each compared with what the checkpoint's own pipeline makes of the same.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ensembles
from export.checkpoint import first_line
from export.errors import ExportError
from export.graphs import Check, Limits, Trial
from tutti import local
from tutti.engine import Engine
from tutti.types import Call, InferRequest, InferResponse, Tensor

_WAIT_S = 300


@dataclass(slots=True)
class _Asked:
    """A sink of one call."""

    is_settled: threading.Event

    def settle(self, calls: Sequence[Call]) -> None:
        self.is_settled.set()


def check(folder: Path, ensemble: str, trials: Sequence[Trial], limits: Limits) -> Check:
    """Whether the ensemble over `folder` answers each trial as it expects. Sizes of errors are shares of the range."""
    engine = local.make_engine(folder, _timer, ensembles.load)
    try:
        engine.load_all()
        failures = engine.failures()
        if failures:
            return Check("served", False, f"it does not load: {failures[0]}")
        worst = 0.0
        for trial in trials:
            expected, got = trial.expected(), _answer(engine, ensemble, trial.inputs)
            fault, error = _compare(expected, trial.read(got) if trial.read else got, limits)
            if fault:
                return Check("served", False, f"{trial.what}: {fault}")
            worst = max(worst, error)
    except ExportError as error:
        return Check("served", False, str(error))
    finally:
        engine.close()
    what = ", ".join(trial.what for trial in trials)
    return Check("served", True, f"'{ensemble}' answers as the checkpoint's own pipeline, but for {worst:.1e}: {what}")


def _timer(delay_s: float, callback: Callable[[], None]) -> None:
    later = threading.Timer(delay_s, callback)
    later.daemon = True
    later.start()


def _answer(engine: Engine, ensemble: str, inputs: Mapping[str, bytes]) -> dict[str, Any]:
    """Its outputs of one row. Raises ExportError where there is no answer."""
    given = {name: Tensor(name, "BYTES", (1, 1), np.array([[data]], dtype=object)) for name, data in inputs.items()}
    asked = _Asked(threading.Event())
    call = Call(InferRequest(ensemble, given), asked)
    engine([call])
    if not asked.is_settled.wait(_WAIT_S):
        raise ExportError(f"'{ensemble}' gave no answer within {_WAIT_S} s")
    if not isinstance(call.answer, InferResponse):
        raise ExportError(f"'{ensemble}' answered with an error: {first_line(call.answer or ExportError(''))}")
    return {tensor.name: tensor.array() for tensor in call.answer.outputs}


def _compare(expected: Mapping[str, Any], got: Mapping[str, Any], limits: Limits) -> tuple[str, float]:
    """(what is wrong, the greatest error as a share of the output's range)."""
    worst = 0.0
    for name, right in expected.items():
        right, made = np.asarray(right), got.get(name)
        if made is None or made.shape != right.shape:
            shape = None if made is None else list(made.shape)
            return f"output '{name}': expected {list(right.shape)}, got {shape}", worst
        if right.dtype.kind != "f":
            # In fewer bits a close decision may fall otherwise: its score is compared.
            if limits.top1 == 1.0 and made.tolist() != right.tolist():
                return f"output '{name}': expected {_short(right)}, got {_short(made)}", worst
            continue
        scale = max(1.0, float(np.abs(right).max(initial=0.0)))
        error = float(np.abs(right - made).max(initial=0.0)) / scale
        if not error <= limits.max_error:
            return f"output '{name}' differs by {error:.1e} of its range, tolerated are {limits.max_error:.0e}", worst
        worst = max(worst, error)
    return "", worst


def _short(array: Any) -> str:
    return str(array.reshape(-1).tolist()[:8])[:120]
