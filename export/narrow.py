"""PyTorch modules in 16 bits: weights and what is computed, between inputs and outputs that stay as they are.

A copy of the module is made whose weights are narrow, and a wrapper that casts at the edges; tracing both gives one
program. Numbers that mean "never" (as the least of 32 bits, added to what attention must not see) are more than float16
can say: they become the half of its range, so that nothing is infinite, nor gets so by adding a score.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tutti.export.errors import ExportError

# Calls whose operands must be of one datatype: there a wide one, as a mask that was made in 32 bits, is made narrow.
_MEETING = frozenset(
    {
        "linear", "matmul", "bmm", "baddbmm", "addmm", "einsum", "conv1d", "conv2d", "conv3d", "layer_norm",
        "group_norm", "batch_norm", "scaled_dot_product_attention",
    }
)  # fmt: skip
# Calls that write a number into a tensor, or scale a mask by one.
_PLACING = frozenset(
    {
        "where", "masked_fill", "masked_fill_", "full", "full_like", "new_full", "fill_", "tensor", "scalar_tensor",
        "new_tensor", "clamp", "clamp_", "__setitem__", "mul", "mul_",
    }
)  # fmt: skip

# Frequencies of rotary positions: coarse ones turn far places by a wrong angle, and models take them in 32 bits anyway.
_KEPT = frozenset({"inv_freq", "original_inv_freq"})


class Wide(torch.nn.Module):
    """A part that computes in 32 bits where the rest has 16, and keeps its weights: what it takes is wide too."""


def narrowed(module: torch.nn.Module, datatype: torch.dtype) -> tuple[torch.nn.Module, int]:
    """A copy with narrow weights, but for the parts that are Wide; and how many elements are narrow.

    Raises ExportError naming a parameter that gets larger than `datatype` can say.
    """
    narrowed = copy.deepcopy(module).eval()
    wide = {id(inner) for part in narrowed.modules() if isinstance(part, Wide) for inner in part.modules()}
    known: dict[int, Any] = {}
    for path, part in narrowed.named_modules():
        if id(part) in wide:
            continue
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                if id(parameter) not in known:
                    where = f"{path}.{name}" if path else name
                    known[id(parameter)] = torch.nn.Parameter(_weight(parameter, where, datatype), requires_grad=False)
                part._parameters[name] = known[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_floating_point() and name not in _KEPT:
                part._buffers[name] = known.setdefault(id(buffer), _saturated(buffer.detach(), datatype))
    return narrowed, sum(tensor.numel() for tensor in known.values())


def _weight(parameter: torch.Tensor, name: str, datatype: torch.dtype) -> torch.Tensor:
    most = torch.finfo(datatype).max
    reached = float(parameter.detach().abs().max()) if parameter.numel() else 0.0
    if reached > most:
        raise ExportError(f"16 bits are not enough: parameter '{name}' reaches {reached:.3g}, {most:.4g} is the most")
    return parameter.detach().to(datatype)


def _saturated(tensor: torch.Tensor, datatype: torch.dtype) -> torch.Tensor:
    most = torch.finfo(datatype).max
    return tensor.clamp(-most, most).to(datatype)


class Narrow(torch.nn.Module):
    """`inner`, which computes in `datatype`, between edges of 32 bits: (inputs of `names`, in order) -> its outputs.

    Whole numbers pass as they are, and so do the inputs that are `wide`, which `inner` makes narrow itself.
    """

    def __init__(
        self, inner: torch.nn.Module, datatype: torch.dtype, names: Sequence[str], wide: frozenset[str]
    ) -> None:
        super().__init__()
        self.inner = inner
        self._datatype = datatype
        self._names = tuple(names)
        self._wide = wide

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with _Bounded(self._datatype):
            answers = self.inner(**{name: self._entered(name, x) for name, x in zip(self._names, tensors, strict=True)})
        answers = (answers,) if isinstance(answers, torch.Tensor) else answers
        return tuple(x.to(torch.float32) if x.is_floating_point() else x for x in answers)

    def _entered(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return _saturated(x, self._datatype) if x.is_floating_point() and name not in self._wide else x


class _Bounded(TorchFunctionMode):
    """While a module is traced: numbers stay within the range, and operands that must be alike become so."""

    def __init__(self, datatype: torch.dtype) -> None:
        super().__init__()
        self._datatype = datatype
        self._most = torch.finfo(datatype).max

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, named = getattr(function, "__name__", ""), dict(kwargs or {})
        change: Callable[[Any], Any] | None = None
        if name in _PLACING:
            change = self._bounded
        elif name in _MEETING and self._is_mixed([*args, *named.values()]):
            change = self._met
        if change is not None:
            args = tuple(_each(change, value) for value in args)
            named = {key: _each(change, value) for key, value in named.items()}
        return function(*args, **named)

    def _bounded(self, value: Any) -> Any:
        """Half of the range stands for a number below all of it; what is infinite is meant so."""
        is_never = isinstance(value, float) and -math.inf < value <= -self._most
        return -self._most / 2 if is_never else value

    def _is_mixed(self, values: Sequence[Any]) -> bool:
        flat = [part for value in values for part in (value if isinstance(value, list | tuple) else [value])]
        kinds = {part.dtype for part in flat if isinstance(part, torch.Tensor) and part.is_floating_point()}
        return kinds == {self._datatype, torch.float32}

    def _met(self, value: Any) -> Any:
        is_wide = isinstance(value, torch.Tensor) and value.dtype == torch.float32
        return _saturated(value, self._datatype) if is_wide else value


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    return type(value)(change(part) for part in value) if type(value) in (list, tuple) else change(value)
