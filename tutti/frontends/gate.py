"""Who may call what: restricted APIs and API keys. Pure. Every route of every protocol passes through one Gate.

Names of the APIs are tritonserver's, for `--http-restricted-api` and `--grpc-restricted-protocol`.
"""

import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from tutti.core.errors import ConfigError, sayable

Category = Literal[
    "health", "metadata", "inference", "shared-memory", "model-config", "model-repository", "statistics", "trace",
    "logging",
]  # fmt: skip
CATEGORIES: tuple[str, ...] = get_args(Category)
GRPC_HEADER_PREFIX = "triton-grpc-protocol-"

# What RFC 9110 has a header's name be.
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")

Refusal = Literal["", "restricted", "unauthenticated"]


@dataclass(frozen=True, slots=True)
class Gate:
    """`restricted` maps an API to the (header, value) that opens it; with `api_keys` every call needs one of them.

    Health does not: load balancers and Kubernetes' probes have no keys. (The native gRPC server asks for one before a
    gate is asked.) Header names are lower-case.
    """

    restricted: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    api_keys: tuple[str, ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether every call passes, so that `check` need not be asked."""
        return not self.restricted and not self.api_keys

    def check(self, category: Category | None, headers: Mapping[str, str]) -> Refusal:
        """Why a call must not pass, "" if it may. Without a category, as the metrics page, only the key counts."""
        if self.api_keys and category != "health" and not any(self._has_key(headers)):
            return "unauthenticated"
        needed = self.restricted.get(category or "")
        if needed is not None and not _equal(headers.get(needed[0], ""), needed[1]):
            return "restricted"
        return ""

    def _has_key(self, headers: Mapping[str, str]) -> list[bool]:
        """Compare with each key, even after a match: the time must not tell which key it was."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        shown = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return [_equal(shown, key) for key in self.api_keys]


def _equal(shown: str, expected: str) -> bool:
    return hmac.compare_digest(shown.encode(), expected.encode())


def parse_restricted(arguments: Sequence[str], header_prefix: str = "") -> dict[str, tuple[str, str]]:
    """`API[,API]...:KEY=VALUE` of each flag. Raises ConfigError for an unknown API, or one that is named twice."""
    flag = "--grpc-restricted-protocol" if header_prefix else "--http-restricted-api"
    restricted: dict[str, tuple[str, str]] = {}
    for argument in arguments:
        names, colon, pair = argument.partition(":")
        key, equals, value = pair.partition("=")
        if not colon or not equals or not key or not value:
            raise ConfigError(f"{flag} '{sayable(argument)}': expected API[,API]...:KEY=VALUE")
        if not _HEADER.fullmatch(key):
            raise ConfigError(f"{flag} '{sayable(argument)}': expected the name of a header, got '{sayable(key)}'")
        if not (value.isascii() and value.isprintable()):
            problem = "expected the value of a header, of ASCII characters that can be seen"
            raise ConfigError(f"{flag} '{sayable(key)}': {problem}, got {value!a}")
        for name in names.split(","):
            if name not in CATEGORIES:
                raise ConfigError(f"{flag}: '{sayable(name)}' is no API: expected one of {', '.join(CATEGORIES)}")
            if name in restricted:
                raise ConfigError(f"{flag}: '{name}' is given more than once")
            restricted[name] = (header_prefix + key.lower(), value)
    return restricted


def parse_api_keys(text: str) -> tuple[str, ...]:
    """One key a line; empty lines and those that begin with # do not count. Raises ConfigError when none is left."""
    lines = (line.strip() for line in text.splitlines())
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ConfigError("the API key file has no key in it")
    return keys
