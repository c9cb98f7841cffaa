"""Logging: how lines look, which pass, and Triton's log settings that clients may read and change.

Control characters in a message are shown escaped: what a client sends cannot begin a line of its own.
"""

import logging
from collections.abc import Mapping
from typing import Any

from tutti.errors import InvalidArgument, Unsupported

Settings = dict[str, bool | int | str]

_FORMATS = {
    "default": ("%(asctime)s %(levelname).1s %(name)s: %(message)s", None),
    "ISO8601": ("%(asctime)sZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S"),
}
_LEVELS = {"log_info": logging.INFO, "log_warning": logging.WARNING, "log_error": logging.ERROR}
_ALL = (True, True, True)
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), 127) if code not in (9,)} | {10: "\\n", 13: "\\r"}


class _Formatter(logging.Formatter):
    """Keeps a message on its line; a traceback, which is ours, keeps its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = record.message.translate(_CONTROL)
        return super().formatMessage(record)


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
        self._handler = logging.FileHandler(file) if file else logging.StreamHandler()
        self._handler.addFilter(self._passes)

    def install(self) -> None:
        """Take the process's logging over."""
        logging.basicConfig(handlers=[self._handler], force=True)
        self._apply()

    def settings(self) -> Settings:
        return dict(self._settings)

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
            is_fine, expected = isinstance(value, str) and value in _FORMATS, f"one of {', '.join(_FORMATS)}"
        else:
            raise InvalidArgument(f"log setting {key[:100]!r}: expected one of {', '.join(self._settings)}")
        if not is_fine:
            raise InvalidArgument(f"log setting '{key}': expected {expected}, got {str(value)[:100]!r}")

    def _apply(self) -> None:
        text, date = _FORMATS[str(self._settings["log_format"])]
        self._handler.setFormatter(_Formatter(text, date))
        logging.getLogger().setLevel(logging.DEBUG if self._settings["log_verbose_level"] else logging.INFO)

    def _passes(self, record: logging.LogRecord) -> bool:
        for key, level in reversed(_LEVELS.items()):
            if record.levelno >= level:
                return bool(self._settings[key])
        return bool(self._settings["log_verbose_level"])
