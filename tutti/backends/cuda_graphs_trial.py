"""Whether a model's graphs can be captured, and compute what the model does: found out in a process that may die.

A capture that fails leaves PyTorch's allocator unusable, and a shape that a model cannot take may end the device for
its process. Which process that is, cuda_graphs_trial_process.py has; here it is started and listened to.
"""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import text_format

from tutti.repository.folders import ModelFolder

# For all of it: to load a model, and to capture its graphs.
DEADLINE_S = 300
# The process ends itself; this is for one that cannot.
_GRACE_S = 10


@dataclass(frozen=True, slots=True)
class Result:
    """`failure` says why there can be no graphs, "" if there can; `left_out` which cannot be, by index, and why."""

    failure: str = ""
    left_out: Mapping[int, str] = field(default_factory=dict)


_lock = threading.Lock()
_passed: dict[tuple[Any, ...], Result] = {}


def run(folder: ModelFolder, version: int, device: str, deadline_s: float = DEADLINE_S) -> Result:
    """Try the graphs of a model on a device. Blocks. What has passed is not tried again as long as no file changes."""
    text = text_format.MessageToString(folder.config.proto)
    files = sorted(folder.version_path(version).rglob("*"))
    key = (text, device, *[(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    with _lock:
        known = _passed.get(key)
    if known is not None:
        return known
    message = pickle.dumps((str(folder.path), text, folder.versions, version, device, deadline_s))
    result = _result(*_execute(message, deadline_s + _GRACE_S), deadline_s)
    if not result.failure:
        with _lock:
            _passed[key] = result
    return result


def _execute(message: bytes, timeout_s: float) -> tuple[bytes, bytes, int | None]:
    """What the process says, what its libraries say, and its status, None where it does not end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    pipe = subprocess.PIPE
    theirs, lifeline = os.pipe()  # nothing is written to it: it closes when this process ends
    command = [sys.executable, "-m", "tutti.backends.cuda_graphs_trial_process", str(theirs)]
    with contextlib.ExitStack() as ends:
        ends.callback(os.close, lifeline)
        try:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                pass_fds=[theirs],
                start_new_session=True,
            )
        finally:
            os.close(theirs)
        return _said(process, message, timeout_s)


def _said(process: "subprocess.Popen[bytes]", message: bytes, timeout_s: float) -> tuple[bytes, bytes, int | None]:
    try:
        output, errors = process.communicate(message, timeout_s)
        return output, errors, process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it for a while
            process.communicate(timeout=30)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        return b"", b"", None


def _result(output: bytes, errors: bytes, status: int | None, deadline_s: float) -> Result:
    if status is None or status == -signal.SIGALRM:
        return Result(f"a process that tried to capture them did not end within {deadline_s:g} s")
    if status == 0 and output:
        said = json.loads(output)
        return Result(said["failure"], {int(index): why for index, why in said["left_out"].items()})
    lines = errors.decode(errors="replace").strip().splitlines() or ["it said nothing"]
    return Result(f"a process that tried to capture them has died (status {status}): {lines[-1]}")
