"""What a front-end process is told to be. The engine's process writes it: it knows what the flags mean."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutti.frontends.api import Access
from tutti.frontends.limits import Limits


@dataclass(frozen=True, slots=True)
class Task:
    """`folder` is for the sockets of all processes; each engine has a folder of its own in it."""

    folder: Path
    host: str
    http_port: int
    grpc_port: int
    limits: Limits
    http: Access
    grpc: Access
    http_tls: Any = None

    def write(self) -> Path:
        """The file that a front-end process is started with."""
        path = self.folder / "task"
        path.write_bytes(pickle.dumps(self))
        return path
