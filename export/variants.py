"""The forms of one graph: built, looked into, and compared with PyTorch in float64. None is taken at its word."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from tutti.export import indices, layout, lengths, narrow, onnx, program
from tutti.export.errors import ExportError
from tutti.export.graphs import Arrays, Graph, Reference, with_arguments
from tutti.export.names import FILES
from tutti.export.parity import Comparer, Comparison

_PYTORCH = f"PyTorch {torch.__version__.partition('+')[0]}"


@dataclass(slots=True)
class Built:
    """A variant's file, its SHA-256 when it was verified, and what was seen."""

    variant: str
    path: Path
    sha256: str
    comparison: Comparison


@dataclass(slots=True)
class Result:
    """The variants of one graph. What was `left_out` was asked for, and would not have been worth it.

    `bounds` are the lowest and the highest values of inputs, and `most` is how many items their variable dimensions may
    have, None for any number: all variants'.
    """

    graph: Graph
    built: dict[str, Built] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    reference: str = ""
    expected: list[Arrays] = field(default_factory=list)
    bounds: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    most: int | None = None

    @property
    def comparisons(self) -> list[Comparison]:
        return [built.comparison for built in self.built.values()]


def in_float64(graph: Graph) -> tuple[Reference, str]:
    """What variants are compared with: the graph's own reference, or PyTorch in float64, or float32 where it must."""
    if graph.reference is not None:
        return graph.reference, "the original, as its own library runs it"
    try:
        module = copy.deepcopy(graph.module).double().eval()
        _run(module, graph.outputs, graph.cases[0], torch.float64)
    except (RuntimeError, TypeError, ValueError):
        return lambda case: _run(graph.module, graph.outputs, case, torch.float32), "PyTorch in float32"
    return lambda case: _run(module, graph.outputs, case, torch.float64), "PyTorch in float64"


def _run(module: Callable[..., Any], outputs: Sequence[str], case: Arrays, kind: torch.dtype) -> Arrays:
    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in case.items()}
    tensors = {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    with torch.inference_mode():
        answer = module(**tensors)
    answer = (answer,) if isinstance(answer, torch.Tensor) else answer
    return {name: tensor.numpy() for name, tensor in zip(outputs, answer, strict=True)}


def _called(module: Any, outputs: Sequence[str], tensors: Sequence[torch.Tensor]) -> Arrays:
    """As the server does it: tensors by position, in the datatypes that they come in."""
    with torch.inference_mode():
        answer = module(*tensors)
    answer = (answer,) if isinstance(answer, torch.Tensor) else answer
    return {name: tensor.numpy() for name, tensor in zip(outputs, answer, strict=True)}


class Builder:
    """Builds and verifies one graph's variants in a folder."""

    def __init__(self, graph: Graph, folder: Path, compute_capability: str = "") -> None:
        self._graph = graph
        self._folder = folder
        self._capability = compute_capability
        reference, told = in_float64(graph)
        self.result = Result(graph, reference=told, expected=[reference(case) for case in graph.cases])

    def make(self, variant: str) -> None:
        """Build one and verify it; what is wrong is in its comparison. Raises ExportError when it cannot be built."""
        path = self._folder / FILES[variant]
        comparer = (
            Comparer(self._graph.name, variant, self._graph.limits_of(variant), self._graph.decision)
            if (variant != "tensorrt")
            else Comparer(self._graph.name, variant, self._graph.limits_of("fp16"))
        )
        precision, note = "", ""
        try:
            precision, note = getattr(self, f"_{variant.replace('-', '_')}")(path, comparer)
        except onnx.NotWorthwhile as error:
            self.result.left_out[variant] = str(error)
            return
        except ExportError as error:
            if variant == "fp32":
                raise
            comparer.failed(str(error))
        comparison = comparer.result()
        comparison.precision, comparison.note = precision, note
        checksum = layout.sha256(path) if path.is_file() else ""
        self.result.built[variant] = Built(variant, path, checksum, comparison)

    def _compare(self, comparer: Comparer, run: Any) -> None:
        for case, expected in zip(self._graph.cases, self.result.expected, strict=True):
            try:
                got = run(case)
            except Exception as error:  # a shape that the graph does not take, most likely
                shapes = ", ".join(f"{key} {list(array.shape)}" for key, array in case.items())
                comparer.failed(f"it cannot be executed on {shapes}: {str(error)[:300]}")
                continue
            comparer.case(case, expected, got)

    def _compare_onnx(self, comparer: Comparer, path: Path) -> Any:
        """The session that was compared."""
        fixed = onnx.fixed_batch(path)
        if fixed:
            comparer.failed(f"tensor '{fixed}' has a fixed batch axis: it was folded into a constant")
        loaded = onnx.session(path)
        self._compare(comparer, lambda case: onnx.run(loaded, case))
        return loaded

    def _inspect(self, comparer: Comparer, path: Path, expected: str) -> str:
        precision, counts = onnx.precision(path)
        if precision != expected:
            comparer.failed(f"expected a graph in {expected}, its weights are in {precision}: {counts}")
        return ", ".join(f"{name} {size:,}" for name, size in sorted(counts.items(), key=lambda item: -item[1]))

    def _fp32(self, path: Path, comparer: Comparer) -> tuple[str, str]:
        graph = self._graph
        onnx.save(graph.module, path, graph.example, graph.outputs, graph.axes)
        loaded = self._compare_onnx(comparer, path)
        tables, proven = indices.find(path), lengths.prove(loaded, graph.lengths)
        self.result.bounds, self.result.most = tables.bounds, proven.most
        for fault in (tables.fault(graph.cases), proven.fault):
            if fault:
                comparer.failed(fault)
        notes = [f"opset {onnx.OPSET}", f"bounds: {tables}" if tables.bounds else "", proven.note, *tables.unclear]
        return self._inspect(comparer, path, "fp32"), "; ".join(note for note in notes if note)

    def _fp16(self, path: Path, comparer: Comparer) -> tuple[str, str]:
        onnx.to_half(self._source, path, self._graph.cases)
        self._compare_onnx(comparer, path)
        return self._inspect(comparer, path, "fp16"), "for GPUs; executed here on the processor"

    def _int8(self, path: Path, comparer: Comparer) -> tuple[str, str]:
        smoothed = onnx.to_int8(self._source, path, self._graph.cases)
        self._compare_onnx(comparer, path)
        how = f", {smoothed} of them smoothed" if smoothed else ""
        return self._inspect(comparer, path, "int8"), f"for processors: products of matrices in 8 bits{how}"

    def _torch(self, path: Path, comparer: Comparer) -> tuple[str, str]:
        saved = program.save(self._graph.module, path, self._graph.example, self._graph.axes)
        self._compare_program(comparer, saved)
        return self._inspect_program(comparer, saved, torch.float32), f"torch.export, {_PYTORCH}"

    def _torch_fp16(self, path: Path, comparer: Comparer) -> tuple[str, str]:
        return self._narrow(path, comparer, torch.float16)

    def _torch_bf16(self, path: Path, comparer: Comparer) -> tuple[str, str]:
        return self._narrow(path, comparer, torch.bfloat16)

    def _narrow(self, path: Path, comparer: Comparer, datatype: torch.dtype) -> tuple[str, str]:
        graph = self._graph
        inner, elements = narrow.narrowed(graph.module, datatype)
        if not elements:
            raise onnx.NotWorthwhile("all of it stays in 32 bits")
        names = list(graph.example)
        module = with_arguments(narrow.Narrow(inner, datatype, names, graph.wide), names)
        saved = program.save(module, path, graph.example, graph.axes)
        self._compare_program(comparer, saved)
        if not comparer.is_well and datatype == torch.float16:
            places = [program.overflow(saved, self._tensors(case)) for case in graph.cases]
            if any(places):
                comparer.failed(f"16 bits are not enough: {next(filter(None, places))}")
        shown = self._inspect_program(comparer, saved, datatype)
        return shown, f"torch.export, for GPUs; executed here on the processor, {_PYTORCH}"

    def _compare_program(self, comparer: Comparer, saved: ExportedProgram) -> None:
        module, outputs = program.runnable(saved), self._graph.outputs
        self._compare(comparer, lambda case: _called(module, outputs, self._tensors(case)))

    def _tensors(self, case: Arrays) -> list[torch.Tensor]:
        return [torch.from_numpy(np.asarray(case[name])) for name in self._graph.example]

    def _inspect_program(self, comparer: Comparer, saved: ExportedProgram, expected: torch.dtype) -> str:
        products = program.products(saved)
        shown = ", ".join(f"{count} products in {str(kind).removeprefix('torch.')}" for kind, count in products.items())
        if products and max(products, key=lambda kind: products[kind]) != expected:
            comparer.failed(f"expected a program in {expected}, it has {shown}")
        return shown or "no products of matrices"

    def _tensorrt(self, path: Path, comparer: Comparer) -> tuple[str, str]:
        from tutti.export import tensorrt

        half = self.result.built.get("fp16")
        source, wanted = (
            (half.path, "HALF") if half is not None and half.comparison.is_well else (self._source, "FLOAT")
        )
        built = tensorrt.build(source, path, self._graph.profile, self._capability)
        if built.datatypes and built.main != wanted:
            comparer.failed(f"expected layers in {wanted}, the network has {built.datatypes}")
        shown = ", ".join(f"{count} layers in {name}" for name, count in built.datatypes.items())
        return shown or "no products of matrices", f"{built.library}, from {source.name}; executed only on a GPU"

    @property
    def _source(self) -> Path:
        return self._folder / FILES["fp32"]
