"""PyTorch's files as drafts: torch.export's tell their tensors, TorchScript's are asked with what a person says."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tutti.core.dtypes import NUMPY
from tutti.export.draft import ANY_SIZE, MAX_BATCH_SIZE, Draft, Field
from tutti.export.errors import ExportError, first_line

# A size that torch.export assumes of every free one, and does not need: 0 and 1 are not told apart from constants.
_ASSUMED = 2


def exported(source: Path) -> Draft:
    """Of torch.export. Raises ExportError for what PyTorch cannot load, or what is no tensor."""
    import torch

    try:
        program = torch.export.load(source)
    except Exception as error:
        raise ExportError(f"'{source.name}': PyTorch cannot load it: {first_line(error)}") from None
    _check_calls(source, program.call_spec)
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    signature = program.graph_signature
    inputs = [spec.arg.name for spec in signature.input_specs if spec.kind.name == "USER_INPUT"]
    outputs = [spec.arg.name for spec in signature.output_specs if spec.kind.name == "USER_OUTPUT"]
    keys = _keys(program.call_spec.out_spec, len(outputs)) or [f"OUTPUT__{index}" for index in range(len(outputs))]
    for key, name in (*zip(inputs, inputs, strict=True), *zip(keys, outputs, strict=True)):
        if not hasattr(values.get(name), "shape"):
            raise ExportError(f"'{source.name}': '{key}' is no tensor: expected forward to take and return tensors")
    return _draft(
        source,
        [(name, values[name]) for name in inputs],
        [(key, values[name]) for key, name in zip(keys, outputs, strict=True)],
        program.range_constraints,
    )


def _check_calls(source: Path, spec: Any) -> None:
    """Inputs are passed by position, and outputs are tensors, alone, in a list or in a dict. Raises ExportError."""
    named = _children(spec.in_spec)[1] if spec.in_spec is not None else None
    if named is not None and named.num_leaves:
        names = ", ".join(map(str, named.context))
        raise ExportError(
            f"'{source.name}' was exported with inputs by keyword ({names}): pass them by position, as in "
            f"torch.export.export(module, (x, {names}))"
        )
    out = spec.out_spec
    if out is not None and any(child.num_leaves != 1 or child.num_children for child in _children(out)):
        raise ExportError(
            f"'{source.name}': forward returns what holds more than tensors ({out}): expected a tensor, a tuple of "
            "tensors, or one dict of them"
        )


def _children(spec: Any) -> Sequence[Any]:
    """Of a specification of what is nested; older PyTorch has a field for them."""
    return spec.children() if hasattr(spec, "children") else spec.children_specs  # type: ignore[no-any-return]


def _keys(spec: Any, count: int) -> list[str]:
    """The keys of a dict of tensors that forward returns; none where it returns anything else."""
    is_dict = spec is not None and isinstance(spec.type, type) and issubclass(spec.type, dict)
    keys = [str(key) for key in spec.context] if is_dict and isinstance(spec.context, list | tuple) else []
    return keys if len(keys) == count else []


def _draft(
    source: Path, inputs: Sequence[tuple[str, Any]], outputs: Sequence[tuple[str, Any]], ranges: Mapping[Any, Any]
) -> Draft:
    """Of a program whose tensors have shapes, of numbers or of symbols with ranges."""
    tensors = [*inputs, *outputs]
    rows = [_bounds(value.shape[0], ranges) for _, value in tensors if len(value.shape)]
    is_batched = len(rows) == len(tensors) and all(least <= 1 < most for least, most in rows)
    size = min(MAX_BATCH_SIZE, *(most for _, most in rows)) if is_batched else 0

    def field(name: str, value: Any) -> Field:
        shape = value.shape[1:] if is_batched else value.shape
        dims = tuple(size if isinstance(size, int) else -1 for size in shape)
        bounds = tuple(_bounds(size, ranges) for size in shape)
        return Field(name, _datatype(value), dims, is_batched and not dims, bounds)

    notes = (
        []
        if size
        else ["requests are not joined: not all first axes are free (torch.export's dynamic_shapes frees them)"]
    )
    return Draft(
        "pytorch",
        source,
        "model.pt2",
        tuple(field(name, value) for name, value in inputs),
        tuple(field(name, value) for name, value in outputs),
        size,
        source.name,
        tuple(notes),
    )


def _bounds(size: Any, ranges: Mapping[Any, Any]) -> tuple[int, int]:
    """The least and the most that a size may be, as torch.export's Dim says."""
    if isinstance(size, int):
        return size, size
    limits = ranges.get(size.node.expr)
    if limits is None:
        return 1, ANY_SIZE
    least = _whole(limits.lower, 1)
    return least if least > _ASSUMED else 1, _whole(limits.upper, ANY_SIZE)


def _whole(limit: Any, otherwise: int) -> int:
    """A limit as a number; of sympy's infinities, which are of several kinds, what stands for them."""
    try:
        return int(limit)
    except (OverflowError, TypeError, ValueError, AttributeError):
        return otherwise


def scripted(source: Path, inputs: Sequence[str]) -> Draft:
    """TorchScript, whose inputs are `inputs` as NAME:TYPE:DIMS. Raises ExportError."""
    import torch

    try:
        module = torch.jit.load(str(source), map_location="cpu").eval()
    except Exception as error:
        raise ExportError(f"'{source.name}': PyTorch cannot load it: {first_line(error)}") from None
    names = [argument.name for argument in module.forward.schema.arguments[1:]]
    if not inputs:
        example = " ".join(f"--input {name}:FP32:3,224,224" for name in names)
        raise ExportError(f"TorchScript does not tell its inputs' types and sizes: say them, as in {example}")
    fields = [_field(text) for text in inputs]
    strangers = [field.name for field in fields if field.name not in names]
    if strangers:
        raise ExportError(f"--input {strangers[0]}: forward takes {', '.join(names)}")
    try:
        zeros = [
            torch.zeros((2, *(8 if dim < 0 else dim for dim in field.dims)), dtype=_torch_type(field))
            for field in fields
        ]
        with torch.inference_mode():
            answer = module(*zeros)
    except Exception as error:
        raise ExportError(f"asked with 2 rows of zeros, forward fails: {first_line(error)}") from None
    tensors = list(answer.items()) if isinstance(answer, dict) else []
    if not tensors:
        several = answer if isinstance(answer, tuple | list) else [answer]
        tensors = [(f"OUTPUT__{index}", tensor) for index, tensor in enumerate(several)]
    outputs = [Field(key, _datatype(value), tuple(value.shape[1:]), value.dim() == 1) for key, value in tensors]
    return Draft("pytorch", source, "model.pt", tuple(fields), tuple(outputs), MAX_BATCH_SIZE, source.name)


def _field(text: str) -> Field:
    """Of NAME:TYPE:DIMS. Raises ExportError."""
    match = re.fullmatch(r"([^:]+):([A-Za-z0-9]+):(-?[0-9]{1,10}(?:,-?[0-9]{1,10})*)", text)
    datatype = match[2].upper().removeprefix("TYPE_") if match else ""
    datatype = {"STRING": "BYTES"}.get(datatype, datatype)
    if match is None or datatype not in NUMPY or datatype == "BYTES":
        raise ExportError(f"--input: expected NAME:TYPE:DIMS, as x:FP32:3,224,224, got '{text}'")
    dims = tuple(int(size) for size in match[3].split(","))
    if any(size < -1 or size == 0 for size in dims):
        raise ExportError(f"--input {text}: expected sizes of 1 and more, or -1 for free ones")
    return Field(match[1], datatype, dims)


def _datatype(tensor: Any) -> str:
    """Triton's name for the elements of a tensor of PyTorch's. Raises ExportError."""
    name = str(getattr(tensor, "dtype", type(tensor).__name__)).removeprefix("torch.")
    known = {dtype.name: datatype for datatype, dtype in NUMPY.items() if datatype != "BYTES"}
    if name not in known:
        raise ExportError(f"expected tensors of Triton's types, got {name}")
    return known[name]


def _torch_type(field: Field) -> Any:
    import torch

    return getattr(torch, NUMPY[field.datatype].name)
