"""What a front-end process is told by the engine's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutti.frontends.api import Access, Limits


@dataclass(frozen=True, slots=True)
class Task:
    """`sockets` is the folder of the engine's Unix sockets: "engine" for calls, "http" and "grpc" for all else."""

    sockets: Path
    host: str
    http_port: int
    grpc_port: int
    limits: Limits
    http: Access
    grpc: Access
    http_tls: Any = None
