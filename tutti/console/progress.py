"""How far a piece of work is, and how long it still takes: a line on the terminal, written over, or one now and then.

For every command; knows none of them. `python -m tutti.console.progress WHAT COMMAND...` tells of a
command of somebody else.
"""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import TextIO

# A terminal's line changes so often, in seconds; a log gets a new line so often.
_TERMINAL_S = 0.5
_LOG_S = 5.0
_TIME = re.compile(r"^\d{4}-\d\d-\d\d[T ][\d:.,]+\s+")
# What a terminal takes to erase the rest of a line: another process may have written a longer one.
_ERASE = "\x1b[K"
# Work that is done sooner than this is not told of.
_SILENT_S = 2.0


class Progress:
    """One line for one piece of work. Clear it before something else is printed."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stderr
        self._is_terminal = self._out.isatty() and os.environ.get("TERM") != "dumb"
        self._every_s = _TERMINAL_S if self._is_terminal else _LOG_S
        self._next_s = 0.0
        self._is_shown = False

    def show(self, text: str) -> None:
        """Unless the last was a moment ago."""
        now = time.monotonic()
        if now < self._next_s:
            return
        self._next_s = now + self._every_s
        if self._is_terminal:
            text = cut(text, shutil.get_terminal_size().columns - 1)
            self._out.write("\r" + text + _ERASE)
            self._is_shown = True
        else:
            self._out.write(text + "\n")
        self._out.flush()

    def clear(self) -> None:
        """Take the line from a terminal; the next is shown at once."""
        if self._is_shown:
            self._out.write("\r" + _ERASE)
            self._out.flush()
        self._is_shown, self._next_s = False, 0.0


class Work:
    """A piece of work in steps, told by a thread while it is on: where it is, for how long, and what time is left.

    Nothing is told of work that takes no two seconds. Use it in a `with`; the line is gone when that ends.
    """

    def __init__(self, what: str, total: int = 0, out: TextIO | None = None) -> None:
        self._what = what
        self._lines = Progress(out)
        self._start = self._began = time.monotonic()
        self._total, self._done, self._step, self._share = total, 0, "", 0.0
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="progress", daemon=True)

    def __enter__(self) -> "Work":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._lines.clear()

    def step(self, what: str, total: int = 0) -> None:
        """The next step begins. `total` is how many there are, this one and those before it included, once known."""
        with self._lock:
            self._total = total or self._total
            self._done += bool(self._step)
            self._step, self._share, self._began = what, 0.0, time.monotonic()

    def say(self, what: str) -> None:
        """What the step, or the work, is at."""
        with self._lock:
            self._step = what

    def at(self, share: float) -> None:
        """So much of the step is done, from 0 to 1."""
        self._share = share

    def _tell(self) -> None:
        pause_s = _SILENT_S
        while not self._is_over.wait(pause_s):
            pause_s = _TERMINAL_S / 2
            with self._lock:
                now = time.monotonic()
                line = told(
                    self._what, self._step, self._done, self._total, self._share, now - self._start, now - self._began
                )
                self._lines.show(line)


def told(what: str, step: str, done: int, total: int, share: float, passed_s: float, step_s: float) -> str:
    """The line: `done` steps of `total` (0: nobody knows) in `passed_s`, and `share` of one that is on for `step_s`.

    What may be long is its end, which a narrow terminal cuts off.
    """
    count = f" [{done + 1}/{total}]" if total > 1 and step else ""
    parts = [clock(passed_s, is_up=False)]
    if share:
        parts.insert(0, f"{share:.0%}")
    left = left_s(done, total, share, passed_s, step_s)
    if left is not None:
        parts.append(f"about {clock(left)} left")
    return f"{what}{count}, {', '.join(parts)}{f': {step}' if step else ''}"


def left_s(done: int, total: int, share: float, passed_s: float, step_s: float) -> float | None:
    """As if the steps to come took as long as those before them, on an average; None where nobody knows."""
    if share:
        own = step_s * (1 - share) / share
        average = (passed_s - step_s + step_s / share) / (done + 1)
        return own + average * max(0, total - done - 1)
    if not done or total <= done:
        return None
    average, more = (passed_s - step_s) / done, total - done - 1
    if step_s > average and not more:
        return None
    return max(0.0, average - step_s) + average * more


def clock(seconds: float, is_up: bool = True) -> str:
    """As 40 s, 3 min 05 s, 2 h 10 min; up to the next second, or down to the last."""
    whole = max(0, math.ceil(seconds) if is_up else math.floor(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def cut(text: str, width: int) -> str:
    """At most so wide: a longer line would not be written over."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def run(what: str, command: Sequence[str]) -> int:
    """Run a command of somebody else, telling what it said last; all of it where it fails. Returns its status."""
    with tempfile.TemporaryFile() as log, Work(what) as work:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            while True:
                try:
                    status = process.wait(_TERMINAL_S / 2)
                    break
                except subprocess.TimeoutExpired:
                    work.say(last_line(log.fileno()))
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if status:
            log.seek(0)
            said = log.read().decode(errors="replace")
    if status:
        print(f"{said.rstrip()}\n{what}: {_ending(status)}", file=sys.stderr)
    return status if status >= 0 else 128 - status


def main(arguments: Sequence[str]) -> int:
    """`run` for a shell: WHAT, and the command. Returns its status, or one of our own with a sentence."""
    what, *command = arguments
    try:
        return run(what, command)
    except KeyboardInterrupt:
        print(f"{what}: stopped by hand", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:  # it cannot be started, or what it says cannot be kept
        print(f"{what}: {error.filename or command[0]}: {error.strerror}", file=sys.stderr)
        return 1


def _ending(status: int) -> str:
    if status == -signal.SIGKILL:
        return "it was killed, by another process or by the system for want of memory"
    return f"it was ended by {signal.Signals(-status).name}" if status < 0 else f"it ended with status {status}"


def last_line(file: int) -> str:
    """What somebody has written last into an open file, without the time before it.

    Where the file is read and written next stays as it is.
    """
    size = os.fstat(file).st_size
    lines = os.pread(file, 4096, max(0, size - 4096)).decode(errors="replace").split("\n")
    return next((_TIME.sub("", line).strip() for line in reversed(lines) if line.strip()), "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
