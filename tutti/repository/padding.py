"""Inputs of variable length in one batch: each is padded to the smallest of its model's buckets that holds it. Pure.

A model says so in parameters of its config.pbtxt, which a stock Triton ignores:

    tutti.buckets.INPUT    "16000, 80000, 480000": sizes of the input's one variable dimension, ascending
    tutti.pad_value.INPUT  what to fill with, by default 0
    tutti.lengths.INPUT    an optional integer input [1] that is given each item's true length
    tutti.mask.INPUT       an optional input of INPUT's shape that is given 1 where there are items and 0 where not
    tutti.unpad.OUTPUT     "INPUT" or "INPUT/N": the output's variable dimension is cut to INPUT's true length, or to an
                           Nth of it, rounded up

Requests whose lengths fall into one bucket share a batch. A length beyond the largest bucket is not padded.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from tutti.core.dtypes import NUMPY
from tutti.core.errors import ConfigError
from tutti.core.types import InferRequest, Shape, Tensor

_PREFIX = "tutti."
_INPUT_KEYS = ("buckets", "pad_value", "lengths", "mask")


class Spec(Protocol):
    """What is to be known of a configured tensor."""

    @property
    def name(self) -> str: ...
    @property
    def datatype(self) -> str: ...
    @property
    def dims(self) -> Shape: ...
    @property
    def is_optional(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class PaddedInput:
    """An input whose dimension `axis`, counted without the batch's, is padded. `lengths` and `mask` name inputs."""

    name: str
    axis: int
    buckets: tuple[int, ...]
    value: float = 0
    lengths: str = ""
    mask: str = ""

    def size_of(self, size: int) -> int:
        """The bucket for `size`; itself beyond the largest."""
        index = bisect_left(self.buckets, size)
        return self.buckets[index] if index < len(self.buckets) else size

    def shape_of(self, body: Shape) -> Shape:
        """A shape without batch axis, once padded."""
        return (*body[: self.axis], self.size_of(body[self.axis]), *body[self.axis + 1 :])


@dataclass(frozen=True, slots=True)
class Padding:
    """What of a model is padded. `outputs` are cut again: name -> (axis, input, divisor). `filled` are datatypes."""

    inputs: Mapping[str, PaddedInput] = field(default_factory=dict)
    outputs: Mapping[str, tuple[int, str, int]] = field(default_factory=dict)
    filled: Mapping[str, str] = field(default_factory=dict)

    def key_of(self, name: str, body: Shape) -> Shape:
        """The shape that decides which requests share a batch."""
        spec = self.inputs.get(name)
        return body if spec is None else spec.shape_of(body)

    def pad(self, requests: Sequence[InferRequest], is_batched: bool) -> list[dict[str, int]]:
        """Give the requests of one batch padded inputs; returns each one's true lengths by input."""
        lengths: list[dict[str, int]] = [{} for _ in requests]
        for name, spec in self.inputs.items():
            shapes = {i: r.inputs[name].shape for i, r in enumerate(requests) if name in r.inputs}
            self._pad_input(requests, spec, is_batched)
            for index, shape in shapes.items():
                lengths[index][name] = shape[is_batched + spec.axis]
                self._fill_in(requests[index], spec, shape, is_batched)
        return lengths

    def cut(self, outputs: Sequence[Tensor], lengths: Mapping[str, int], is_batched: bool) -> list[Tensor]:
        """The outputs without what padding has added to them."""
        tensors = []
        for tensor in outputs:
            axis, source, divisor = self.outputs.get(tensor.name, (0, "", 1))
            size = -(-lengths.get(source, -1) // divisor)
            axis += is_batched
            if not source or source not in lengths or size >= tensor.shape[axis]:
                tensors.append(tensor)
                continue
            array = tensor.array()[(slice(None),) * axis + (slice(size),)]
            tensors.append(Tensor(tensor.name, tensor.datatype, array.shape, array))
        return tensors

    def _pad_input(self, requests: Sequence[InferRequest], spec: PaddedInput, is_batched: bool) -> None:
        """All requests get stretches of one array, so that joining them is no copy.

        The tensors stay as they are: a batch that fails is padded again, in parts.
        """
        padded = [request for request in requests if spec.name in request.inputs]
        tensors = [request.inputs[spec.name] for request in padded]
        wanted = [spec.shape_of(tensor.shape[is_batched:]) for tensor in tensors]
        if not tensors or all(w == t.shape[is_batched:] for w, t in zip(wanted, tensors, strict=True)):
            return
        rows = [tensor.shape[0] if is_batched else 1 for tensor in tensors]
        whole = np.full((sum(rows), *wanted[0]), spec.value, NUMPY[tensors[0].datatype])
        start = 0
        for request, tensor, n in zip(padded, tensors, rows, strict=True):
            part = whole[start : start + n]
            body = tensor.shape[is_batched:]
            part[(slice(None), *(slice(size) for size in body))] = tensor.array().reshape(n, *body)
            array = part if is_batched else part[0]
            request.inputs[spec.name] = Tensor(spec.name, tensor.datatype, array.shape, array)
            start += n

    def _fill_in(self, request: InferRequest, spec: PaddedInput, shape: Shape, is_batched: bool) -> None:
        """Give the request the lengths and the mask that it lacks."""
        size = shape[is_batched + spec.axis]
        if spec.lengths and spec.lengths not in request.inputs:
            array = np.full((*shape[:is_batched], 1), size, NUMPY[self.filled[spec.lengths]])
            request.inputs[spec.lengths] = Tensor(spec.lengths, self.filled[spec.lengths], array.shape, array)
        if spec.mask and spec.mask not in request.inputs:
            padded = (*shape[:is_batched], *spec.shape_of(shape[is_batched:]))
            array = np.zeros(padded, NUMPY[self.filled[spec.mask]])
            array[(slice(None),) * (is_batched + spec.axis) + (slice(size),)] = 1
            request.inputs[spec.mask] = Tensor(spec.mask, self.filled[spec.mask], array.shape, array)


NO_PADDING = Padding()


def parse(model: str, parameters: Mapping[str, str], inputs: Sequence[Spec], outputs: Sequence[Spec]) -> Padding:
    """A model's Padding from its parameters. Raises ConfigError naming the parameter."""
    by_name = {spec.name: spec for spec in inputs}
    padded: dict[str, PaddedInput] = {}
    filled: dict[str, str] = {}
    for key, text in parameters.items():
        kind, _, name = key.removeprefix(_PREFIX).partition(".")
        if not key.startswith(_PREFIX) or kind not in _INPUT_KEYS:
            continue
        if name not in by_name:
            raise _bad(model, key, f"the model has no input '{name}'")
        if kind == "buckets":
            padded[name] = _padded(model, key, text, by_name[name], parameters)
        elif f"{_PREFIX}buckets.{name}" not in parameters:
            raise _bad(model, key, f"needs {_PREFIX}buckets.{name}")
    for spec in list(padded.values()):
        for kind, other in (("lengths", spec.lengths), ("mask", spec.mask)):
            if not other:
                continue
            key = f"{_PREFIX}{kind}.{spec.name}"
            if other not in by_name or not by_name[other].is_optional or by_name[other].datatype == "BYTES":
                raise _bad(model, key, f"expected an optional input of numbers, got '{other}'")
            wanted = (1,) if kind == "lengths" else by_name[spec.name].dims
            if by_name[other].dims != wanted:
                raise _bad(model, key, f"input '{other}' has dims {list(by_name[other].dims)}, not {list(wanted)}")
            filled[other] = by_name[other].datatype
        if spec.mask:  # one that a client sends is padded with the input
            padded[spec.mask] = PaddedInput(spec.mask, spec.axis, spec.buckets)
    return Padding(padded, _unpadded(model, parameters, padded, outputs), filled)


def _padded(model: str, key: str, text: str, spec: Spec, parameters: Mapping[str, str]) -> PaddedInput:
    if spec.datatype == "BYTES" or spec.dims.count(-1) != 1:
        problem = f"input '{spec.name}' is {spec.datatype} with dims {list(spec.dims)}"
        raise _bad(model, key, f"{problem}: expected numbers with one variable dimension")
    sizes = [part.strip() for part in text.split(",")]
    if not all(size.isdecimal() and 0 < int(size) < 2**40 for size in sizes):
        raise _bad(model, key, f"expected sizes of at least 1, as '16000, 80000', got '{text}'")
    value_key = f"{_PREFIX}pad_value.{spec.name}"
    try:
        value = float(parameters.get(value_key, "0"))
        np.array(value).astype(NUMPY[spec.datatype])
    except (ValueError, OverflowError):
        raise _bad(model, value_key, f"expected a number, got '{parameters[value_key]}'") from None
    lengths, mask = (parameters.get(f"{_PREFIX}{kind}.{spec.name}", "") for kind in ("lengths", "mask"))
    return PaddedInput(spec.name, spec.dims.index(-1), tuple(sorted(map(int, sizes))), value, lengths, mask)


def _unpadded(
    model: str, parameters: Mapping[str, str], inputs: Mapping[str, PaddedInput], outputs: Sequence[Spec]
) -> dict[str, tuple[int, str, int]]:
    by_name = {spec.name: spec for spec in outputs}
    buckets = {}
    prefix = f"{_PREFIX}unpad."
    for key, text in parameters.items():
        if not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix)
        source, _, divisor = text.partition("/")
        if name not in by_name or by_name[name].dims.count(-1) != 1:
            raise _bad(model, key, f"expected an output with one variable dimension, '{name}' is none")
        if source not in inputs or (divisor and (not divisor.isdecimal() or int(divisor) < 1)):
            raise _bad(model, key, f"expected INPUT or INPUT/N of a padded input, got '{text}'")
        buckets[name] = (by_name[name].dims.index(-1), source, int(divisor or 1))
    return buckets


def _bad(model: str, key: str, why: str) -> ConfigError:
    return ConfigError(f"model '{model}': parameters.{key}: {why}")
