"""What a graph may say beyond Triton, in parameters of the ensemble's config.pbtxt that a stock Triton ignores. Pure.

A step goes by any tensor that it makes:

    tutti.when.TENSOR       the condition (conditions.py) under which the step runs for a row
    tutti.default.TENSOR    the tensor's value where no step made it: a number, text, true or false; a variable
                            dimension is 0 then
    tutti.each.TENSOR       "ITEMS, ...": the step runs once for each item of these tensors, along their first axis
                            after the batch's; its other inputs are repeated
    tutti.items.ITEMS       the tensor, one whole number a row, that says how many items a row of ITEMS has; by default
                            all along the axis
    tutti.gather.TENSOR     max, min, mean or sum of an each-step's output over a row's items, or concat, the default:
                            all of them along a new first axis
    tutti.optional.TENSOR   "true": the step is left out where there is no time for it
    tutti.exit              the condition under which a row is decided: steps that the condition does not need are left
                            out for it
    tutti.deadline_ms       how long a request may take that does not say so itself
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tutti.core.dtypes import NUMPY
from tutti.ensembles.spelling import near

PREFIX = "tutti."
_WHOLE = ("tutti.exit", "tutti.deadline_ms")
GATHERS = ("concat", "max", "min", "mean", "sum")


class ExtensionError(ValueError):
    """A parameter that is not understood; says which and why."""


@dataclass(frozen=True, slots=True)
class Extensions:
    """The parameters by kind, their texts not yet checked against the graph."""

    when: Mapping[str, str] = field(default_factory=dict)
    default: Mapping[str, str] = field(default_factory=dict)
    each: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    items: Mapping[str, str] = field(default_factory=dict)
    gather: Mapping[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    exit: str = ""
    deadline_ns: int = 0


def parse(parameters: Mapping[str, str]) -> Extensions:
    """Raises ExtensionError for a key of ours that is not known: a misspelt condition must not be ignored."""
    by_kind: dict[str, dict[str, str]] = {k: {} for k in ("when", "default", "each", "items", "gather", "optional")}
    decided, deadline_ns = "", 0
    for key, text in parameters.items():
        if not key.startswith(PREFIX):
            why = f"an ensemble reads those of tutti only, as tutti.when.TENSOR{_meant(key, by_kind)}"
            raise ExtensionError(f"parameters.{key}: {why}")
        kind, _, tensor = key.removeprefix(PREFIX).partition(".")
        if key == "tutti.exit":
            decided = text
        elif key == "tutti.deadline_ms":
            if not text.isdecimal() or not 0 < int(text) < 10**9:
                raise ExtensionError(f"parameters.{key}: expected a whole number of milliseconds, got '{text}'")
            deadline_ns = int(text) * 1_000_000
        elif key in ("tutti.fallback", "tutti.max_dims"):
            continue  # about where it may run and what it takes: read elsewhere
        elif kind in by_kind and tensor:
            by_kind[kind][tensor] = text
        else:
            known = ", ".join(f"tutti.{kind}.TENSOR" for kind in by_kind)
            why = f"is not known, there are {known}, tutti.exit and tutti.deadline_ms{_meant(key, by_kind)}"
            raise ExtensionError(f"parameters.{key}: {why}")
    for tensor, how in by_kind["gather"].items():
        if how not in GATHERS:
            raise ExtensionError(f"parameters.tutti.gather.{tensor}: expected one of {', '.join(GATHERS)}, got '{how}'")
    for tensor, text in by_kind["optional"].items():
        if text not in ("true", "false"):
            raise ExtensionError(f"parameters.tutti.optional.{tensor}: expected true or false, got '{text}'")
    return Extensions(
        by_kind["when"],
        by_kind["default"],
        {tensor: tuple(name.strip() for name in text.split(",")) for tensor, text in by_kind["each"].items()},
        by_kind["items"],
        by_kind["gather"],
        frozenset(tensor for tensor, text in by_kind["optional"].items() if text == "true"),
        decided,
        deadline_ns,
    )


def value(datatype: str, text: str) -> Any:
    """A default of a tensor of this datatype. Raises ExtensionError for what is none."""
    if datatype == "BYTES":
        return text.encode()
    if datatype == "BOOL":
        if text not in ("true", "false"):
            raise ExtensionError(f"expected true or false, got '{text}'")
        return text == "true"
    try:
        number = float(text) if datatype in ("FP16", "FP32", "FP64", "BF16") else int(text)
        return np.array(number, NUMPY[datatype])[()] if datatype != "BF16" else _bf16(number)
    except (ValueError, OverflowError):
        raise ExtensionError(f"expected a value of {datatype}, got '{text}'") from None


def _bf16(number: float) -> Any:
    """The upper half of an FP32."""
    return np.array([number], np.float32).view(np.uint16)[1]


def _meant(key: str, kinds: Iterable[str]) -> str:
    """The key that may have been meant, with the tensor that it names."""
    tensor = key.split(".", 2)[2] if key.count(".") > 1 else "TENSOR"
    return near(key, [*_WHOLE, *(f"{PREFIX}{kind}.{tensor}" for kind in kinds)])
