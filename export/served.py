"""The last look before publishing: what was staged is served in this process, and asked as clients will ask it.

From raw text, pictures or sounds to answers, each compared with what the checkpoint's own pipeline makes of the same.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tutti import ensembles
from tutti.core.dtypes import Array, from_numpy
from tutti.core.types import Call, InferRequest, InferResponse, Tensor
from tutti.export.errors import ExportError, first_line
from tutti.export.graphs import Check, Limits, Trial
from tutti.serving import local
from tutti.serving.engine import Engine
from tutti.serving.model import Model

_WAIT_S = 300


@dataclass(slots=True)
class _Asked:
    """A sink of one call."""

    is_settled: threading.Event

    def settle(self, calls: Sequence[Call]) -> None:
        self.is_settled.set()


class Staged:
    """The models of a folder, served in this process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def ask(self, model: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Its outputs by name. Raises ExportError where there is no answer."""
        tensors = {name: Tensor(name, from_numpy(array.dtype), array.shape, array) for name, array in inputs.items()}
        asked = _Asked(threading.Event())
        call = Call(InferRequest(model, tensors), asked)
        self._engine([call])
        if not asked.is_settled.wait(_WAIT_S):
            raise ExportError(f"'{model}' gave no answer within {_WAIT_S} s")
        if not isinstance(call.answer, InferResponse):
            raise ExportError(f"'{model}' answered with an error: {first_line(call.answer or ExportError(''))}")
        return {tensor.name: tensor.array() for tensor in call.answer.outputs}

    def models(self) -> list[Model]:
        return self._engine.models()


@contextmanager
def staged(folder: Path) -> Iterator[Staged]:
    """Serve a folder of models. Raises ExportError where one of them cannot be loaded."""
    engine = local.make_engine(folder, _timer, ensembles.load)
    try:
        engine.load_all()
        if failures := engine.failures():
            raise ExportError(f"it does not load: {failures[0]}")
        yield Staged(engine)
    finally:
        engine.close()


def _timer(delay_s: float, callback: Callable[[], None]) -> None:
    later = threading.Timer(delay_s, callback)
    later.daemon = True
    later.start()


def check(folder: Path, ensemble: str, trials: "Sequence[Trial]", limits: Limits) -> Check:
    """Whether the ensemble over `folder` answers each trial as it expects. Sizes of errors are shares of the range."""
    from tutti.export.graphs import Check

    worst = 0.0
    try:
        with staged(folder) as models:
            for trial in trials:
                row = {name: np.array([[data]], dtype=object) for name, data in trial.inputs.items()}
                expected, got = trial.expected(), models.ask(ensemble, row)
                fault, error = _compare(expected, trial.read(got) if trial.read else got, limits)
                if fault:
                    return Check("served", False, f"{trial.what}: {fault}")
                worst = max(worst, error)
    except ExportError as error:
        return Check("served", False, str(error))
    subjects = ", ".join(trial.what for trial in trials)
    return Check(
        "served", True, f"'{ensemble}' answers as the checkpoint's own pipeline, but for {worst:.1e}: {subjects}"
    )


def _compare(expected: Mapping[str, Any], got: Mapping[str, Any], limits: Limits) -> tuple[str, float]:
    """(what is wrong, the greatest error as a share of the output's range)."""
    worst = 0.0
    for name, right in expected.items():
        right, answer = np.asarray(right), got.get(name)
        if answer is None or answer.shape != right.shape:
            shape = None if answer is None else list(answer.shape)
            return f"output '{name}': expected {list(right.shape)}, got {shape}", worst
        if right.dtype.kind != "f":
            # In fewer bits a close decision may fall otherwise: its score is compared.
            if limits.top1 == 1.0 and answer.tolist() != right.tolist():
                return f"output '{name}': expected {_short(right)}, got {_short(answer)}", worst
            continue
        scale = max(1.0, float(np.abs(right).max(initial=0.0)))
        error = float(np.abs(right - answer).max(initial=0.0)) / scale
        if not error <= limits.max_error:
            return f"output '{name}' differs by {error:.1e} of its range, tolerated are {limits.max_error:.0e}", worst
        worst = max(worst, error)
    return "", worst


def _short(array: Any) -> str:
    return str(array.reshape(-1).tolist()[:8])[:120]
