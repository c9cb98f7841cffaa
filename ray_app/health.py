"""Whether a replica still executes: batches that do not come out, and a request that is made to see. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from tutti.core.dtypes import NUMPY
from tutti.core.errors import DeviceLost, Internal, Unknown
from tutti.core.types import Answer, InferRequest, InferResponse, Tensor
from tutti.repository.model_config import ModelConfig

# A replica that was idle for this long is asked for an inference.
IDLE_S = 5.0
# An idle replica has no queue: an answer that takes longer than this will not come.
INFERENCE_TIMEOUT_S = 20.0
# Errors that a working model does not answer with. Others say that the request was wrong, or was not executed.
_SYMPTOMS = (Internal, DeviceLost, Unknown)


@dataclass(slots=True)
class _Inside:
    """Batches of one model in execution, and when one last ended, or began with none inside."""

    count: int = 0
    at_s: float = 0.0


@dataclass(slots=True)
class Pulse:
    """Batches in execution, by model, and when the last of all began or ended, in seconds of any clock.

    A model that hangs is not to be overlooked because others are busy: each has a pulse of its own.
    """

    at_s: float = 0.0
    _models: dict[str, _Inside] = field(default_factory=dict)

    @property
    def inside(self) -> int:
        return sum(model.count for model in self._models.values())

    def begins(self, model: str, now_s: float) -> None:
        inside = self._models.setdefault(model, _Inside())
        if not inside.count:
            inside.at_s = now_s
        inside.count += 1
        self.at_s = now_s

    def ends(self, model: str, now_s: float) -> None:
        inside = self._models[model]
        inside.count -= 1
        inside.at_s = self.at_s = now_s
        if not inside.count:
            del self._models[model]  # models come and go

    def stuck(self, now_s: float, limit_s: float) -> str:
        """A model that has something inside, none of which has ended for `limit_s`; "" where there is none."""
        return next((name for name, inside in self._models.items() if now_s - inside.at_s > limit_s), "")

    def is_idle(self, now_s: float) -> bool:
        return not self._models and now_s - self.at_s > IDLE_S


class Prober:
    """Chooses the inference that shows whether a replica still executes, and judges its answer.

    The request is zeros, which a model may not like: only of one that has answered it is an error a symptom.
    """

    def __init__(self) -> None:
        self._has_answered: dict[str, bool] = {}

    def request(self, models: Iterable[ModelConfig]) -> InferRequest | None:
        """For the first of the models that allows for it, and does not fail on it by its nature."""
        for config in models:
            if self._has_answered.get(config.name, True) and (request := request_for(config)) is not None:
                return request
        return None

    def symptom(self, request: InferRequest, answer: Answer) -> str:
        """What is wrong with the replica, by this answer; "" where nothing is."""
        name = request.model_name
        if isinstance(answer, InferResponse):
            self._has_answered[name] = True
        elif isinstance(answer, DeviceLost) or (isinstance(answer, _SYMPTOMS) and name in self._has_answered):
            return f"model '{name}' does not answer any more: {answer.message}"
        elif isinstance(answer, _SYMPTOMS):
            self._has_answered[name] = False
        return ""


def request_for(config: ModelConfig) -> InferRequest | None:
    """One row of zeros for a model that a request changes nothing in; None for others."""
    if not config.joins_rows or config.sequences is not None or config.ragged:
        return None
    inputs = {}
    for spec in config.inputs:
        shape = tuple(max(1, dim) for dim in spec.dims)
        shape = (1, *shape) if config.is_batched else shape
        text = spec.datatype == "BYTES"
        array = np.full(shape, b"", dtype=object) if text else np.zeros(shape, NUMPY[spec.datatype])
        inputs[spec.name] = Tensor(spec.name, spec.datatype, shape, array)
    return InferRequest(config.name, inputs)
