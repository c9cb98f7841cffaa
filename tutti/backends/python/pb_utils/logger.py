"""What models log, on Python's logging."""

import enum
import logging
from typing import ClassVar

from tutti.backends.python.pb_utils.values import text_of


class Logger:
    """Triton's model logger, on Python's logging. Raises TypeError for a message that is no text, or another level."""

    class LogLevel(enum.IntEnum):
        """Triton's names and numbers."""

        INFO, WARNING, ERROR, VERBOSE = range(4)

    INFO, WARNING, ERROR, VERBOSE = LogLevel
    _log = logging.getLogger("tutti.backends.python.model")
    _OF_PYTHON: ClassVar = dict(
        zip(LogLevel, (logging.INFO, logging.WARNING, logging.ERROR, logging.DEBUG), strict=True)
    )

    @classmethod
    def log(cls, message: str, level: LogLevel = LogLevel.INFO) -> None:
        if not isinstance(level, cls.LogLevel):
            raise TypeError(f"log: expected a level, as pb_utils.Logger.INFO, got {level!r}")
        cls._log.log(cls._OF_PYTHON[level], "%s", text_of(message))

    @classmethod
    def log_info(cls, message: str) -> None:
        cls.log(message, cls.INFO)

    @classmethod
    def log_warn(cls, message: str) -> None:
        cls.log(message, cls.WARNING)

    @classmethod
    def log_error(cls, message: str) -> None:
        cls.log(message, cls.ERROR)

    @classmethod
    def log_verbose(cls, message: str) -> None:
        cls.log(message, cls.VERBOSE)
