"""Errors of models: those that they raise or answer with, and what an exception of theirs says."""

from typing import ClassVar

from tutti.core import errors


class TritonModelException(Exception):
    """Raise from initialize to refuse the load, or from execute to fail the whole batch."""


class TritonError:
    """An error of one response. `code` is one of the class's constants."""

    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)
    _CLASSES: ClassVar[dict[int, type[errors.InferError]]] = {
        NOT_FOUND: errors.NotFound,
        INVALID_ARG: errors.InvalidArgument,
        UNAVAILABLE: errors.Unavailable,
        UNSUPPORTED: errors.Unsupported,
        CANCELLED: errors.Cancelled,
        ALREADY_EXISTS: errors.AlreadyExists,
        UNKNOWN: errors.Unknown,
    }

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message = message
        self._code = code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code

    def as_infer_error(self) -> errors.InferError:
        return self._CLASSES.get(self._code, errors.Internal)(errors.sayable(self._message))

    @classmethod
    def of(cls, error: errors.InferError) -> "TritonError":
        code = next((code for code, kind in cls._CLASSES.items() if isinstance(error, kind)), cls.INTERNAL)
        return cls(error.message, code)

    def __str__(self) -> str:
        return self._message


def told(error: BaseException) -> str:
    """An exception of a model's, in one sentence. Its own text may fail to be made."""
    kind = type(error).__name__
    try:
        return errors.sayable(f"{kind}: {error}")
    except BaseException:
        return f"{kind}, whose text cannot be made"


def has_text(error: BaseException) -> bool:
    """Whether an exception, and those behind it, have a text."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        try:
            str(link)
        except BaseException:
            return False
        link = link.__cause__ or link.__context__
    return True
