"""config.pbtxt -> frozen dataclasses. Parsing and checking only: touches no backend and no other model.

Every field that is set is either honoured or refused here with its path, so that nothing is silently ignored.
Field meanings follow Triton's model_config.proto.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from google.protobuf import json_format, text_format
from google.protobuf.message import Message
from tritonclient.grpc import model_config_pb2 as pb

from tutti.core import dtypes, files
from tutti.core.errors import ConfigError, reason
from tutti.core.types import Shape
from tutti.repository import backend_records
from tutti.repository.backend_records import BUILT_IN, BackendRecord, GpuUse
from tutti.repository.length_limits import ANY_SIZE, MaxDims
from tutti.repository.length_limits import parse as parse_max_dims
from tutti.repository.misspelt import told
from tutti.repository.padding import NO_PADDING, Padding
from tutti.repository.padding import parse as parse_padding
from tutti.repository.policies import NO_LIMIT, BatchingPolicy, QueuePolicy, RateLimit, Resource
from tutti.repository.ragged import NOT_RAGGED, BatchInput, Ragged
from tutti.repository.value_bounds import UNBOUNDED, Bounds
from tutti.repository.value_bounds import parse as parse_bounds

DEFAULT_MAX_QUEUED_ROWS = 16_384
_ENSEMBLE = "ensemble"
_PLATFORMS = sorted([record.platform for record in BUILT_IN.values() if record.platform] + [_ENSEMBLE])
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
_DEFAULT_SEQUENCE_IDLE_US = 1_000_000
_MAX_NAME = 1024


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output as configured. `dims` exclude the batch axis; -1 is any size, zero included."""

    name: str
    datatype: str
    dims: Shape
    is_optional: bool = False
    label_filename: str = ""
    reshape: Shape | None = None

    @property
    def model_dims(self) -> Shape:
        """The dims that the model itself has: those of `reshape` where it is given."""
        return self.dims if self.reshape is None else self.reshape

    def accepts(self, shape: Shape) -> bool:
        """Whether `shape`, without its batch axis, fits `dims`."""
        return len(shape) == len(self.dims) and all(d in (-1, n) for d, n in zip(self.dims, shape, strict=True))


@dataclass(frozen=True, slots=True)
class InstanceGroup:
    """`count` instances on `kind` ("auto", "cpu" or "gpu"), per listed GPU where there are any."""

    kind: str = "auto"
    count: int = 1
    gpus: tuple[int, ...] = ()
    name: str = ""
    rate_limit: RateLimit = NO_LIMIT


@dataclass(frozen=True, slots=True)
class EnsembleStep:
    """One step: model tensor name -> ensemble tensor name, for inputs and outputs. `version` "" is the newest."""

    model_name: str
    version: str
    input_map: Mapping[str, str]
    output_map: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class VersionPolicy:
    """Which version folders are served: the newest `latest`, `specific` ones, or all when both are empty."""

    latest: int = 1
    specific: tuple[int, ...] = ()

    def select(self, versions: list[int]) -> list[int]:
        ordered = sorted(versions)
        if self.specific:
            return [version for version in ordered if version in self.specific]
        return ordered[-self.latest :] if self.latest else ordered


ControlKind = Literal["start", "ready", "end", "corrid"]


@dataclass(frozen=True, slots=True)
class SequenceControl:
    """A control input of the sequence batcher. `off` and `on` are its values; none for the correlation id."""

    name: str
    kind: ControlKind
    datatype: str
    off: float = 0
    on: float = 1


@dataclass(frozen=True, slots=True)
class SequenceState:
    """A tensor the server keeps between a sequence's requests: the output feeds the next request's input.

    `initial_file`, in the model's folder `initial_state`, holds its first value in wire form; otherwise it is zeros.
    """

    input_name: str
    output_name: str
    datatype: str
    dims: Shape
    initial_dims: Shape
    initial_file: str = ""


@dataclass(frozen=True, slots=True)
class SequencePolicy:
    """`sequence_batching`. `slots` is how many sequences an instance holds at a time.

    With `is_direct` each sequence keeps its row of the batch; otherwise the sequences' oldest requests are batched.
    """

    is_direct: bool
    slots: int
    idle_ns: int
    batching: BatchingPolicy | None
    min_slot_utilization: float
    controls: tuple[SequenceControl, ...]
    states: tuple[SequenceState, ...]


@dataclass(frozen=True, slots=True)
class WarmupInput:
    """One input of a warm-up request: zeros, random, or from a file in the model's folder `warmup`."""

    datatype: str
    dims: Shape
    kind: Literal["zero", "random", "file"]
    filename: str = ""


@dataclass(frozen=True, slots=True)
class Warmup:
    """One warm-up request of `batch_size` rows, run `count` times by each instance before it serves."""

    name: str
    batch_size: int
    count: int
    inputs: Mapping[str, WarmupInput]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model's configuration, checked. `batching` is None where requests are never joined."""

    name: str
    platform: str
    backend: str
    max_batch_size: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batching: BatchingPolicy | None
    max_queued_rows: int
    instance_groups: tuple[InstanceGroup, ...]
    version_policy: VersionPolicy
    parameters: Mapping[str, str]
    steps: tuple[EnsembleStep, ...]
    model_filename: str
    proto: Any
    is_decoupled: bool = False
    is_cached: bool = False
    sequences: SequencePolicy | None = None
    warmups: tuple[Warmup, ...] = ()
    metric_tags: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    padding: Padding = NO_PADDING
    ragged: Ragged = NOT_RAGGED
    bounds: Bounds = UNBOUNDED
    max_dims: MaxDims = ANY_SIZE
    max_inflight_requests: int = 0
    # False where requests of several callers must not reach the model as one: their rows could not be told apart.
    makes_rows: bool = True
    # What its backend's record says.
    joins_rows: bool = False
    gpus: GpuUse = "asked"

    @property
    def is_ensemble(self) -> bool:
        return self.backend == _ENSEMBLE

    @property
    def is_batched(self) -> bool:
        """Whether tensors carry a leading batch axis."""
        return self.max_batch_size > 0

    @property
    def may_merge(self) -> bool:
        """Whether requests of equal shapes may reach the model as one: its backend joins them anyway."""
        is_plain = self.sequences is None and not (self.is_decoupled or self.is_cached)
        is_joined = self.joins_rows and self.batching is not None and self.max_batch_size > 1
        return self.makes_rows and is_plain and is_joined and not self.padding.inputs and not self.ragged

    @property
    def cpu_filename(self) -> str:
        """The file that stands in for the model's where there is no GPU for it; "" for none."""
        return self.parameters.get("tutti.cpu_model_filename", "")

    @property
    def gpu_filename(self) -> str:
        """The file that is executed on GPUs in the model's place; "" for none."""
        return self.parameters.get("tutti.gpu_model_filename", "")

    @property
    def latency_ns(self) -> dict[int, int]:
        """What executions of so many rows are told to take, before any was seen.

        Raises ConfigError for a `tutti.latency_ms` that is not "ROWS:MILLISECONDS,...".
        """
        return self._told_ns("tutti.latency_ms")

    @property
    def gpu_latency_ns(self) -> dict[int, int]:
        """The same on a GPU, for plans of clusters, by `tutti.gpu_latency_ms`."""
        return self._told_ns("tutti.gpu_latency_ms")

    def _told_ns(self, name: str) -> dict[int, int]:
        text = self.parameters.get(name, "")
        found: dict[int, int] = {}
        for part in text.split(",") if text else ():
            rows, _, ms = part.partition(":")
            try:
                found[int(rows)] = int(float(ms) * 1e6)
            except (ValueError, OverflowError):
                found[-1] = 0
        if any(rows < 1 or ns < 1 for rows, ns in found.items()):
            what = f"expected ROWS:MILLISECONDS and more of them, got '{text[:80]}'"
            raise ConfigError(f"model '{self.name}': parameters.{name}: {what}")
        return found

    def wire_shape(self, spec: TensorSpec) -> Shape:
        """`dims` with the batch axis in front, as metadata shows it."""
        return (-1, *spec.dims) if self.is_batched else spec.dims


def as_decoupled(config: ModelConfig) -> ModelConfig:
    """The configuration of a model whose requests may have any number of answers, as an ensemble's of such steps."""
    proto = pb.ModelConfig()
    proto.CopyFrom(config.proto)
    proto.model_transaction_policy.decoupled = True
    return replace(config, is_decoupled=True, proto=proto)


Complete = Callable[[Any], None]
"""Fills in what a ModelConfig message leaves out, where it can be told from the model's files."""


def load(path: Path, complete: Complete = lambda _: None) -> ModelConfig:
    """Read `<model folder>/config.pbtxt`; a missing file is an empty one. Raises ConfigError naming model and field.

    What is not UTF-8 does no harm in a comment.
    """
    try:
        text = files.read_text(path) if os.path.lexists(path) else ""
    except OSError as error:
        raise ConfigError(f"model '{path.parent.name}': cannot read {path.name}: {reason(error)}") from None
    return parse(text, path.parent.name, complete)


def parse(text: str, folder: str, complete: Complete = lambda _: None) -> ModelConfig:
    """Parse, complete and check one config.pbtxt; `folder` gives the name where the file gives none."""
    try:
        proto = text_format.Parse(text, pb.ModelConfig())
    except (text_format.ParseError, ValueError, RecursionError) as error:
        raise ConfigError(f"model '{folder}': config.pbtxt does not parse: {told(error)}") from None
    return _complete_and_check(proto, folder, complete)


def parse_json(text: str | bytes, folder: str, complete: Complete = lambda _: None) -> ModelConfig:
    """As `parse`, for a configuration in JSON, as a client sends it with a load."""
    try:
        proto = _from_json(text)
    except (json_format.ParseError, ValueError, RecursionError) as error:
        raise ConfigError(f"model '{folder}': the configuration's JSON does not parse: {told(error)}") from None
    return _complete_and_check(proto, folder, complete)


def _from_json(text: str | bytes) -> Any:
    """The message. As in Triton a repeated field may be one value without its brackets."""
    if text.strip()[:1] not in ("{", b"{"):
        raise ValueError("expected an object")
    try:
        return json_format.Parse(text, pb.ModelConfig(), max_recursion_depth=20)
    except json_format.ParseError as error:
        value = json.loads(text, object_pairs_hook=_distinct)
        listed = _listed(value, pb.ModelConfig.DESCRIPTOR)
        if listed == value:
            raise error
        return json_format.ParseDict(listed, pb.ModelConfig(), max_recursion_depth=20)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(name for name in names if names.count(name) > 1)!r}")
    return made


def _listed(value: Any, message: Any) -> Any:
    """A message's JSON, each repeated field of it a list."""
    if not isinstance(value, dict):
        return value
    fields = {name: field for field in message.fields for name in (field.name, field.json_name)}
    return {key: _field_listed(part, fields[key]) if key in fields else part for key, part in value.items()}


def _field_listed(value: Any, field: Any) -> Any:
    kind = field.message_type
    if kind is None:
        return value if value is None or isinstance(value, list) or not field.is_repeated else [value]
    if kind.GetOptions().map_entry:
        inner = kind.fields_by_name["value"].message_type
        if inner is None or not isinstance(value, dict):
            return value
        for key, part in value.items():
            if not isinstance(part, dict):
                raise ValueError(
                    f"{field.name}: expected {inner.name} objects by name, got {part!r:.100} as {key!r:.100}"
                )
        return {key: _listed(part, inner) for key, part in value.items()}
    if not field.is_repeated:
        return _listed(value, kind)
    if value is None:
        return value
    return [_listed(part, kind) for part in (value if isinstance(value, list) else [value])]


def _complete_and_check(proto: Any, folder: str, complete: Complete) -> ModelConfig:
    if not proto.name:
        proto.name = folder
    complete(proto)
    record = backend_of(proto, folder)
    _check(proto, folder, record)
    built = _build(proto, record)
    _fill_defaults(proto, record)
    return built


def backend_of(proto: Any, model: str) -> BackendRecord | None:
    """The backend that a ModelConfig message names, by its platform maybe; None for an ensemble, and for none.

    Raises ConfigError for an installed one that is broken.
    """
    if proto.HasField("ensemble_scheduling"):
        return None
    if proto.backend:
        return backend_records.find(proto.backend, model)
    return backend_records.of_platform(proto.platform)


def _fill_defaults(proto: Any, record: BackendRecord | None) -> None:
    """Say what holds where nothing was said, as Triton shows it to clients and to python models."""
    if record is not None:
        proto.backend = record.name
        proto.platform = proto.platform or (record.platform if record.shows_platform else "")
        proto.default_model_filename = proto.default_model_filename or next(iter(record.filenames), "")
        if not proto.instance_group:
            proto.instance_group.add()
        for index, group in enumerate(proto.instance_group):
            group.name = group.name or (proto.name if len(proto.instance_group) == 1 else f"{proto.name}_{index}")
            group.count = group.count or 1
    if not proto.HasField("version_policy"):
        proto.version_policy.latest.num_versions = 1
    for memory in ("input_pinned_memory", "output_pinned_memory"):
        if record is not None and not proto.optimization.HasField(memory):
            getattr(proto.optimization, memory).enable = True
    if proto.HasField("ensemble_scheduling"):
        proto.model_transaction_policy.SetInParent()
    sequences = proto.sequence_batching
    if proto.HasField("sequence_batching") and not sequences.max_sequence_idle_microseconds:
        sequences.max_sequence_idle_microseconds = _DEFAULT_SEQUENCE_IDLE_US
    if proto.HasField("dynamic_batching") and not proto.dynamic_batching.preferred_batch_size:
        proto.dynamic_batching.preferred_batch_size.append(proto.max_batch_size)


def as_json(message: Any) -> dict[str, Any]:
    """A configuration as Triton's JSON: proto field names, enum names, numbers as numbers.

    What has a presence, as messages and alternatives of each other, is left out where it is not set.
    """
    shown: dict[str, Any] = {}
    for one in message.DESCRIPTOR.fields:
        value = getattr(message, one.name)
        if one.message_type is not None and one.message_type.GetOptions().map_entry:
            shown[one.name] = {key: as_json(v) if isinstance(v, Message) else v for key, v in value.items()}
        elif one.is_repeated:
            shown[one.name] = [_json_value(one, item) for item in value]
        elif not one.has_presence or message.HasField(one.name):
            shown[one.name] = _json_value(one, value)
    return shown


def _json_value(field: Any, value: Any) -> Any:
    if isinstance(value, Message):
        return as_json(value)
    return field.enum_type.values_by_number[value].name if field.enum_type is not None else value


def _fail(model: str, path: str, why: str) -> ConfigError:
    return ConfigError(f"model '{model}': {path}: {why}")


def _set_paths(message: Message, prefix: str = "") -> Iterator[str]:
    for one, value in message.ListFields():
        path = f"{prefix}{one.name}"
        is_map = one.message_type is not None and one.message_type.GetOptions().map_entry
        if one.message_type is None or is_map or f"{path}.*" in _HONOURED:
            yield path
            continue
        children = value if one.is_repeated else [value]
        for child in children:
            nested = list(_set_paths(child, f"{path}."))
            yield from nested or [path]


def _check(proto: Any, folder: str, record: BackendRecord | None) -> None:
    _check_enums(proto, folder)
    if proto.name != folder:
        raise _fail(folder, "name", f"expected the folder's name '{folder}', got '{proto.name}'")
    if proto.max_batch_size < 0:
        raise _fail(folder, "max_batch_size", f"expected 0 or more, got {proto.max_batch_size}")
    for path in _set_paths(proto):
        if path not in _HONOURED and f"{path}.*" not in _HONOURED and path not in _EMPTY_IS_FINE:
            raise _fail(folder, path, "this server does not support the field")
    if proto.HasField("ensemble_scheduling"):
        for name in ("instance_group", "model_warmup", "optimization"):  # as in Triton: none of it would be done
            if any(one.name == name for one, _ in proto.ListFields()):
                raise _fail(folder, name, "an ensemble has none of its own: the models of its steps have")
    for step in proto.ensemble_scheduling.step:
        if step.model_namespace:
            raise _fail(folder, "ensemble_scheduling.step.model_namespace", "this server does not support the field")
    for kind, specs in (("input", proto.input), ("output", proto.output)):
        may_be_none = kind == "input" and record is not None and not record.needs_inputs
        _check_tensors(folder, kind, specs, may_be_none)
    _check_batching(proto)


def _check_enums(message: Message, folder: str, prefix: str = "") -> None:
    """Protobuf takes any number for an enum: refuse those without a name."""
    for one, value in message.ListFields():
        path = f"{prefix}{one.name}"
        if one.message_type is not None:
            is_map = one.message_type.GetOptions().map_entry
            children = value.values() if is_map else value if one.is_repeated else [value]
            for child in children:
                if isinstance(child, Message):
                    _check_enums(child, folder, f"{path}.")
        elif one.enum_type is not None:
            for number in value if one.is_repeated else [value]:
                if number not in one.enum_type.values_by_number:
                    raise _fail(
                        folder, path, f"expected one of {', '.join(one.enum_type.values_by_name)}, got {number}"
                    )


def _check_tensors(folder: str, kind: str, specs: Any, may_be_none: bool = False) -> None:
    if not specs and not may_be_none:
        raise _fail(folder, kind, "expected at least one")
    names = [spec.name for spec in specs]
    for index, spec in enumerate(specs):
        path = f"{kind}[{index}]"
        if not spec.name:
            raise _fail(folder, f"{path}.name", "expected a name")
        if names.count(spec.name) > 1:
            raise _fail(folder, f"{path}.name", f"'{spec.name}' appears more than once")
        if _datatype(spec.data_type) not in dtypes.NUMPY:
            raise _fail(folder, f"{path}.data_type", "expected a data type")
        if len(spec.name) > _MAX_NAME:
            raise _fail(folder, f"{path}.name", f"expected at most {_MAX_NAME} characters")
        if any(dim < 1 and dim != -1 for dim in spec.dims):
            raise _fail(folder, f"{path}.dims", f"expected sizes of at least 1, or -1 for any, got {list(spec.dims)}")
        if spec.HasField("reshape"):
            _check_reshape(folder, path, spec)


def _check_reshape(folder: str, path: str, spec: Any) -> None:
    """Both shapes must hold the same elements: as many variable dimensions, and equal products between them."""
    if _known_parts(spec.dims) != _known_parts(spec.reshape.shape):
        why = f"{list(spec.reshape.shape)} does not hold the same elements as dims {list(spec.dims)}"
        raise _fail(folder, f"{path}.reshape.shape", why)


def _datatype(number: int) -> str:
    """The datatype of a DataType's number; "" for one that is none."""
    try:
        return dtypes.from_config(pb.DataType.Name(number))
    except ValueError:
        return ""


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
        raise _fail(proto.name, "dynamic_batching", "needs max_batch_size of at least 1")
    for size in proto.dynamic_batching.preferred_batch_size:
        if not 1 <= size <= proto.max_batch_size:
            expected = f"expected sizes from 1 to max_batch_size {proto.max_batch_size}"
            raise _fail(proto.name, "dynamic_batching.preferred_batch_size", f"{expected}, got {size}")
    policy = proto.dynamic_batching
    if policy.priority_levels and not 1 <= policy.default_priority_level <= policy.priority_levels:
        expected = f"expected a level from 1 to priority_levels {policy.priority_levels}"
        raise _fail(
            proto.name, "dynamic_batching.default_priority_level", f"{expected}, got {policy.default_priority_level}"
        )
    for level in policy.priority_queue_policy:
        if not 1 <= level <= policy.priority_levels:
            expected = f"expected levels from 1 to priority_levels {policy.priority_levels}"
            raise _fail(proto.name, "dynamic_batching.priority_queue_policy", f"{expected}, got {level}")


def _ragged(proto: Any, record: BackendRecord | None) -> Ragged:
    ragged = frozenset(spec.name for spec in proto.input if spec.allow_ragged_batch)
    inputs, outputs = {spec.name for spec in proto.input}, {spec.name for spec in proto.output}
    made, scattered = [], {}
    for index, one in enumerate(proto.batch_input):
        path = f"batch_input[{index}]"
        if len(one.source_input) != 1 or one.source_input[0] not in inputs:
            raise _fail(proto.name, f"{path}.source_input", f"expected one input, got {list(one.source_input)}")
        if not one.target_name:
            raise _fail(proto.name, f"{path}.target_name", "expected at least one")
        datatype = _datatype(one.data_type)
        if datatype not in ("INT32", "FP32"):
            raise _fail(proto.name, f"{path}.data_type", f"expected TYPE_INT32 or TYPE_FP32, got {datatype or 'none'}")
        kind = pb.BatchInput.Kind.Name(one.kind)
        made.append(BatchInput(kind, tuple(one.target_name), datatype, one.source_input[0]))
    for index, one in enumerate(proto.batch_output):
        path = f"batch_output[{index}]"
        if len(one.source_input) != 1 or one.source_input[0] not in inputs:
            raise _fail(proto.name, f"{path}.source_input", f"expected one input, got {list(one.source_input)}")
        for name in one.target_name:
            if name not in outputs:
                raise _fail(proto.name, f"{path}.target_name", f"the model has no output '{name}'")
            scattered[name] = one.source_input[0]
    found = Ragged(ragged, tuple(made), scattered)
    if found and not proto.max_batch_size:
        raise _fail(proto.name, "input.allow_ragged_batch", "needs max_batch_size of at least 1")
    joins = record is None or record.joins_rows
    if (made or scattered) and (not joins or proto.HasField("ensemble_scheduling")):
        raise _fail(proto.name, "batch_input", "only backends that join a batch have batch inputs and outputs")
    if found and proto.HasField("sequence_batching"):
        raise _fail(proto.name, "input.allow_ragged_batch", "is not supported with sequence_batching")
    return found


def _padding(proto: Any, parameters: Mapping[str, str], specs: Any) -> Padding:
    padding = parse_padding(proto.name, parameters, *specs)
    if padding.inputs and (proto.HasField("ensemble_scheduling") or proto.HasField("sequence_batching")):
        raise _fail(proto.name, "parameters.tutti.buckets", "neither an ensemble nor a model with sequences is padded")
    if padding.outputs and proto.model_transaction_policy.decoupled:
        raise _fail(proto.name, "parameters.tutti.unpad", "is not supported for a decoupled model")
    return padding


def _build(proto: Any, record: BackendRecord | None) -> ModelConfig:
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
    if proto.HasField("ensemble_scheduling") or (not proto.backend and proto.platform == _ENSEMBLE):
        return _ENSEMBLE
    name: str = proto.backend or (record.name if record is not None else "")
    if not name:
        raise _fail(proto.name, "backend", f"expected a backend, or a platform of {_PLATFORMS}")
    return name


def _spec(proto: Any) -> TensorSpec:
    datatype = _datatype(proto.data_type)
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
        raise _fail(proto.name, "response_cache.enable", "the answers of a decoupled model cannot be cached")
    if proto.response_cache.enable and proto.HasField("sequence_batching"):
        raise _fail(proto.name, "response_cache.enable", "an answer depends on its sequence, and cannot be cached")
    return bool(proto.response_cache.enable)


def _sequences(proto: Any) -> SequencePolicy | None:
    if not proto.HasField("sequence_batching"):
        return None
    batching = proto.sequence_batching
    if batching.state and proto.model_transaction_policy.decoupled:
        raise _fail(proto.name, "sequence_batching.state", "is not supported for a decoupled model")
    if proto.HasField("dynamic_batching") or proto.HasField("ensemble_scheduling"):
        raise _fail(proto.name, "sequence_batching", "a model has one of it, dynamic_batching and ensemble_scheduling")
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
        idle_ns=(batching.max_sequence_idle_microseconds or _DEFAULT_SEQUENCE_IDLE_US) * 1000,
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
        datatype = _datatype(proto.data_type)
        if datatype not in ("UINT64", "INT64", "UINT32", "INT32", "BYTES"):
            raise _fail(model, f"{path}.data_type", f"expected an integer type or TYPE_STRING, got {datatype}")
        return SequenceControl(name, kind, datatype)
    for datatype, values in (
        ("INT32", proto.int32_false_true), ("FP32", proto.fp32_false_true), ("BOOL", proto.bool_false_true),
    ):  # fmt: skip
        if values:
            if len(values) != 2:
                raise _fail(model, path, f"expected the values for false and true, got {list(values)}")
            return SequenceControl(name, kind, datatype, values[0], values[1])
    raise _fail(model, path, "expected one of int32_false_true, fp32_false_true, bool_false_true")


def _state(model: str, index: int, proto: Any) -> SequenceState:
    path = f"sequence_batching.state[{index}]"
    datatype = _datatype(proto.data_type)
    if datatype not in dtypes.NUMPY:
        raise _fail(model, f"{path}.data_type", "expected a data type")
    if len(proto.initial_state) > 1:
        raise _fail(model, f"{path}.initial_state", "expected at most one")
    initial = proto.initial_state[0] if proto.initial_state else None
    dims = tuple(proto.dims)
    # What varies starts empty of choice: at 1, as in Triton.
    first = tuple(initial.dims) if initial is not None else tuple(1 if dim == -1 else dim for dim in dims)
    if any(dim < 0 for dim in first):
        raise _fail(model, f"{path}.initial_state[0].dims", f"expected sizes, got {list(first)}")
    filename = initial.data_file if initial is not None else ""
    return SequenceState(proto.input_name, proto.output_name, datatype, dims, first, filename)


def _warmup(proto: Any, index: int) -> Warmup:
    warmup = proto.model_warmup[index]
    inputs = {}
    for name, item in warmup.inputs.items():
        path = f"model_warmup[{index}].inputs['{name}']"
        kind = item.WhichOneof("input_data_type")
        datatype = _datatype(item.data_type)
        if name not in {spec.name for spec in proto.input}:
            raise _fail(proto.name, path, f"expected one of {sorted(spec.name for spec in proto.input)}")
        if kind is None or datatype not in dtypes.NUMPY or any(dim < 0 for dim in item.dims):
            raise _fail(
                proto.name, path, "expected data_type, dims, and one of zero_data, random_data, input_data_file"
            )
        kinds: dict[str, Literal["zero", "random", "file"]] = {"zero_data": "zero", "random_data": "random"}
        inputs[name] = WarmupInput(datatype, tuple(item.dims), kinds.get(kind, "file"), item.input_data_file)
    if warmup.batch_size > max(1, proto.max_batch_size):
        expected = f"expected at most max_batch_size {proto.max_batch_size}"
        raise _fail(proto.name, f"model_warmup[{index}].batch_size", f"{expected}, got {warmup.batch_size}")
    return Warmup(warmup.name, max(1, warmup.batch_size), warmup.count or 1, MappingProxyType(inputs))


def _groups(proto: Any, record: BackendRecord | None) -> tuple[InstanceGroup, ...]:
    groups = tuple(_group(proto, index, record) for index in range(len(proto.instance_group)))
    return groups or (InstanceGroup(),)


def _group(proto: Any, index: int, record: BackendRecord | None) -> InstanceGroup:
    group = proto.instance_group[index]
    kind = pb.ModelInstanceGroup.Kind.Name(group.kind).removeprefix("KIND_").lower()
    is_models_choice = record is not None and record.chooses_devices
    if kind == "model" and (not is_models_choice or group.gpus):
        what = "names no GPUs" if is_models_choice else "is supported for python models only"
        raise _fail(proto.name, f"instance_group[{index}].kind", f"KIND_MODEL {what}")
    if group.count < 0:
        raise _fail(proto.name, f"instance_group[{index}].count", f"expected 1 or more, got {group.count}")
    limit = _rate_limit(proto.name, f"instance_group[{index}].rate_limiter", group.rate_limiter)
    return InstanceGroup(kind, group.count or 1, tuple(group.gpus), group.name, limit)


def _rate_limit(model: str, path: str, proto: Any) -> RateLimit:
    names = [resource.name for resource in proto.resources]
    for index, resource in enumerate(proto.resources):
        if not resource.name or names.count(resource.name) > 1:
            raise _fail(model, f"{path}.resources[{index}].name", f"expected names, each once, got {names}")
        if not resource.count:
            raise _fail(model, f"{path}.resources[{index}].count", "expected 1 or more, got 0")
    resources = tuple(Resource(one.name, one.count, getattr(one, "global")) for one in proto.resources)
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
