"""Python models in processes of their own: `parameters { key: "tutti.isolate" value { string_value: "process" } }`.

Each instance is a process: it has an interpreter lock and a CUDA context of its own, and when it dies it takes nothing
with it but the batch it held. It costs a copy of each batch to the process and back. Run as a module, this file is that
process.
"""

import contextlib
import fcntl
import logging
import math
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from tutti import config, wire
from tutti.backends.device_options import HANG_PARAMETER, OWN_CODE_HANG_TIMEOUT_S, hang_timeout_s
from tutti.config import InstanceGroup
from tutti.devices.health import health
from tutti.errors import ConfigError, InferError, Internal, Unavailable
from tutti.repository import ModelFolder
from tutti.scheduler import Executed
from tutti.types import Answer, Call, InferResponse, now_ns, settle

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
    """One instance: a process with a PythonBackend.

    A process that dies, hangs or loses its device fails the batch it has, and another takes its place: the batch's
    callers do not wait for that.
    """

    def __init__(
        self, folder: ModelFolder, version: int, index: int, group: InstanceGroup, device: int, on: str = "cpu"
    ) -> None:
        """`device` is the number that the model is told, `on` where the instance is: "cpu", or as "cuda:0"."""
        self.runs_inline = False
        self.kind = group.kind
        self.device = on
        self._name = folder.config.name
        text = text_format.MessageToString(folder.config.proto)
        self._start_message = pickle.dumps((str(folder.path), text, folder.versions, version, index, group, device))
        self._hang_timeout_s = hang_timeout_s(folder.config, OWN_CODE_HANG_TIMEOUT_S)
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection
        self._lifeline = -1
        began = time.monotonic()
        self._start(0)
        self._started_in_s = time.monotonic() - began

    def execute(self, calls: Sequence[Call]) -> Executed:
        if self._process is None:
            self._start_again()
        try:
            self._connection.send_bytes(pickle.dumps(wire.pack_calls(calls, now_ns()), protocol=5))
            message, lost = pickle.loads(self._connection.recv_bytes())
        except BlockingIOError:
            self._kill()
            what = f"its process did not answer for {self._hang_timeout_s:g} s (parameters.{HANG_PARAMETER})"
            return self._replaced(calls, [self._error(Internal, what)] * len(calls))
        except (EOFError, OSError):
            what = f"its process ended while it executed (status {self._end()})"
            return self._replaced(calls, [self._error(Unavailable, what)] * len(calls))
        answers = wire.unpack_answers(message)
        if lost:
            self._kill()
            if not any(isinstance(answer, InferResponse) for answer in answers):
                return self._replaced(calls, answers)
        return answers

    def close(self) -> None:
        if self._process is None:
            return
        try:
            self._connection.send_bytes(b"")
            self._process.wait(timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            _log.warning("model '%s': its process did not end by itself", self._name)
        self._end()

    def give_up(self) -> None:
        """Nobody waits for what its process executes. From any thread."""
        process = self._process
        if process is not None:
            process.kill()

    def _error(self, kind: type[InferError], what: str) -> InferError:
        error = kind(f"model '{self._name}': {what} and is started anew")
        _log.warning("%s", error)
        return error

    def _replaced(self, calls: Sequence[Call], answers: Sequence[Answer]) -> Executed:
        """Settles the calls now, and then starts another process."""
        for call, answer in zip(calls, answers, strict=True):
            call.answer = answer
        try:
            settle(calls)
        except Exception:  # a broken sink must not end the instance
            _log.exception("model '%s': could not deliver answers", self._name)
        with contextlib.suppress(Unavailable):  # the next batch tries again, and tells its callers
            self._start_again()
        return [None] * len(calls)

    def _start_again(self) -> None:
        """Raises Unavailable."""
        # It has been started before: what takes much longer now is a hang.
        limit_s = self._hang_timeout_s + 3 * self._started_in_s if self._hang_timeout_s else 0
        try:
            self._start(limit_s)
        except ConfigError as error:
            _log.error("its process is not there: %s", error)
            raise Unavailable(f"{error}; it is tried again with the next request") from None

    def _start(self, limit_s: float) -> None:
        ours, theirs = socket.socketpair()
        their_lifeline, self._lifeline = os.pipe()  # nothing is written to it: it closes when this process ends
        inherited = (theirs.fileno(), their_lifeline)
        command = [sys.executable, "-m", "tutti.backends.isolated", *map(str, inherited)]
        paths = [path for path in sys.path if path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        self._process = subprocess.Popen(command, pass_fds=inherited, env=environment, stdin=subprocess.DEVNULL)
        theirs.close()
        os.close(their_lifeline)
        _limit(ours, limit_s)
        self._connection = Connection(os.dup(ours.fileno()))
        try:
            self._connection.send_bytes(self._start_message)
            failure = self._connection.recv_bytes().decode()
            _limit(ours, self._hang_timeout_s)
        except BlockingIOError:
            self._kill()
            failure = f"its process did not start within {limit_s:g} s"
        except (EOFError, OSError):
            failure = f"its process ended while it started (status {self._end()})"
        finally:
            ours.close()
        if failure:
            self._end()
            raise ConfigError(f"model '{self._name}': {failure}")

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
        self._end()

    def _end(self) -> int:
        """The status of the process, which has ended by then, or is being ended."""
        process, self._process = self._process, None
        if process is None:
            return 0
        self._connection.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it for a while
                process.wait(timeout=30)
        os.close(self._lifeline)
        return -signal.SIGKILL if process.returncode is None else process.returncode


def _limit(connection: socket.socket, seconds: float) -> None:
    """Whoever waits for the connection for longer gets a BlockingIOError; 0 is no limit. The kernel looks to it."""
    microseconds = math.ceil(seconds * 1e6)
    time_of_kernel = struct.pack("ll", *divmod(microseconds, 1_000_000))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, time_of_kernel)


def main() -> None:
    """The instance's process: start, then a batch at a time until told to end, its device fails, or the server ends."""
    from tutti.backends import python

    connection = Connection(int(sys.argv[1]))
    _end_with(int(sys.argv[2]))
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
            packed = wire.pack_answers(list(map(_settled, calls, answers)))
            connection.send_bytes(pickle.dumps((packed, bool(health.failures())), protocol=5))
    except (EOFError, OSError):
        pass  # the server has gone
    backend.close()


def _end_with(lifeline: int) -> None:
    """Have the kernel kill this process when the other end of a pipe closes, whatever it does by then.

    A thread would not do: what hangs may hold the interpreter's lock.
    """
    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:
        raise SystemExit("the server has gone")


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
