"""Whether a compiled model does what the model does: both execute the same small inputs, of several sizes.

Inputs have the shapes that the model was exported for. Their values are seeded: within `tutti.bounds` where the model
has them, ones for masks, and zeros for other integers, since an index out of range would end a GPU's context.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tutti.repository.model_config import ModelConfig

Forward = Callable[..., Any]
Fill = tuple[int, int] | None
"""The lowest and the highest value of an input; None for whatever suits its datatype."""

_SEED = 0
# How far random integers go from the lowest.
_RANDOM = 126
# How far outputs may differ, as a share of their range, by the coarsest datatype that computes them.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_COARSE = 0.1


def fills(config: ModelConfig, order: Sequence[str]) -> list[Fill]:
    """What to fill the inputs `order` with."""
    masks = {spec.mask for spec in config.padding.inputs.values()}
    fills_by_input: list[Fill] = []
    for name in order:
        limit = config.bounds.ranges.get(name)
        if name in masks or "mask" in name.lower():
            fills_by_input.append((1, 1))
        else:
            fills_by_input.append(None if limit is None else (limit.low, min(limit.high, limit.low + _RANDOM)))
    return fills_by_input


def tolerance(exported: Any) -> float:
    """How far the outputs of an exported program may differ, unless the model says so itself."""
    outputs = [node.meta.get("val") for node in _node(exported, "output").all_input_nodes]
    tensors = [*exported.state_dict.values(), *exported.constants.values(), *outputs]
    dtypes = {t.dtype for t in tensors if isinstance(t, torch.Tensor) and t.dtype.is_floating_point}
    return max((_TOLERANCES.get(dtype, _COARSE) for dtype in dtypes), default=0.0)


def samples(exported: Any, fills: Sequence[Fill], device: str) -> Iterator[list[Any]]:
    """Inputs of an exported program, in order: as large as when it was exported, the smallest, and larger ones."""
    specs = [spec.meta["val"] for spec in _inputs(exported)]
    if not all(isinstance(spec, torch.Tensor) for spec in specs):
        raise ValueError("forward takes arguments that are no tensors")
    examples = pytree.tree_leaves(exported.example_inputs) if exported.example_inputs is not None else []
    known = _known(specs, examples)
    generator = torch.Generator().manual_seed(_SEED)
    for pick in (_same, _smallest, _larger):
        shapes = [[_size(length, pick, known, exported.range_constraints) for length in spec.shape] for spec in specs]
        yield [
            _filled(spec.dtype, shape, fills[index] if index < len(fills) else None, generator).to(device)
            for index, (spec, shape) in enumerate(zip(specs, shapes, strict=True))
        ]


def difference(expected: Any, outputs: Any, allowed: float) -> str:
    """Where outputs differ by more than a share `allowed` of their range, and by how much; "" where none does."""
    named, structure = pytree.tree_flatten_with_path(expected)
    others, structure_made = pytree.tree_flatten(outputs)
    if structure != structure_made:
        return f"its outputs are {structure_made}, not {structure}"
    for (path, right), other in zip(named, others, strict=True):
        where = f"output {pytree.keystr(path)}" if path else "its output"
        if right.shape != other.shape or right.dtype != other.dtype:
            return f"{where} is {other.dtype}{list(other.shape)}, not {right.dtype}{list(right.shape)}"
        off = _off(right, other)
        if not off <= allowed:
            return f"{where} of {list(right.shape)} differs by {off:.2%} of its range, allowed are {allowed:.2%}"
    return ""


def _off(right: Any, output: Any) -> float:
    """The greatest difference as a share of the range; of other than floats the share that differs."""
    if not right.numel():
        return 0.0
    if not right.dtype.is_floating_point:
        return float((right != output).double().mean())
    right, output = right.detach().double(), output.detach().double()
    is_finite = right.isfinite()
    is_like = torch.allclose(right[~is_finite], output[~is_finite], equal_nan=True)
    if not is_like or not output[is_finite].isfinite().all():
        return float("inf")
    right, output = right[is_finite], output[is_finite]
    return float((right - output).abs().max() / max(float(right.abs().max()), 1e-6)) if right.numel() else 0.0


def _node(exported: Any, op: str) -> Any:
    return next(node for node in exported.graph_module.graph.nodes if node.op == op)


def _inputs(exported: Any) -> list[Any]:
    """The graph's nodes of what the caller passes."""
    names = set(exported.graph_signature.user_inputs)
    return [node for node in exported.graph_module.graph.nodes if node.op == "placeholder" and node.name in names]


def _known(specs: Sequence[Any], examples: Sequence[Any]) -> dict[Any, int]:
    """The sizes that the model was exported with, by their symbols."""
    sizes: dict[Any, int] = {}
    for spec, example in zip(specs, examples, strict=False):
        for length, size in zip(spec.shape, getattr(example, "shape", ()), strict=False):
            if isinstance(length, torch.SymInt) and length.node.expr.is_Symbol:
                sizes.setdefault(length.node.expr, int(size))
    return sizes


Pick = Callable[[int, int], int]
"""The size of a variable dimension, from the one at export and the least."""


def _same(size: int, least: int) -> int:
    return size


def _smallest(size: int, least: int) -> int:
    return least


def _larger(size: int, least: int) -> int:
    return 2 * size + 1


def _size(length: Any, pick: Pick, known: dict[Any, int], ranges: Any) -> int:
    if not isinstance(length, torch.SymInt):
        return int(length)
    expression = length.node.expr
    values = {}
    for symbol in expression.free_symbols:
        limits = ranges.get(symbol)
        least = max(1, int(limits.lower)) if limits is not None else 1
        size = pick(known.get(symbol, least + 1), least)
        values[symbol] = size if limits is None or size <= limits.upper else int(limits.upper)
    return int(expression.subs(values))


def _filled(dtype: Any, shape: Sequence[int], fill: Fill, generator: Any) -> Any:
    if fill is None:
        if dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(dtype)
        return torch.ones(shape, dtype=dtype) if dtype == torch.bool else torch.zeros(shape, dtype=dtype)
    low, high = fill
    return torch.randint(0, high - low + 1, tuple(shape), generator=generator).add(low).to(dtype)
