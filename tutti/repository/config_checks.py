"""What of a ModelConfig message is refused: fields that are not honoured, and values that make no sense. Pure.

Every field that is set is either honoured or refused here with its path, so that nothing is silently ignored.
"""

from collections.abc import Iterator
from typing import Any

from google.protobuf.message import Message
from tritonclient.grpc import model_config_pb2 as pb

from tutti.core import dtypes
from tutti.core.errors import ConfigError
from tutti.repository.backend_records import BackendRecord

# Dotted paths of the fields this server acts on, or that change nothing that a client can see. Subtrees end in ".*".
_HONOURED = frozenset(
    {
        "name", "platform", "backend", "max_batch_size", "default_model_filename",
        "input.name", "input.data_type", "input.dims", "input.optional", "input.format", "input.reshape.shape",
        "output.name", "output.data_type", "output.dims", "output.label_filename", "output.reshape.shape",
        "version_policy.latest.num_versions", "version_policy.all", "version_policy.specific.versions",
        "dynamic_batching.preferred_batch_size", "dynamic_batching.max_queue_delay_microseconds",
        "dynamic_batching.preserve_ordering", "dynamic_batching.priority_levels",
        "dynamic_batching.default_priority_level", "dynamic_batching.default_queue_policy.*",
        "dynamic_batching.priority_queue_policy",
        "sequence_batching.direct.max_queue_delay_microseconds", "sequence_batching.direct.minimum_slot_utilization",
        "sequence_batching.oldest.max_candidate_sequences", "sequence_batching.oldest.preferred_batch_size",
        "sequence_batching.oldest.max_queue_delay_microseconds", "sequence_batching.oldest.preserve_ordering",
        "sequence_batching.max_sequence_idle_microseconds", "sequence_batching.control_input.*",
        "sequence_batching.state.input_name", "sequence_batching.state.output_name",
        "sequence_batching.state.data_type", "sequence_batching.state.dims",
        "sequence_batching.state.initial_state.*", "sequence_batching.state.use_same_buffer_for_input_output",
        "instance_group.name", "instance_group.kind", "instance_group.count", "instance_group.gpus",
        "instance_group.rate_limiter.*",
        "ensemble_scheduling.step.*", "ensemble_scheduling.max_inflight_requests", "parameters.*", "metric_tags",
        "model_warmup.*", "model_transaction_policy.decoupled", "response_cache.enable",
        # How the data travels between host and GPU, and how eagerly: results are the same.
        "optimization.graph.level", "optimization.priority", "optimization.input_pinned_memory.*",
        "optimization.output_pinned_memory.*", "optimization.gather_kernel_buffer_threshold",
        "input.allow_ragged_batch", "batch_input.kind", "batch_input.target_name", "batch_input.data_type",
        "batch_input.source_input", "batch_output.target_name", "batch_output.kind", "batch_output.source_input",
        "optimization.eager_batching", "optimization.cuda.graphs", "optimization.cuda.graph_spec.*",
        "optimization.cuda.busy_wait_events", "optimization.cuda.output_copy_stream",
        "optimization.execution_accelerators.gpu_execution_accelerator.*",
    }
)  # fmt: skip
# Set, but to what it is anyway.
_EMPTY_IS_FINE = frozenset(
    {
        "dynamic_batching", "dynamic_batching.default_queue_policy", "version_policy.latest", "response_cache",
        "model_transaction_policy", "optimization", "optimization.graph", "optimization.input_pinned_memory",
        "optimization.output_pinned_memory", "sequence_batching", "sequence_batching.direct",
        "sequence_batching.oldest", "ensemble_scheduling", "optimization.cuda", "optimization.execution_accelerators",
        "instance_group", "input.reshape", "output.reshape",
    }
)  # fmt: skip
_MAX_NAME = 1024


def fail(model: str, path: str, why: str) -> ConfigError:
    """What is to be raised of a field of a model."""
    return ConfigError(f"model '{model}': {path}: {why}")


def datatype_of(number: int) -> str:
    """The datatype of a DataType's number; "" for one that is none."""
    try:
        return dtypes.from_config(pb.DataType.Name(number))
    except ValueError:
        return ""


def _set_paths(message: Message, prefix: str = "") -> Iterator[str]:
    for field, value in message.ListFields():
        path = f"{prefix}{field.name}"
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        if field.message_type is None or is_map or f"{path}.*" in _HONOURED:
            yield path
            continue
        children = value if field.is_repeated else [value]
        for child in children:
            nested = list(_set_paths(child, f"{path}."))
            yield from nested or [path]


def check(proto: Any, folder: str, record: BackendRecord | None) -> None:
    """Raises ConfigError with the path of the first field that is refused."""
    _check_enums(proto, folder)
    if proto.name != folder:
        raise fail(folder, "name", f"expected the folder's name '{folder}', got '{proto.name}'")
    if proto.max_batch_size < 0:
        raise fail(folder, "max_batch_size", f"expected 0 or more, got {proto.max_batch_size}")
    for path in _set_paths(proto):
        if path not in _HONOURED and f"{path}.*" not in _HONOURED and path not in _EMPTY_IS_FINE:
            raise fail(folder, path, "this server does not support the field")
    if proto.HasField("ensemble_scheduling"):
        for name in ("instance_group", "model_warmup", "optimization"):  # as in Triton: none of it would be done
            if any(field.name == name for field, _ in proto.ListFields()):
                raise fail(folder, name, "an ensemble has none of its own: the models of its steps have")
    for step in proto.ensemble_scheduling.step:
        if step.model_namespace:
            raise fail(folder, "ensemble_scheduling.step.model_namespace", "this server does not support the field")
    for kind, specs in (("input", proto.input), ("output", proto.output)):
        may_be_none = kind == "input" and record is not None and not record.needs_inputs
        _check_tensors(folder, kind, specs, may_be_none)
    _check_batching(proto)


def _check_enums(message: Message, folder: str, prefix: str = "") -> None:
    """Protobuf takes any number for an enum: refuse those without a name."""
    for field, value in message.ListFields():
        path = f"{prefix}{field.name}"
        if field.message_type is not None:
            is_map = field.message_type.GetOptions().map_entry
            children = value.values() if is_map else value if field.is_repeated else [value]
            for child in children:
                if isinstance(child, Message):
                    _check_enums(child, folder, f"{path}.")
        elif field.enum_type is not None:
            for number in value if field.is_repeated else [value]:
                if number not in field.enum_type.values_by_number:
                    raise fail(
                        folder, path, f"expected one of {', '.join(field.enum_type.values_by_name)}, got {number}"
                    )


def _check_tensors(folder: str, kind: str, specs: Any, may_be_none: bool = False) -> None:
    if not specs and not may_be_none:
        raise fail(folder, kind, "expected at least one")
    names = [spec.name for spec in specs]
    for index, spec in enumerate(specs):
        path = f"{kind}[{index}]"
        if not spec.name:
            raise fail(folder, f"{path}.name", "expected a name")
        if names.count(spec.name) > 1:
            raise fail(folder, f"{path}.name", f"'{spec.name}' appears more than once")
        if datatype_of(spec.data_type) not in dtypes.NUMPY:
            raise fail(folder, f"{path}.data_type", "expected a data type")
        if len(spec.name) > _MAX_NAME:
            raise fail(folder, f"{path}.name", f"expected at most {_MAX_NAME} characters")
        if any(dim < 1 and dim != -1 for dim in spec.dims):
            raise fail(folder, f"{path}.dims", f"expected sizes of at least 1, or -1 for any, got {list(spec.dims)}")
        if spec.HasField("reshape"):
            _check_reshape(folder, path, spec)


def _check_reshape(folder: str, path: str, spec: Any) -> None:
    """Both shapes must hold the same elements: as many variable dimensions, and equal products between them."""
    if _known_parts(spec.dims) != _known_parts(spec.reshape.shape):
        why = f"{list(spec.reshape.shape)} does not hold the same elements as dims {list(spec.dims)}"
        raise fail(folder, f"{path}.reshape.shape", why)


def _known_parts(dims: Any) -> list[int]:
    parts = [1]
    for dim in dims:
        if dim == -1:
            parts.append(1)
        else:
            parts[-1] *= dim
    return parts


def _check_batching(proto: Any) -> None:
    if not proto.HasField("dynamic_batching"):
        return
    if proto.max_batch_size == 0:
        raise fail(proto.name, "dynamic_batching", "needs max_batch_size of at least 1")
    for size in proto.dynamic_batching.preferred_batch_size:
        if not 1 <= size <= proto.max_batch_size:
            expected = f"expected sizes from 1 to max_batch_size {proto.max_batch_size}"
            raise fail(proto.name, "dynamic_batching.preferred_batch_size", f"{expected}, got {size}")
    policy = proto.dynamic_batching
    if policy.priority_levels and not 1 <= policy.default_priority_level <= policy.priority_levels:
        expected = f"expected a level from 1 to priority_levels {policy.priority_levels}"
        raise fail(
            proto.name, "dynamic_batching.default_priority_level", f"{expected}, got {policy.default_priority_level}"
        )
    for level in policy.priority_queue_policy:
        if not 1 <= level <= policy.priority_levels:
            expected = f"expected levels from 1 to priority_levels {policy.priority_levels}"
            raise fail(proto.name, "dynamic_batching.priority_queue_policy", f"{expected}, got {level}")
