"""The batch axis between an ensemble and models of other batching: where it is put in front of a tensor or taken away.

As in Triton, a tensor goes to a model with a batch as one row where its dims are the model's own, and one row of a
batch to a model without one as what it is. Knows shapes, and nothing of graphs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tutti.core.types import RAW_TYPES, Shape, Tensor


@dataclass(frozen=True, slots=True)
class Axis:
    """How a model's tensor is handed over: with an axis of one row put in front, or without it. `rank` is without."""

    name: str
    rank: int
    is_added: bool

    def changed(self, tensor: Tensor) -> Tensor:
        """The tensor with the other shape. One of another rank, or of several rows, stays as it is: it will not fit."""
        shape = tensor.shape
        if self.is_added and len(shape) == self.rank:
            shape = (1, *shape)
        elif not self.is_added and len(shape) == self.rank + 1 and shape[0] == 1:
            shape = shape[1:]
        else:
            return tensor
        data = tensor.data if isinstance(tensor.data, RAW_TYPES) else tensor.array().reshape(shape)
        return Tensor(tensor.name, tensor.datatype, shape, data)


def changed_inputs(axes: Sequence[Axis], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A step's inputs by the model's names, as its model takes them."""
    return inputs | {axis.name: axis.changed(inputs[axis.name]) for axis in axes if axis.name in inputs}


def changed_outputs(axes: Sequence[Axis], outputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """A step's outputs by the model's names, as the graph goes on with them."""
    by_name = {axis.name: axis for axis in axes}
    return [
        by_name[tensor.name].changed(tensor) if tensor is not None and tensor.name in by_name else tensor
        for tensor in outputs
    ]


def shapes_fit(expected: Shape, other: Shape) -> bool:
    """Whether some tensor can have both shapes: -1 is any size."""
    return len(expected) == len(other) and all(a == b or -1 in (a, b) for a, b in zip(expected, other, strict=True))
