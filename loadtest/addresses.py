"""Addresses as people write them: HOST:PORT, perhaps as a URL over HTTP. Pure."""

from tutti.loadtest.errors import ScenarioError


def address(given: str) -> str:
    """HOST:PORT, without a scheme or a path. Raises ScenarioError for what is neither."""
    if given.startswith(("https://", "grpcs://")):
        raise ScenarioError(f"expected HOST:PORT, got '{given}': load tests go without TLS")
    plain = given.partition("://")[2] if given.startswith(("http://", "grpc://")) else given
    host, colon, port = plain.removesuffix("/metrics").rstrip("/").rpartition(":")
    if not colon or not _is_host(host):
        raise ScenarioError(f"expected HOST:PORT, as 127.0.0.1:8000, got '{given}'")
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65_536):
        raise ScenarioError(f"expected a port from 1 to 65535, got '{port}' in '{given}'")
    return f"{host or '127.0.0.1'}:{port}"


def split(given: str) -> tuple[str, int]:
    """The host and the port of an address."""
    host, _, port = given.rpartition(":")
    return host.strip("[]") or "127.0.0.1", int(port)


def _is_host(host: str) -> bool:
    if host.startswith("["):
        return host.endswith("]")
    return not set(host) & set("/:@ \t\n")
