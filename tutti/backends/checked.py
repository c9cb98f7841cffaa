"""Around another distribution's backend: what it answers is what is configured, or an error that says what is wrong.

Our own backends check what they make where they know it best. Answers that a backend settles itself are not seen here.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from tutti.backends.wrapped import Wrapped
from tutti.core.dtypes import NUMPY
from tutti.core.errors import Internal
from tutti.core.types import InferRequest, InferResponse, Shape, Tensor
from tutti.repository.model_config import ModelConfig
from tutti.scheduling.interface import Answers, Backend


class Checked(Wrapped):
    """One instance, its answers checked: how many they are, and their outputs' names, datatypes and shapes."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__(backend)
        self._is_batched = config.is_batched
        self._subject = f"model '{config.name}': backend '{config.backend}'"
        # Name -> datatype, and dims without the batch's axis.
        self._outputs: dict[str, tuple[str, Shape]] = {
            spec.name: (spec.datatype, spec.model_dims) for spec in config.outputs
        }
        for state in config.sequences.states if config.sequences is not None else ():
            self._outputs.setdefault(state.output_name, (state.datatype, state.dims))

    def inwards(self, requests: Sequence[InferRequest]) -> tuple[list[InferRequest], Callable[[Answers], Answers]]:
        return list(requests), partial(self._all_checked, requests)

    def _all_checked(self, requests: Sequence[InferRequest], answers: Answers) -> Answers:
        """Raises Internal where it cannot be told whose the answers are."""
        if len(answers) != len(requests):
            raise Internal(f"{self._subject}: expected {len(requests)} answers of a batch, got {len(answers)}")
        return [
            answer if answer is None or isinstance(answer, Exception) else self._checked(request, answer)
            for request, answer in zip(requests, answers, strict=True)
        ]

    def _checked(self, request: InferRequest, answer: InferResponse) -> InferResponse | Internal:
        wanted = set(request.outputs or self._outputs)
        names = [tensor.name for tensor in answer.outputs]
        if not answer.is_null and (set(names) != wanted or len(names) != len(wanted)):
            return Internal(f"{self._subject}: expected the outputs {sorted(wanted)}, got {sorted(names)}")
        inputs = request.inputs.values()
        rows = (next(iter(inputs)).shape[0],) if self._is_batched and inputs else ()
        fault = next(filter(None, (self._fault(tensor, rows) for tensor in answer.outputs)), "")
        return Internal(f"{self._subject}: {fault}") if fault else answer

    def _fault(self, tensor: Tensor, rows: Shape) -> str:
        """What is wrong with an output; "" where nothing is."""
        datatype, dims = self._outputs[tensor.name]
        is_array = isinstance(tensor.data, np.ndarray)
        if tensor.datatype != datatype or (is_array and tensor.array().dtype != NUMPY[datatype]):
            answered = f"{tensor.datatype} ({tensor.array().dtype})" if is_array else tensor.datatype
            return f"output '{tensor.name}': expected {datatype}, got {answered}"
        expected = (*rows, *dims)
        is_fitting = len(expected) == len(tensor.shape) and all(
            dim in (-1, size) for dim, size in zip(expected, tensor.shape, strict=True)
        )
        if not is_fitting or (is_array and tensor.array().shape != tensor.shape):
            holds = tensor.array().shape if is_array else tensor.shape
            held = f" that holds {list(holds)}" if holds != tensor.shape else ""
            return f"output '{tensor.name}': expected the shape {list(expected)}, got {list(tensor.shape)}{held}"
        return ""
