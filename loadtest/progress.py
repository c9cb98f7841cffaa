"""How far a run is, and how long it still takes: a line on the terminal, written over, or one now and then in a log."""

import math
import sys
import time
from typing import TextIO

# A terminal's line changes so often, in seconds; a log gets a new line so often.
_TERMINAL_S = 0.5
_LOG_S = 5.0


class Progress:
    """One line for one piece of work. Clear it before something else is printed."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stderr
        self._is_terminal = self._out.isatty()
        self._every_s = _TERMINAL_S if self._is_terminal else _LOG_S
        self._next_s = 0.0
        self._width = 0

    def show(self, text: str) -> None:
        """Unless the last was a moment ago."""
        now = time.monotonic()
        if now < self._next_s:
            return
        self._next_s = now + self._every_s
        if self._is_terminal:
            self._out.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._out.write(text + "\n")
        self._out.flush()

    def clear(self) -> None:
        """Take the line from a terminal; the next is shown at once."""
        if self._width:
            self._out.write("\r" + " " * self._width + "\r")
            self._out.flush()
        self._width, self._next_s = 0, 0.0


def clock(seconds: float) -> str:
    """As 40 s, 3 min 05 s, 2 h 10 min."""
    whole = max(0, math.ceil(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
