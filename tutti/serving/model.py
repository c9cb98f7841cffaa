"""One served model version: checks each request against the configuration, then passes it to what executes it.

What executes is any `Infer`: a scheduler over local instances, an ensemble's executor, or a pool of replicas.
"""

import logging
import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tutti.core.errors import InferError, InvalidArgument, Unavailable, Unsupported
from tutti.core.types import Call, Infer, InferRequest, Shape, Tensor, now_ns, settle, settle_all
from tutti.observing import explanations
from tutti.observing.explanations import OWN, Explained, Facts
from tutti.observing.statistics import ModelStatistics
from tutti.repository.model_config import ModelConfig, TensorSpec
from tutti.scheduling.interface import HANG_S

_log = logging.getLogger(__name__)

_MAX_SIGNATURES = 4096
# A year: more is no deadline.
_MAX_TIMEOUT_US = 365 * 86400 * 1_000_000


@dataclass(frozen=True, slots=True)
class Served:
    """What executes a model's checked calls, and how to tell its state and end it. `close` drains first.

    `pending` counts the requests that wait; `reason` says why it is not ready. `config` is the model's configuration
    where what executes it knows more than its folder. `device`, as "cuda:0", is where it takes inputs from, and leaves
    outputs, where its callers do.
    """

    infer: Infer
    close: Callable[[], None]
    is_ready: Callable[[], bool] = lambda: True
    pending: Callable[[], int] = lambda: 0
    reason: Callable[[], str] = lambda: ""
    config: ModelConfig | None = None
    device: str = "cpu"
    # How many instances are where, for people: "2 on cpu".
    instances: str = ""
    # Of each instance, its name and for how many seconds it has executed a batch: 0 where it does not.
    executing: Callable[[], Sequence[tuple[str, float, bool]]] = lambda: ()
    # Of requests' parameters of ours, beside tutti_explain, those that are heeded.
    takes: Collection[str] = ()


class Model:
    """An `Infer` for one model version."""

    def __init__(
        self,
        config: ModelConfig,
        version: int,
        labels: Mapping[str, tuple[str, ...]],
        served: Served,
        statistics: ModelStatistics,
        load_s: float = 0.0,
    ) -> None:
        self.config = config = served.config or config
        self.version = version
        self.labels = labels
        self.statistics = statistics
        self.device = served.device
        self.instances = served.instances
        self.load_s = load_s
        self._served = served
        # Where the queue policy lets requests have timeouts, the `timeout` parameter is for the queue alone.
        policy = config.batching
        self._timeout_is_deadline = policy is None or not policy.has_timeout_override
        self._checked: dict[Hashable, tuple[int, Hashable]] = {}
        self._output_names = frozenset(spec.name for spec in config.outputs)
        self._lock = threading.Lock()
        self._gate = threading.Condition(self._lock)
        self._entering = 0
        self._is_closed = False

    @property
    def takes(self) -> Collection[str]:
        """Of requests' parameters of ours, beside tutti_explain, those that are heeded."""
        return self._served.takes

    def __call__(self, calls: Sequence[Call]) -> None:
        if not self.take(calls):
            settle_all(calls, Unavailable(f"model '{self.config.name}' is being unloaded"))

    def take(self, calls: Sequence[Call]) -> bool:
        """As calling it, but returns False, the calls untouched, when this version has been closed."""
        with self._lock:
            if self._is_closed:
                return False
            self._entering += 1
        try:
            self._submit(calls)
        finally:
            with self._lock:
                self._entering -= 1
                if self._is_closed:
                    self._gate.notify_all()
        return True

    def _submit(self, calls: Sequence[Call]) -> None:
        failed: list[Call] = []
        passed: list[Call] = []
        now = now_ns()
        for call in calls:
            call.arrived_ns = now
            parameters = call.request.parameters
            if parameters and self._timeout_is_deadline:
                set_deadline(call, parameters.get("timeout"), now)
            try:
                for name in parameters:
                    if name.startswith(OWN):  # few have one: no more is spent on the others
                        self._heed(call)
                        break
                call.rows, call.key = self._check(call.request)
                if self.config.is_decoupled and call.emit is None:
                    raise Unsupported(
                        f"model '{self.config.name}': a call for one answer doesn't support models with decoupled "
                        "transaction policy, use ModelStreamInfer, generate or generate_stream, or in a python model "
                        "'decoupled=True' with exec and async_exec"
                    )
                passed.append(call)
            except InferError as error:
                call.answer = error
                failed.append(call)
        if failed:
            self.statistics.record_failures(failed, now)
            settle(failed)
        if passed:
            self._served.infer(passed)

    def _heed(self, call: Call) -> None:
        """Do what parameters of ours ask for. Raises InvalidArgument for those that do not fit."""
        if not explanations.is_asked(self.config.name, call.request.parameters, self._served.takes):
            return
        if not isinstance(call.trace, Facts):  # else it is a step of what is explained
            Explained(call, self.version, self.config.is_ensemble)
        assert call.trace is not None
        executing = self._served.executing()
        if executing:
            call.trace.note("waiting_requests", self.pending())
            call.trace.note("busy_instances", sum(seconds > 0 for _, seconds, _ in executing))
            call.trace.note("instances", len(executing))

    def is_ready(self) -> bool:
        return self._served.is_ready()

    def reason(self) -> str:
        """Why the model is not ready; "" when it is."""
        return self._served.reason()

    def executing(self, only_stuck: bool = False) -> list[str]:
        """Which instances execute a batch, and for how long; `only_stuck`: for longer than they may."""
        return [
            f"instance '{name}' has been executing a batch for {seconds:.0f} s"
            for name, seconds, is_stuck in self._served.executing()
            if (is_stuck if only_stuck else seconds > 0)
        ]

    def stuck(self) -> int:
        """How many instances have executed one batch for longer than they may."""
        return len(self.executing(only_stuck=True))

    def is_stuck(self) -> bool:
        """Whether all of them have."""
        instances = self._served.executing()
        return bool(instances) and all(is_stuck for _, _, is_stuck in instances)

    def pending(self) -> int:
        """Requests that wait in its queue."""
        return self._served.pending()

    def close(self) -> None:
        """Take no more calls, let those inside end, and release what executes them. Blocks."""
        with self._gate:
            self._is_closed = True
            self._gate.wait_for(lambda: not self._entering, HANG_S)
        self._served.close()

    def _check(self, request: InferRequest) -> tuple[int, Hashable]:
        """(rows, batch key) of a request. Requests of one signature are checked once."""
        signature = request.signature
        if signature is None:
            tensors = request.inputs.values()
            signature = tuple([(t.name, t.datatype, t.shape) for t in tensors]) + request.outputs
        known = self._checked.get(signature)
        if known is None:
            known = check_request(self.config, self._output_names, request)
            if len(self._checked) >= _MAX_SIGNATURES:
                self._checked.clear()
            self._checked[signature] = known
        return known


def set_deadline(call: Call, timeout_us: object, at_ns: int) -> None:
    """Let the call's deadline be `timeout_us` after `at_ns`, unless it is none or the call has an earlier one."""
    if type(timeout_us) is int and 0 < timeout_us < _MAX_TIMEOUT_US:
        deadline_ns = at_ns + timeout_us * 1000
        call.deadline_ns = min(call.deadline_ns or deadline_ns, deadline_ns)


def check_request(config: ModelConfig, output_names: frozenset[str], request: InferRequest) -> tuple[int, Hashable]:
    """Check tensors and requested outputs against the configuration.

    Returns the request's rows and its batch key: names, and shapes without the batch axis, once padded; those of ragged
    inputs do not count. Raises InvalidArgument naming the model, the tensor, what was expected and what came.
    """
    specs = {spec.name: spec for spec in config.inputs}
    tensors = request.inputs
    _check_names(config, specs, tensors)
    for name, tensor in tensors.items():
        _check_tensor(config, specs[name], tensor)
    for name in request.outputs:
        if name not in output_names:
            outputs = [spec.name for spec in config.outputs]
            raise InvalidArgument(
                f"unexpected inference output '{name}' for model '{config.name}'; expected {_names(outputs)}"
            )
    key_of, ragged = config.padding.key_of, config.ragged.inputs
    return _rows(config, tensors), tuple(
        (name, () if name in ragged else key_of(name, tensors[name].shape[config.is_batched :]))
        for name in sorted(tensors)
    )


# Errors here begin in Triton's words, which programs written for it look for.


def _check_names(config: ModelConfig, specs: Mapping[str, TensorSpec], tensors: Mapping[str, Tensor]) -> None:
    required = [spec.name for spec in config.inputs if not spec.is_optional]
    missing = [name for name in required if name not in tensors]
    least, most = len(required), len(specs)
    if not least <= len(tensors) <= most or missing:
        wanted = f"{most} inputs" if least == most else f"number of inputs between {least} and {most}"
        lacking = f", but missing required input(s) {_listed(missing)}. Please provide all required input(s)"
        raise InvalidArgument(
            f"expected {wanted} but got {len(tensors)} inputs for model '{config.name}'. "
            f"Got input(s) {_listed(tensors)}"
            f"{lacking if missing else ''}. Its inputs are {_names(specs)}"
        )
    for name in tensors:
        if name not in specs:
            raise InvalidArgument(
                f"unexpected inference input '{name}' for model '{config.name}'; expected {_names(specs)}"
            )


def _listed(names: Iterable[str]) -> str:
    return f"[{','.join([repr(name) for name in names])}]"


def _names(names: Sequence[str] | Mapping[str, object]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"


def _check_tensor(config: ModelConfig, spec: TensorSpec, tensor: Tensor) -> None:
    if tensor.datatype != spec.datatype:
        raise InvalidArgument(
            f"inference input '{spec.name}' data-type is '{tensor.datatype}', but model '{config.name}' expects "
            f"'{spec.datatype}'"
        )
    body: Shape = tensor.shape[1:] if config.is_batched else tensor.shape
    if (config.is_batched and not tensor.shape) or not spec.accepts(body):
        note = ", with the batch dimension, which max_batch_size adds, in front" if config.is_batched else ""
        raise InvalidArgument(
            f"unexpected shape for input '{spec.name}' for model '{config.name}'. Expected "
            f"{_shape(config.wire_shape(spec))}, got {_shape(tensor.shape)}{note}"
        )
    excess = config.max_dims.excess(spec.name, body)
    if excess is not None:
        axis, most = excess
        raise InvalidArgument(
            f"model '{config.name}': input '{spec.name}': expected at most {most} in dimension "
            f"{axis + config.is_batched} of its shape, got {body[axis]}: {list(tensor.shape)}"
        )


def _shape(shape: Shape) -> str:
    return f"[{','.join(map(str, shape))}]"


def _rows(config: ModelConfig, inputs: Mapping[str, Tensor]) -> int:
    if not config.is_batched:
        return 1
    sizes = {name: tensor.shape[0] for name, tensor in inputs.items()}
    rows = next(iter(sizes.values()), 1)
    if any(size != rows for size in sizes.values()):
        other = next(name for name, size in sizes.items() if size != rows)
        raise InvalidArgument(f"input '{other}' batch size does not match other inputs for '{config.name}': {sizes}")
    if not 1 <= rows <= config.max_batch_size:
        limit = f"must be <= {config.max_batch_size} for '{config.name}'"
        advice = ": send it in several requests, or raise max_batch_size in config.pbtxt" if rows else ""
        raise InvalidArgument(f"inference request batch-size {limit}, and at least 1, got {rows}{advice}")
    return rows


def end(model: Model) -> None:
    """Close it, whatever that raises, and say that it is gone."""
    try:
        model.close()
    except Exception:
        _log.exception("model '%s' version %d could not be ended", model.config.name, model.version)
    _log.info("unloaded model '%s' version %d", model.config.name, model.version)
