"""Ports that the flags give to more than one front-end. Knows nothing of sockets."""

from itertools import combinations
from typing import Protocol

_EVERY = ("0.0.0.0", "::", "")
_NAMES = {"localhost": "127.0.0.1"}


class Options(Protocol):
    """The flags of addresses and ports."""

    host: str
    http_port: int
    grpc_port: int
    metrics_port: int
    http_address: str | None
    grpc_address: str | None
    metrics_address: str | None
    allow_http: bool
    allow_grpc: bool
    allow_metrics: bool


def given_twice(options: Options) -> str:
    """The error about two front-ends with one port on one address; "" if there are none."""
    host = options.http_address or options.host
    doors = (
        ("--http-port", host, options.http_port, options.allow_http),
        ("--grpc-port", options.grpc_address or options.host, options.grpc_port, options.allow_grpc),
        ("--metrics-port", options.metrics_address or host, options.metrics_port, options.allow_metrics),
    )
    open_doors = [
        (flag, _NAMES.get(address, address), port) for flag, address, port, is_open in doors if is_open and port
    ]
    for (flag, address, port), (other_flag, other_address, other_port) in combinations(open_doors, 2):
        is_shared = address == other_address or address in _EVERY or other_address in _EVERY
        if port == other_port and is_shared:
            return f"{flag} and {other_flag} are both {port}: expected a port for each, or 0 for any that is free"
    return ""
