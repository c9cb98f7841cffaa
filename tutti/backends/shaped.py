"""Models that take and make other shapes than their clients see: padded to a few lengths, or reshaped."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from tutti.backends.wrapped import Wrapped
from tutti.core import rows
from tutti.core.errors import ConfigError
from tutti.core.types import InferRequest, InferResponse, Tensor
from tutti.repository.model_config import ModelConfig
from tutti.scheduling.interface import Answers, Backend


class Padded(Wrapped):
    """A backend whose model takes inputs of a few lengths only, and its clients send any."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__(backend)
        self._padding = config.padding
        self._is_batched = config.is_batched

    def inwards(self, requests: Sequence[InferRequest]) -> tuple[list[InferRequest], Callable[[Answers], Answers]]:
        padded = [replace(request, inputs=self._writable(request.inputs)) for request in requests]
        lengths = self._padding.pad(padded, self._is_batched)
        return padded, lambda answers: self._cut(answers, lengths)

    def _writable(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs, of which those to be padded may be changed: the request is executed again if its batch fails."""
        return {
            name: Tensor(name, tensor.datatype, tensor.shape, tensor.data) if name in self._padding.inputs else tensor
            for name, tensor in inputs.items()
        }

    def _cut(self, answers: Answers, lengths: Sequence[Mapping[str, int]]) -> Answers:
        if self._padding.outputs:
            for answer, sizes in zip(answers, lengths, strict=True):
                if isinstance(answer, InferResponse):
                    answer.outputs = self._padding.cut(answer.outputs, sizes, self._is_batched)
        return answers


class Reshaped(Wrapped):
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
