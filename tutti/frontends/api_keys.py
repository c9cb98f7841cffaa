"""The API key that a command shows a server: the first of a file, as `tutti serve --api-key-file` reads it.

Never of a command line, which every user of the machine can read. No message says the key.
"""

import argparse
from pathlib import Path

from tutti.core import files
from tutti.core.errors import ConfigError, reason, sayable
from tutti.frontends import gate

FLAG = "--api-key-file"


def add_to(parser: argparse.ArgumentParser) -> None:
    """The flag, of a command that asks a server."""
    help_text = "show the server the first key of this file (default: none)"
    parser.add_argument(FLAG, type=Path, metavar="FILE", help=help_text)


def headers(path: Path | None) -> dict[str, str]:
    """What shows the key, over HTTP and as gRPC's metadata; nothing without a file. Raises ConfigError."""
    if path is None:
        return {}
    try:
        key = gate.parse_api_keys(files.read_utf8(path))[0]
    except (OSError, ValueError, ConfigError) as error:
        raise ConfigError(f"{FLAG} {sayable(path)}: {reason(error)}") from None
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{FLAG} {sayable(path)}: its first key is not of ASCII characters that can be seen")
    return {"authorization": f"Bearer {key}"}
