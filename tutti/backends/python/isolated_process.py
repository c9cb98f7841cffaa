"""The server's end of a python model's process: starts it, talks to it, notices its death, ends it and its helpers.

The thread that executes a batch reads its answers. All else that the process says comes to a thread of its own, which
also waits for the process to end: a channel's end would not tell, since a helper of the model's may have it.
"""

import contextlib
import logging
import math
import os
import pickle
import queue
import select
import signal
import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from tutti.backends.python import isolated_wire as wire
from tutti.backends.python.interpreter import KILL_TIMEOUT_S, LEAVE_TIMEOUT_S, Command, end, is_readable
from tutti.backends.python.isolated_questions import Questions
from tutti.backends.python.isolated_wire import Arena
from tutti.core.errors import ConfigError, InferError, Internal, Unavailable
from tutti.core.types import Answer, Call, Infer, InferResponse, now_ns, settle_all

_log = logging.getLogger(__name__)

# How long a process may take to end by itself, once it was told to: it owes answers, and finalizes.
END_TIMEOUT_S = 35.0


class Ended(Exception):
    """The process is not there any more."""


class Hangs(Exception):
    """The process has not answered in time."""


class ModelProcess:
    """One process with one instance. One thread at a time executes; `infer` answers what it asks of other models."""

    def __init__(self, name: str, command: Command, start: Mapping[str, Any], infer: Infer, limit_s: float) -> None:
        """Returns when the model is initialized. Raises ConfigError, after `limit_s` (0: any time) if not before."""
        self._name = name
        self._lock = threading.Lock()
        self._open: dict[int, Call] = {}
        self._questions = Questions(name, infer, self._open, self._send)
        self._next_id = 1
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._status: int | None = None
        self._inputs, self._outputs = Arena.new(), Arena.new()
        self._inputs_begin = 0
        self._why: InferError | None = None
        self._reaping = threading.Lock()
        # Held while its channel of calls is in use, which is not to be closed then.
        self._talking = threading.Lock()
        with contextlib.ExitStack() as failing:  # as where there are no more descriptors
            failing.callback(self._inputs.close)
            failing.callback(self._outputs.close)
            self._start(command, failing)
            failing.pop_all()
        self._begin(start, limit_s)

    def _start(self, command: Command, failing: contextlib.ExitStack) -> None:
        (self._calls, their_calls), (self._side, their_side) = socket.socketpair(), socket.socketpair()
        with their_calls, their_side:
            for own_end in (self._calls, self._side):
                failing.callback(own_end.close)
            descriptors = [their_calls.fileno(), their_side.fileno(), self._inputs.fd, self._outputs.fd]
            self._process, self._lifeline = command.start("main", descriptors)
        failing.callback(os.close, self._lifeline)
        failing.callback(end, self._process)
        self._pidfd = os.pidfd_open(self._process.pid)
        failing.callback(os.close, self._pidfd)
        self._calls_channel = Connection(os.dup(self._calls.fileno()))
        failing.callback(self._calls_channel.close)
        self._side_channel = Connection(os.dup(self._side.fileno()))
        failing.callback(self._side_channel.close)
        self._incoming = wire.Incoming(self._side)
        self._listener = threading.Thread(target=self._listen, name=f"{self._name} process", daemon=True)
        self._listener.start()

    def _begin(self, start: Mapping[str, Any], limit_s: float) -> None:
        _limit(self._calls, limit_s)
        try:
            self._calls_channel.send_bytes(pickle.dumps(start))
            failure = str(pickle.loads(self._calls_channel.recv_bytes()))
        except BlockingIOError:
            failure = f"its process did not start within {limit_s:g} s"
        except (EOFError, OSError):
            failure = f"its process ended while it started ({self.how_ended()})"
        except Exception as error:
            failure = f"what its process says cannot be read: {type(error).__name__}: {error}"
        if failure:
            self.kill()
            raise ConfigError(failure)

    def limit(self, seconds: float) -> None:
        """How long an execution may last; 0 is any time."""
        _limit(self._calls, seconds)

    def execute(self, calls: Sequence[Call]) -> tuple[list[Answer | None], bool]:
        """The answers, None where one comes or has come by itself, and whether the process has lost its device.

        Raises Ended when the process has ended, all its calls are settled then, and Hangs when it is to be ended.
        """
        first_id = self._next_id
        self._next_id += len(calls)
        batch = wire.pack_batch(calls, first_id, now_ns(), self._inputs, self._inputs_begin)
        data = pickle.dumps((batch, self._outputs.begin(), logging.getLogger().level), protocol=5)
        with self._lock:
            self._open.update(zip(range(first_id, first_id + len(calls)), calls, strict=True))
        try:
            packed, is_lost, self._inputs_begin = pickle.loads(self._asked_for(data))
            answers = wire.unpack_answers(packed, self._outputs)
        except BlockingIOError:
            raise Hangs from None
        except (EOFError, OSError):
            self.how_ended()
            self._fail_open()  # those that came after it had ended
            raise Ended from None
        except Exception as error:  # of a class that is known to the model only
            with self._lock:
                for number in range(first_id, first_id + len(calls)):
                    self._open.pop(number, None)
            reason = f"its answers cannot be read: {type(error).__name__}: {error}"
            raise Internal(f"model '{self._name}': {reason}") from None
        with self._lock:
            for number, answer in enumerate(answers, first_id):
                if answer is not None:
                    self._open.pop(number, None)
        return answers, is_lost

    def _asked_for(self, data: bytes) -> bytes:
        """What it says to a message."""
        with self._talking:
            self._calls_channel.send_bytes(data)
            return self._calls_channel.recv_bytes()

    def has_ended(self) -> bool:
        return self._status is not None

    def how_ended(self) -> str:
        """Its status, after it has ended; it is ended if it does not by itself."""
        if self._status is None and not is_readable(self._pidfd, LEAVE_TIMEOUT_S):
            self.kill()
        self._listener.join(KILL_TIMEOUT_S)
        return f"status {self._status}"

    def kill(self, why: InferError | None = None) -> None:
        """End it, and all that it has started, at once; `why` is what callers are told that it owes answers."""
        self._why = why
        with self._reaping, contextlib.suppress(ProcessLookupError, PermissionError):
            if self._status is None:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._listener.join(KILL_TIMEOUT_S)
        if self._listener.is_alive():  # a driver holds it
            self._fail_open()
        else:
            self._release()

    def close(self) -> bool:
        """Have it finalize and end; returns whether it did by itself."""
        try:
            _limit(self._calls, END_TIMEOUT_S)
            self._asked_for(b"")  # it has finalized
            is_fine = True
        except (EOFError, OSError):
            is_fine = False
        if is_fine:
            is_readable(self._pidfd, LEAVE_TIMEOUT_S)
        self.kill()
        return is_fine

    def _release(self) -> None:
        with self._lock:  # two threads may have waited for its end
            (lifeline, self._lifeline), (pidfd, self._pidfd) = (self._lifeline, -1), (self._pidfd, -1)
        if lifeline < 0:
            return
        os.close(lifeline)
        os.close(pidfd)
        self._outbox.put(None)
        if self._writer is not None:
            self._writer.join()
        with self._talking:  # once it is closed, another file may get its number
            self._calls_channel.close()
        self._side_channel.close()
        self._calls.close()
        self._side.close()
        self._inputs.close()
        self._outputs.close()

    # In the thread that listens, until the process has ended.

    def _listen(self) -> None:
        poll = select.poll()
        poll.register(self._side, select.POLLIN)
        poll.register(self._pidfd, select.POLLIN)
        wait_ms: float | None = None
        while ready := dict(poll.poll(wait_ms)):
            if self._side.fileno() not in ready:
                break
            if not self._take_all():
                poll.unregister(self._side)
                wait_ms = LEAVE_TIMEOUT_S * 1000  # it ends, or cannot answer any more
        self._has_gone()

    def _take_all(self) -> bool:
        """What has come; returns False when no more will."""
        try:
            messages = self._incoming.read()
        except (EOFError, OSError):
            return False
        for data in messages:
            self._take(data)
        return True

    def _take(self, data: bytes) -> None:
        kind = "something"
        try:
            kind, *rest = pickle.loads(data)
            (self._on_answer if kind == "answer" else getattr(self._questions, f"on_{kind}"))(*rest)
        except Exception:
            _log.exception("model '%s': what its process says (%s) cannot be followed", self._name, kind)

    def _has_gone(self) -> None:
        with self._reaping:
            self._kill_group()
        is_readable(self._pidfd, math.inf)  # a driver may hold it: who ends it must not wait for that
        with self._reaping:  # afterwards another process may have its number
            self._kill_group()  # what it had started meanwhile
            self._status = self._process.wait()
        self._questions.cancel_all()
        self._fail_open()
        for channel in (self._calls, self._side):
            with contextlib.suppress(OSError):
                channel.shutdown(socket.SHUT_RDWR)  # threads that execute or write stop waiting

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _fail_open(self) -> None:
        """What it owes answers to gets an error."""
        with self._lock:
            left = list(self._open.values())
            self._open.clear()
        if left:
            reason = f"its process ended while it executed (status {self._status}) and is started anew"
            self._fail(left, self._why or Unavailable(f"model '{self._name}': {reason}"))

    def _fail(self, calls: Sequence[Call], error: InferError) -> None:
        _log.warning("%s", error)
        try:
            settle_all(calls, error)
        except Exception:  # a broken sink must not end the instance
            _log.exception("model '%s': could not deliver answers", self._name)

    def _on_answer(self, number: int, is_final: bool, packed: wire.Answers) -> None:
        (answer,) = wire.unpack_answers(packed)
        with self._lock:
            call = self._open.get(number)
            if call is None:
                return
            is_last = is_final or call.emit is None
            if is_last:
                del self._open[number]
        if is_last:
            assert answer is not None
            call.finish(answer)
            return
        assert call.emit is not None and isinstance(answer, InferResponse)
        try:
            call.emit(answer)
        except InferError as error:  # its caller does not take its answers
            self._send("refused", number, error)

    def _send(self, *message: Any) -> None:
        """On the second channel, without waiting: a process that does not read must hold up nobody."""
        data = pickle.dumps(message, protocol=5)
        with self._lock:
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name=f"{self._name} writer", daemon=True)
                self._writer.start()
        self._outbox.put(data)

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            while (data := self._outbox.get()) is not None:
                self._side_channel.send_bytes(data)


def _limit(
    connection: socket.socket, seconds: float, which: Sequence[int] = (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO)
) -> None:
    """A wait on the connection that lasts longer raises BlockingIOError; 0 is no limit. The kernel keeps the time."""
    microseconds = math.ceil(seconds * 1e6)
    time_of_kernel = struct.pack("ll", *divmod(microseconds, 1_000_000))
    for option in which:
        connection.setsockopt(socket.SOL_SOCKET, option, time_of_kernel)
