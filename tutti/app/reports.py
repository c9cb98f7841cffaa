"""What an engine's process tells its supervisor: JSON objects, one a line, through a pipe. And to end with it.

Reports: `task` is the file that tells front-end processes what to do; `ready`; `failed` says which device, and why;
`logs` are the settings of logs, as they are from now on.
"""

import ctypes
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1
# A line with such a text, each character escaped, is written whole: PIPE_BUF is 4096 bytes.
_MAX_TEXT = 600


@dataclass(frozen=True, slots=True)
class Supervised:
    """Where a supervised process reports: `descriptor` is a pipe's; `folder` is for its sockets."""

    descriptor: int
    parent: int
    folder: Path

    @classmethod
    def parse(cls, text: str) -> "Supervised":
        descriptor, parent, folder = text.split(":", 2)
        return cls(int(descriptor), int(parent), Path(folder))

    def __str__(self) -> str:
        return f"{self.descriptor}:{self.parent}:{self.folder}"

    def report(self, **report: object) -> None:
        """From any thread. A supervisor that has gone is no error: this process is about to end, too."""
        line = json.dumps(
            {key: value[:_MAX_TEXT] if isinstance(value, str) else value for key, value in report.items()}
        )
        try:
            os.write(self.descriptor, line.encode() + b"\n")
        except OSError:
            return


def end_with(parent: int, how: signal.Signals = signal.SIGKILL) -> None:
    """Have Linux send this process a signal when its parent, `parent`, ends: by default, one that it cannot handle."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, how, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
