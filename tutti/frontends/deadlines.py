"""How long a client waits, as headers say it. Pure. Knows no call: door.py gives calls their deadlines."""

from collections.abc import Iterable

from tutti.core.errors import InvalidArgument

# gRPC's header, which HTTP gateways pass on under its name, and Envoy's, in milliseconds.
TIMEOUT_HEADERS = frozenset({b"grpc-timeout", b"x-envoy-expected-rq-timeout-ms"})
_UNIT_NS = {b"H": 3600 * 10**9, b"M": 60 * 10**9, b"S": 10**9, b"m": 10**6, b"u": 1000, b"n": 1}


def timeout_ns(header: bytes, value: bytes) -> int:
    """What one of TIMEOUT_HEADERS says, at least 1. Raises InvalidArgument."""
    is_grpc = header == b"grpc-timeout"
    digits, unit_ns = (value[:-1], _UNIT_NS.get(value[-1:], 0)) if is_grpc else (value, 10**6)
    if not unit_ns or not digits.isdigit() or len(digits) > 8:
        expected = "at most 8 digits and a unit, one of HMSmun" if is_grpc else "at most 8 digits, milliseconds"
        raise InvalidArgument(f"header {header.decode()}: expected {expected}, got {value[:40].decode('latin-1')!r}")
    return max(1, int(digits) * unit_ns)


def least_ns(headers: Iterable[tuple[bytes, bytes]]) -> int:
    """The shortest time that lower-case headers name; 0 where none of them does. Raises InvalidArgument."""
    return min((timeout_ns(name, value) for name, value in headers if name in TIMEOUT_HEADERS), default=0)
