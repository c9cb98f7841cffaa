"""Warm-up: requests that every instance answers before its model is ready, as `model_warmup` asks."""

import math
from collections.abc import Sequence

import numpy as np

from tutti.core import dtypes
from tutti.core.errors import ConfigError, InferError
from tutti.core.types import Call, InferRequest, InferResponse, Tensor
from tutti.repository.folders import ModelFolder
from tutti.repository.model_config import Warmup, WarmupInput
from tutti.scheduling.interface import Backend
from tutti.serving.model import check_request

_SEED = 0
# How far random integers go from the lowest.
_RANDOM = 126


class _Sink:
    """Keeps the error of a call that settles late."""

    def __init__(self) -> None:
        self.error: InferError | None = None

    def settle(self, calls: Sequence[Call]) -> None:
        for call in calls:
            if isinstance(call.answer, InferError):
                self.error = call.answer


def run(folder: ModelFolder, instances: Sequence[Backend]) -> None:
    """Send the configured requests to each instance. Raises ConfigError when one of them fails."""
    config = folder.config
    for warmup in config.warmups:
        inputs = {name: _tensor(folder, warmup, name, item) for name, item in warmup.inputs.items()}
        try:
            check_request(config, frozenset(), InferRequest(config.name, inputs))
        except InferError as error:
            raise ConfigError(f"model '{config.name}': model_warmup '{warmup.name}': {error}") from None
        for instance in instances:
            for _ in range(warmup.count):
                sink = _Sink()
                # A decoupled model's answers go nowhere.
                call = Call(InferRequest(config.name, dict(inputs)), sink, None, lambda _: None)
                call.rows = warmup.batch_size
                try:
                    executed = instance.execute([call])
                    (answer,) = executed() if callable(executed) else executed
                except Exception as error:
                    answer = error
                failure = sink.error if answer is None else answer
                if failure is not None and not isinstance(failure, InferResponse):
                    raise ConfigError(f"model '{config.name}': model_warmup '{warmup.name}' failed: {failure}")


def _tensor(folder: ModelFolder, warmup: Warmup, name: str, item: WarmupInput) -> Tensor:
    """One input, each row the same but for random data."""
    shape = (warmup.batch_size, *item.dims) if folder.config.is_batched else item.dims
    if item.kind == "file":
        row = folder.read("warmup", item.filename)
        size = math.prod(item.dims) * dtypes.NUMPY[item.datatype].itemsize
        if item.datatype != "BYTES" and len(row) != size:
            raise ConfigError(
                f"model '{folder.config.name}': model_warmup '{warmup.name}': input '{name}': expected {size} bytes in "
                f"'{item.filename}', got {len(row)}"
            )
        return Tensor(name, item.datatype, shape, row * (shape[0] if folder.config.is_batched else 1))
    if item.datatype == "BYTES":
        return Tensor(name, "BYTES", shape, np.full(shape, b"", dtype=object))
    dtype = dtypes.NUMPY[item.datatype]
    if item.kind == "zero":
        return Tensor(name, item.datatype, shape, np.zeros(shape, dtype))
    rng = np.random.default_rng(_SEED)
    if dtype.kind == "f":
        return Tensor(name, item.datatype, shape, rng.random(shape).astype(dtype))
    limit = folder.config.bounds.ranges.get(name)
    low, high = (0, 1 if dtype.kind == "b" else _RANDOM) if limit is None else (limit.low, limit.high)
    steps = rng.integers(0, min(high - low, _RANDOM), shape, endpoint=True).astype(dtype)
    return Tensor(name, item.datatype, shape, steps if low == 0 else steps + low)
