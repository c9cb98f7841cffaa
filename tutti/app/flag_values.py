"""The values of flags: text -> what it stands for, or what was expected and what came. Knows no flag."""

import argparse
import math
import re
from collections.abc import Callable

from tutti.console.arguments import shown
from tutti.frontends.size_limits import CASE_MATTERS


def pattern(text: str) -> str:
    try:
        re.compile(text.removeprefix(CASE_MATTERS))
        return text
    except re.error as error:
        raise argparse.ArgumentTypeError(f"not a regular expression: {error}") from None


def whole(least: int, most: float, expected: str) -> Callable[[str], int]:
    """A parser of whole numbers in a range, which is told in words to who gives another."""

    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,18}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {shown(text)}")
        return int(text)

    return parse


def number_from(least: int) -> Callable[[str], int]:
    return whole(least, 2**31 - 1, f"a whole number from {least} to 2147483647")


port = whole(0, 65535, "a port from 0 (any that is free) to 65535")
size = whole(1, math.inf, "bytes, which must be greater than 0")
count = whole(1, math.inf, "1 or more")
count_or_none = whole(0, math.inf, "0 or more")


MAX_SECONDS = 1e9
# Of what is started, as front-ends: more are a slip, which would take the machine with it.
MOST_PROCESSES = 1024


def seconds(text: str) -> float:
    """More than none, and no more than Python's timers take."""
    seconds = float(text) if re.fullmatch(r"[0-9]*\.?[0-9]+([eE][+-]?[0-9]{1,3})?", text) else math.nan
    if not 0 < seconds <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"expected seconds, more than 0, got {shown(text)}")
    return seconds


def milliseconds(text: str) -> float:
    try:
        ms = float(text)
    except ValueError:
        ms = math.nan
    if not 0 <= ms < math.inf:
        raise argparse.ArgumentTypeError(f"expected milliseconds, 0 or more, got '{text}'")
    return ms


def interval_ms(text: str) -> float:
    """More than none."""
    try:
        return seconds(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected milliseconds, more than 0, got '{text}'") from None


def level(text: str) -> int:
    """As Triton has it, true and false are levels, too."""
    return int(boolean(text)) if text.lower() in ("true", "false") else count_or_none(text)


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {shown(text)}")
    return text.lower() in ("true", "1")


def count_or_auto(text: str) -> int | None:
    """None for auto."""
    return None if text == "auto" else whole(1, MOST_PROCESSES, f"1 or more, or auto (at most {MOST_PROCESSES})")(text)
