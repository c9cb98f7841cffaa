"""Tensors of a batch of calls, as columns over the rows of all of them. Knows no graph."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from tutti.core import rows
from tutti.core.dtypes import Array
from tutti.core.types import Call, Tensor


class CallRows:
    """Calls in their order, and where the rows of each begin among those of all."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        self.sizes = [call.rows for call in calls]
        self.starts = [0, *accumulate(self.sizes[:-1])]
        self.rows = self.starts[-1] + self.sizes[-1]

    def stop(self, index: int) -> int:
        """Where the rows of a call end."""
        return self.starts[index] + self.sizes[index]


class Column:
    """One tensor of all rows: in one piece, or in a part for each call where shapes differ.

    `valid` [rows] says for which rows there is one; None for all. A part is None where its call has none at all.
    """

    __slots__ = ("_is_alike", "_parts", "_whole", "valid")

    def __init__(
        self,
        whole: Tensor | None = None,
        parts: list[Tensor | None] | None = None,
        valid: Array | None = None,
        is_alike: bool = False,
    ) -> None:
        """`is_alike`: the parts are known to have one shape."""
        self._whole = whole
        self._parts = parts
        self._is_alike = is_alike
        self.valid = valid

    def whole(self) -> Tensor | None:
        """All rows in one tensor; None where shapes differ or parts are missing."""
        if self._whole is not None:
            return self._whole
        if self._parts is not None:
            parts = [part for part in self._parts if part is not None]
            first = parts[0] if parts else None
            if first is None or len(parts) < len(self._parts):
                return None
            if not self._is_alike and any(
                part.shape[1:] != first.shape[1:] or part.datatype != first.datatype for part in parts
            ):
                return None
            if len(parts) == 1:
                self._whole = first
            else:
                array = rows.concatenate(parts)
                self._whole = Tensor(first.name, first.datatype, array.shape, array)
            self._parts = None
        return self._whole

    def part(self, frame: CallRows, index: int) -> Tensor | None:
        """The rows of one call."""
        if self._parts is not None:
            return self._parts[index]
        whole = self._whole
        assert whole is not None
        if len(frame.calls) == 1:
            return whole
        start, stop = frame.starts[index], frame.starts[index] + frame.sizes[index]
        return rows.part(whole, start, stop)

    def is_there(self, frame: CallRows, index: int) -> bool:
        """Whether all rows of a call have it."""
        if self.valid is None:
            return self._parts is None or self._parts[index] is not None
        start = frame.starts[index]
        return bool(self.valid[start : start + frame.sizes[index]].all())


def renamed(name: str, tensor: Tensor) -> Tensor:
    """The same tensor under another name."""
    return Tensor(name, tensor.datatype, tensor.shape, tensor.data)


def selected(tensor: Tensor, mask: Any, name: str = "") -> Tensor:
    """The rows of a tensor that a mask, [rows] bool, selects."""
    array = tensor.array()[mask]
    return Tensor(name or tensor.name, tensor.datatype, array.shape, array)


def joined(name: str, parts: Sequence[Tensor]) -> Tensor:
    """Tensors of equal shapes, but for their rows, as one."""
    if len(parts) == 1:
        return parts[0]
    array = rows.concatenate(parts)
    return Tensor(name, parts[0].datatype, array.shape, array)


def stretch(tensor: Tensor, start: int, size: int) -> Tensor:
    """Rows of a tensor, without a copy."""
    return rows.part(tensor, start, start + size)
