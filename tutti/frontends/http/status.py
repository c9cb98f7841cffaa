"""The one table from errors to HTTP status codes."""

from tutti.core import errors

_STATUS: dict[type[errors.InferError], int] = {
    errors.InvalidArgument: 400,
    errors.NotFound: 404,
    errors.Unavailable: 503,
    errors.DeadlineExceeded: 504,
    errors.Unsupported: 501,
    errors.AlreadyExists: 400,
    errors.Unknown: 400,
    errors.Cancelled: 400,
    errors.Internal: 500,
}


REFUSED: dict[str, tuple[int, str]] = {
    "restricted": (403, "This API is restricted"),
    "unauthenticated": (401, "an API key is needed: Authorization: Bearer KEY"),
}


def status_of(error: errors.InferError) -> int:
    return next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), 500)
