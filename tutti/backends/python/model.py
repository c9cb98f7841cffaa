"""An instance of a python model: a TritonPythonModel of a `model.py`, unchanged, in whichever process this is.

Each instance has its own TritonPythonModel. execute gets the batch as a list of requests, as in Triton: nothing is
joined, so each request may have tensors of its own shape. Tensors may be in a GPU's memory: outputs wherever the model
puts them, inputs where `FORCE_CPU_ONLY_INPUT_TENSORS` is "no". Instances of KIND_GPU take turns with all else on their
GPU.
"""

import contextlib
import inspect
import json
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from types import ModuleType
from typing import Any

from tutti.backends.python import model_imports
from tutti.backends.python.coroutines import Coroutines
from tutti.backends.python.instances import device_of, instance_kind, takes_inputs_on_host
from tutti.backends.python.pb_utils import responses as model_responses
from tutti.backends.python.pb_utils.errors import TritonError, has_text, told
from tutti.backends.python.pb_utils.requests import InferenceRequest
from tutti.backends.python.pb_utils.responses import InferenceResponse
from tutti.backends.python.pb_utils.senders import InferenceResponseSender
from tutti.backends.python.pb_utils.tensors import Tensor as ModelTensor
from tutti.backends.python.pb_utils.tensors import sent
from tutti.backends.python.pb_utils.values import are_parameters
from tutti.core import rows
from tutti.core.dtypes import NUMPY
from tutti.core.errors import DeviceLost, InferError, Internal, OutOfMemory
from tutti.core.types import Call, Columns, InferResponse, Tensor
from tutti.devices import health, tensors
from tutti.devices.device_turns import TurnTaker
from tutti.devices.errors import is_out_of_memory, is_unclear, sticky
from tutti.devices.nvml import gpu_count
from tutti.repository import config
from tutti.repository.folders import ModelFolder
from tutti.repository.model_config import InstanceGroup, ModelConfig
from tutti.scheduling.interface import Executed

_log = logging.getLogger(__name__)

# How long an unload waits for answers that a model still owes.
FINALIZE_TIMEOUT_S = 30.0


class PythonBackend:
    """One instance: a TritonPythonModel."""

    def __init__(
        self,
        folder: ModelFolder,
        version: int,
        model: Any,
        name: str,
        group: InstanceGroup,
        number: int,
        taker: TurnTaker | None = None,
        module: ModuleType | None = None,
    ) -> None:
        """`number` is the GPU's. With `taker` each execution has a turn on it. `module` is forgotten at the end."""
        self.runs_inline = False  # a model may wait for whatever it likes
        self.kind = f"{group.kind}"
        self.device = device_of(group, number)
        self._taker = taker
        self._module = module
        self._coroutines = Coroutines(folder.config.name)
        self._config: ModelConfig = folder.config
        self._version = str(version)
        self._model = model
        self._number = number
        self._takes_inputs_on_host = takes_inputs_on_host(folder.config)
        self._datatypes = {spec.name: spec.datatype for spec in folder.config.outputs}
        for state in folder.config.sequences.states if folder.config.sequences is not None else ():
            self._datatypes[state.output_name] = state.datatype  # the server keeps it for the next request
        self._output_names = tuple(self._datatypes)
        self._has_text = any(spec.datatype == "BYTES" for spec in folder.config.inputs)
        self._null = InferResponse(self._config.name, self._version, [], is_null=True)
        self._owed = 0
        self._settled = threading.Condition()
        if hasattr(model, "initialize"):
            try:
                model.initialize(self._arguments(folder, name, group))
            except BaseException as error:
                self._failure("initialize", error)
                if taker is not None:
                    taker.close()
                raise

    def _arguments(self, folder: ModelFolder, instance: str, group: InstanceGroup) -> dict[str, str]:
        name = self._config.name
        kind = instance_kind(group, gpu_count())
        return {
            "model_config": json.dumps(config.as_json(self._config.proto)),
            "model_instance_kind": kind,
            "model_instance_name": instance,
            "model_instance_device_id": str(self._number if kind == "GPU" else 0),
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
            except BaseException:
                _log.exception("model '%s': finalize failed", self._config.name)
        self._coroutines.close()
        if self._taker is not None:
            self._taker.close()
        if self._module is not None:
            model_imports.forget(self._module)

    def _turn(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._taker is None else self._taker.turn()

    def _execute(self, calls: list[Call]) -> Executed:
        is_decoupled = self._config.is_decoupled
        senders: dict[int, InferenceResponseSender] = {}
        sender_of = partial(self._sender_of, senders)
        if is_decoupled:  # a sender that nobody keeps fails its call, so none is forgotten
            for call in calls:
                sender_of(call)
        try:
            on_host = self._takes_inputs_on_host
            with self._turn():
                responses = self._model.execute(
                    [InferenceRequest.received(call, self._output_names, sender_of, on_host) for call in calls]
                )
                if inspect.iscoroutine(responses):
                    if is_decoupled:  # others may be executed meanwhile
                        self._coroutines.go(responses).add_done_callback(lambda done: self._went(done, senders))
                        return [None] * len(calls)
                    # A turn on a device is its thread's.
                    wait = self._coroutines.result if self._taker is None else self._coroutines.result_here
                    responses = wait(responses)
                responses = self._checked(responses, len(calls))
                model_responses.detach(responses, calls)  # waits for what is still under way on the device
        except BaseException as error:  # whatever it is, it is this batch's only
            failure = self._failed(error, senders)
            return [None if id(call) in senders else failure for call in calls]
        if senders:
            return [
                self._returned(call, response, senders.get(id(call)))
                for call, response in zip(calls, responses, strict=True)
            ]
        return lambda: self._joined(calls, responses) or list(map(self._answer, calls, responses))

    def _sender_of(self, senders: dict[int, InferenceResponseSender], call: Call) -> InferenceResponseSender:
        sender = senders.get(id(call))
        if sender is None:
            with self._settled:
                self._owed += 1
            is_decoupled = self._config.is_decoupled
            sender = senders[id(call)] = InferenceResponseSender(call, self._sent, self._null, is_decoupled, self._paid)
        return sender

    def _returned(
        self, call: Call, response: Any, sender: InferenceResponseSender | None
    ) -> InferResponse | InferError | None:
        """What execute returned for a call; None where its sender has answered, or is to."""
        if sender is None:
            return self._answer(call, response)
        if response is None or not sender.give_up():
            return None
        return self._answer(call, response)

    def _went(
        self,
        done: "Future[tuple[Any, BaseException | None]]",
        senders: dict[int, InferenceResponseSender],
    ) -> None:
        """A coroutine of a decoupled model has ended."""
        try:
            responses, error = done.result()
            if error is not None:
                raise error
            self._checked(responses, 0)
        except BaseException as error:
            self._failed(error, senders)

    def _failed(self, error: BaseException, senders: dict[int, InferenceResponseSender]) -> InferError:
        _log.debug("model '%s': execute failed", self._config.name, exc_info=True)
        failure = self._failure("execute", error)
        for sender in senders.values():
            sender.fail(failure)
        return failure

    def _paid(self) -> None:
        with self._settled:
            self._owed -= 1
            self._settled.notify_all()

    def _failure(self, action: str, error: BaseException) -> InferError:
        """What callers are told of a model's error. The device's health is told of an error that ends its use."""
        if isinstance(error, DeviceLost):  # while it waited for its turn
            return error
        # It begins as Triton's sentence does: clients look at that.
        says = f"Failed to process the request(s) for model '{self._config.name}': {action} raised {told(error)}"
        if not has_text(error):
            return Internal(says)
        reason = sticky(error) or (tensors.failure(self._number) if is_unclear(error) else "")
        if reason:
            health.health.fail(f"cuda:{self._number}", f"model '{self._config.name}': {reason}")
            return DeviceLost(f"model '{self._config.name}': device cuda:{self._number} has failed: {reason}")
        kind = OutOfMemory if is_out_of_memory(error) else Internal
        return kind(says)

    def _checked(self, responses: Any, count: int) -> list[Any]:
        """What execute returned, one for each request; None for those that are answered through response senders."""
        if responses is None:
            return [None] * count
        if self._config.is_decoupled:
            raise TypeError(
                f"Python model '{self._config.name}' is using the decoupled mode and the execute function must return "
                "None: it answers through response senders"
            )
        if not isinstance(responses, list):
            raise TypeError(f"expected {count} responses in a list, got a {type(responses).__name__}")
        if len(responses) != count:
            raise TypeError(
                "Number of InferenceResponse objects do not match the number of InferenceRequest objects. "
                f"InferenceRequest(s) size is:{count}, and InferenceResponse(s) size is:{len(responses)}"
            )
        return responses

    def _joined(self, calls: Sequence[Call], responses: Any) -> list[InferResponse] | None:
        """The answers as parts of joined arrays, which are quick to encode, where all are alike, plain and small."""
        asked = calls[0].request.outputs
        if len(calls) == 1 or not self._config.is_batched or any(call.request.outputs != asked for call in calls):
            return None
        names = [name for name in self._output_names if not asked or name in asked]
        sizes = [call.rows for call in calls]
        joined = model_responses.join(responses, names, [NUMPY[self._datatypes[name]] for name in names], sizes)
        if joined is None:
            return None
        outputs = [Tensor(n, self._datatypes[n], array.shape, array) for n, array in zip(names, joined, strict=True)]
        return rows.parts(self._config.name, self._version, Columns(outputs), sizes)

    def _sent(self, call: Call, response: Any) -> InferResponse | InferError:
        """The answer that a response sender was given."""
        try:
            model_responses.detach([response], [call])
        except BaseException as error:
            return self._failure("a response", error)
        return self._answer(call, response)

    def _answer(self, call: Call, response: Any) -> InferResponse | InferError:
        if response is None:
            return Internal(
                f"model '{self._config.name}': execute returned no response to a request, and took no response sender"
            )
        if not isinstance(response, InferenceResponse):
            return Internal(
                f"model '{self._config.name}': Expected an 'InferenceResponse' object in the execute function return "
                f"list, found type '{type(response).__name__}'"
            )
        error = response.error()
        if error is not None:
            if not isinstance(error, TritonError):
                got = type(error).__name__
                return Internal(f"model '{self._config.name}': a response's error: expected a TritonError, got a {got}")
            return error.as_infer_error()
        asked = call.request.outputs
        try:
            outputs = model_responses.outputs_of(response)
            chosen = [
                self._output(outputs[name])
                for name in self._output_names
                if name in outputs and (not asked or name in asked)
            ]
        except InferError as bad_output:
            named = f"model '{self._config.name}'"
            return Internal(bad_output.message if named in bad_output.message else f"{named}: {bad_output.message}")
        parameters = model_responses.parameters_of(response)
        if parameters and not are_parameters(parameters):
            return Internal(f"model '{self._config.name}': response parameters: expected numbers, text and booleans")
        return InferResponse(self._config.name, self._version, chosen, parameters)

    def _output(self, tensor: ModelTensor) -> Tensor:
        """An output as the model made it: as in Triton its datatype is its own, whatever is configured.

        But for BF16, for which numpy has no name.
        """
        output = sent(tensor)
        if output.datatype == "UINT16" and self._datatypes[output.name] == "BF16":
            output.array()  # on a device they would still be called UINT16
            output.datatype = "BF16"
        return output
