"""Logging: how lines look, which pass, and Triton's log settings that clients may read and change.

Control characters in a message are shown escaped: what a client sends cannot begin a line of its own. In JSON a line is
an object, whatever names and messages contain.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from tutti.core.errors import InvalidArgument, Unsupported, sayable

Settings = dict[str, bool | int | str]

_FORMATS = {
    "default": ("%(asctime)s %(levelname).1s %(name)s: %(message)s", None),
    "ISO8601": ("%(asctime)sZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S"),
}
FORMATS = (*_FORMATS, "json")
_LEVELS = {"log_info": logging.INFO, "log_warning": logging.WARNING, "log_error": logging.ERROR}
_ALL = (True, True, True)
# C1 has another beginning of terminals' sequences, and Unicode two more ends of lines.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9,)}
_CONTROL |= {10: "\\n", 13: "\\r", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def one_line(text: str) -> str:
    """The text with what would end its line, or be a terminal's command, escaped."""
    return sayable(text).translate(_CONTROL)


def utc(at_s: float) -> str:
    """A time as ISO 8601 has it, to the millisecond."""
    whole_s, ms = divmod(int(at_s * 1000), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole_s))}.{ms:03d}Z"


class _Formatter(logging.Formatter):
    """Keeps a message on its line; a traceback, which is ours, keeps its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = one_line(record.message)
        return super().formatMessage(record)


class _JsonFormatter(logging.Formatter):
    """An object a line. What a record has as `fields` is in it, too, and a traceback as a text."""

    def format(self, record: logging.LogRecord) -> str:
        said = {"time": utc(record.created), "level": record.levelname, "logger": record.name}
        said["message"] = sayable(record.getMessage())
        if record.exc_info:
            said["exception"] = sayable(self.formatException(record.exc_info))
        return json.dumps(said | getattr(record, "fields", {}))


class Logs:
    """The process's one log handler, and the settings on it."""

    def __init__(
        self, verbose: int = 0, file: str = "", log_format: str = "default", kinds: tuple[bool, bool, bool] = _ALL
    ) -> None:
        """`kinds` says whether lines of info, warnings and errors pass."""
        info, warning, error = kinds
        self._settings: Settings = {
            "log_file": file,
            "log_info": info,
            "log_warning": warning,
            "log_error": error,
            "log_verbose_level": verbose,
            "log_format": log_format,
        }
        self._handler: logging.StreamHandler[Any] = logging.StreamHandler(sys.stderr)
        if file:
            self._handler = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
        self._handler.addFilter(self._passes)
        # Whether clients, or who started the server, want to know of every request; and who is told when that changes.
        self.is_verbose = verbose > 0
        self._listeners: list[Callable[[], None]] = []
        self._shape()

    def install(self) -> None:
        """Take the process's logging over."""
        logging.basicConfig(handlers=[self._handler], force=True)
        self._apply()

    def listen(self, changed: Callable[[], None]) -> None:
        """Have `changed` called whenever settings have."""
        self._listeners.append(changed)

    def settings(self) -> Settings:
        return dict(self._settings)

    def changeable(self) -> Settings:
        """Those that `update` takes, for other processes of the server: each has its own file."""
        return {name: value for name, value in self._settings.items() if name != "log_file"}

    def update(self, changes: Mapping[str, Any]) -> Settings:
        """Change some settings; returns all. Raises InvalidArgument for a name or value that does not fit.

        Raises Unsupported for the file: a client must not choose where the server writes.
        """
        for key, value in changes.items():
            self._check(key, value)
        self._settings.update(changes)
        self._apply()
        return self.settings()

    def _check(self, key: str, value: Any) -> None:
        if key == "log_file":
            raise Unsupported("log file location can not be updated through network protocol")
        if key in _LEVELS:
            is_fine, expected = isinstance(value, bool), "true or false"
        elif key == "log_verbose_level":
            is_fine = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32
            expected = "a whole number of 0 or more"
        elif key == "log_format":
            is_fine, expected = isinstance(value, str) and value in FORMATS, f"one of {', '.join(FORMATS)}"
        else:
            raise InvalidArgument(f"log setting {key[:100]!r}: expected one of {', '.join(self._settings)}")
        if not is_fine:
            raise InvalidArgument(f"log setting '{key}': expected {expected}, got {str(value)[:100]!r}")

    @property
    def is_json(self) -> bool:
        return self._settings["log_format"] == "json"

    def line(self, level: int, name: str, message: str, fields: Mapping[str, Any]) -> bytes:
        """A line as the handler would write it, for who must not wait for others' lines; b"" where it does not pass."""
        record = logging.LogRecord(name, level, "", 0, message, None, None)
        record.fields = fields
        return f"{self._handler.format(record)}\n".encode() if self._passes(record) else b""

    @property
    def stream(self) -> Any:
        """Where lines go."""
        return self._handler.stream

    def _apply(self) -> None:
        self._shape()
        self.is_verbose = bool(self._settings["log_verbose_level"])
        logging.getLogger().setLevel(logging.DEBUG if self.is_verbose else logging.INFO)
        for changed in self._listeners:
            changed()

    def _shape(self) -> None:
        form = str(self._settings["log_format"])
        self._handler.setFormatter(_JsonFormatter() if form == "json" else _Formatter(*_FORMATS[form]))

    def _passes(self, record: logging.LogRecord) -> bool:
        for key, level in reversed(_LEVELS.items()):
            if record.levelno >= level:
                return bool(self._settings[key])
        return bool(self._settings["log_verbose_level"])
