"""The demo's server: `tutti serve --ray` as a process of its own, and a sentence for each way in which it ends early.

Knows nothing of what is asked of it.
"""

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

import psutil

from tutti.console.progress import Work, last_line
from tutti.loadtest.process import free_ports, stop, wait_until_ready

# A server that dies closes its connections a moment before it has ended.
_ENDING_S = 2.0
# What is left of one that has ended may take so long to follow it.
_LEAVING_S = 15.0
# How often its processes are noted while it starts.
_NOTE_S = 1.0
# What serves a repository, given its folder and flags.
COMMAND = (sys.executable, "-m", "tutti.app.cli", "serve")
_ERROR = re.compile(r"^\S+ \S+ E tutti: (.+)$|^tutti: (.+)$", re.MULTILINE)


class DemoError(Exception):
    """The demo cannot go on. The message says why, and what to do."""


class Server:
    """The repository on free ports of 127.0.0.1. Stop it, however the demo ends."""

    def __init__(self, repository: Path, log: TextIO) -> None:
        """It begins, and writes to `log`, an open file with a name."""
        self.http_port, self.grpc_port, metrics_port = free_ports(3)
        command = [
            *COMMAND, str(repository), "--ray", "--http-port", str(self.http_port),
            "--grpc-port", str(self.grpc_port), "--metrics-port", str(metrics_port),
        ]  # fmt: skip
        self._what = f"tutti serve {repository} --ray"
        self._log = log
        # Ctrl-C of a terminal reaches the demo alone, which stops the server in order.
        self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self._family: set[psutil.Process] = set()
        self._noted_s = 0.0

    def wait_until_ready(self) -> None:
        """Raises DemoError where it does not come up."""
        url = f"http://127.0.0.1:{self.http_port}/v2/health/ready"
        try:
            with Work(self._what) as work:
                wait_until_ready(self.process, url, None, lambda: self._look(work))
        except RuntimeError:
            raise DemoError(self.why("nothing could be asked")) from None
        self._note_family()

    def why(self, what: str) -> str:
        """`what` has gone wrong: what has become of the server, and what to do."""
        return f"{what}: {self._became()}; its log is {self._log.name}: run make demo again"

    def stop(self) -> list[str]:
        """SIGTERM, and see that it takes all its processes with it; returns what went wrong, a line each.

        What it has left is killed.
        """
        had_ended = self.process.poll() is not None
        self._note_family()
        wrong = [] if stop(self.process) else ["the server did not stop by itself"]
        _, alive = psutil.wait_procs(self._family, timeout=_LEAVING_S)
        _kill(alive)
        return [*wrong, *([f"the server left {len(alive)} processes behind"] if alive and not had_ended else [])]

    def kill(self) -> None:
        """At once, with all its processes."""
        self._note_family()
        self.process.kill()
        self.process.wait()
        _kill(self._family)

    def _look(self, work: Work) -> None:
        work.say(last_line(self._log.fileno()))
        if time.monotonic() >= self._noted_s + _NOTE_S:
            self._note_family()

    def _note_family(self) -> None:
        """Its processes as of now: those of one that has ended are nobody's children any more."""
        self._noted_s = time.monotonic()
        with contextlib.suppress(psutil.NoSuchProcess):
            self._family |= set(psutil.Process(self.process.pid).children(recursive=True))

    def _became(self) -> str:
        """What its status says, and its last error."""
        try:
            status = self.process.wait(_ENDING_S)
        except subprocess.TimeoutExpired:
            return f"the server is still there{self._said()}"
        if status == -signal.SIGKILL:
            return "the server was killed, by another process or by the system for want of memory"
        if status < 0:
            return f"the server was ended by {signal.Signals(-status).name}"
        return f"the server ended with status {status}{self._said()}"

    def _said(self) -> str:
        """The last error in its log; of a log without any the last line."""
        told = [first or second for first, second in _ERROR.findall(Path(self._log.name).read_text(errors="replace"))]
        said = told[-1] if told else last_line(self._log.fileno())
        return f" and said: {said[:300]}" if said else " and said nothing"


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
