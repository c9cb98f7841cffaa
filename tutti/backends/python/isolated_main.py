"""The process of one instance of a python model: executes batches, and asks the server what only the server can do.

There are two channels. On the first a batch comes and its answers go back, one at a time. On the second goes all else:
answers of response senders, requests to other models, metrics, logs, and whether a caller has gone.
"""

import asyncio
import contextlib
import logging
import os
import pickle
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from tutti.backends.python import isolated_wire as wire
from tutti.backends.python import loading
from tutti.backends.python.isolated_server import ServerLink, sendable
from tutti.backends.python.isolated_wire import Arena
from tutti.backends.python.model import PythonBackend
from tutti.backends.python.pb_utils.errors import told
from tutti.core.errors import ConfigError, InferError, Internal
from tutti.core.lifeline import end_with
from tutti.core.types import Answer, Call
from tutti.devices.health import health
from tutti.repository import config
from tutti.repository.folders import ModelFolder

_log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> None:
    """Start the model, execute a batch at a time, and end when told to, or with the server.

    The arguments are file descriptors: of a pipe that closes when the server ends, of both channels, and of the arenas
    of inputs and of outputs.
    """
    lifeline, calls, side, inputs, outputs = map(int, arguments)
    end_with(lifeline)
    for descriptor in (calls, side, inputs, outputs):
        os.set_inheritable(descriptor, False)
    channel = Connection(calls)
    server = ServerLink(Connection(side))
    os.register_at_fork(after_in_child=lambda: _leave([calls, side, lifeline], server))
    start = pickle.loads(channel.recv_bytes())
    asyncio.set_event_loop(asyncio.new_event_loop())  # code of models asks for this thread's
    try:
        server.begin(start["log_level"])
        backend = _load(start)
        failure = ""
    except ConfigError as error:
        failure = str(error)
    except BaseException as error:
        failure = told(error)
    channel.send_bytes(pickle.dumps(failure))
    if failure:
        return
    with contextlib.suppress(EOFError, OSError):  # the server has gone
        _execute_all(channel, backend, server, Arena(inputs), Arena(outputs))
        backend.close()
        channel.send_bytes(b"")


def complete(arguments: Sequence[str]) -> None:
    """Complete a model's configuration: a process of its own for one call.

    The arguments are file descriptors: of a pipe that closes when the server ends, and of its channel.
    """
    lifeline, number = map(int, arguments)
    end_with(lifeline)
    os.set_inheritable(number, False)
    channel = Connection(number)
    text, path = pickle.loads(channel.recv_bytes())
    try:
        proto = text_format.Parse(text, model_config_pb2.ModelConfig())
        loading.complete_alone(proto, Path(path))
        channel.send_bytes(pickle.dumps((text_format.MessageToString(proto), "")))
    except BaseException as error:
        channel.send_bytes(pickle.dumps(("", told(error))))


def _load(start: Mapping[str, Any]) -> PythonBackend:
    path = Path(start["path"])
    folder = ModelFolder(path, config.parse(start["config"], path.name), start["versions"])
    return loading.load_one(folder, start["version"], start["name"], start["group"], start["device"])


def _execute_all(
    channel: Connection, backend: PythonBackend, server: ServerLink, inputs: Arena, outputs: Arena
) -> None:
    process_id = os.getpid()
    while message := channel.recv_bytes():
        (model, version, heads, payload), begin, log_level = pickle.loads(message)
        server.follow(log_level)
        view = wire.unpacked(payload, inputs)
        calls = [server.received(head, wire.request_of(model, version, head, view)) for head in heads]
        del view
        answers = _answers(backend, calls)
        if os.getpid() != process_id:  # the model has forked, and this is the other process
            os._exit(0)
        packed = _packed(model, answers, outputs, begin)
        del calls, answers
        server.settle_metrics()
        channel.send_bytes(pickle.dumps((packed, bool(health.failures()), inputs.begin()), protocol=5))


def _answers(backend: PythonBackend, calls: Sequence[Call]) -> list[Answer | None]:
    try:
        executed = backend.execute(calls)
        answers = executed() if callable(executed) else executed
    except BaseException as error:
        reason = f"model '{calls[0].request.model_name}': its answers cannot be made: {told(error)}"
        answers = [Internal(reason)] * len(calls)
    return [
        InferError(str(answer)) if isinstance(answer, Exception) and not isinstance(answer, InferError) else answer
        for answer in answers
    ]


def _packed(model: str, answers: Sequence[Answer | None], outputs: Arena, begin: int) -> wire.Answers:
    """The answers; one that cannot be sent is an error of its own."""
    try:
        return wire.pack_answers(answers, outputs, begin)
    except Exception:
        return wire.pack_answers([sendable(model, answer) for answer in answers], outputs, begin)


def _leave(descriptors: Sequence[int], server: ServerLink) -> None:
    """In a process that the model has forked: it must not answer in the model's name, nor keep the channels open.

    The descriptors stay taken, since objects have their numbers.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(nothing, descriptor, inheritable=False)
    os.close(nothing)
    server.leave()
