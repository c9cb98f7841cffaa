"""A checked ModelConfig message -> the configuration as data, field by field. Raises ConfigError with the path."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from tritonclient.grpc import model_config_pb2 as pb

from tutti.core import dtypes
from tutti.repository.backend_records import BUILT_IN, BackendRecord
from tutti.repository.config_checks import datatype_of, fail
from tutti.repository.length_limits import parse as parse_max_dims
from tutti.repository.model_config import (
    ENSEMBLE,
    ControlKind,
    EnsembleStep,
    InstanceGroup,
    ModelConfig,
    SequenceControl,
    SequencePolicy,
    SequenceState,
    TensorSpec,
    VersionPolicy,
    Warmup,
    WarmupInput,
)  # fmt: skip
from tutti.repository.padding import Padding
from tutti.repository.padding import parse as parse_padding
from tutti.repository.policies import BatchingPolicy, QueuePolicy, RateLimit, Resource
from tutti.repository.ragged import BatchInput, Ragged
from tutti.repository.value_bounds import parse as parse_bounds

DEFAULT_MAX_QUEUED_ROWS = 16_384
DEFAULT_SEQUENCE_IDLE_US = 1_000_000
_PLATFORMS = sorted([record.platform for record in BUILT_IN.values() if record.platform] + [ENSEMBLE])


def _ragged(proto: Any, record: BackendRecord | None) -> Ragged:
    ragged = frozenset(spec.name for spec in proto.input if spec.allow_ragged_batch)
    inputs, outputs = {spec.name for spec in proto.input}, {spec.name for spec in proto.output}
    batch_inputs, scattered = [], {}
    for index, field in enumerate(proto.batch_input):
        path = f"batch_input[{index}]"
        if len(field.source_input) != 1 or field.source_input[0] not in inputs:
            raise fail(proto.name, f"{path}.source_input", f"expected one input, got {list(field.source_input)}")
        if not field.target_name:
            raise fail(proto.name, f"{path}.target_name", "expected at least one")
        datatype = datatype_of(field.data_type)
        if datatype not in ("INT32", "FP32"):
            raise fail(proto.name, f"{path}.data_type", f"expected TYPE_INT32 or TYPE_FP32, got {datatype or 'none'}")
        kind = pb.BatchInput.Kind.Name(field.kind)
        batch_inputs.append(BatchInput(kind, tuple(field.target_name), datatype, field.source_input[0]))
    for index, field in enumerate(proto.batch_output):
        path = f"batch_output[{index}]"
        if len(field.source_input) != 1 or field.source_input[0] not in inputs:
            raise fail(proto.name, f"{path}.source_input", f"expected one input, got {list(field.source_input)}")
        for name in field.target_name:
            if name not in outputs:
                raise fail(proto.name, f"{path}.target_name", f"the model has no output '{name}'")
            scattered[name] = field.source_input[0]
    result = Ragged(ragged, tuple(batch_inputs), scattered)
    if result and not proto.max_batch_size:
        raise fail(proto.name, "input.allow_ragged_batch", "needs max_batch_size of at least 1")
    joins = record is None or record.joins_rows
    if (batch_inputs or scattered) and (not joins or proto.HasField("ensemble_scheduling")):
        raise fail(proto.name, "batch_input", "only backends that join a batch have batch inputs and outputs")
    if result and proto.HasField("sequence_batching"):
        raise fail(proto.name, "input.allow_ragged_batch", "is not supported with sequence_batching")
    return result


def _padding(proto: Any, parameters: Mapping[str, str], specs: Any) -> Padding:
    padding = parse_padding(proto.name, parameters, *specs)
    if padding.inputs and (proto.HasField("ensemble_scheduling") or proto.HasField("sequence_batching")):
        raise fail(proto.name, "parameters.tutti.buckets", "neither an ensemble nor a model with sequences is padded")
    if padding.outputs and proto.model_transaction_policy.decoupled:
        raise fail(proto.name, "parameters.tutti.unpad", "is not supported for a decoupled model")
    return padding


def build(proto: Any, record: BackendRecord | None) -> ModelConfig:
    """All of it. `record` is its backend's, where that is known."""
    backend = _backend_name(proto, record)
    joins_rows = record is not None and record.joins_rows
    policy = proto.dynamic_batching
    is_dynamic = proto.HasField("dynamic_batching")
    parameters = MappingProxyType({key: value.string_value for key, value in proto.parameters.items()})
    inputs, outputs = (tuple(_spec(spec) for spec in specs) for specs in (proto.input, proto.output))
    padding = _padding(proto, parameters, (inputs, outputs))
    warmups = tuple(_warmup(proto, index) for index in range(len(proto.model_warmup)))
    return ModelConfig(
        name=proto.name,
        platform=proto.platform or (record.platform if record is not None else "") or backend,
        backend=backend,
        max_batch_size=proto.max_batch_size,
        inputs=inputs,
        outputs=outputs,
        batching=_batching(proto) if is_dynamic else None,
        max_queued_rows=policy.default_queue_policy.max_queue_size or DEFAULT_MAX_QUEUED_ROWS,
        instance_groups=_groups(proto, record),
        version_policy=_version_policy(proto),
        parameters=parameters,
        steps=_steps(proto),
        model_filename=proto.default_model_filename,
        proto=proto,
        is_decoupled=proto.model_transaction_policy.decoupled,
        is_cached=_cached(proto),
        sequences=_sequences(proto),
        warmups=warmups,
        metric_tags=MappingProxyType(dict(proto.metric_tags)),
        padding=padding,
        ragged=_ragged(proto, record),
        bounds=parse_bounds(proto.name, parameters, inputs, padding, is_checked=joins_rows),
        max_dims=parse_max_dims(proto.name, parameters, inputs, padding, warmups),
        max_inflight_requests=proto.ensemble_scheduling.max_inflight_requests,
        joins_rows=joins_rows,
        gpus=record.gpus if record is not None else "asked",
    )


def _backend_name(proto: Any, record: BackendRecord | None) -> str:
    """Any that is named: whether there is such a backend is seen when the model is loaded."""
    if proto.HasField("ensemble_scheduling") or (not proto.backend and proto.platform == ENSEMBLE):
        return ENSEMBLE
    name: str = proto.backend or (record.name if record is not None else "")
    if not name:
        raise fail(proto.name, "backend", f"expected a backend, or a platform of {_PLATFORMS}")
    return name


def _spec(proto: Any) -> TensorSpec:
    datatype = datatype_of(proto.data_type)
    return TensorSpec(
        proto.name,
        datatype,
        tuple(proto.dims),
        is_optional=getattr(proto, "optional", False),
        label_filename=getattr(proto, "label_filename", ""),
        reshape=tuple(proto.reshape.shape) if proto.HasField("reshape") else None,
    )


def _batching(proto: Any) -> BatchingPolicy:
    policy = proto.dynamic_batching
    return BatchingPolicy(
        max_batch_size=proto.max_batch_size,
        preferred_batch_sizes=tuple(sorted(policy.preferred_batch_size)),
        max_queue_delay_ns=policy.max_queue_delay_microseconds * 1000,
        priority_levels=policy.priority_levels,
        default_priority_level=policy.default_priority_level,
        queue=_queue_policy(policy.default_queue_policy),
        queue_by_level=MappingProxyType({k: _queue_policy(v) for k, v in policy.priority_queue_policy.items()}),
        preserves_ordering=policy.preserve_ordering,
    )


def _queue_policy(proto: Any) -> QueuePolicy:
    return QueuePolicy(
        timeout_ns=proto.default_timeout_microseconds * 1000,
        delays=proto.timeout_action == pb.ModelQueuePolicy.DELAY,
        allows_override=proto.allow_timeout_override,
        max_rows=proto.max_queue_size,
    )


def _cached(proto: Any) -> bool:
    if proto.response_cache.enable and proto.model_transaction_policy.decoupled:
        raise fail(proto.name, "response_cache.enable", "the answers of a decoupled model cannot be cached")
    if proto.response_cache.enable and proto.HasField("sequence_batching"):
        raise fail(proto.name, "response_cache.enable", "an answer depends on its sequence, and cannot be cached")
    return bool(proto.response_cache.enable)


def _sequences(proto: Any) -> SequencePolicy | None:
    if not proto.HasField("sequence_batching"):
        return None
    batching = proto.sequence_batching
    if batching.state and proto.model_transaction_policy.decoupled:
        raise fail(proto.name, "sequence_batching.state", "is not supported for a decoupled model")
    if proto.HasField("dynamic_batching") or proto.HasField("ensemble_scheduling"):
        raise fail(proto.name, "sequence_batching", "a model has one of it, dynamic_batching and ensemble_scheduling")
    is_oldest = batching.WhichOneof("strategy_choice") == "oldest"
    policy = batching.oldest if is_oldest else batching.direct
    slots = max(1, proto.max_batch_size)
    if is_oldest:
        slots = policy.max_candidate_sequences or slots
    preferred = tuple(sorted(policy.preferred_batch_size)) if is_oldest else ()
    is_joined = proto.max_batch_size > 0
    delay_ns = policy.max_queue_delay_microseconds * 1000
    return SequencePolicy(
        is_direct=not is_oldest,
        slots=slots,
        idle_ns=(batching.max_sequence_idle_microseconds or DEFAULT_SEQUENCE_IDLE_US) * 1000,
        batching=BatchingPolicy(proto.max_batch_size, preferred, delay_ns) if is_joined else None,
        min_slot_utilization=0.0 if is_oldest else policy.minimum_slot_utilization,
        controls=tuple(
            _control(proto.name, f"sequence_batching.control_input[{index}].control[{nth}]", item.name, control)
            for index, item in enumerate(batching.control_input)
            for nth, control in enumerate(item.control)
        ),
        states=tuple(_state(proto.name, index, state) for index, state in enumerate(batching.state)),
    )


def _control(model: str, path: str, name: str, proto: Any) -> SequenceControl:
    kinds: dict[int, ControlKind] = {0: "start", 1: "ready", 2: "end", 3: "corrid"}
    kind = kinds[proto.kind]
    if kind == "corrid":
        datatype = datatype_of(proto.data_type)
        if datatype not in ("UINT64", "INT64", "UINT32", "INT32", "BYTES"):
            raise fail(model, f"{path}.data_type", f"expected an integer type or TYPE_STRING, got {datatype}")
        return SequenceControl(name, kind, datatype)
    for datatype, values in (
        ("INT32", proto.int32_false_true), ("FP32", proto.fp32_false_true), ("BOOL", proto.bool_false_true),
    ):  # fmt: skip
        if values:
            if len(values) != 2:
                raise fail(model, path, f"expected the values for false and true, got {list(values)}")
            return SequenceControl(name, kind, datatype, values[0], values[1])
    raise fail(model, path, "expected one of int32_false_true, fp32_false_true, bool_false_true")


def _state(model: str, index: int, proto: Any) -> SequenceState:
    path = f"sequence_batching.state[{index}]"
    datatype = datatype_of(proto.data_type)
    if datatype not in dtypes.NUMPY:
        raise fail(model, f"{path}.data_type", "expected a data type")
    if len(proto.initial_state) > 1:
        raise fail(model, f"{path}.initial_state", "expected at most one")
    initial = proto.initial_state[0] if proto.initial_state else None
    dims = tuple(proto.dims)
    # What varies starts empty of choice: at 1, as in Triton.
    first = tuple(initial.dims) if initial is not None else tuple(1 if dim == -1 else dim for dim in dims)
    if any(dim < 0 for dim in first):
        raise fail(model, f"{path}.initial_state[0].dims", f"expected sizes, got {list(first)}")
    filename = initial.data_file if initial is not None else ""
    return SequenceState(proto.input_name, proto.output_name, datatype, dims, first, filename)


def _warmup(proto: Any, index: int) -> Warmup:
    warmup = proto.model_warmup[index]
    inputs = {}
    for name, item in warmup.inputs.items():
        path = f"model_warmup[{index}].inputs['{name}']"
        kind = item.WhichOneof("input_data_type")
        datatype = datatype_of(item.data_type)
        if name not in {spec.name for spec in proto.input}:
            raise fail(proto.name, path, f"expected one of {sorted(spec.name for spec in proto.input)}")
        if kind is None or datatype not in dtypes.NUMPY or any(dim < 0 for dim in item.dims):
            raise fail(proto.name, path, "expected data_type, dims, and one of zero_data, random_data, input_data_file")
        kinds: dict[str, Literal["zero", "random", "file"]] = {"zero_data": "zero", "random_data": "random"}
        inputs[name] = WarmupInput(datatype, tuple(item.dims), kinds.get(kind, "file"), item.input_data_file)
    if warmup.batch_size > max(1, proto.max_batch_size):
        expected = f"expected at most max_batch_size {proto.max_batch_size}"
        raise fail(proto.name, f"model_warmup[{index}].batch_size", f"{expected}, got {warmup.batch_size}")
    return Warmup(warmup.name, max(1, warmup.batch_size), warmup.count or 1, MappingProxyType(inputs))


def _groups(proto: Any, record: BackendRecord | None) -> tuple[InstanceGroup, ...]:
    groups = tuple(_group(proto, index, record) for index in range(len(proto.instance_group)))
    return groups or (InstanceGroup(),)


def _group(proto: Any, index: int, record: BackendRecord | None) -> InstanceGroup:
    group = proto.instance_group[index]
    kind = pb.ModelInstanceGroup.Kind.Name(group.kind).removeprefix("KIND_").lower()
    is_models_choice = record is not None and record.chooses_devices
    if kind == "model" and (not is_models_choice or group.gpus):
        why = "names no GPUs" if is_models_choice else "is supported for python models only"
        raise fail(proto.name, f"instance_group[{index}].kind", f"KIND_MODEL {why}")
    if group.count < 0:
        raise fail(proto.name, f"instance_group[{index}].count", f"expected 1 or more, got {group.count}")
    limit = _rate_limit(proto.name, f"instance_group[{index}].rate_limiter", group.rate_limiter)
    return InstanceGroup(kind, group.count or 1, tuple(group.gpus), group.name, limit)


def _rate_limit(model: str, path: str, proto: Any) -> RateLimit:
    names = [resource.name for resource in proto.resources]
    for index, resource in enumerate(proto.resources):
        if not resource.name or names.count(resource.name) > 1:
            raise fail(model, f"{path}.resources[{index}].name", f"expected names, each once, got {names}")
        if not resource.count:
            raise fail(model, f"{path}.resources[{index}].count", "expected 1 or more, got 0")
    resources = tuple(
        Resource(resource.name, resource.count, getattr(resource, "global")) for resource in proto.resources
    )
    return RateLimit(resources, proto.priority or 1)


def _version_policy(proto: Any) -> VersionPolicy:
    choice = proto.version_policy.WhichOneof("policy_choice")
    if choice == "all":
        return VersionPolicy(latest=0)
    if choice == "specific":
        return VersionPolicy(specific=tuple(proto.version_policy.specific.versions))
    return VersionPolicy(latest=proto.version_policy.latest.num_versions or 1)


def _steps(proto: Any) -> tuple[EnsembleStep, ...]:
    return tuple(
        EnsembleStep(
            step.model_name,
            "" if step.model_version in (0, -1) else str(step.model_version),
            MappingProxyType(dict(step.input_map)),
            MappingProxyType(dict(step.output_map)),
        )
        for step in proto.ensemble_scheduling.step
    )
