"""The answers of models, and what the server takes from them: outputs, parameters, arrays that are nobody else's."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tutti.backends.python.pb_utils.errors import TritonError
from tutti.backends.python.pb_utils.tensors import Tensor, checked_tensors
from tutti.backends.python.pb_utils.values import checked_parameters
from tutti.core.dtypes import Array
from tutti.core.types import Call


class InferenceResponse:
    """The answer to one request: its outputs, or an error."""

    __slots__ = ("_error", "_outputs", "_parameters")

    def __init__(
        self,
        output_tensors: Sequence[Tensor] = (),
        error: TritonError | str | None = None,
        parameters: str | Mapping[str, Any] | None = None,
    ) -> None:
        self._outputs = checked_tensors(output_tensors)
        self._error = TritonError(error) if isinstance(error, str) else error
        self._parameters: dict[str, Any] = {}
        if parameters:
            self._parameters = checked_parameters(parameters)

    def output_tensors(self) -> list[Tensor]:
        return self._outputs

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def parameters(self) -> str:
        return json.dumps(self._parameters)


def outputs_of(response: InferenceResponse) -> dict[str, Tensor]:
    """A response's outputs by name."""
    return {tensor._name: tensor for tensor in response._outputs}


def parameters_of(response: InferenceResponse) -> dict[str, Any]:
    """A copy of a response's parameters."""
    return dict(response._parameters)


_MAX_JOINED = 64 * 1024


def join(
    responses: Sequence[Any], names: Sequence[str], wanted: Sequence[np.dtype[Any]], rows: Sequence[int]
) -> list[Array] | None:
    """Each output of all responses, joined; None where they are not alike, or too large to copy."""
    columns: list[list[Array]] = [[] for _ in names]
    for response, size in zip(responses, rows, strict=True):
        if not isinstance(response, InferenceResponse) or response._error is not None or response._parameters:
            return None
        if len(response._outputs) != len(names):
            return None
        for index, tensor in enumerate(response._outputs):
            array = tensor._data
            if type(array) is not np.ndarray or tensor._datatype or tensor._name != names[index]:
                return None
            if array.dtype != wanted[index] or array.shape[:1] != (size,):
                return None
            columns[index].append(array)
    if any(
        wide.dtype == object or sum([a.nbytes for a in column]) > _MAX_JOINED
        for column in columns
        for wide in column[:1]
    ):
        return None
    try:
        return [np.concatenate(column) for column in columns]
    except ValueError:  # other axes differ
        return None


# The tensor's, and getrefcount's argument.
_REFERENCES_OF_ITS_OWN = 2


def detach(responses: Iterable[Any], calls: Sequence[Call]) -> None:
    """Give responses copies of those arrays that the model could write to again.

    An array that its tensor alone refers to, and that is no view of another, is the tensor's own. What is on a device
    is copied to the host, unless the call takes it there; raises what the device says.
    """
    for response, call in zip(responses, calls, strict=False):  # of how many there must be, another tells
        if isinstance(response, InferenceResponse):
            for tensor in response._outputs:
                if type(tensor._data) is not np.ndarray:
                    if not call.request.outputs or tensor._name in call.request.outputs:
                        tensor._settle(tensor._name in call.request.device_outputs)
                elif tensor._data.base is not None or sys.getrefcount(tensor._data) > _REFERENCES_OF_ITS_OWN:
                    tensor._data = tensor._data.copy()
