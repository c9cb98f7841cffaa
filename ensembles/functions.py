"""Functions of conditions, each of all elements that a tensor has in a row: max(SCORES) and its like. Pure.

One entry is all that another takes: conditions parse it, expressions in Python offer it by `Tensor.of`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tutti.core.dtypes import Array


@dataclass(frozen=True, slots=True)
class Function:
    """`calculate` makes [rows] numbers of [rows, elements]; where rows have no element it is not asked.

    `of_nothing` is the value of a row without elements; None where there is none, so that comparisons are false.
    """

    name: str
    calculate: Callable[[Array], Array]
    of_nothing: float | None = None
    takes_text: bool = False


FUNCTIONS: dict[str, Function] = {
    function.name: function
    for function in (
        Function("max", lambda elements: elements.max(axis=1)),
        Function("min", lambda elements: elements.min(axis=1)),
        Function("mean", lambda elements: elements.mean(axis=1, dtype=np.float64)),
        Function("sum", lambda elements: elements.sum(axis=1, dtype=np.float64), of_nothing=0.0),
        Function("argmax", lambda elements: elements.argmax(axis=1)),
        Function(
            "count",
            lambda elements: np.full(len(elements), elements.shape[1]),
            of_nothing=0.0,
            takes_text=True,
        ),
    )
}
