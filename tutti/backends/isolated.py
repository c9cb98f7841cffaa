"""Python models in processes of their own: `parameters { key: "tutti.isolate" value { string_value: "process" } }`.

Each instance is a process: it has an interpreter lock of its own, and when it dies it takes nothing with it but the
batch it held. It costs a copy of each batch to the process and back. Run as a module, this file is that process.
"""

import logging
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from tutti import config, wire
from tutti.config import InstanceGroup
from tutti.errors import ConfigError, InferError, Unavailable
from tutti.repository import ModelFolder
from tutti.scheduler import Executed
from tutti.types import Call, now_ns

_log = logging.getLogger(__name__)

PARAMETER = "tutti.isolate"


def is_wanted(folder: ModelFolder) -> bool:
    """Whether the model's instances are to be processes. Raises ConfigError."""
    given = folder.config.parameters.get(PARAMETER, "")
    if given not in ("", "process"):
        raise ConfigError(f"model '{folder.config.name}': parameters.{PARAMETER}: expected 'process', got '{given}'")
    if given and folder.config.is_decoupled:
        raise ConfigError(
            f"model '{folder.config.name}': parameters.{PARAMETER}: a decoupled model runs in process only"
        )
    return bool(given)


class IsolatedBackend:
    """One instance: a process with a PythonBackend."""

    def __init__(self, folder: ModelFolder, version: int, index: int, group: InstanceGroup, device: int) -> None:
        self.runs_inline = False
        self.kind = group.kind
        self._name = folder.config.name
        text = text_format.MessageToString(folder.config.proto)
        self._start_message = pickle.dumps((str(folder.path), text, folder.versions, version, index, group, device))
        self._process: subprocess.Popen[bytes]
        self._connection: Connection
        self._start()

    def execute(self, calls: Sequence[Call]) -> Executed:
        try:
            self._connection.send_bytes(pickle.dumps(wire.pack_calls(calls, now_ns()), protocol=5))
            received = self._connection.recv_bytes()
        except (EOFError, OSError):
            code = self._end()
            self._start()
            what = f"its process ended while it executed (status {code}) and has been started anew"
            raise Unavailable(f"model '{self._name}': {what}") from None
        return wire.unpack_answers(pickle.loads(received))

    def close(self) -> None:
        try:
            self._connection.send_bytes(b"")
            self._process.wait(timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            _log.warning("model '%s': its process did not end by itself", self._name)
        self._end()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "tutti.backends.isolated", str(theirs.fileno())]
        paths = [path for path in sys.path if path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)
        theirs.close()
        self._connection = Connection(ours.detach())
        try:
            self._connection.send_bytes(self._start_message)
            failure = self._connection.recv_bytes().decode()
        except (EOFError, OSError):
            failure = f"its process ended while it started (status {self._end()})"
        if failure:
            self._end()
            raise ConfigError(f"model '{self._name}': {failure}")

    def _end(self) -> int:
        self._connection.close()
        try:
            return self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def main() -> None:
    """The instance's process: start, then a batch at a time until told to end or the server has gone."""
    from tutti.backends import python

    connection = Connection(int(sys.argv[1]))
    path, text, versions, version, index, group, device = pickle.loads(connection.recv_bytes())
    try:
        parsed = config.parse(text, Path(path).name)
        backend = python.load_one(ModelFolder(Path(path), parsed, versions), version, index, group, device)
    except Exception as error:
        connection.send_bytes(str(error).encode())
        return
    connection.send_bytes(b"")
    try:
        while message := connection.recv_bytes():
            calls = wire.unpack_calls(pickle.loads(message), _Nobody(), now_ns())
            for call in calls:
                call.rows = next((t.shape[0] for t in call.request.inputs.values() if t.shape), 1)
            executed = backend.execute(calls)
            answers: list[Any] = list(executed() if callable(executed) else executed)
            connection.send_bytes(pickle.dumps(wire.pack_answers(list(map(_settled, calls, answers))), protocol=5))
    except (EOFError, OSError):
        pass  # the server has gone
    backend.close()


class _Nobody:
    """The sink of calls whose answers are sent back in order."""

    def settle(self, calls: Sequence[Call]) -> None:
        """A response sender has answered: the answer is in the call."""


def _settled(call: Call, answer: Any) -> Any:
    found = call.answer if answer is None else answer
    if found is None:
        return Unavailable(f"model '{call.request.model_name}': an isolated model answers before execute returns")
    return found if isinstance(found, InferError) or not isinstance(found, Exception) else InferError(str(found))


if __name__ == "__main__":
    main()
