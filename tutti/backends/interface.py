"""What the author of a backend imports. Nothing else of tutti is promised to stay where it is.

A backend is a module with `load`, and a BackendRecord that is an entry point of the group `tutti.backends`. `load`
returns a Backend for each instance: a JoinedBackend where requests are executed as one, or what has its own `execute`.
"""

from tutti.backends.joined import JoinedBackend
from tutti.backends.model_files import model_file, version_file
from tutti.backends.placement import instances
from tutti.core.dtypes import Array
from tutti.core.errors import ConfigError, InferError, Internal, InvalidArgument, OutOfMemory
from tutti.core.types import Call, Infer, InferRequest, InferResponse, Tensor
from tutti.repository.backend_records import BackendRecord, lacks_tensors
from tutti.repository.folders import ModelFolder
from tutti.repository.model_config import ModelConfig, TensorSpec
from tutti.scheduling.interface import Answers, Backend, Executed, undone

__all__ = [
    "Answers", "Array", "Backend", "BackendRecord", "Call", "ConfigError", "Executed", "Infer", "InferError",
    "InferRequest", "InferResponse", "Internal", "InvalidArgument", "JoinedBackend", "ModelConfig", "ModelFolder",
    "OutOfMemory", "Tensor", "TensorSpec", "instances", "lacks_tensors", "model_file", "undone", "version_file",
]  # fmt: skip
