"""How long the variable dimensions of a model's inputs may be: what is longer is refused as it comes. Pure.

A model says so in a parameter of its config.pbtxt, which a stock Triton ignores:

    tutti.max_dims    JSON, the greatest size of each variable (-1) dimension of inputs, in their order; a number alone
                      for an input that has one: {"input_ids": [512], "pictures": [640, 480], "audio": 480000}

A table of places has no row for what is behind its end: on a GPU PyTorch's context ends with it, for all requests and
models of the process, and elsewhere the error says little.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tutti.core.errors import ConfigError
from tutti.core.types import Shape
from tutti.repository.padding import Padding
from tutti.repository.value_bounds import entries

PARAMETER = "tutti.max_dims"


class Spec(Protocol):
    """What is to be known of a configured input."""

    @property
    def name(self) -> str: ...
    @property
    def dims(self) -> Shape: ...


class Shaped(Protocol):
    """One input of a warm-up request."""

    @property
    def dims(self) -> Shape: ...


class Warmup(Protocol):
    """What is to be known of a warm-up request."""

    @property
    def name(self) -> str: ...
    @property
    def inputs(self) -> Mapping[str, Shaped]: ...


@dataclass(frozen=True, slots=True)
class MaxDims:
    """The greatest sizes of inputs' dims, without the batch's, by name: None for any. Inputs without take any."""

    sizes: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)

    def excess(self, name: str, body: Shape) -> tuple[int, int] | None:
        """(axis, its greatest size) of the first dim of a shape without batch axis that is too large; None for none."""
        for axis, (most, size) in enumerate(zip(self.sizes.get(name, ()), body, strict=False)):
            if most is not None and size > most:
                return axis, most
        return None


ANY_SIZE = MaxDims()


def parse(
    model: str, parameters: Mapping[str, str], inputs: Sequence[Spec], padding: Padding, warmups: Sequence[Warmup]
) -> MaxDims:
    """A model's MaxDims from its parameters.

    Raises ConfigError for an input that the model has not or that has not as many variable dimensions, for what is no
    size, and where padding or a warm-up would make an input longer.
    """
    text = parameters.get(PARAMETER)
    if text is None:
        return ANY_SIZE
    by_name = {spec.name: spec for spec in inputs}
    limits = entries(text, '{"input_ids": [512]}', lambda why: _bad(model, why))
    max_dims = MaxDims({name: _sizes(model, name, sizes, by_name) for name, sizes in limits})
    for name, padded in padding.inputs.items():
        sizes = max_dims.sizes.get(name)
        most = sizes[padded.axis] if sizes is not None else None
        if most is not None and padded.buckets[-1] > most:
            raise _bad(model, f"input '{name}' takes at most {most}, and is padded to {padded.buckets[-1]}")
    for warmup in warmups:
        for name, item in warmup.inputs.items():
            excess = max_dims.excess(name, item.dims)
            if excess is not None:
                warmed = f"and model_warmup '{warmup.name}' has {list(item.dims)}"
                raise _bad(model, f"input '{name}' takes at most {excess[1]} in dims[{excess[0]}], {warmed}")
    return max_dims


def _sizes(model: str, name: str, value: Any, inputs: Mapping[str, Spec]) -> tuple[int | None, ...]:
    """The greatest size of each of an input's dims."""
    if name not in inputs:
        raise _bad(model, f"expected one of {sorted(inputs)}, got '{name}'")
    dims = inputs[name].dims
    count = dims.count(-1)
    sizes = [value] if type(value) is int else value
    if not isinstance(sizes, list) or any(type(size) is not int or size < 1 for size in sizes):
        raise _bad(model, f"input '{name}': expected sizes of at least 1, got {value!r:.80}")
    if not count or len(sizes) != count:
        problem = f"it has {count} variable dimensions: {list(dims)}"
        raise _bad(model, f"input '{name}': expected a size for each, and {problem}, got {value!r:.80}")
    left = iter(sizes)
    return tuple(next(left) if dim == -1 else None for dim in dims)


def _bad(model: str, why: str) -> ConfigError:
    return ConfigError(f"model '{model}': parameters.{PARAMETER}: {why}")
