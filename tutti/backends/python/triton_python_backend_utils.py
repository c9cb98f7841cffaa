"""What a model.py written for Triton's python backend imports as `triton_python_backend_utils`.

Names, arguments and results are those of Triton's module, so such a file runs unchanged. All is made in pb_utils/.
"""

from typing import Any

from tutti.backends.python.pb_utils.completion import ModelConfig
from tutti.backends.python.pb_utils.constants import (
    TRITONSERVER_MEMORY_CPU,
    TRITONSERVER_MEMORY_GPU,
    TRITONSERVER_REQUEST_FLAG_SEQUENCE_END,
    TRITONSERVER_REQUEST_FLAG_SEQUENCE_START,
    TRITONSERVER_REQUEST_RELEASE_ALL,
    TRITONSERVER_REQUEST_RELEASE_RESCHEDULE,
    TRITONSERVER_RESPONSE_COMPLETE_FINAL,
)
from tutti.backends.python.pb_utils.control import is_model_ready, load_model, unload_model
from tutti.backends.python.pb_utils.datatypes import (
    TRITON_STRING_TO_NUMPY,
    deserialize_bytes_tensor,
    numpy_to_triton_type,
    serialize_byte_tensor,
    triton_string_to_numpy,
    triton_to_numpy_type,
)
from tutti.backends.python.pb_utils.errors import TritonError, TritonModelException
from tutti.backends.python.pb_utils.folders import get_model_dir
from tutti.backends.python.pb_utils.logger import Logger
from tutti.backends.python.pb_utils.memory import PreferredMemory
from tutti.backends.python.pb_utils.metrics import Metric, MetricFamily
from tutti.backends.python.pb_utils.requests import InferenceRequest, InferenceTrace
from tutti.backends.python.pb_utils.responses import InferenceResponse
from tutti.backends.python.pb_utils.senders import InferenceResponseSender
from tutti.backends.python.pb_utils.tensors import Tensor
from tutti.backends.python.pb_utils.values import text_of as _text_of

__all__ = [
    "TRITONSERVER_MEMORY_CPU", "TRITONSERVER_MEMORY_GPU", "TRITONSERVER_REQUEST_FLAG_SEQUENCE_END",
    "TRITONSERVER_REQUEST_FLAG_SEQUENCE_START", "TRITONSERVER_REQUEST_RELEASE_ALL",
    "TRITONSERVER_REQUEST_RELEASE_RESCHEDULE", "TRITONSERVER_RESPONSE_COMPLETE_FINAL", "TRITON_STRING_TO_NUMPY",
    "InferenceRequest", "InferenceResponse", "InferenceResponseSender", "InferenceTrace", "Logger", "Metric",
    "MetricFamily", "ModelConfig", "PreferredMemory", "Tensor", "TritonError", "TritonModelException",
    "deserialize_bytes_tensor", "get_input_config_by_name", "get_input_tensor_by_name", "get_model_dir",
    "get_output_config_by_name", "get_output_tensor_by_name", "is_model_ready", "load_model", "numpy_to_triton_type",
    "serialize_byte_tensor", "triton_string_to_numpy", "triton_to_numpy_type", "unload_model",
    "using_decoupled_model_transaction_policy",
]  # fmt: skip


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return request._input(_text_of(name))


def get_output_tensor_by_name(response: InferenceResponse, name: str) -> Tensor | None:
    text = _text_of(name)
    return next((tensor for tensor in response.output_tensors() if tensor.name() == text), None)


def get_input_config_by_name(model_config: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((spec for spec in model_config.get("input", []) if spec["name"] == name), None)


def get_output_config_by_name(model_config: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((spec for spec in model_config.get("output", []) if spec["name"] == name), None)


def using_decoupled_model_transaction_policy(model_config: dict[str, Any]) -> bool:
    return bool(model_config.get("model_transaction_policy", {}).get("decoupled", False))
