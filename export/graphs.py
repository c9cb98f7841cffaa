"""What an export is of: graphs that are exported and verified, python steps around them, and the ensemble over both."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from tutti.core.types import Shape
from tutti.export.layout import Entry

if TYPE_CHECKING:  # it takes seconds, and `tutti init` of an ONNX file does without
    import torch

Arrays = Mapping[str, npt.NDArray[Any]]
Reference = Callable[[Arrays], Arrays]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]
"""Input name -> smallest, usual and largest shape, batch axis included."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How far a variant may be from the reference.

    `max_error` is a share of the output's range, which is at least 1; `cosine` is that of a row, the least; `top1` the
    share of rows with the reference's decision, where the reference's margin is not itself within the error.
    """

    max_error: float
    cosine: float
    top1: float


# By precision. float32 on other kernels: a few units of the last place, over some tens of layers.
LIMITS: Mapping[str, Limits] = {
    "fp32": Limits(1e-4, 0.99999, 1.0),
    "torch": Limits(1e-4, 0.99999, 1.0),
    "fp16": Limits(2e-2, 0.999, 0.99),
    "int8": Limits(0.5, 0.97, 0.9),
    # Executed in 16 bits, each result rounded: to 11 bits, or to the 8 of bfloat16, which is eight times as coarse.
    "torch-fp16": Limits(2e-2, 0.999, 0.99),
    "torch-bf16": Limits(1e-1, 0.99, 0.95),
}


def with_arguments(module: "torch.nn.Module", names: Sequence[str]) -> "torch.nn.Module":
    """`module`, called with tensors by position, by a forward that names them: exporters bind axes by these names."""

    import torch

    def forward(self: Any, *tensors: "torch.Tensor", **more: "torch.Tensor") -> Any:
        return self.inner(*tensors, *(more[name] for name in names[len(tensors) :]))

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *names)]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    kind = type("WithArguments", (torch.nn.Module,), {"forward": forward})
    module_with_names: torch.nn.Module = kind()
    module_with_names.inner = module
    return module_with_names.eval()


@dataclass(frozen=True, slots=True)
class Claim:
    """The most items that each variable dimension of a graph's inputs is said to have, but for the batch.

    `case` makes inputs of so many, which reach the last place.
    """

    most: int
    case: Callable[[int], Arrays]


@dataclass(frozen=True, slots=True)
class Graph:
    """One model to export. `module`'s arguments are the model's inputs, by name, the batch first.

    `example` has a batch of 2; `axes` names the variable axes of inputs; `cases` are what variants are verified on.
    `reference` is what they are compared with, by default the module itself in float64.
    """

    name: str
    module: "torch.nn.Module"
    example: Mapping[str, "torch.Tensor"]
    outputs: tuple[str, ...]
    axes: Mapping[str, Mapping[int, str]]
    cases: Sequence[Arrays]
    profile: Profile
    reference: Reference | None = None
    max_batch_size: int = 32
    parameters: Mapping[str, str] = field(default_factory=dict)
    labels: Sequence[str] = ()
    # The output whose largest column is the decision.
    decision: str = ""
    limits: Mapping[str, Limits] = field(default_factory=dict)
    # Inputs that stay in 32 bits where the graph has 16: the module makes them narrow itself, where its network begins.
    wide: frozenset[str] = frozenset()
    lengths: Claim | None = None
    # The python model of the product that runs this graph itself, if one does: no model of its own then.
    host: str = ""

    def limits_of(self, variant: str) -> Limits:
        return self.limits.get(variant, LIMITS[variant])


@dataclass(frozen=True, slots=True)
class Check:
    """Something else that was looked at before publishing: what, whether it is well, and why."""

    what: str
    is_well: bool
    why: str


@dataclass(frozen=True, slots=True)
class Trial:
    """A request of one row to the ensemble, `what` it is of, and what the checkpoint's own pipeline answers.

    `inputs` are the bytes of each input of shape [1]; `expected` makes outputs by name, the batch of one first.
    `read` makes of the ensemble's outputs what is compared with it.
    """

    what: str
    inputs: Mapping[str, bytes]
    expected: Callable[[], Arrays]
    read: Callable[[Arrays], Arrays] | None = None


@dataclass(frozen=True, slots=True)
class Product:
    """All of one export. `steps` are models of other backends; `ensemble` makes the last entry of all the others.

    `provenance` says where the weights come from. `checks` look at the whole, given each graph's result by name;
    `trials` are asked of the ensemble before it is published.
    """

    graphs: Sequence[Graph]
    steps: Sequence[Entry] = ()
    ensemble: Callable[[Mapping[str, Entry]], Entry] | None = None
    provenance: str = ""
    checks: Sequence[Callable[[Mapping[str, Any]], Check]] = ()
    accuracy: float | None = None
    trials: Sequence[Trial] = ()
