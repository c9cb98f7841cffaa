"""What an ONNX graph takes and makes, beside a model's configuration: what is missing there, and what does not fit.

Knows of graphs what a session tells, and executes none.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tritonclient.grpc import model_config_pb2 as pb

from tutti.core.dtypes import to_config
from tutti.core.errors import ConfigError
from tutti.core.types import Shape
from tutti.repository.model_config import ModelConfig, TensorSpec

_COMPLETED_BATCH_SIZE = 4
_ORT_TYPES = {
    "tensor(bool)": "BOOL", "tensor(uint8)": "UINT8", "tensor(uint16)": "UINT16", "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64", "tensor(int8)": "INT8", "tensor(int16)": "INT16", "tensor(int32)": "INT32",
    "tensor(int64)": "INT64", "tensor(float16)": "FP16", "tensor(float)": "FP32", "tensor(double)": "FP64",
    "tensor(bfloat16)": "BF16", "tensor(string)": "BYTES",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Node:
    """A tensor of the graph. `shape` has -1 for what varies; a variable first axis may have a name."""

    name: str
    datatype: str
    shape: Shape
    first_axis: str = ""


def nodes(tensors: Iterable[Any]) -> dict[str, Node]:
    """A session's tensors by name. A type that Triton has no datatype for keeps ONNX Runtime's name."""
    nodes = {}
    for tensor in tensors:
        shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in tensor.shape)
        first = tensor.shape[0] if tensor.shape and isinstance(tensor.shape[0], str) else ""
        nodes[tensor.name] = Node(tensor.name, _ORT_TYPES.get(tensor.type, tensor.type), shape, first)
    return nodes


def complete(proto: Any, inputs: Sequence[Node], outputs: Sequence[Node]) -> None:
    """Fill in inputs, outputs and batching of a ModelConfig message from the graph, as Triton does.

    A graph whose tensors all have a variable first axis is batched: max_batch_size, where not given, becomes 4, with
    dynamic batching. Tensors without other axes are shown to clients as [ 1 ]. Raises ConfigError.
    """
    is_batched = all(node.shape[:1] == (-1,) for node in (*inputs, *outputs))
    if not proto.max_batch_size and not proto.input and not proto.output and is_batched:
        proto.max_batch_size = _COMPLETED_BATCH_SIZE
        proto.dynamic_batching.SetInParent()
    sequences = proto.sequence_batching
    of_sequences = {control.name for control in sequences.control_input}  # the server feeds and reads these itself
    of_sequences.update(name for state in sequences.state for name in (state.input_name, state.output_name))
    for field, nodes in ((proto.input, inputs), (proto.output, outputs)):
        if field:
            continue
        for node in nodes:
            if node.name not in of_sequences:
                _complete_tensor(proto, field, node)


def _complete_tensor(proto: Any, field: Any, node: Node) -> None:
    if node.datatype not in _ORT_TYPES.values():
        advice = ""
        if node.datatype.startswith("seq(map"):
            advice = ": `tutti init` makes a tensor of it, and so does skl2onnx's option zipmap=False"
        reason = f"has type {node.datatype}, which is no tensor of Triton's{advice}"
        raise ConfigError(f"model '{proto.name}': tensor '{node.name}' {reason}")
    dims = node.shape[1:] if proto.max_batch_size else node.shape
    spec = field.add(name=node.name, data_type=pb.DataType.Value(to_config(node.datatype)), dims=dims or [1])
    if not dims and proto.max_batch_size:
        spec.reshape.SetInParent()


def check(config: ModelConfig, inputs: dict[str, Node], defaults: dict[str, Node], outputs: dict[str, Node]) -> None:
    """Compare the graph's tensors with those of the configuration; `defaults` are inputs that it has values for.

    Sizes that vary in the graph's outputs are for the answers to show. Raises ConfigError naming the tensor.
    """
    for spec in config.inputs:
        node = _node_of(config, "input", spec, inputs | defaults)
        is_filled = spec.name in config.padding.filled
        if spec.is_optional and spec.name in inputs and not is_filled:
            raise _fail(config, "input", spec.name, "is optional, but the graph has no default for it")
        if spec.name in config.ragged.inputs:
            if len(node.shape) != 1:
                raise _fail(config, "input", spec.name, f"is ragged: expected shape [-1] in the graph, {_has(node)}")
        else:
            _check_shape(config, "input", spec, node)
    for spec in config.outputs:
        node = _node_of(config, "output", spec, outputs)
        if spec.name not in config.ragged.scattered:
            _check_shape(config, "output", spec, node)
    _check_made_by_server(config, inputs | defaults, outputs)
    _check_surplus(config, inputs)


def _node_of(config: ModelConfig, kind: str, spec: TensorSpec, nodes: dict[str, Node]) -> Node:
    node = nodes.get(spec.name)
    if node is None:
        raise _fail(config, kind, spec.name, f"the graph has {sorted(nodes)}")
    if node.datatype != spec.datatype:
        raise _fail(config, kind, spec.name, f"configured as {spec.datatype}, the graph has {node.datatype}")
    return node


def _check_shape(config: ModelConfig, kind: str, spec: TensorSpec, node: Node) -> None:
    dims = spec.model_dims
    if not node.shape and not config.is_batched:
        if any(dim != 1 for dim in dims):
            raise _fail(config, kind, spec.name, f"is a scalar in the graph: expected dims of 1, got {list(dims)}")
        return
    if config.is_batched and node.shape[:1] != (-1,):
        reason = f"max_batch_size is {config.max_batch_size}: expected a variable first axis in the graph, {_has(node)}"
        raise _fail(config, kind, spec.name, reason)
    wanted = (-1, *dims) if config.is_batched else dims
    fits = len(wanted) == len(node.shape) and all(n in (-1, dim) for n, dim in zip(node.shape, wanted, strict=True))
    if not fits:
        batch = " with the batch's axis" if config.is_batched else ""
        raise _fail(config, kind, spec.name, f"configured with shape {list(wanted)}{batch}, {_has(node)}")


def _check_made_by_server(config: ModelConfig, inputs: dict[str, Node], outputs: dict[str, Node]) -> None:
    """What the server feeds and keeps itself has to be in the graph, too."""
    for batch_input in config.ragged.batch_inputs:
        for name in batch_input.names:
            if name not in inputs:
                raise _fail(config, "batch_input", name, f"the graph has {sorted(inputs)}")
    if config.sequences is None:
        return
    fed = [(control.name, control.datatype) for control in config.sequences.controls]
    fed += [(state.input_name, state.datatype) for state in config.sequences.states]
    kept = [(state.output_name, state.datatype) for state in config.sequences.states]
    for names, there in ((fed, inputs), (kept, outputs)):
        for name, datatype in names:
            if name not in there:
                raise _fail(config, "sequence_batching", name, f"the graph has {sorted(there)}")
            if there[name].datatype != datatype:
                mismatch = f"configured as {datatype}, the graph has {there[name].datatype}"
                raise _fail(config, "sequence_batching", name, mismatch)


def _check_surplus(config: ModelConfig, inputs: dict[str, Node]) -> None:
    known = {spec.name for spec in config.inputs}
    known.update(name for batch_input in config.ragged.batch_inputs for name in batch_input.names)
    if config.sequences is not None:
        known.update(control.name for control in config.sequences.controls)
        known.update(state.input_name for state in config.sequences.states)
    surplus = sorted(set(inputs) - known)
    if surplus:
        raise ConfigError(f"model '{config.name}': input: the graph also needs {surplus}, which are not configured")


def names_rows(config: ModelConfig, inputs: dict[str, Node], outputs: dict[str, Node]) -> bool:
    """Whether the graph calls the first axes of all configured outputs what it calls those of the inputs."""
    names = {inputs[spec.name].first_axis for spec in config.inputs if spec.name in inputs}
    names |= {outputs[spec.name].first_axis for spec in config.outputs if spec.name in outputs}
    return len(names) == 1 and "" not in names


def scalars(nodes: Iterable[Node], specs: Sequence[TensorSpec]) -> dict[str, Shape]:
    """Tensors without axes in the graph that are configured with some, of size 1: their configured shapes."""
    dims = {spec.name: spec.model_dims for spec in specs}
    return {node.name: dims[node.name] for node in nodes if not node.shape and dims.get(node.name)}


def _has(node: Node) -> str:
    return f"the graph has {list(node.shape)}"


def _fail(config: ModelConfig, kind: str, name: str, why: str) -> ConfigError:
    return ConfigError(f"model '{config.name}': {kind} '{name}': {why}")
