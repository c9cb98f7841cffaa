"""Triton's python backend, in process: `model.py` with a TritonPythonModel, unchanged.

Each instance has its own TritonPythonModel. execute gets the batch as a list of requests, as in Triton: nothing is
joined, so each request may have tensors of its own shape.
"""

import asyncio
import contextlib
import importlib.util
import inspect
import json
import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tutti import backends, config, rows
from tutti.backends import isolated
from tutti.backends import triton_python_backend_utils as pb_utils
from tutti.config import InstanceGroup, ModelConfig
from tutti.dtypes import NUMPY, Array, from_numpy
from tutti.errors import ConfigError, InferError, Internal
from tutti.repository import ModelFolder
from tutti.scheduler import Backend, Executed
from tutti.types import Call, Columns, Infer, InferResponse, Tensor

_log = logging.getLogger(__name__)

# How long an unload waits for answers that a model still owes.
FINALIZE_TIMEOUT_S = 30.0
_import_lock = threading.Lock()


def load(folder: ModelFolder, version: int, infer: Infer) -> list[Backend]:
    """Import model.py once, and initialize one TritonPythonModel per instance. Models may send requests to `infer`."""
    path = backends.model_file(folder, version, "model.py")
    pb_utils.serve_with(infer)
    loaded: list[Backend] = []
    if isolated.is_wanted(folder):
        try:
            for index, (group, device) in enumerate(backends.instances(folder.config)):
                loaded.append(isolated.IsolatedBackend(folder, version, index, group, device))
        except ConfigError:
            for backend in loaded:
                backend.close()
            raise
        return loaded
    try:
        module = _import(path, f"tutti_model_{folder.config.name}_{version}")
        for index, (group, device) in enumerate(backends.instances(folder.config)):
            loaded.append(PythonBackend(folder, version, module.TritonPythonModel(), index, group, device))
    except Exception as error:
        for backend in loaded:
            backend.close()
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"model '{folder.config.name}': {path.name} failed to load: {reason}") from error
    return loaded


def load_one(folder: ModelFolder, version: int, index: int, group: InstanceGroup, device: int) -> Backend:
    """One instance, in a process that has no others."""
    path = backends.model_file(folder, version, "model.py")
    try:
        module = _import(path, f"tutti_model_{folder.config.name}_{version}")
        return PythonBackend(folder, version, module.TritonPythonModel(), index, group, device)
    except Exception as error:
        raise ConfigError(f"{path.name} failed to load: {type(error).__name__}: {error}") from error


def complete(proto: Any, path: Path) -> None:
    """Let model.py complete the configuration, where it has `auto_complete_config`. Raises ConfigError."""
    try:
        module = _import(path, f"tutti_model_{proto.name}_config")
        if hasattr(module.TritonPythonModel, "auto_complete_config"):
            completed = module.TritonPythonModel.auto_complete_config(pb_utils.ModelConfig(proto))
            if not isinstance(completed, pb_utils.ModelConfig):
                raise TypeError(f"auto_complete_config returned a {type(completed).__name__}, no ModelConfig")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"model '{proto.name}': {path.name} could not complete its configuration: {reason}"
        ) from error


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

    def __init__(
        self, folder: ModelFolder, version: int, model: Any, index: int, group: InstanceGroup, device: int
    ) -> None:
        self.runs_inline = False  # a model may wait for whatever it likes
        self.kind = f"{group.kind}"
        self._config: ModelConfig = folder.config
        self._version = str(version)
        self._model = model
        self._output_names = tuple(spec.name for spec in folder.config.outputs)
        self._datatypes = {spec.name: spec.datatype for spec in folder.config.outputs}
        self._has_text = any(spec.datatype == "BYTES" for spec in folder.config.inputs)
        self._null = InferResponse(self._config.name, self._version, [], is_null=True)
        self._owed = 0
        self._settled = threading.Condition()
        if hasattr(model, "initialize"):
            model.initialize(self._arguments(folder, index, group, device))

    def _arguments(self, folder: ModelFolder, index: int, group: InstanceGroup, device: int) -> dict[str, str]:
        name = self._config.name
        return {
            "model_config": json.dumps(config.as_json(self._config.proto)),
            "model_instance_kind": "GPU" if group.kind == "gpu" else "CPU",
            "model_instance_name": f"{group.name or name}_{index}",
            "model_instance_device_id": str(device),
            "model_repository": str(folder.path),
            "model_version": self._version,
            "model_name": name,
        }

    def execute(self, calls: Sequence[Call]) -> Executed:
        """None where the model answers, or has answered, through a response sender."""
        spoiled: dict[int, InferError] = {}
        for call in calls if self._has_text else ():  # the sizes of other tensors have been checked
            try:
                for tensor in call.request.inputs.values():
                    tensor.array()
            except InferError as error:
                spoiled[id(call)] = type(error)(f"model '{self._config.name}': {error.message}")
        passed = [call for call in calls if id(call) not in spoiled] if spoiled else list(calls)
        executed = self._execute(passed) if passed else []
        if not spoiled:
            return executed
        rest = iter(executed() if callable(executed) else executed)
        return [spoiled[id(call)] if id(call) in spoiled else next(rest) for call in calls]

    def close(self) -> None:
        """Wait for the answers still owed, then finalize."""
        with self._settled:
            if not self._settled.wait_for(lambda: not self._owed, FINALIZE_TIMEOUT_S):
                _log.warning("model '%s' still owes %d answers and is finalized", self._config.name, self._owed)
        if hasattr(self._model, "finalize"):
            try:
                self._model.finalize()
            except Exception:
                _log.exception("model '%s': finalize failed", self._config.name)

    def _execute(self, calls: list[Call]) -> Executed:
        is_decoupled = self._config.is_decoupled
        senders: dict[int, pb_utils.InferenceResponseSender] = {}

        def sender_of(call: Call) -> pb_utils.InferenceResponseSender:
            sender = senders.get(id(call))
            if sender is None:
                with self._settled:
                    self._owed += 1
                sender = senders[id(call)] = pb_utils.InferenceResponseSender(
                    call, self._answer, self._null, is_decoupled, self._paid
                )
            return sender

        if is_decoupled:  # a sender that nobody keeps fails its call, so none is forgotten
            for call in calls:
                sender_of(call)
        try:
            responses = self._model.execute(
                [pb_utils.InferenceRequest.received(call, self._output_names, sender_of) for call in calls]
            )
            if inspect.isawaitable(responses):
                responses = asyncio.run(_awaited(responses))
            self._check(responses, len(calls))
        except Exception as error:
            _log.debug("model '%s': execute failed", self._config.name, exc_info=True)
            failure = Internal(f"model '{self._config.name}': execute raised {type(error).__name__}: {error}")
            for sender in senders.values():
                sender.fail(failure)
            return [None if id(call) in senders else failure for call in calls]
        pb_utils.detach(responses or ())
        if senders:
            return [
                None if response is None and id(call) in senders else self._answer(call, response)
                for call, response in zip(calls, responses or [None] * len(calls), strict=True)
            ]
        return lambda: self._joined(calls, responses) or list(map(self._answer, calls, responses))

    def _paid(self) -> None:
        with self._settled:
            self._owed -= 1
            self._settled.notify_all()

    def _check(self, responses: Any, count: int) -> None:
        if self._config.is_decoupled:
            if responses is not None:
                raise TypeError("a decoupled model's execute returns None and answers through response senders")
        elif not isinstance(responses, list) or len(responses) != count:
            got = f"{len(responses)} responses" if isinstance(responses, list) else f"a {type(responses).__name__}"
            raise TypeError(f"expected {count} responses, got {got}")

    def _joined(self, calls: Sequence[Call], responses: Any) -> list[InferResponse] | None:
        """The answers as parts of joined arrays, which are quick to encode, where all are alike, plain and small."""
        asked = calls[0].request.outputs
        if len(calls) == 1 or not self._config.is_batched or any(call.request.outputs != asked for call in calls):
            return None
        names = [name for name in self._output_names if not asked or name in asked]
        sizes = [call.rows for call in calls]
        joined = pb_utils.join(responses, names, [NUMPY[self._datatypes[name]] for name in names], sizes)
        if joined is None:
            return None
        outputs = [Tensor(n, self._datatypes[n], array.shape, array) for n, array in zip(names, joined, strict=True)]
        return rows.parts(self._config.name, self._version, Columns(outputs), sizes)

    def _answer(self, call: Call, response: Any) -> InferResponse | InferError:
        if not isinstance(response, pb_utils.InferenceResponse):
            return Internal(f"model '{self._config.name}': execute returned a {type(response).__name__}, no response")
        error = response.error()
        if error is not None:
            return error.as_infer_error()
        asked = call.request.outputs
        try:
            arrays = pb_utils.arrays_of(response)
            chosen = [self._output(arrays, name) for name in self._output_names if not asked or name in asked]
        except InferError as bad_output:
            return Internal(bad_output.message)
        parameters = pb_utils.parameters_of(response)
        if parameters and not all(isinstance(value, bool | int | float | str) for value in parameters.values()):
            return Internal(f"model '{self._config.name}': response parameters: expected numbers, text and booleans")
        return InferResponse(self._config.name, self._version, chosen, parameters)

    def _output(self, arrays: dict[str, Array], name: str) -> Tensor:
        array = arrays.get(name)
        if array is None:
            raise Internal(f"model '{self._config.name}': its response lacks output '{name}'")
        datatype = self._datatypes[name]
        if array.dtype != NUMPY[datatype]:
            made = from_numpy(array.dtype)
            if made != datatype and (made, datatype) != ("UINT16", "BF16"):
                raise Internal(
                    f"model '{self._config.name}': output '{name}': expected {datatype}, model.py made {made}"
                )
        return Tensor(name, datatype, array.shape, array)


async def _awaited(work: Any) -> Any:
    return await work
