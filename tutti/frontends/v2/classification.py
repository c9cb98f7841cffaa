"""Triton's classification extension: the top classes of an output as text, `value:index[:label]`. Pure."""

from collections.abc import Sequence

import numpy as np

from tutti.core import files
from tutti.core.errors import InvalidArgument
from tutti.core.types import Tensor


def classify(model: str, tensor: Tensor, count: int, labels: Sequence[str], is_batched: bool) -> Tensor:
    """The `count` largest elements of each row, largest first: BYTES [rows, k], or [k] of an unbatched model.

    k is `count` or the number of elements, whichever is less. Floats are shown with six decimals. Raises
    InvalidArgument for an output that is not numeric.
    """
    array = tensor.array()
    if tensor.datatype in ("BYTES", "BF16"):
        why = f"class result not available for output due to unsupported type '{tensor.datatype}'"
        raise InvalidArgument(f"model '{model}': output '{tensor.name}': {why}: it cannot be classified")
    rows = array.reshape(array.shape[0] if is_batched else 1, -1)
    k = min(count, rows.shape[1])
    order = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :k]
    shown = np.empty((len(rows), k), dtype=object)
    for row, indexes in enumerate(order):
        shown[row] = [_show(rows[row, index], int(index), labels) for index in indexes]
    return Tensor(tensor.name, "BYTES", shown.shape if is_batched else (k,), shown if is_batched else shown[0])


def _show(value: np.generic, index: int, labels: Sequence[str]) -> bytes:
    number = f"{float(value):.6f}" if isinstance(value, np.floating) else str(int(value))
    label = f":{labels[index]}" if index < len(labels) and labels[index] else ""
    return files.to_bytes(f"{number}:{index}{label}")
