"""What a front-end process is told to be. The engine's process writes it: it knows what the flags mean."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutti.frontends.door import Access
from tutti.frontends.size_limits import Limits
from tutti.observing.logs import Logs, Settings
from tutti.observing.request_log import RequestLog


@dataclass(frozen=True, slots=True)
class Logging:
    """What a front-end process logs, as the flags of the same names say."""

    settings: Settings
    access_log: str = ""
    slow_ms: float = 0.0

    def logs(self) -> Logs:
        settings = self.settings
        kinds = bool(settings["log_info"]), bool(settings["log_warning"]), bool(settings["log_error"])
        return Logs(int(settings["log_verbose_level"]), str(settings["log_file"]), str(settings["log_format"]), kinds)

    def requests(self, logs: Logs, stdout: int) -> RequestLog:
        """The log of requests; `stdout` is the server's standard output."""
        return RequestLog(logs, self.access_log, self.slow_ms, stdout)


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
    logging: Logging
    http_tls: Any = None

    def write(self) -> Path:
        """The file that a front-end process is started with."""
        path = self.folder / "task"
        path.write_bytes(pickle.dumps(self))
        return path
