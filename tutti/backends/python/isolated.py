"""Python models in processes of their own, which is how Triton runs them, and the default here.

Each instance is a process: modules, paths, event loops, signals, threads, exits and an interpreter lock are its own,
and when it dies it takes nothing with it but what it owed answers to. It costs a hop between processes for each batch,
and two copies of what is large. `parameters { key: "tutti.isolate" value { string_value: "no" } }` keeps a model that
is known to be well-behaved in the server's process.
"""

import contextlib
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from tutti.backends.device_options import HANG_PARAMETER, OWN_CODE_HANG_TIMEOUT_S, hang_timeout_s
from tutti.backends.python import execution_env
from tutti.backends.python.isolated_completion import completed
from tutti.backends.python.isolated_process import Ended, Hangs, ModelProcess
from tutti.core.errors import ConfigError, Internal, Unavailable
from tutti.core.types import Answer, Call, Infer, InferResponse, settle
from tutti.repository.folders import ModelFolder
from tutti.repository.model_config import InstanceGroup, ModelConfig
from tutti.scheduling.interface import Executed

_log = logging.getLogger(__name__)

PARAMETER = "tutti.isolate"


def choice(config: ModelConfig) -> str:
    """ "process", "no", or "" where the model does not say. Raises ConfigError."""
    text = config.parameters.get(PARAMETER, "")
    if text not in ("", "process", "no"):
        expected = f"expected 'process' or 'no', got '{text}'"
        raise ConfigError(f"model '{config.name}': parameters.{PARAMETER}: {expected}")
    return text


class IsolatedBackend:
    """One instance: a process with a PythonBackend.

    A process that dies, hangs or loses its device fails what it owes answers to, and another takes its place: callers
    do not wait for that.
    """

    def __init__(
        self,
        folder: ModelFolder,
        version: int,
        name: str,
        group: InstanceGroup,
        device: int,
        on: str,
        infer: Infer,
    ) -> None:
        """`name` is the instance's, `device` the number that it is told, `on` where it is: "cpu", or as "cuda:0"."""
        self.runs_inline = False
        self.kind = group.kind
        self.device = on
        self._name = folder.config.name
        self._infer = infer
        self._command = execution_env.command(folder.config, folder.path)
        self._begin: dict[str, Any] = {
            "path": str(folder.path),
            "config": text_format.MessageToString(folder.config.proto),
            "versions": folder.versions,
            "version": version,
            "name": name,
            "group": group,
            "device": device,
        }
        self._hang_timeout_s = hang_timeout_s(folder.config, OWN_CODE_HANG_TIMEOUT_S)
        self._process: ModelProcess | None = None
        self._is_given_up = False
        # What a batch may take before the instance counts as stuck, seconds, where the model says so itself.
        says = HANG_PARAMETER in folder.config.parameters
        self.hang_s: float | None = (self._hang_timeout_s or math.inf) if says else None
        began = time.monotonic()
        self._start(0)
        self._started_in_s = time.monotonic() - began

    def execute(self, calls: Sequence[Call]) -> Executed:
        process = self._process
        if process is None or process.has_ended():
            process = self._start_again()
        try:
            answers, has_lost_device = process.execute(calls)
        except Ended:
            _log.warning("model '%s': its process has ended and is started anew", self._name)
            return self._replaced(calls)
        except Hangs:
            limit = f"{self._hang_timeout_s:g} s (parameters.{HANG_PARAMETER})"
            message = f"model '{self._name}': its process did not answer for {limit} and is started anew"
            _log.warning("%s", message)
            process.kill(Internal(message))
            return self._replaced(calls)
        if has_lost_device:
            process.kill()
            if not any(isinstance(answer, InferResponse) for answer in answers):
                _settle(self._name, calls, answers)
                return self._replaced(calls)
        return answers

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None and not process.close():
            _log.warning("model '%s': its process did not end by itself", self._name)

    def give_up(self) -> None:
        """Nobody waits for what its process executes, nor for another process. From any thread."""
        self._is_given_up = True
        process = self._process
        if process is not None:
            process.kill()

    def _replaced(self, calls: Sequence[Call]) -> Executed:
        """The calls are settled: starts another process."""
        with contextlib.suppress(Unavailable):  # the next batch tries again, and tells its callers
            self._start_again()
        return [None] * len(calls)

    def _start_again(self) -> ModelProcess:
        """Raises Unavailable."""
        if self._is_given_up:
            raise Unavailable(f"model '{self._name}': its process was given up")
        if self._process is not None:
            self._process.kill()
            self._process = None
        # It has been started before: what takes much longer now is a hang.
        limit_s = self._hang_timeout_s + 3 * self._started_in_s if self._hang_timeout_s else 0
        try:
            return self._start(limit_s)
        except ConfigError as error:
            _log.error("its process is not there: %s", error)
            raise Unavailable(f"{error}; it is tried again with the next request") from None

    def _start(self, limit_s: float) -> ModelProcess:
        begin = {**self._begin, "log_level": logging.getLogger().level}
        try:
            process = ModelProcess(self._name, self._command, begin, self._infer, limit_s)
        except (ConfigError, OSError, RuntimeError) as error:
            raise ConfigError(f"model '{self._name}': {error}") from None
        process.limit(self._hang_timeout_s)
        self._process = process
        if self._is_given_up:  # meanwhile: who gave it up has not seen the new process
            process.kill()
            raise ConfigError(f"model '{self._name}': its process was given up while it started")
        return process


def _settle(name: str, calls: Sequence[Call], answers: Sequence[Answer | None]) -> None:
    for call, answer in zip(calls, answers, strict=True):
        call.answer = answer or call.answer
    try:
        settle([call for call, answer in zip(calls, answers, strict=True) if answer is not None])
    except Exception:  # a broken sink must not end the instance
        _log.exception("model '%s': could not deliver answers", name)


def complete(proto: Any, path: Path) -> None:
    """Let model.py complete the configuration, in a process of its own. Raises ConfigError."""
    command = execution_env.command_of(proto, path.parents[1])
    text = completed(command, text_format.MessageToString(proto), path, OWN_CODE_HANG_TIMEOUT_S)
    proto.CopyFrom(text_format.Parse(text, type(proto)()))
