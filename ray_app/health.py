"""Whether a replica still executes: batches that do not come out, and a request that is made to see. Pure."""

from dataclasses import dataclass

import numpy as np

from tutti.config import JOINING, ModelConfig
from tutti.dtypes import NUMPY
from tutti.types import InferRequest, Tensor

# A replica that has had nothing to do for so long is asked for an inference.
IDLE_S = 5.0
# It may wait behind nothing: what takes longer does not come.
INFERENCE_TIMEOUT_S = 20.0


@dataclass(slots=True)
class Pulse:
    """Batches in execution, and when one last began or ended, in seconds of any clock."""

    inside: int = 0
    at_s: float = 0.0

    def begins(self, now_s: float) -> None:
        if not self.inside:
            self.at_s = now_s
        self.inside += 1

    def ends(self, now_s: float) -> None:
        self.inside -= 1
        self.at_s = now_s

    def is_stuck(self, now_s: float, limit_s: float) -> bool:
        """Whether something is inside and nothing has ended for `limit_s`."""
        return self.inside > 0 and now_s - self.at_s > limit_s

    def is_idle(self, now_s: float) -> bool:
        return not self.inside and now_s - self.at_s > IDLE_S


def request_for(config: ModelConfig) -> InferRequest | None:
    """One row of zeros for a model that a request changes nothing in; None for others.

    Whether the model likes it does not matter: an error is an answer.
    """
    if config.backend not in JOINING or config.sequences is not None or config.ragged:
        return None
    inputs = {}
    for spec in config.inputs:
        shape = tuple(max(1, dim) for dim in spec.dims)
        shape = (1, *shape) if config.is_batched else shape
        text = spec.datatype == "BYTES"
        array = np.full(shape, b"", dtype=object) if text else np.zeros(shape, NUMPY[spec.datatype])
        inputs[spec.name] = Tensor(spec.name, spec.datatype, shape, array)
    return InferRequest(config.name, inputs)
