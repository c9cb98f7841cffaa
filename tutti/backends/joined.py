"""What backends share that execute a batch as one: inputs are joined, executed once, and outputs split again."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from tutti.backends import device_options
from tutti.core import rows
from tutti.core.dtypes import NUMPY, Array
from tutti.core.errors import ConfigError, DeviceLost, InferError, Internal, InvalidArgument, OutOfMemory
from tutti.core.types import RAW_TYPES, Call, InferRequest, InferResponse, Shape, Tensor, now_ns
from tutti.devices.engine import DeviceEngine
from tutti.devices.pipeline import Pipeline
from tutti.devices.process_engines import engine_of
from tutti.repository import ragged
from tutti.repository.model_config import ModelConfig
from tutti.scheduling.cost import Alternatives
from tutti.scheduling.interface import Answers

_log = logging.getLogger(__name__)

_MAX_ASKED = 256
# Rows of a trial, which no count of things in nothing is likely to be, and the size of variable dimensions in it.
_TRIAL_ROWS = 3
_TRIAL_SIZE = 8
_ON_HOST = (*RAW_TYPES, np.ndarray)
Item = TypeVar("Item")
Run = Callable[[Sequence[str], Mapping[str, Array]], Sequence[Array]]
"""The outputs named, for joined inputs."""


class JoinedModel:
    """A model whose requests of a batch are joined: what it makes for them, and each request's share of that."""

    library = ""

    def __init__(self, config: ModelConfig, version: str) -> None:
        self.config = config
        self._version = version
        self._datatypes = {spec.name: spec.datatype for spec in config.outputs}
        for state in config.sequences.states if config.sequences is not None else ():
            self._datatypes[state.output_name] = state.datatype
        self._all = tuple(self._datatypes)
        self._dims = {spec.name: spec.model_dims for spec in config.outputs}
        for state in config.sequences.states if config.sequences is not None else ():
            self._dims.setdefault(state.output_name, state.dims)
        # Of each output, the last shape without the batch's axis that was found to fit.
        self._fitting: dict[str, Shape] = {}
        # The outputs to make, by those asked for.
        self._names: dict[tuple[str, ...], list[str]] = {}

    def wanted(self, requests: Sequence[InferRequest]) -> tuple[list[str], bool]:
        """The outputs that some request asks for, in the model's order; and whether all ask for the same."""
        first = requests[0]
        is_alike = len(requests) == 1 or all(request.outputs == first.outputs for request in requests)
        names = self._names.get(first.outputs) if is_alike else None
        if names is None:
            asked = {name for request in requests for name in request.outputs or self._all}
            names = [name for name in self._datatypes if name in asked]
            if is_alike and len(self._names) < _MAX_ASKED:
                self._names[first.outputs] = names
        return names, is_alike

    def datatype(self, name: str) -> str:
        """The configured datatype of an output."""
        return self._datatypes[name]

    def response(self, outputs: list[Tensor]) -> InferResponse:
        """An answer of this model."""
        return InferResponse(self.config.name, self._version, outputs)

    def check_outputs(self, requests: Sequence[InferRequest], outputs: Sequence[Tensor]) -> None:
        """Raises Internal for outputs that have not a row for each of the batch, or not their configured sizes.

        Rows that belong to nobody, or to whom cannot be told, must not reach anybody.
        """
        is_batched = self.config.is_batched and bool(requests[0].inputs)
        wanted: Shape = ()
        if is_batched:
            first = next(iter(requests[0].inputs))
            wanted = (sum([request.inputs[first].shape[0] for request in requests]),)
        for tensor in outputs:
            shape = tensor.shape
            body = shape[1:] if is_batched else shape
            if shape[: len(wanted)] != wanted or body != self._fitting.get(tensor.name):
                self._check_output(tensor, wanted)
                self._fitting[tensor.name] = body

    def _check_output(self, tensor: Tensor, rows_wanted: Shape) -> None:
        if tensor.name in self.config.ragged.scattered:
            return
        dims = self._dims[tensor.name]
        shape, body = list(tensor.shape), tensor.shape[len(rows_wanted) :]
        if tensor.shape[: len(rows_wanted)] != rows_wanted:
            expected = f"expected {rows_wanted[0]} rows, as many as the batch, got shape {shape}"
            hint = "max_batch_size: 0 serves a model whose first axis is another one"
            raise Internal(f"output '{tensor.name}': {expected}: {hint}")
        if len(body) != len(dims) or any(dim not in (-1, size) for dim, size in zip(dims, body, strict=True)):
            raise Internal(f"output '{tensor.name}': configured with dims {list(dims)}, the model made {shape}")

    def answers(
        self, requests: Sequence[InferRequest], outputs: list[Tensor], is_alike: bool
    ) -> Sequence[InferResponse]:
        """Each request's share of the joined outputs."""
        if self.config.ragged and self.config.ragged.scattered:
            return self._scattered(requests, outputs)
        return rows.answers(self.config.name, self._version, requests, outputs, is_alike)

    def _scattered(self, requests: Sequence[InferRequest], outputs: Sequence[Tensor]) -> list[InferResponse]:
        """Outputs whose parts have an input's shape, and others, which have a row for each of the batch."""
        sizes = [next(iter(request.inputs.values())).shape[0] for request in requests]
        columns = [
            self.config.ragged.parts(self.config.name, output, requests)
            if output.name in self.config.ragged.scattered
            else rows.split(output, sizes)
            for output in outputs
        ]
        return [
            InferResponse(
                self.config.name,
                self._version,
                [part for part in parts if not request.outputs or part.name in request.outputs],
            )
            for request, parts in zip(requests, zip(*columns, strict=True), strict=True)
        ]

    def _output(self, name: str, array: Array) -> Tensor:
        datatype = self._datatypes[name]
        if array.dtype != NUMPY[datatype]:
            array = array.astype(NUMPY[datatype])
        return Tensor(name, datatype, array.shape, array)

    def refusals(self, requests: Sequence[InferRequest]) -> list[InferError | None]:
        """Why each request, looked at by itself, must not be executed; None where nothing is known against it."""
        return [self._refusal(request) for request in requests]

    def _refusal(self, request: InferRequest) -> InferError | None:
        limits = self.config.bounds
        try:
            limits.check_all(
                {
                    name: rows.values(tensor)
                    for name, tensor in request.inputs.items()
                    if name in limits.ranges or isinstance(tensor.data, _ON_HOST)
                }
            )
        except InferError as error:
            return type(error)(f"model '{self.config.name}': {error.message}")
        return None

    def failure(self, request: InferRequest, error: Exception) -> InferError:
        name = self.config.name
        for tensor in request.inputs.values():
            if 0 in tensor.shape:  # what most graphs fail on, in words that do not say so
                shape = list(tensor.shape)
                return InvalidArgument(
                    f"model '{name}': input '{tensor.name}' is empty: expected elements, got {shape}"
                )
        shapes = ", ".join(f"'{t.name}' {t.datatype}{list(t.shape)}" for t in request.inputs.values())
        return Internal(f"model '{name}': {self.library} failed on input {shapes}: {error}")


class JoinedBackend(JoinedModel):
    """One instance on `device`, "cpu" or as "cuda:0". What is derived from it implements `run`.

    On the processor, execute may run in its callers' threads; elsewhere models take turns.
    """

    def __init__(self, config: ModelConfig, version: str, device: str = "cpu") -> None:
        super().__init__(config, version)
        self.kind = device.partition(":")[0]
        self.runs_inline = self.kind == "cpu"
        self.device = device
        self._engine: DeviceEngine | None = None
        self._pipeline: Pipeline | None = None
        if self.kind != "cpu":
            share, hang_ns = device_options.weight(config), device_options.hang_ns(config)
            self._engine = engine_of(device)
            self._pipeline = self._engine.pipeline(config.name, share, hang_ns=hang_ns)
        # Whether requests are executed together. False where their rows could not be told apart afterwards.
        self.joins = True
        self._scratch = rows.Scratch()
        self._ways: dict[int, Alternatives] = {}

    def run(self, names: Sequence[str], feed: Mapping[str, Array]) -> Sequence[Array]:
        """The outputs `names` for joined inputs. Raises OutOfMemory, or anything else for a batch that fails."""
        raise NotImplementedError

    def close(self) -> None:
        """Release what it has of a device."""
        if self._pipeline is not None:
            self._pipeline.close()

    def execute(self, calls: Sequence[Call]) -> Answers:
        """One run for all. Where that fails, only culprits fail: see `apart`.

        Large inputs, which would have to be copied to be joined, run one by one where that has proved to be quicker.
        """
        requests = [call.request for call in calls]
        if not self.joins:
            return [answer for request in requests for answer in self._execute([request])]
        if len(requests) == 1 or not self.runs_inline or not rows.is_large(requests):
            return self._execute(requests)
        known = self._ways.setdefault(len(requests), Alternatives())
        way = known.choose()
        start_ns = now_ns()
        answers = self._execute(requests) if way == 0 else [self._execute([request])[0] for request in requests]
        known.record(way, now_ns() - start_ns, len(requests))
        return answers

    def _execute(self, requests: Sequence[InferRequest]) -> Answers:
        try:
            return self._run(requests)
        except (OutOfMemory, DeviceLost):
            raise  # smaller batches may fit; or none do any more
        except InferError as error:
            refusals = self.refusals(requests) if isinstance(error, InvalidArgument) else [None] * len(requests)
            return apart(requests, refusals, error, self._execute)

    def _run(self, requests: Sequence[InferRequest]) -> Sequence[InferResponse]:
        first = requests[0]
        names, is_alike = self.wanted(requests)
        is_ragged = bool(self.config.ragged)
        if len(requests) == 1 and not is_ragged:
            feed = {name: tensor.array() for name, tensor in first.inputs.items()}
        else:
            feed = {name: self._joined(requests, name) for name in first.inputs}
        if is_ragged:
            feed |= self.config.ragged.made(requests)
        try:
            self.config.bounds.check_all(feed)  # before a device is asked for anything
            if self._engine is None or self._pipeline is None:
                arrays = self.run(names, feed)
            else:
                with self._engine.turn(self._pipeline):
                    arrays = self.run(names, feed)
        except DeviceLost:
            raise
        except InferError as error:
            raise type(error)(f"model '{self.config.name}': {error.message}") from None
        except Exception as error:
            raise self._meant(first, error) from None
        try:
            outputs = [self._output(name, array) for name, array in zip(names, arrays, strict=True)]
            self.check_outputs(requests, outputs)
        except InferError as error:
            raise type(error)(f"model '{self.config.name}': {error.message}") from None
        except Exception as error:  # other arrays than asked for, or none
            raise self.failure(first, error) from None
        return self.answers(requests, outputs, is_alike)

    def _meant(self, request: InferRequest, error: Exception) -> InferError:
        """What the library's error is to the caller; the device may be lost with it."""
        if self._engine is not None:
            if self._engine.device.is_memory_error(error):
                return OutOfMemory(f"{self.library} has no memory left on {self.device}: {error}")
            reason = self._engine.report(error)
            if reason:
                return DeviceLost(f"model '{self.config.name}': device {self.device} has failed: {reason}")
        return self.failure(request, error)

    def _joined(self, requests: Sequence[InferRequest], name: str) -> Array:
        if name in self.config.ragged.inputs:
            return ragged.flattened(requests, name)
        return rows.join(requests, name, self._scratch)


def apart(
    items: Sequence[Item],
    refusals: Sequence[InferError | None],
    error: InferError,
    execute: Callable[[Sequence[Item]], Answers],
) -> Answers:
    """Answers where all together have failed with `error`: what is refused fails, all others are executed as one.

    Where nothing is refused each is executed alone, so that only the culprit fails.
    """
    left = [item for item, refusal in zip(items, refusals, strict=True) if refusal is None]
    if len(left) == len(items):
        return [error] if len(items) == 1 else [answer for item in items for answer in execute([item])]
    answers = iter(execute(left) if left else ())
    return [next(answers) if refusal is None else refusal for refusal in refusals]


def may_join(config: ModelConfig) -> bool:
    """Whether several requests may be executed as one whose rows are told apart afterwards."""
    is_queued = config.batching is not None or config.sequences is not None
    return config.max_batch_size > 1 and is_queued and not config.ragged


def makes_rows(config: ModelConfig, run: Run) -> bool | None:
    """Whether a model makes a row of each output for each row of a batch, as a trial of zeros shows.

    A detector's rows, say, are as many as there are things in the pictures. None where the trial fails.
    """
    count = min(_TRIAL_ROWS, config.max_batch_size)
    names = [spec.name for spec in config.outputs]
    try:
        outputs = run(names, trial_inputs(config, count))
    except Exception:
        _log.debug("model '%s': the trial of its rows failed", config.name, exc_info=True)
        return None
    return all(array.shape[:1] == (count,) for array in outputs)


def trial_inputs(config: ModelConfig, count: int) -> dict[str, Array]:
    """`count` rows of zeros, or of what the model takes that is nearest to them; empty for text."""
    feed: dict[str, Array] = {}
    for spec in config.inputs:
        padded, limit = config.padding.inputs.get(spec.name), config.bounds.ranges.get(spec.name)
        size = padded.buckets[0] if padded is not None else _TRIAL_SIZE
        shape = (count, *(dim if dim > 0 else size for dim in spec.model_dims))
        fill: bytes | int = b"" if spec.datatype == "BYTES" else max(0, limit.low) if limit is not None else 0
        feed[spec.name] = np.full(shape, fill, NUMPY[spec.datatype])
    if config.sequences is not None:
        for control in config.sequences.controls:
            fill = b"" if control.datatype == "BYTES" else 0
            feed[control.name] = np.full((count, 1), fill, NUMPY[control.datatype])
        for state in config.sequences.states:
            fill = b"" if state.datatype == "BYTES" else 0
            feed[state.input_name] = np.full((count, *state.initial_dims), fill, NUMPY[state.datatype])
    return feed


def whole_number(config: ModelConfig, key: str) -> int:
    """A parameter of the configuration, 0 where it is not given. Raises ConfigError."""
    text = config.parameters.get(key, "0")
    if not text.isdecimal():
        raise ConfigError(f"model '{config.name}': parameters.{key}: expected a whole number, got '{text}'")
    return int(text)
