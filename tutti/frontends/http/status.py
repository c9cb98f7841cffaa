"""How HTTP tells failures: the one table from errors to status codes, and the gate's refusals."""

from collections.abc import Sequence

from tutti.core import errors
from tutti.frontends.door import Dialect

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


def http_headers(headers: Sequence[tuple[bytes, bytes]]) -> dict[str, str]:
    """Names are lower-case; of a repeated header the last one counts."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}


DIALECT = Dialect(
    "HTTP",
    _STATUS,
    500,
    {
        "restricted": (403, "This API is restricted"),
        "unauthenticated": (401, "an API key is needed: Authorization: Bearer KEY"),
    },
    http_headers,
)
