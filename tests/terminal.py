"""A program in a terminal of its own, as a person has it: what it shows is read, and keys are pressed."""

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from pathlib import Path

_PATIENCE_S = 60.0


class Terminal:
    """Of 24 lines and 80 columns. `text` is all that was shown and read so far."""

    def __init__(self, command: Sequence[str], cwd: Path | None = None, **environment: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        inherited = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, cwd=cwd, env={**inherited, **environment},
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self.text = ""

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def read_until(self, pattern: str) -> None:
        """Until it has shown that since the last time; fails the test when it never does."""
        begin, deadline = len(self.text), time.monotonic() + _PATIENCE_S
        while not re.search(pattern, self.text[begin:]):
            self._read(deadline, f"never shown: {pattern}")

    def end(self) -> int:
        """Read what it still shows, until it has ended; returns its status."""
        deadline = time.monotonic() + _PATIENCE_S
        with contextlib.suppress(OSError):  # its end of the terminal has been closed
            while True:
                self._read(deadline, "it has not ended")
        os.close(self._master)
        return self.process.wait(timeout=_PATIENCE_S)

    def _read(self, deadline: float, failing: str) -> None:
        left_s = max(0.0, deadline - time.monotonic())
        assert select.select([self._master], [], [], left_s)[0], f"{failing}\n{self.text}"
        self.text += os.read(self._master, 65536).decode(errors="replace")
