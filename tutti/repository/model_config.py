"""A model's configuration as data, checked: what config.pbtxt says, in the field's own terms. Knows no file.

Field meanings follow Triton's model_config.proto.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from tritonclient.grpc import model_config_pb2 as pb

from tutti.core.errors import ConfigError
from tutti.core.types import Shape
from tutti.repository.backend_records import GpuUse
from tutti.repository.length_limits import ANY_SIZE, MaxDims
from tutti.repository.padding import NO_PADDING, Padding
from tutti.repository.policies import NO_LIMIT, BatchingPolicy, RateLimit
from tutti.repository.ragged import NOT_RAGGED, Ragged
from tutti.repository.value_bounds import UNBOUNDED, Bounds

# The platform, and the backend, of an ensemble.
ENSEMBLE = "ensemble"


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
        return self.backend == ENSEMBLE

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
        times: dict[int, int] = {}
        for part in text.split(",") if text else ():
            rows, _, ms = part.partition(":")
            try:
                times[int(rows)] = int(float(ms) * 1e6)
            except (ValueError, OverflowError):
                times[-1] = 0
        if any(rows < 1 or ns < 1 for rows, ns in times.items()):
            expected = f"expected ROWS:MILLISECONDS and more of them, got '{text[:80]}'"
            raise ConfigError(f"model '{self.name}': parameters.{name}: {expected}")
        return times

    def wire_shape(self, spec: TensorSpec) -> Shape:
        """`dims` with the batch axis in front, as metadata shows it."""
        return (-1, *spec.dims) if self.is_batched else spec.dims


def as_decoupled(config: ModelConfig) -> ModelConfig:
    """The configuration of a model whose requests may have any number of answers, as an ensemble's of such steps."""
    proto = pb.ModelConfig()
    proto.CopyFrom(config.proto)
    proto.model_transaction_policy.decoupled = True
    return replace(config, is_decoupled=True, proto=proto)
