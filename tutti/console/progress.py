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
# A line that says nothing new comes again after so long at the most.
_LONGEST_S = 60.0
# Less than this share of a step tells nothing of the rest.
_TELLING = 0.05
_TIME = re.compile(r"^\d{4}-\d\d-\d\d[T ][\d:.,]+\s+")
# What a terminal takes to erase the rest of a line: another process may have written a longer one.
_ERASE = "\x1b[K"
# Work that is done sooner than this is not told of.
_SILENT_S = 2.0


class Repeats:
    """When a line may come in a log, where lines stay: not soon after the last, and ever later while it is the same.

    So a reader sees that work goes on, and is not told the same thing again and again.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = self._pause_s = every_s
        self._told_s = -math.inf
        self._about: object = None

    def is_due(self, about: object, now_s: float) -> bool:
        """Whether a line is to come now. `about` is what it says, but for the time that has passed."""
        is_same = about == self._about
        if now_s < self._told_s + (self._pause_s if is_same else self._every_s):
            return False
        self._pause_s = max(self._every_s, min(2 * self._pause_s, _LONGEST_S)) if is_same else self._every_s
        self._told_s, self._about = now_s, about
        return True


class Pace:
    """How long the rest of many pieces may take, by when those before them were done."""

    def __init__(self) -> None:
        self._done, self._done_s = 0, 0.0

    def left_s(self, done: int, total: int, passed_s: float) -> float | None:
        """None where nobody knows: at the start, and where the next takes longer than those before it would have it."""
        if done != self._done:
            self._done, self._done_s = done, passed_s
        return rest_s(done, total, self._done_s, passed_s - self._done_s)


class Progress:
    """One line for one piece of work. Clear it before something else is printed."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stderr
        self._is_terminal = self._out.isatty() and os.environ.get("TERM") != "dumb"
        self._next_s = 0.0
        self._repeats = Repeats(_LOG_S)
        self._is_shown = False

    def show(self, text: str, about: object = None) -> None:
        """Unless the last was a moment ago; `about` is what it says but for the time that has passed (default: all)."""
        now = time.monotonic()
        if self._is_terminal and now >= self._next_s:
            self._next_s = now + _TERMINAL_S
            self._out.write("\r" + cut(text, shutil.get_terminal_size().columns - 1) + _ERASE)
            self._out.flush()
            self._is_shown = True
        elif not self._is_terminal and self._repeats.is_due(text if about is None else about, now):
            self._out.write(text + "\n")
            self._out.flush()

    def clear(self) -> None:
        """Take the line from a terminal; the next is shown at once."""
        if self._is_shown:
            self._out.write("\r" + _ERASE)
            self._out.flush()
        self._is_shown, self._next_s, self._repeats = False, 0.0, Repeats(_LOG_S)


class Work:
    """A piece of work in steps, told by a thread while it is on: where it is, for how long, and what time is left.

    Nothing is told of work that takes no two seconds. Use it in a `with`; the line is gone when that ends.
    """

    def __init__(self, subject: str, total: int = 0, out: TextIO | None = None, is_alike: bool = False) -> None:
        """Of steps that are `is_alike` those that are done tell how long the others take; of others nobody knows."""
        self._what, self._is_alike = subject, is_alike
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

    def step(self, stage: str, total: int = 0) -> None:
        """The next step begins. `total` is how many there are, this one and those before it included, once known."""
        with self._lock:
            self._total = total or self._total
            self._done += bool(self._step)
            self._step, self._share, self._began = stage, 0.0, time.monotonic()

    def say(self, stage: str) -> None:
        """What the step, or the work, is at."""
        with self._lock:
            self._step = stage

    def at(self, share: float) -> None:
        """So much of the step is done, from 0 to 1."""
        self._share = share

    def _tell(self) -> None:
        pause_s = _SILENT_S
        while not self._is_over.wait(pause_s):
            pause_s = _TERMINAL_S / 2
            with self._lock:
                now = time.monotonic()
                passed_s, step_s = now - self._start, now - self._began
                left = left_s(self._done, self._total, self._share, passed_s, step_s, self._is_alike)
                line = told(self._what, self._step, self._done, self._total, self._share, passed_s, left)
                self._lines.show(line, (self._step, self._done, f"{self._share:.0%}"))


def told(subject: str, step: str, done: int, total: int, share: float, passed_s: float, left: float | None) -> str:
    """The line: `done` steps of `total` (0: nobody knows) in `passed_s`, `share` of one, and what is left, if known.

    What may be long is its end, which a narrow terminal cuts off.
    """
    count = f" [{done + 1}/{total}]" if total > 1 and step else ""
    parts = [clock(passed_s, is_up=False)]
    if share:
        parts.insert(0, f"{share:.0%}")
    if left is not None:
        parts.append(f"{amount(left)} left")
    return f"{subject}{count}, {', '.join(parts)}{f': {step}' if step else ''}"


def left_s(done: int, total: int, share: float, passed_s: float, step_s: float, is_alike: bool) -> float | None:
    """Of `total` steps (0: of one) `done` are, and `share` of one that is on for `step_s`; None where nobody knows.

    What is done tells of what is to come only where that is alike: of an export's steps one takes seconds, the next
    minutes.
    """
    is_last = done + 1 >= total
    if share >= _TELLING and (is_last or is_alike):
        rest = step_s * (1 - share) / share
        average = (passed_s - step_s + step_s / share) / (done + 1)
        return rest + average * max(0, total - done - 1)
    return rest_s(done, total, passed_s - step_s, step_s) if is_alike and not share else None


def rest_s(done: int, total: int, done_s: float, since_s: float) -> float | None:
    """Of alike pieces `done` took `done_s`, and `since_s` have passed since; None where nobody knows.

    That is so before the first is done, and where the next takes longer than it was to: when it will be done, and
    whether the others take as long, nothing tells.
    """
    if not 0 < done < total or since_s > done_s / done:
        return None
    return done_s / done * (total - done) - since_s


def amount(seconds: float) -> str:
    """As an estimate is told: no closer than it is known."""
    if seconds <= 5:
        return "a few seconds"
    if seconds <= 50:
        return f"about {10 * math.ceil(seconds / 10)} s"
    if seconds < 90:
        return "about a minute"
    return f"about {round(seconds / 60)} min" if seconds < 5400 else f"about {clock(seconds)}"


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


def run(subject: str, command: Sequence[str]) -> int:
    """Run a command of somebody else, telling what it said last; all of it where it fails. Returns its status."""
    with tempfile.TemporaryFile() as log, Work(subject) as work:
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
        print(f"{said.rstrip()}\n{subject}: {_ending(status)}", file=sys.stderr)
    return status if status >= 0 else 128 - status


def main(arguments: Sequence[str]) -> int:
    """`run` for a shell: WHAT, and the command. Returns its status, or one of our own with a sentence."""
    subject, *command = arguments
    try:
        return run(subject, command)
    except KeyboardInterrupt:
        print(f"{subject}: stopped by hand", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:  # it cannot be started, or what it says cannot be kept
        print(f"{subject}: {error.filename or command[0]}: {error.strerror}", file=sys.stderr)
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
