"""Which values of integer inputs a model takes: what is outside is refused before a device sees it. Pure.

A model says so in a parameter of its config.pbtxt, which a stock Triton ignores:

    tutti.bounds    JSON, each input's lowest and highest value: {"input_ids": [0, 30521], "token_type_ids": [0, 1]}

An id that is no row of its table ends PyTorch's context on a GPU, for all requests and models of the process; ONNX
Runtime's and TensorRT's kernels for GPUs answer with zeros, as if nothing were wrong.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from tutti.core.dtypes import NUMPY, Array
from tutti.core.errors import ConfigError, InvalidArgument
from tutti.repository.padding import Padding

PARAMETER = "tutti.bounds"
_least, _greatest = np.minimum.reduce, np.maximum.reduce


class Spec(Protocol):
    """What is to be known of a configured input."""

    @property
    def name(self) -> str: ...
    @property
    def datatype(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Range:
    """`low` and `high` belong to it, and are values of `datatype`."""

    datatype: str
    low: int
    high: int
    _dtype: Any = field(init=False, repr=False, compare=False)
    _unsigned: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        dtype = NUMPY[self.datatype]
        object.__setattr__(self, "_dtype", dtype)
        object.__setattr__(self, "_unsigned", np.dtype(f"u{dtype.itemsize}"))

    def holds(self, array: Array) -> bool:
        """Whether all values, of which there is at least one, are in range."""
        if self.low == 0 and array.dtype == self._dtype:
            # One pass: read as unsigned, negative values are greater than all others.
            return bool(_greatest(array.view(self._unsigned), axis=None) <= self.high)
        return bool(_least(array, axis=None) >= self.low and _greatest(array, axis=None) <= self.high)


@dataclass(frozen=True, slots=True)
class Bounds:
    """The ranges of a model's inputs, by name; inputs without one take anything."""

    ranges: Mapping[str, Range] = field(default_factory=dict)

    def check(self, name: str, array: Array) -> None:
        """Raises InvalidArgument naming the input, the first value out of its range, and where that stands."""
        limit = self.ranges.get(name)
        if limit is not None and array.size and not limit.holds(array):
            raise _refusal(name, limit, array)

    def check_all(self, feed: Mapping[str, Array]) -> None:
        """As `check`, for what of the inputs is there."""
        for name in self.ranges:
            if name in feed:
                self.check(name, feed[name])


UNBOUNDED = Bounds()


def _refusal(name: str, limit: Range, array: Array) -> InvalidArgument:
    place = np.unravel_index(int(np.argmax((array < limit.low) | (array > limit.high))), array.shape)
    where = [int(index) for index in place]
    return InvalidArgument(
        f"input '{name}': expected values from {limit.low} to {limit.high}, got {array[place].item()} at {where}"
    )


def parse(
    model: str, parameters: Mapping[str, str], inputs: Sequence[Spec], padding: Padding, is_checked: bool = True
) -> Bounds:
    """A model's Bounds from its parameters; `is_checked` says whether its backend looks at them.

    Raises ConfigError for an input that the model has not or that is no integer, for a range that is none or that its
    datatype cannot hold, and where padding would fill in what is out of range.
    """
    text = parameters.get(PARAMETER)
    if text is None:
        return UNBOUNDED
    if not is_checked:
        raise _bad(model, "only backends that join a batch look at it")
    by_name = {spec.name: spec for spec in inputs}
    ranges = entries(text, '{"input_ids": [0, 30521]}', lambda why: _bad(model, why))
    bounds = Bounds({name: _range(model, name, pair, by_name) for name, pair in ranges})
    for name, value in _filled_in(padding):
        limit = bounds.ranges.get(name)
        if limit is not None and not limit.low <= value <= limit.high:
            raise _bad(model, f"input '{name}' takes {limit.low} to {limit.high}, and is padded with {value:g}")
    return bounds


def entries(text: str, example: str, bad: Callable[[str], ConfigError]) -> list[tuple[str, Any]]:
    """The pairs of a JSON object, of which each name is there once. Raises what `bad` makes of the reason."""
    try:
        pairs = json.loads(text, object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:
        raise bad(f"expected JSON, got {text[:80]!r}: {error}") from None
    if not isinstance(pairs, tuple):
        raise bad(f"expected an object, as {example}, got {text[:80]!r}")
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise bad(f"'{twice[0]}' appears more than once")
    return list(pairs)


def _range(model: str, name: str, pair: Any, inputs: Mapping[str, Spec]) -> Range:
    if name not in inputs:
        raise _bad(model, f"expected one of {sorted(inputs)}, got '{name}'")
    datatype = inputs[name].datatype
    if not datatype.startswith(("INT", "UINT")):
        raise _bad(model, f"input '{name}': expected integers, the input is {datatype}")
    if not isinstance(pair, list) or [type(value) for value in pair] != [int, int]:
        raise _bad(model, f"input '{name}': expected the lowest and the highest value, got {pair!r:.80}")
    low, high = pair
    if low > high:
        raise _bad(model, f"input '{name}': the lowest value {low} is above the highest {high}")
    limits = np.iinfo(NUMPY[datatype])
    if low < limits.min or high > limits.max:
        raise _bad(model, f"input '{name}': {datatype} has values from {limits.min} to {limits.max}, got {pair}")
    return Range(datatype, low, high)


def _filled_in(padding: Padding) -> list[tuple[str, float]]:
    """What the server itself writes: an input's padding, and ones and zeros of masks."""
    padded = [(name, spec.value) for name, spec in padding.inputs.items()]
    return padded + [(spec.mask, value) for spec in padding.inputs.values() if spec.mask for value in (0, 1)]


def _bad(model: str, why: str) -> ConfigError:
    return ConfigError(f"model '{model}': parameters.{PARAMETER}: {why}")
