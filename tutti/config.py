"""config.pbtxt -> frozen dataclasses. Parsing and checking only: touches no backend and no other model.

Every field that is set is either honoured or refused here with its path, so that nothing is silently ignored.
Field meanings follow Triton's model_config.proto.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from google.protobuf import text_format
from google.protobuf.message import Message
from tritonclient.grpc import model_config_pb2 as pb

from tutti import dtypes
from tutti.batching import BatchingPolicy
from tutti.errors import ConfigError
from tutti.types import Shape

DEFAULT_MAX_QUEUED_ROWS = 16_384
_PLATFORM_BACKENDS = {
    "onnxruntime_onnx": "onnxruntime",
    "tensorrt_plan": "tensorrt",
    "pytorch_libtorch": "pytorch",
    "ensemble": "ensemble",
}
# Dotted paths of the fields this server acts on. Whole subtrees end in ".*".
_HONOURED = frozenset(
    {
        "name", "platform", "backend", "max_batch_size", "default_model_filename",
        "input.name", "input.data_type", "input.dims", "input.optional", "input.format",
        "output.name", "output.data_type", "output.dims", "output.label_filename",
        "version_policy.latest.num_versions", "version_policy.all", "version_policy.specific.versions",
        "dynamic_batching.preferred_batch_size", "dynamic_batching.max_queue_delay_microseconds",
        "dynamic_batching.default_queue_policy.max_queue_size",
        "instance_group.name", "instance_group.kind", "instance_group.count", "instance_group.gpus",
        "ensemble_scheduling.*", "parameters.*",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output as configured. `dims` exclude the batch axis; -1 is any size, zero included."""

    name: str
    datatype: str
    dims: Shape
    is_optional: bool = False
    label_filename: str = ""

    def accepts(self, shape: Shape) -> bool:
        """Whether `shape`, without its batch axis, fits `dims`."""
        return len(shape) == len(self.dims) and all(d in (-1, n) for d, n in zip(self.dims, shape, strict=True))


@dataclass(frozen=True, slots=True)
class InstanceGroup:
    """`count` instances on `kind` ("auto", "cpu" or "gpu"), per listed GPU where there are any."""

    kind: str = "auto"
    count: int = 1
    gpus: tuple[int, ...] = ()


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

    @property
    def is_ensemble(self) -> bool:
        return self.backend == "ensemble"

    @property
    def is_batched(self) -> bool:
        """Whether tensors carry a leading batch axis."""
        return self.max_batch_size > 0

    def wire_shape(self, spec: TensorSpec) -> Shape:
        """`dims` with the batch axis in front, as metadata shows it."""
        return (-1, *spec.dims) if self.is_batched else spec.dims


Complete = Callable[[Any], None]
"""Fills in what a ModelConfig message leaves out, where it can be told from the model's files."""


def load(path: Path, complete: Complete = lambda _: None) -> ModelConfig:
    """Read `<model folder>/config.pbtxt`; a missing file is an empty one. Raises ConfigError naming model and field."""
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except OSError as error:
        raise ConfigError(f"model '{path.parent.name}': cannot read {path.name}: {error.strerror}") from None
    return parse(text, path.parent.name, complete)


def parse(text: str, folder: str, complete: Complete = lambda _: None) -> ModelConfig:
    """Parse, complete and check one config.pbtxt; `folder` gives the name where the file gives none."""
    try:
        proto = text_format.Parse(text, pb.ModelConfig())
    except text_format.ParseError as error:
        raise ConfigError(f"model '{folder}': config.pbtxt does not parse: {error}") from None
    if not proto.name:
        proto.name = folder
    complete(proto)
    _check(proto, folder)
    return _build(proto)


def as_json(message: Any) -> dict[str, Any]:
    """A configuration as Triton's JSON: proto field names, enum names, numbers as numbers, unset messages left out."""
    shown: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            shown[field.name] = {key: as_json(v) if isinstance(v, Message) else v for key, v in value.items()}
        elif field.is_repeated:
            shown[field.name] = [_json_value(field, item) for item in value]
        elif field.message_type is None or message.HasField(field.name):
            shown[field.name] = _json_value(field, value)
    return shown


def _json_value(field: Any, value: Any) -> Any:
    if isinstance(value, Message):
        return as_json(value)
    return field.enum_type.values_by_number[value].name if field.enum_type is not None else value


def _fail(model: str, path: str, why: str) -> ConfigError:
    return ConfigError(f"model '{model}': {path}: {why}")


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


def _check(proto: Any, folder: str) -> None:
    if proto.name != folder:
        raise _fail(folder, "name", f"expected the folder's name '{folder}', got '{proto.name}'")
    if proto.max_batch_size < 0:
        raise _fail(folder, "max_batch_size", f"expected 0 or more, got {proto.max_batch_size}")
    # Set, but to what it is anyway.
    empty_is_fine = {
        "dynamic_batching", "dynamic_batching.default_queue_policy", "version_policy.latest", "response_cache",
        "model_transaction_policy", "optimization",
    }  # fmt: skip
    for path in _set_paths(proto):
        if path not in _HONOURED and f"{path}.*" not in _HONOURED and path not in empty_is_fine:
            raise _fail(folder, path, "this server does not support the field")
    for kind, specs in (("input", proto.input), ("output", proto.output)):
        _check_tensors(folder, kind, specs)
    _check_batching(proto)


def _check_tensors(folder: str, kind: str, specs: Any) -> None:
    if not specs:
        raise _fail(folder, kind, "expected at least one")
    names = [spec.name for spec in specs]
    for index, spec in enumerate(specs):
        path = f"{kind}[{index}]"
        if not spec.name:
            raise _fail(folder, f"{path}.name", "expected a name")
        if names.count(spec.name) > 1:
            raise _fail(folder, f"{path}.name", f"'{spec.name}' appears more than once")
        if dtypes.from_config(pb.DataType.Name(spec.data_type)) not in dtypes.NUMPY:
            raise _fail(folder, f"{path}.data_type", "expected a data type")
        if any(dim < 1 and dim != -1 for dim in spec.dims):
            raise _fail(folder, f"{path}.dims", f"expected sizes of at least 1, or -1 for any, got {list(spec.dims)}")


def _check_batching(proto: Any) -> None:
    if not proto.HasField("dynamic_batching"):
        return
    if proto.max_batch_size == 0:
        raise _fail(proto.name, "dynamic_batching", "needs max_batch_size of at least 1")
    for size in proto.dynamic_batching.preferred_batch_size:
        if not 1 <= size <= proto.max_batch_size:
            expected = f"expected sizes from 1 to max_batch_size {proto.max_batch_size}"
            raise _fail(proto.name, "dynamic_batching.preferred_batch_size", f"{expected}, got {size}")


def _build(proto: Any) -> ModelConfig:
    backend = "ensemble" if proto.HasField("ensemble_scheduling") else proto.backend
    backend = backend or _PLATFORM_BACKENDS.get(proto.platform, "")
    if not backend:
        raise _fail(proto.name, "backend", f"expected a backend, or a platform of {sorted(_PLATFORM_BACKENDS)}")
    policy = proto.dynamic_batching
    is_dynamic = proto.HasField("dynamic_batching")
    return ModelConfig(
        name=proto.name,
        platform=proto.platform or {v: k for k, v in _PLATFORM_BACKENDS.items()}.get(backend, backend),
        backend=backend,
        max_batch_size=proto.max_batch_size,
        inputs=tuple(_spec(spec) for spec in proto.input),
        outputs=tuple(_spec(spec) for spec in proto.output),
        batching=_batching(proto) if is_dynamic else None,
        max_queued_rows=policy.default_queue_policy.max_queue_size or DEFAULT_MAX_QUEUED_ROWS,
        instance_groups=tuple(_group(proto, index) for index in range(len(proto.instance_group))) or (InstanceGroup(),),
        version_policy=_version_policy(proto),
        parameters=MappingProxyType({key: value.string_value for key, value in proto.parameters.items()}),
        steps=_steps(proto),
        model_filename=proto.default_model_filename,
        proto=proto,
    )


def _spec(proto: Any) -> TensorSpec:
    datatype = dtypes.from_config(pb.DataType.Name(proto.data_type))
    return TensorSpec(
        proto.name,
        datatype,
        tuple(proto.dims),
        is_optional=getattr(proto, "optional", False),
        label_filename=getattr(proto, "label_filename", ""),
    )


def _batching(proto: Any) -> BatchingPolicy:
    return BatchingPolicy(
        max_batch_size=proto.max_batch_size,
        preferred_batch_sizes=tuple(sorted(proto.dynamic_batching.preferred_batch_size)),
        max_queue_delay_ns=proto.dynamic_batching.max_queue_delay_microseconds * 1000,
    )


def _group(proto: Any, index: int) -> InstanceGroup:
    group = proto.instance_group[index]
    kind = pb.ModelInstanceGroup.Kind.Name(group.kind).removeprefix("KIND_").lower()
    if kind == "model":
        raise _fail(proto.name, f"instance_group[{index}].kind", "KIND_MODEL is not supported")
    if group.count < 0:
        raise _fail(proto.name, f"instance_group[{index}].count", f"expected 1 or more, got {group.count}")
    return InstanceGroup(kind, group.count or 1, tuple(group.gpus))


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
