"""PyTorch module -> torch.export package, and what a saved package says about itself.

Programs take their tensors by position, as the server gives them. One that is saved loads where the schema of PyTorch's
packages has the same major version; its operators are those of the PyTorch that traced it. Export where it is served.
"""

import contextlib
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from tutti.export.errors import ExportError

# What most of the time goes into.
_PRODUCTS = frozenset(
    {
        "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d", "conv2d", "conv3d", "lstm", "gru",
        "scaled_dot_product_attention",
    }
)  # fmt: skip


def save(
    module: torch.nn.Module,
    path: Path,
    example: Mapping[str, torch.Tensor],
    axes: Mapping[str, Mapping[int, str]],
) -> ExportedProgram:
    """Trace `module(*example)` and save it; returns what a server would load. `axes` are the variable ones, by input.

    Raises ExportError with PyTorch's reason.
    """
    dynamic = tuple(dict.fromkeys(axes.get(name, {}), torch.export.Dim.DYNAMIC) for name in example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are shared
        try:
            program = torch.export.export(module.eval(), tuple(example.values()), dynamic_shapes=dynamic, strict=False)
            torch.export.save(program, str(path))
        except Exception as error:  # of many kinds, from anywhere in the model's code
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ExportError(f"PyTorch cannot export {path.name}: {reason}") from error
        return torch.export.load(str(path))


def runnable(program: ExportedProgram) -> Any:
    """The program's module, as the server makes it: its guards are of the shapes that it was traced with."""
    return program.module(check_guards=False)


def products(program: ExportedProgram) -> dict[torch.dtype, int]:
    """How many products of matrices and convolutions compute in which datatype."""
    dtypes: Counter[torch.dtype] = Counter()
    for node in program.graph.nodes:
        name = getattr(node.target, "__name__", "").partition(".")[0]
        value = node.meta.get("val")
        value = value[0] if isinstance(value, list | tuple) and value else value
        if node.op == "call_function" and name in _PRODUCTS and isinstance(value, torch.Tensor):
            dtypes[value.dtype] += 1
    return dict(dtypes)


def overflow(program: ExportedProgram, tensors: Sequence[torch.Tensor]) -> str:
    """Where values first get larger than their datatype can say, given its inputs; "" for nowhere.

    Infinities below are no fault: they hide places from attention.
    """
    watch = _Watch(runnable(program))
    with torch.inference_mode(), contextlib.suppress(Exception):  # whoever asks knows what cannot be executed
        watch.run(*tensors)
    return watch.found


class _Watch(torch.fx.Interpreter):
    """Executes node by node; `found` says what was no longer finite first."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.found = ""

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        tensor = value[0] if isinstance(value, list | tuple) and value else value
        if not self.found and isinstance(tensor, torch.Tensor) and _is_beyond(tensor):
            most = torch.finfo(tensor.dtype).max
            self.found = f"what '{_place(n)}' makes gets larger than {most:.0f}, which is the most"
        return value


def _is_beyond(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and bool((tensor.isnan() | tensor.isposinf()).any())


def _place(node: torch.fx.Node) -> str:
    """The module that a node is of, and the node."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]).removeprefix("inner.") if stack else ""
    return f"{path}: {node.name}" if path else node.name
