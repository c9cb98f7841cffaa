"""The largest batch of a model, compiled apart: kernels for one size can be quicker than those for any.

A vision transformer's 256 pictures took 23.3 ms on an H200 so, and 25.7 ms with kernels for batches of any size. What
is compiled, and whether it does the same, is of others to know (compiled.py, compiler.py).
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tutti.backends import compiler
from tutti.backends.compiler import JIT, Job, Uncompilable
from tutti.repository.model_config import ModelConfig

_log = logging.getLogger(__name__)


def rows_of(config: ModelConfig, how: str, device: str) -> int:
    """The size of batches for which a model is compiled apart; 0 for none.

    Only where nothing but the rows varies: lengths would be variable all the same. On a processor little is gained, and
    a package of AOTInductor would hold the weights once more.
    """
    is_variable = any(-1 in spec.model_dims for spec in config.inputs)
    return 0 if device == "cpu" or how != JIT or is_variable or config.max_batch_size < 2 else config.max_batch_size


def make(job: Job, folder: Path) -> None:
    """Compile for batches of `job.rows` into a new folder, which is gone where that fails."""
    folder.mkdir()
    try:
        compiler.compile_apart(job, folder)
    except Uncompilable as error:
        _log.info("model '%s': is not compiled for batches of %d apart: %s", job.model, job.rows, error)
        shutil.rmtree(folder)


class BySize:
    """A model's forward for batches of any size, and another for those of `rows`."""

    def __init__(self, of_any: Callable[..., Any], of_largest: Callable[..., Any], rows: int) -> None:
        self._of_any = of_any
        self._of_largest = of_largest
        self._rows = rows

    def __call__(self, *tensors: Any) -> Any:
        is_largest = all(tensor.ndim and tensor.shape[0] == self._rows for tensor in tensors)
        return (self._of_largest if is_largest else self._of_any)(*tensors)
