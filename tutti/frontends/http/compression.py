"""HTTP content codings, gzip and deflate, as Triton knows them. Pure. Sizes are bytes."""

import zlib

from tutti.core.errors import InvalidArgument, Unsupported
from tutti.core.types import Raw

# zlib's window bits say which wrapper the data has. HTTP's deflate is zlib's format.
_WINDOW_BITS = {"gzip": 31, "deflate": 15}


def decompress(data: Raw, encoding: str, limit: int) -> bytes:
    """The content of a request body. Raises InvalidArgument when it is broken or larger than `limit`."""
    if encoding not in _WINDOW_BITS:
        raise Unsupported(f"Content-Encoding '{encoding}' is not supported, only gzip and deflate")
    inflater = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        content = inflater.decompress(data, limit + 1)  # 0 would be no limit at all
    except zlib.error as error:
        raise InvalidArgument(f"the request body is not {encoding}: {error}") from None
    if len(content) > limit:
        raise InvalidArgument(f"the decompressed request body is larger than {limit} bytes")
    if not inflater.eof:
        raise InvalidArgument(f"the request body is not {encoding}: it is cut off")
    if inflater.unused_data:
        raise InvalidArgument(f"the request body has {len(inflater.unused_data)} bytes after its {encoding} data")
    return content


def compress(data: bytes, encoding: str) -> bytes:
    """`data` in a coding that `choose` returned."""
    deflater = zlib.compressobj(level=1, wbits=_WINDOW_BITS[encoding])
    return deflater.compress(data) + deflater.flush()


def choose(accept_encoding: str) -> str:
    """The coding for a response, by the request's Accept-Encoding: the one of most weight, "" for none.

    Of equal ones gzip comes before deflate, and either before none.
    """
    weights: dict[str, float] = {}
    for part in accept_encoding.lower().split(","):
        coding, _, weight = part.partition(";")
        value = weight.strip().replace(" ", "").removeprefix("q=") or "1"
        try:
            weights[coding.strip()] = float(value)
        except ValueError:
            weights[coding.strip()] = 0.0
    best = max(_WINDOW_BITS, key=lambda coding: weights.get(coding, 0.0))
    weight_of_best = weights.get(best, 0.0)
    return best if weight_of_best > 0 and weight_of_best >= weights.get("identity", 0.0) else ""
