"""The server's end of a process that completes one model's configuration, and is not there any more afterwards."""

import contextlib
import os
import pickle
import socket
import subprocess
from multiprocessing.connection import Connection
from pathlib import Path

from tutti.backends.python.interpreter import LEAVE_TIMEOUT_S, Command, end, is_readable
from tutti.core.errors import ConfigError
from tutti.core.operations import Work


def completed(command: Command, text: str, path: Path, limit_s: float) -> str:
    """The configuration as the model's `auto_complete_config` completes it, in a process. Raises ConfigError."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process, lifeline = command.start("complete", [theirs.fileno()])
        failure = ""
        try:
            watch = Work("a process completes a configuration", lambda: _has_ended_in_time(process, ours, limit_s))
            try:
                with Connection(os.dup(ours.fileno())) as channel:
                    channel.send_bytes(pickle.dumps((text, str(path))))
                    text, failure = pickle.loads(channel.recv_bytes())
            except (EOFError, OSError):
                is_late = watch.wait(LEAVE_TIMEOUT_S) and not watch.result()
                status = end(process)
                failure = f"it did not end within {limit_s:g} s" if is_late else f"its process ended (status {status})"
            except Exception as error:
                failure = f"what its process says cannot be read: {type(error).__name__}: {error}"
        finally:
            end(process)
            os.close(lifeline)
    if failure:
        raise ConfigError(failure)
    return text


def _has_ended_in_time(process: "subprocess.Popen[bytes]", channel: socket.socket, limit_s: float) -> bool:
    """Wait until a process ends, or the time is over; then shut its channel, so that its reader stops waiting.

    The channel's end would not tell: something that the process has started may have it.
    """
    try:
        pidfd = os.pidfd_open(process.pid)
        try:
            return is_readable(pidfd, limit_s)
        finally:
            os.close(pidfd)
    finally:
        with contextlib.suppress(OSError):
            channel.shutdown(socket.SHUT_RDWR)
