"""How the `tutti` commands read their arguments: a parser that says in a few lines what was wrong, and kinds of values.

What is wrong is named, cut where it is long, and shown so that it cannot move a terminal's cursor. Knows no command.
"""

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from tutti.core.errors import sayable

# A value is what somebody typed: the rest of a longer one tells nothing.
MAX_SHOWN = 120
_MAX_MESSAGE = 600
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), 127, *range(0x80, 0xA0)) if code != 10}


class Terse(argparse.ArgumentParser):
    """As argparse's, but what it says of a wrong argument fits a terminal, whatever was typed.

    A number is finite and of ASCII digits, and no path is empty: that would be the folder where the person stands.
    """

    def __init__(self, *options: Any, **named: Any) -> None:
        super().__init__(*options, **named)
        for kind, parse in ((int, integer), (float, number), (Path, path)):
            self.register("type", kind, parse)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        for argument in words:
            if argument.startswith("--") and argument.endswith("=--"):  # argparse would have it be an empty list
                self.error(f"argument {argument[:-3]}: expected a value, got '--'")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        super().error(plain(message, _MAX_MESSAGE))

    def unknown(self, arguments: Sequence[str]) -> NoReturn:
        """End with the arguments that are none of the command's, and with the flags that may have been meant."""
        known = [flag for action in self._actions for flag in action.option_strings]
        told = []
        for argument in arguments:
            flag = argument.partition("=")[0]
            told.append(shown(argument) + (near(flag, known, "{}") if argument.startswith("-") else ""))
        self.error(f"unknown: {', '.join(told)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            problem = f"{shown(value)} is none of {', '.join(names)}{near(str(value), names)}"
            raise argparse.ArgumentError(action, problem)


class Parser(Terse):
    """One whose commands end with their own usage where a flag is unknown, and with the flags that may have been meant.

    argparse's has the usage of the command above.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, rest = super().parse_known_args(args, namespace)
        if rest and self._subparsers is None:
            self.unknown(rest)
        return options, rest


def near(name: str, known: Iterable[str], form: str = "'{}'") -> str:
    """A question to add to what is said of an unknown name: whether one of almost that name was meant; "" for none."""
    nearest = difflib.get_close_matches(name[:MAX_SHOWN], list(known), 1)
    return f" (did you mean {form.format(nearest[0])}?)" if nearest else ""


def plain(text: object, most: int = MAX_SHOWN) -> str:
    """A text for a terminal: control characters and what is no text escaped, the middle left out of a longer one."""
    said = sayable(text).translate(_CONTROL)
    return said if len(said) <= most else f"{said[: most // 2]} ... {said[-most // 2 :]}"


def shown(text: object) -> str:
    """A value in quotes."""
    return f"'{plain(text).replace(chr(10), chr(92) + 'n')}'"


def integer(text: str) -> int:
    """A kind of values. Python takes digits of other scripts, underscores and spaces, too."""
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"expected a whole number, got {shown(text)}")
    return int(text)


def number(text: str) -> float:
    """A kind of values."""
    is_number = re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", text)
    if not is_number or math.isinf(float(text)):
        raise argparse.ArgumentTypeError(f"expected a number, got {shown(text)}")
    return float(text)


def whole(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """A kind of values: whole numbers in this range."""

    def parse(text: str) -> int:
        if not low <= (value := integer(text)) <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {shown(text)}")
        return value

    return parse


def positive(text: str) -> float:
    """A kind of values: numbers above 0."""
    if (value := number(text)) <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {shown(text)}")
    return value


def path(text: str) -> Path:
    """A kind of values: the path of a file or a folder. An empty one would be the folder where the person stands."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got ''")
    return Path(text)


def server_url(text: str) -> str:
    """The URL of a server named as HOST:PORT or by its URL, without a slash at the end; "" for what is neither."""
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        is_known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_known = False
    return url.rstrip("/") if is_known and url.isascii() and url.isprintable() and " " not in url else ""
