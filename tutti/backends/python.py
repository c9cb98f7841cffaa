"""Triton's python backend, in process: `model.py` with a TritonPythonModel, unchanged.

Each instance has its own TritonPythonModel. execute gets the batch as a list of requests, as in Triton: nothing is
joined, so each request may have tensors of its own shape.
"""

import contextlib
import importlib.util
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tutti import backends, config
from tutti.backends import triton_python_backend_utils as pb_utils
from tutti.config import ModelConfig
from tutti.errors import ConfigError, InferError, Internal
from tutti.repository import ModelFolder
from tutti.scheduler import Backend
from tutti.types import InferRequest, InferResponse, Tensor

_import_lock = threading.Lock()


def load(folder: ModelFolder, version: int) -> list[Backend]:
    """Import model.py once, and initialize one TritonPythonModel per instance."""
    path = backends.model_file(folder, version, "model.py")
    try:
        module = _import(path, f"tutti_model_{folder.config.name}_{version}")
        return [
            PythonBackend(folder, version, module.TritonPythonModel(), index)
            for index in range(backends.instance_count(folder.config))
        ]
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"model '{folder.config.name}': {path.name} failed to load: {reason}") from error


def _import(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _import_lock, _beside(path.parent):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[None]:
    """Let the file import what lies beside it, and Triton's module under its own name."""
    sys.modules.setdefault("triton_python_backend_utils", pb_utils)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


class PythonBackend:
    """One instance: a TritonPythonModel."""

    def __init__(self, folder: ModelFolder, version: int, model: Any, index: int) -> None:
        self._config: ModelConfig = folder.config
        self._version = str(version)
        self._model = model
        self._output_names = tuple(spec.name for spec in folder.config.outputs)
        if hasattr(model, "initialize"):
            model.initialize(self._arguments(folder, index))

    def _arguments(self, folder: ModelFolder, index: int) -> dict[str, str]:
        name = self._config.name
        return {
            "model_config": json.dumps(config.as_json(self._config.proto)),
            "model_instance_kind": "CPU",
            "model_instance_name": f"{name}_{index}",
            "model_instance_device_id": "0",
            "model_repository": str(folder.path),
            "model_version": self._version,
            "model_name": name,
        }

    def execute(self, requests: Sequence[InferRequest]) -> Sequence[InferResponse | Exception]:
        answers: list[InferResponse | Exception] = []
        passed = []
        for request in requests:
            try:
                for tensor in request.inputs.values():
                    tensor.array()
                passed.append(request)
                answers.append(_PENDING)
            except InferError as error:
                answers.append(type(error)(f"model '{self._config.name}': {error.message}"))
        executed = iter(self._execute(passed) if passed else ())
        return [next(executed) if answer is _PENDING else answer for answer in answers]

    def close(self) -> None:
        if hasattr(self._model, "finalize"):
            self._model.finalize()

    def _execute(self, requests: list[InferRequest]) -> list[InferResponse | Exception]:
        try:
            responses = self._model.execute([pb_utils.InferenceRequest(r, self._output_names) for r in requests])
        except Exception as error:
            raise Internal(f"model '{self._config.name}': execute raised {type(error).__name__}: {error}") from error
        if not isinstance(responses, list) or len(responses) != len(requests):
            got = f"{len(responses)} responses" if isinstance(responses, list) else f"a {type(responses).__name__}"
            raise Internal(f"model '{self._config.name}': execute: expected {len(requests)} responses, got {got}")
        return [self._answer(request, response) for request, response in zip(requests, responses, strict=True)]

    def _answer(self, request: InferRequest, response: Any) -> InferResponse | Exception:
        if not isinstance(response, pb_utils.InferenceResponse):
            return Internal(f"model '{self._config.name}': execute returned a {type(response).__name__}, no response")
        error = response.error()
        if error is not None:
            return error.as_infer_error()
        try:
            outputs = {tensor.name: tensor for tensor in pb_utils.to_outputs(response)}
            chosen = [self._checked(outputs, name) for name in request.outputs or self._output_names]
        except InferError as bad_output:
            return Internal(bad_output.message)
        parameters = json.loads(response.parameters())
        if not all(isinstance(value, bool | int | float | str) for value in parameters.values()):
            return Internal(f"model '{self._config.name}': response parameters: expected numbers, text and booleans")
        return InferResponse(self._config.name, self._version, chosen, parameters)

    def _checked(self, outputs: dict[str, Tensor], name: str) -> Tensor:
        spec = next(spec for spec in self._config.outputs if spec.name == name)
        tensor = outputs.get(name)
        if tensor is None:
            raise Internal(f"model '{self._config.name}': its response lacks output '{name}'")
        if tensor.datatype != spec.datatype and (tensor.datatype, spec.datatype) != ("UINT16", "BF16"):
            raise Internal(
                f"model '{self._config.name}': output '{name}': expected {spec.datatype}, "
                f"model.py made {tensor.datatype}"
            )
        tensor.datatype = spec.datatype
        return tensor


_PENDING: Any = object()
