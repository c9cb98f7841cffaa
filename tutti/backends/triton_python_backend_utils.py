"""What a model.py written for Triton's python backend imports as `triton_python_backend_utils`.

Names, arguments and results are those of Triton's module, so such a file runs unchanged.
"""

import json
import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from tritonclient.grpc import model_config_pb2 as pb

from tutti import dtypes, errors
from tutti.dtypes import Array
from tutti.types import InferRequest
from tutti.types import Tensor as _Tensor


class TritonModelException(Exception):
    """Raise from initialize to refuse the load, or from execute to fail the whole batch."""


class TritonError:
    """An error of one response. `code` is one of the class's constants."""

    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)
    _CLASSES: ClassVar[dict[int, type[errors.InferError]]] = {
        NOT_FOUND: errors.NotFound,
        INVALID_ARG: errors.InvalidArgument,
        UNAVAILABLE: errors.Unavailable,
        UNSUPPORTED: errors.Unsupported,
        CANCELLED: errors.Cancelled,
    }

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message = message
        self._code = code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code

    def as_infer_error(self) -> errors.InferError:
        return self._CLASSES.get(self._code, errors.Internal)(self._message)


class Tensor:
    """A named tensor over a numpy array."""

    def __init__(self, name: str, array: Array) -> None:
        self._name = name
        self._array = np.asarray(array)

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Array:
        """BYTES tensors are object arrays of bytes."""
        return self._array

    def triton_dtype(self) -> int:
        return numpy_to_triton_type(self._array.dtype.type)

    def is_cpu(self) -> bool:
        return True


class InferenceRequest:
    """One request of the batch, as execute sees it."""

    def __init__(self, request: InferRequest, output_names: Sequence[str]) -> None:
        self._request = request
        self._output_names = output_names

    def inputs(self) -> list[Tensor]:
        return [Tensor(tensor.name, tensor.array()) for tensor in self._request.inputs.values()]

    def request_id(self) -> str:
        return self._request.id

    def correlation_id(self) -> int | str:
        value = self._request.parameters.get("sequence_id", 0)
        return value if isinstance(value, int | str) else 0

    def model_name(self) -> str:
        return self._request.model_name

    def model_version(self) -> int:
        return int(self._request.model_version or -1)

    def parameters(self) -> str:
        """The request's parameters as a JSON object."""
        return json.dumps(self._request.parameters)

    def requested_output_names(self) -> list[str]:
        return list(self._request.outputs or self._output_names)

    def is_cancelled(self) -> bool:
        return False


class InferenceResponse:
    """The answer to one request: its outputs, or an error."""

    def __init__(
        self,
        output_tensors: Sequence[Tensor] = (),
        error: TritonError | None = None,
        parameters: str | dict[str, Any] | None = None,
    ) -> None:
        self._outputs = list(output_tensors)
        self._error = TritonError(error) if isinstance(error, str) else error
        self._parameters: dict[str, Any] = (
            json.loads(parameters) if isinstance(parameters, str) else dict(parameters or {})
        )

    def output_tensors(self) -> list[Tensor]:
        return self._outputs

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def parameters(self) -> str:
        return json.dumps(self._parameters)


class Logger:
    """Triton's model logger, on Python's logging."""

    _log = logging.getLogger("tutti.backends.python.model")

    @classmethod
    def log(cls, message: str, level: int = 1) -> None:
        cls._log.log({0: logging.DEBUG, 1: logging.INFO, 2: logging.WARNING, 3: logging.ERROR}[level], "%s", message)

    @classmethod
    def log_info(cls, message: str) -> None:
        cls._log.info("%s", message)

    @classmethod
    def log_warn(cls, message: str) -> None:
        cls._log.warning("%s", message)

    @classmethod
    def log_error(cls, message: str) -> None:
        cls._log.error("%s", message)

    @classmethod
    def log_verbose(cls, message: str) -> None:
        cls._log.debug("%s", message)


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    tensor = request._request.inputs.get(name)
    return None if tensor is None else Tensor(name, tensor.array())


def get_output_tensor_by_name(response: InferenceResponse, name: str) -> Tensor | None:
    return next((tensor for tensor in response.output_tensors() if tensor.name() == name), None)


def get_input_config_by_name(model_config: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((spec for spec in model_config.get("input", []) if spec["name"] == name), None)


def get_output_config_by_name(model_config: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((spec for spec in model_config.get("output", []) if spec["name"] == name), None)


def using_decoupled_model_transaction_policy(model_config: dict[str, Any]) -> bool:
    return bool(model_config.get("model_transaction_policy", {}).get("decoupled", False))


def triton_to_numpy_type(data_type: int) -> Any:
    """DataType's number -> numpy type."""
    return triton_string_to_numpy(pb.DataType.Name(data_type))


def numpy_to_triton_type(numpy_type: Any) -> int:
    """Numpy type -> DataType's number."""
    name = dtypes.to_config(dtypes.from_numpy(np.dtype(numpy_type)))
    return int(pb.DataType.Value(name))


def triton_string_to_numpy(type_name: str) -> Any:
    """`TYPE_FP32` -> numpy.float32; `TYPE_STRING` -> numpy.object_."""
    return dtypes.NUMPY[dtypes.from_config(type_name)].type


def to_outputs(response: InferenceResponse) -> list[_Tensor]:
    """A response's tensors in the server's own form."""
    return [_Tensor.of(tensor.name(), _text_as_bytes(tensor.as_numpy())) for tensor in response.output_tensors()]


def _text_as_bytes(array: Array) -> Array:
    return array.astype(object) if array.dtype.kind in "SU" else array
