"""Addresses as people write them: HOST:PORT, perhaps as a URL over HTTP. Pure."""

from tutti.loadtest.errors import ScenarioError


def address(text: str) -> str:
    """HOST:PORT, without a scheme or a path. Raises ScenarioError for what is neither."""
    if text.startswith(("https://", "grpcs://")):
        raise ScenarioError(f"expected HOST:PORT, got '{text}': load tests go without TLS")
    plain = text.partition("://")[2] if text.startswith(("http://", "grpc://")) else text
    host, colon, port = plain.removesuffix("/metrics").rstrip("/").rpartition(":")
    if not colon or not _is_host(host):
        raise ScenarioError(f"expected HOST:PORT, as 127.0.0.1:8000, got '{text}'")
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65_536):
        raise ScenarioError(f"expected a port from 1 to 65535, got '{port}' in '{text}'")
    return f"{host or '127.0.0.1'}:{port}"


def split(address: str) -> tuple[str, int]:
    """The host and the port of an address."""
    host, _, port = address.rpartition(":")
    return host.strip("[]") or "127.0.0.1", int(port)


def _is_host(host: str) -> bool:
    if host.startswith("["):
        return host.endswith("]")
    return not set(host) & set("/:@ \t\n")
