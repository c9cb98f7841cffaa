"""Backends, one file each: a `load` that makes a model's instances. Each imports its library only when used."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from tutti.backends import parameters
from tutti.core import extras, rows
from tutti.core.errors import ConfigError, InferError
from tutti.core.types import Call, Infer, InferRequest, InferResponse, Tensor
from tutti.devices.nvml import gpu_count
from tutti.repository import backend_records, folders
from tutti.repository.backend_records import BackendRecord
from tutti.repository.config import InstanceGroup, ModelConfig
from tutti.repository.folders import ModelFolder
from tutti.scheduling.scheduler import Answers, Backend, Executed, undone

if TYPE_CHECKING:
    from tutti.backends.on_device import DeviceWork


class BackendModule(Protocol):
    def load(self, folder: ModelFolder, version: int, infer: Infer) -> list[Backend]:
        """One backend per configured instance. Raises ConfigError with the reason."""


def load(folder: ModelFolder, version: int, infer: Infer) -> list[Backend]:
    """The instances of one model version; `infer` answers what they ask of other models.

    Raises ConfigError when its backend is missing or refuses it.
    """
    config = folder.config
    record = backend_records.find(config.backend, config.name)
    if record is None:
        choice = backend_records.choice(config.backend)
        raise ConfigError(f"model '{config.name}': backend: '{config.backend}' is not one of {choice}")
    _check_contents(folder, version, record)
    module = _module(config, record)
    parameters.check(config, record.parameters)
    loaded = module.load(folder, version, infer)
    with undone(loaded):
        if any(spec.reshape is not None for spec in (*config.inputs, *config.outputs)):
            loaded = [_around(Reshaped(config, backend), backend) for backend in loaded]
        if config.padding.inputs:
            loaded = [_around(Padded(config, backend), backend) for backend in loaded]
    return loaded


def _module(config: ModelConfig, record: BackendRecord) -> BackendModule:
    """Raises ConfigError where it is not to be imported."""
    try:
        return cast(BackendModule, importlib.import_module(record.module))
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        advice = f": {_install(record, record.extras[library])}" if library in record.extras else ""
        raise ConfigError(f"model '{config.name}': backend: '{record.name}' needs '{error.name}'{advice}") from None
    except Exception as error:
        if record.name in backend_records.BUILT_IN:
            raise
        what = f"module '{record.module}' of {backend_records.distribution(record.name)} cannot be imported"
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"model '{config.name}': backend: '{record.name}': {what}: {reason}") from error


def _install(record: BackendRecord, extra: str) -> str:
    distribution = backend_records.distribution(record.name)
    return f"pip install '{distribution}[{extra}]'" if distribution else extras.install(extra)


def _check_contents(folder: ModelFolder, version: int, record: BackendRecord) -> None:
    """Raises ConfigError for a model's file that is missing, or is none: its library would be slow to say less."""
    config = folder.config
    usual = (config.model_filename,) if config.model_filename else record.filenames
    names = [*usual, *filter(None, (config.cpu_filename, config.gpu_filename))]
    paths = {name: folders.file_of(folder.version_path(version) / name) for name in names}
    there = {name: path for name, path in paths.items() if path.is_file()}
    if not there and usual:
        version_file(folder, version, usual[0])
    for name, path in there.items():
        if what := record.mistaken(path):
            raise ConfigError(f"model '{config.name}': {version}/{name} {what}")


def _around(wrapper: "_Wrapped", backend: Backend) -> Backend:
    return _WrappedOnDevice(wrapper, backend) if hasattr(backend, "pipeline") else wrapper


class _Wrapped:
    """A backend around another, which sees requests, and makes answers, of another form."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.runs_inline = backend.runs_inline
        self.kind = backend.kind
        self.device = getattr(backend, "device", "cpu")
        self.joins = getattr(backend, "joins", True)
        self.hang_s = getattr(backend, "hang_s", None)

    def close(self) -> None:
        self._backend.close()

    def give_up(self) -> None:
        give_up = getattr(self._backend, "give_up", None)
        if give_up is not None:
            give_up()

    def execute(self, calls: Sequence[Call]) -> Executed:
        given = [call.request for call in calls]
        requests, outwards = self.inwards(given)
        for call, request in zip(calls, requests, strict=True):
            call.request = request
        try:
            executed = self._backend.execute(calls)
        finally:  # a batch that fails is executed again, in parts
            for call, request in zip(calls, given, strict=True):
                call.request = request
        return (lambda: outwards(executed())) if callable(executed) else outwards(executed)

    def inwards(self, requests: Sequence[InferRequest]) -> tuple[list[InferRequest], Callable[[Answers], Answers]]:
        """The requests as the backend is to see them, and what makes its answers theirs."""
        raise NotImplementedError


class _WrappedOnDevice(_Wrapped):
    """The same around a backend whose batches go through a device's engine."""

    def __init__(self, wrapper: _Wrapped, backend: Any) -> None:
        super().__init__(backend)
        self.engine = backend.engine
        self.pipeline = backend.pipeline
        self._pipelined = backend
        self._wrapper = wrapper

    def inwards(self, requests: Sequence[InferRequest]) -> tuple[list[InferRequest], Callable[[Answers], Answers]]:
        return self._wrapper.inwards(requests)

    def batch(self, requests: Sequence[InferRequest]) -> "DeviceWork":
        inside, outwards = self.inwards(requests)
        return _WrappedWork(self._pipelined.batch(inside), outwards)

    def refusals(self, requests: Sequence[InferRequest]) -> Sequence[InferError | None]:
        refusals: Sequence[InferError | None] = self._pipelined.refusals(self.inwards(requests)[0])
        return refusals


class _WrappedWork:
    """A batch of a wrapped backend: only its answers are others."""

    def __init__(self, work: "DeviceWork", outwards: Callable[[Answers], Answers]) -> None:
        self.parts = work.parts
        self.launch = work.launch
        self.stays = work.stays
        self.failure = work.failure
        self._work = work
        self._outwards = outwards

    def answers(self, outputs: Sequence[Any]) -> Answers:
        return self._outwards(self._work.answers(outputs))


class Padded(_Wrapped):
    """A backend whose model takes inputs of a few lengths only, and its clients send any."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__(backend)
        self._padding = config.padding
        self._is_batched = config.is_batched

    def inwards(self, requests: Sequence[InferRequest]) -> tuple[list[InferRequest], Callable[[Answers], Answers]]:
        padded = [replace(request, inputs=self._own(request.inputs)) for request in requests]
        lengths = self._padding.pad(padded, self._is_batched)
        return padded, lambda answers: self._cut(answers, lengths)

    def _own(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs, of which those to be padded may be changed: the request is executed again if its batch fails."""
        return {
            name: Tensor(name, tensor.datatype, tensor.shape, tensor.data) if name in self._padding.inputs else tensor
            for name, tensor in inputs.items()
        }

    def _cut(self, answers: Answers, lengths: Sequence[Mapping[str, int]]) -> Answers:
        if self._padding.outputs:
            for answer, own in zip(answers, lengths, strict=True):
                if isinstance(answer, InferResponse):
                    answer.outputs = self._padding.cut(answer.outputs, own, self._is_batched)
        return answers


class Reshaped(_Wrapped):
    """A backend whose model has other shapes than its clients see: the `reshape` of inputs and outputs."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        if config.is_decoupled:
            raise ConfigError(f"model '{config.name}': reshape: is not supported for a decoupled model")
        super().__init__(backend)
        self._is_batched = config.is_batched
        self._inputs = {spec.name: spec for spec in config.inputs if spec.reshape is not None}
        self._outputs = {spec.name: spec for spec in config.outputs if spec.reshape is not None}

    def inwards(self, requests: Sequence[InferRequest]) -> tuple[list[InferRequest], Callable[[Answers], Answers]]:
        reshaped = [replace(request, inputs=self._as_in_model(request.inputs)) for request in requests]
        return reshaped, self._all_as_configured

    def _as_in_model(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: rows.reshape(tensor, self._inputs[name].dims, self._inputs[name].model_dims, self._is_batched)
            if name in self._inputs
            else tensor
            for name, tensor in inputs.items()
        }

    def _all_as_configured(self, answers: Answers) -> Answers:
        for answer in answers:
            if isinstance(answer, InferResponse):
                answer.outputs = [self._as_configured(tensor) for tensor in answer.outputs]
        return answers

    def _as_configured(self, tensor: Tensor) -> Tensor:
        spec = self._outputs.get(tensor.name)
        if spec is None or len(tensor.shape) != len(spec.model_dims) + self._is_batched:
            return tensor
        return rows.reshape(tensor, spec.model_dims, spec.dims, self._is_batched)


def instances(
    config: ModelConfig, can_use_gpus: bool = True, gpus: int | None = None
) -> list[tuple[InstanceGroup, int]]:
    """Each instance's group and device: as in Triton, `count` on each GPU listed, on every GPU where none is.

    Where there are GPUs that the backend can use, KIND_AUTO comes back as "gpu". `gpus` is how many there are, by
    default those that this process sees; without any the backend decides what to make of the kind. Raises ConfigError
    for a GPU that does not exist.
    """
    there_are = gpu_count() if gpus is None else gpus
    placed: list[tuple[InstanceGroup, int]] = []
    for index, group in enumerate(config.instance_groups):
        numbers: Sequence[int] = group.gpus or (0,)
        if group.kind in ("cpu", "model"):
            numbers = (0,)
        elif can_use_gpus and there_are:
            _check_gpus(config.name, index, group, there_are)
            numbers = group.gpus or range(there_are)
            group = replace(group, kind="gpu")
        placed += [(group, number) for number in numbers for _ in range(group.count)]
    return placed


def _check_gpus(model: str, index: int, group: InstanceGroup, there_are: int) -> None:
    for number in group.gpus:
        if not 0 <= number < there_are:
            expected = f"expected numbers below {there_are}, as many GPUs as this process sees"
            raise ConfigError(f"model '{model}': instance_group[{index}].gpus: {expected}, got {number}")


def model_file(folder: ModelFolder, version: int, default: str) -> Path:
    """The version's model file. Raises ConfigError if it is not there."""
    return version_file(folder, version, folder.config.model_filename or default)


def version_file(folder: ModelFolder, version: int, name: str) -> Path:
    """A file in the version's folder. Raises ConfigError if it is not there."""
    given = folders.file_of(folder.version_path(version) / name)
    try:
        path = given.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself
        path = given
    if not path.is_relative_to(folder.path.resolve()) or not path.is_file():
        raise ConfigError(f"model '{folder.config.name}': version {version} has no file '{name}'{_instead(given)}")
    return path


def _instead(path: Path) -> str:
    """What is there in the place of a file, or beside it."""
    if path.is_symlink():
        return f": it is a link to '{path.readlink()}', and no file of its folder"
    if path.exists():
        return ", but a folder" if path.is_dir() else ", but what is no regular file"
    there = sorted(entry.name for entry in path.parent.iterdir())[:5] if path.parent.is_dir() else []
    return f"; there are {', '.join(map(repr, there))}" if there else ""
