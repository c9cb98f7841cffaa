"""Interpreters for models: how one is started, told to be gone, and waited for. Knows nothing of what it executes."""

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# How long a process that was told to end may take to leave, with what it has started.
LEAVE_TIMEOUT_S = 3.0
# The kernel ends a process at once, unless a driver holds it.
KILL_TIMEOUT_S = 30.0
_ROOT = str(Path(__file__).parents[3])
_BEGIN = """
import json, sys
head, tail, entry, *arguments = map(json.loads, sys.argv[1:])
sys.path[:] = head or [path for path in sys.path if path]
sys.path += [path for path in tail if path not in sys.path]
sys.argv[1:] = []
from tutti.backends.python import isolated_main
getattr(isolated_main, entry)(arguments)
"""


class Command:
    """How an interpreter for models is started."""

    def __init__(self, executable: str = sys.executable, environment: Mapping[str, str] | None = None) -> None:
        """With `environment` it is another installation's, whose packages come before the server's."""
        self._executable = executable
        self._environment = environment
        searched = [path for path in sys.path if path]
        self._head: list[str] = searched if environment is None else []
        self._tail = [_ROOT] if environment is None else [_ROOT, *searched]

    def start(self, entry: str, descriptors: Sequence[int]) -> tuple["subprocess.Popen[bytes]", int]:
        """In a session of its own: it is ended with what it has started, and a terminal's signals are the server's.

        With it comes its lifeline, a descriptor: it ends when that is closed, as it is at the latest by this process's
        end.
        """
        theirs, lifeline = os.pipe()  # nothing is written to it
        inherited = [theirs, *descriptors]
        arguments = [json.dumps(each) for each in (self._head, self._tail, entry, *inherited)]
        try:
            process = subprocess.Popen(
                [self._executable, "-c", _BEGIN, *arguments],
                pass_fds=inherited,
                env=None if self._environment is None else {**os.environ, **self._environment},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except BaseException:
            os.close(lifeline)
            raise
        finally:
            os.close(theirs)
        return process, lifeline


def end(process: "subprocess.Popen[bytes]") -> int | None:
    """End a process, and all that it has started, at once; returns its status, None where a driver holds it."""
    if process.returncode is None:  # afterwards another process may have its number
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILL_TIMEOUT_S)
    return process.returncode


def is_readable(descriptor: int, seconds: float) -> bool:
    if descriptor < 0:
        return True
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if math.isinf(seconds) else seconds * 1000))
