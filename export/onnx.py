"""PyTorch module -> ONNX file, its variants in fewer bits, and what a saved graph says about itself.

Opset 20: from 23 on, attention becomes one operator whose ONNX Runtime CPU kernel fails on masks of one row.
"""

import logging
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

from tutti.core import dtypes
from tutti.export.errors import ExportError
from tutti.export.graphs import Arrays
from tutti.repository.model_config import TensorSpec

OPSET = 20
BATCH = "batch"
HALF_MAX = 65_504.0
# What hides a place from attention, as far as it goes: any large number will do.
_MASK = 1e37
# Where a weight is worth the 8 bits: products of matrices. ONNX Runtime's dynamic convolutions in 8 bits are slower.
_QUANTIZED = ["MatMul", "Gemm"]
_MIN_QUANTIZED_SHARE = 0.3
_MOST_NOISE = 0.03
_SMOOTHING = 0.65


def save(
    module: torch.nn.Module,
    path: Path,
    example: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
    axes: Mapping[str, Mapping[int, str]],
) -> None:
    """Trace `module(**example)` and save it. `axes` names the variable axes per input; examples need batch 2.

    Raises ExportError with the exporter's reason.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations say nothing about the model
        try:
            torch.onnx.export(
                module.eval(),
                kwargs=dict(example),
                f=str(path),
                dynamo=True,
                input_names=list(example),
                output_names=list(outputs),
                dynamic_shapes={name: dict(axes.get(name, {})) for name in example},
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(f"PyTorch cannot export {path.stem}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The first line of what the exporter says, without colours, and of what made it say so."""
    cause = error.__cause__ or error
    said = [re.sub(r"\x1b\[[0-9;]*m", "", str(raised)).strip().splitlines() for raised in (error, cause)]
    return ": ".join(dict.fromkeys(lines[0] for lines in said if lines))[:400]


def tensor_specs(path: Path) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of a saved graph, without the batch axis; a named axis is -1.

    Read from the file, since the exporter prunes what the graph never reads.
    """
    graph = onnx.load(str(path), load_external_data=False).graph
    return [_spec(value) for value in graph.input], [_spec(value) for value in graph.output]


def _spec(value: Any) -> TensorSpec:
    tensor = value.type.tensor_type
    datatype = "BYTES" if tensor.elem_type == onnx.TensorProto.STRING else _datatype(tensor.elem_type)
    dims = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)
    return TensorSpec(value.name, datatype, dims[1:])


def _datatype(element: int) -> str:
    if element == onnx.TensorProto.BFLOAT16:
        return "BF16"
    return dtypes.from_numpy(onnx.helper.tensor_dtype_to_np_dtype(element))


def fixed_batch(path: Path) -> str:
    """Which tensor has a batch axis of one size only; "" for none: an exporter may fold it into a constant."""
    graph = onnx.load(str(path), load_external_data=False).graph
    for value in [*graph.input, *graph.output]:
        dims = value.type.tensor_type.shape.dim
        if not dims or dims[0].HasField("dim_value"):
            return str(value.name)
    return ""


def session(path: Path | bytes) -> Any:
    """An ONNX Runtime session on the processor. Raises ExportError when the file cannot be loaded."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        source = path if isinstance(path, bytes) else str(path)
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        name = "the graph" if isinstance(path, bytes) else path.name
        raise ExportError(f"onnxruntime cannot load {name}: {str(error)[:300]}") from None


def run(loaded: Any, case: Arrays, options: Any = None) -> dict[str, Any]:
    """All outputs of a session, by name."""
    inputs = {node.name for node in loaded.get_inputs()}
    names = [node.name for node in loaded.get_outputs()]
    feed = {name: array for name, array in case.items() if name in inputs}
    return dict(zip(names, loaded.run(names, feed, options), strict=True))


def failure(loaded: Any, case: Arrays) -> str:
    """Why a session cannot be run on a case; "" where it can."""
    quiet = ort.RunOptions()
    quiet.log_severity_level = 4  # a failure may be what is asked for
    try:
        run(loaded, case, quiet)
    except Exception as error:
        return str(error)[:300]
    return ""


def to_half(source: Path, target: Path, cases: Sequence[Arrays]) -> None:
    """The graph with weights and activations of 16 bits; inputs and outputs stay as they are.

    Raises ExportError naming a tensor that gets larger than 16 bits can say.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    over = _overflow(source, cases)
    if over:
        raise ExportError(f"16 bits are not enough: {over}")
    model = onnx.load(str(source))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are nearly zero
        narrowed = convert_float_to_float16(model, keep_io_types=True, node_block_list=_before_logarithms(model))
    _take_out_round_trips(narrowed)
    onnx.save(narrowed, str(target))


def _take_out_round_trips(model: Any) -> None:
    """The converter has nodes that stay in 32 bits hand over 16 among themselves: let them not."""
    half, full = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    casts = [(node, node.attribute[0].i) for node in model.graph.node if node.op_type == "Cast"]
    # Those that the converter has put in: the graph's own may be from whole numbers.
    down = {
        node.output[0]: node.input[0]
        for node, to in casts
        if to == half and (node.input[0].endswith("_cast_to_fp16") or node.name.startswith("graph_input_cast"))
    }
    up = {node.output[0]: down[node.input[0]] for node, to in casts if to == full and node.input[0] in down}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in up:
                node.input[index] = up[name]
    used = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    kept = [node for node in model.graph.node if node.op_type != "Cast" or node.output[0] in used]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    del model.graph.value_info[:]  # some of it is of what has changed


def _before_logarithms(model: Any) -> list[str]:
    """Names of the nodes that lead to a logarithm: 16 bits do not tell small energies from none."""
    by_output = {name: node for node in model.graph.node for name in node.output}
    waiting = [node for node in model.graph.node if node.op_type == "Log"]
    producers: dict[str, Any] = {}
    while waiting:
        node = waiting.pop()
        if node.name not in producers:
            producers[node.name] = node
            waiting += [by_output[name] for name in node.input if name in by_output]
    return list(producers)


def _overflow(source: Path, cases: Sequence[Arrays]) -> str:
    """The tensor that gets too large for 16 bits in one of the cases, and how large; "" for none.

    ONNX Runtime computes in 32 bits on processors, so running the variant there would not show it.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(str(source)))
    known = {value.name for value in [*model.graph.input, *model.graph.output]}
    floats = [
        value
        for value in model.graph.value_info
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT and value.name not in known
    ]
    produced = {name for node in model.graph.node for name in node.output}
    model.graph.output.extend(value for value in floats if value.name in produced)
    loaded = session(model.SerializeToString())
    for case in cases:
        for name, array in run(loaded, case).items():
            if array.dtype == np.float32 and array.size:
                size = np.abs(array)
                most = float(size[size < _MASK].max(initial=0.0))
                if most > HALF_MAX:
                    return f"tensor '{name}' reaches {most:.3g}, {HALF_MAX:.0f} is the most"
    return ""


def to_int8(source: Path, target: Path, cases: Sequence[Arrays]) -> int:
    """The graph with weights of matrix products in 8 bits, activations quantized as they come.

    Activations with outliers, by the cases, are smoothed first; returns how many products that were. Raises
    NotWorthwhile where few of the weights would be in 8 bits.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(str(source))
    smoothed = _smooth(model, cases)
    between = target.with_suffix(".smoothed.onnx")
    onnx.save(model, str(between))
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises a pre-processing that changes nothing here
    try:
        quantize_dynamic(
            str(between),
            str(target),
            op_types_to_quantize=_QUANTIZED,
            weight_type=QuantType.QInt8,
            per_channel=True,
            nodes_to_exclude=_before_logarithms(model),
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        root.setLevel(level)
        between.unlink()
    counts = _elements(onnx.load(str(target)))
    share = counts["INT8"] / max(1, counts["INT8"] + counts["FLOAT"])
    if share < _MIN_QUANTIZED_SHARE:
        reason = f"{share:.0%} of the weights are in matrix products"
        raise NotWorthwhile(f"{reason}: 8 bits would not be worth it")
    return smoothed


def _smooth(model: Any, cases: Sequence[Arrays]) -> int:
    """Move outliers of activations into the weights that they meet; returns at how many products.

    x W = (x / s) (s W), with s = max|x|^a / max|W|^(1 - a) for each column of x (SmoothQuant: Xiao et al., 2023). Where
    an activation in 8 bits would be off by more than _MOST_NOISE of its size: a range of 255 steps rounds by
    step / sqrt(12), root mean square, and one outlier makes all steps wide.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    apart = set(_before_logarithms(model))
    products = [
        node
        for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] in weights and node.name not in apart
        and len(weights[node.input[1]].dims) == 2
    ]  # fmt: skip
    largest, noise = _activations(model, [node.input[0] for node in products], cases)
    before: dict[str, Any] = {}
    for node in products:
        name = node.input[0]
        if noise[name] <= _MOST_NOISE:
            continue
        weight = onnx.numpy_helper.to_array(weights[node.input[1]])
        x, w = (np.maximum(bound, 1e-5) for bound in (largest[name], np.abs(weight).max(1)))
        scale = (x**_SMOOTHING / w ** (1 - _SMOOTHING)).astype(np.float32)
        names = [f"{node.name}.{part}" for part in ("weight", "scale", "smoothed")]
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight * scale[:, np.newaxis], names[0]))
        model.graph.initializer.append(onnx.numpy_helper.from_array(1 / scale, names[1]))
        before[node.name] = onnx.helper.make_node("Mul", [name, names[1]], [names[2]], name=f"{node.name}.smooth")
        node.input[0], node.input[1] = names[2], names[0]
    nodes = [kept for node in model.graph.node for kept in (before.get(node.name), node) if kept is not None]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return len(before)


def _activations(model: Any, names: Sequence[str], cases: Sequence[Arrays]) -> tuple[dict[str, Any], dict[str, float]]:
    """Of tensors over all cases: each column's largest size, and the mean noise of 8 bits as a share of the size."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    known = {value.name for value in [*probe.graph.output, *probe.graph.input]}
    wanted = list(dict.fromkeys(names))
    probe.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in wanted if name not in known)
    loaded = session(probe.SerializeToString())
    largest: dict[str, Any] = {}
    noise: dict[str, float] = dict.fromkeys(wanted, 0.0)
    for case in cases:
        values = {**case, **run(loaded, case)}
        for name in wanted:
            x = values[name].astype(np.float64)
            columns = np.abs(x).reshape(-1, x.shape[-1]).max(0, initial=0.0)
            largest[name] = np.maximum(largest.get(name, 0.0), columns)
            step = (max(0.0, x.max(initial=0.0)) - min(0.0, x.min(initial=0.0))) / 255
            size = float(np.sqrt(np.square(x).mean())) if x.size else 0.0
            noise[name] += step / 12**0.5 / max(size, 1e-12) / len(cases)
    return largest, noise


class NotWorthwhile(ExportError):
    """The variant can be made, but nobody would want it."""


def _elements(model: Any) -> Counter[str]:
    """The weights' elements by datatype, but for what leads to a logarithm: that stays as it is."""
    counts: Counter[str] = Counter()
    apart = set(_before_logarithms(model))
    used = {name for node in model.graph.node if node.name not in apart for name in node.input}
    for tensor in model.graph.initializer:
        if tensor.name in used:
            size = int(np.prod(tensor.dims)) if tensor.dims else 1
            counts[onnx.TensorProto.DataType.Name(tensor.data_type)] += size
    return counts


def precision(path: Path) -> tuple[str, dict[str, int]]:
    """What a saved graph computes in, by its weights ("fp32", "fp16" or "int8"), and the elements of each datatype."""
    model = onnx.load(str(path))
    counts = _elements(model)
    everything = max(1, sum(counts[name] for name in ("FLOAT", "FLOAT16", "INT8")))
    has_integer_products = any(node.op_type.endswith("Integer") for node in model.graph.node)
    if counts["INT8"] >= _MIN_QUANTIZED_SHARE * everything and has_integer_products:
        return "int8", dict(counts)  # embeddings and norms stay as they are
    return ("fp16" if counts["FLOAT16"] > 0.9 * everything else "fp32"), dict(counts)
