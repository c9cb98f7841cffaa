"""The front-end processes of a server, as their supervisor starts, tells, watches and ends them.

They outlive the engine's process: each is told on its standard input where the engine is, or why there is none, and
says on its standard output when it has connected. Imports nothing of what they do.
"""

import asyncio
import errno
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

_log = logging.getLogger(__name__)

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
RESTART_DELAY_S = 0.2
_CONNECT_TIMEOUT_S = 1.0


class _Place:
    """One of the processes, and its successors."""

    def __init__(self) -> None:
        self.process: asyncio.subprocess.Process | None = None
        self.linked = asyncio.Event()

    def tell(self, line: Mapping[str, object]) -> None:
        if self.process is not None and self.process.returncode is None:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(line).encode() + b"\n")


def check_free(host: str, port: int, family: int, name: str) -> None:
    """Raises OSError when another server listens on a port that is to be shared, or the host is not this machine.

    The message has the address and the flag that gave it: `name` is "http", "grpc" or "metrics".
    """
    try:
        _check_free(host, port, family)
    except OSError as error:
        flag = f"--{name}-port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else f"--host or --{name}-address"
        raise OSError(error.errno, f"{host}:{port}: {error.strerror} ({flag})") from None


def _check_free(host: str, port: int, family: int) -> None:
    """Raises OSError if anybody listens on a port. A connection tells: closed ones may hold a port, too."""
    with socket.socket(family) as alone:
        alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            alone.bind((host, port))
            return
        except (UnicodeError, TypeError):  # either, by how the socket encodes the name
            raise OSError(errno.EINVAL, "expected an address, or the name of a host") from None
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            taken = error
    with socket.socket(family) as client:
        client.settimeout(_CONNECT_TIMEOUT_S)
        if client.connect_ex((host, port)) != errno.ECONNREFUSED:
            raise taken


def _standard_output() -> int:
    """A descriptor of its own for it; -1 where there is none."""
    try:
        return os.dup(1)
    except OSError:
        return -1


class FrontEnds:
    """Lives on one event loop. One that ends by itself is started anew."""

    def __init__(self, count: int) -> None:
        self._places = [_Place() for _ in range(count)]
        self._reserved: list[socket.socket] = []
        self._keepers: list[asyncio.Task[None]] = []
        # What a process that is started now is told first.
        self._state: list[Mapping[str, object]] = []
        self._engine: Path | None = None
        self._has_opened = False
        self._is_stopping = False
        self._failed = asyncio.Event()
        # This process's standard output, which front-end processes write to: their own leads here.
        self._stdout = _standard_output()

    def reserve(self, host: str, port: int, name: str = "http") -> int:
        """Hold a port for the processes, which share it. Raises OSError when another server has it, naming it."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        check_free(host, port, family, name)
        listener = socket.socket(family)
        # Connections that the last server closed hold the port for a minute, but for sockets with the same option as
        # its own. Which that was nobody knows: both are set.
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            listener.setsockopt(socket.SOL_SOCKET, option, 1)
        listener.bind((host, port))
        self._reserved.append(listener)
        return int(listener.getsockname()[1])

    def start(self, task: Path) -> None:
        """Let them begin; the first time, they listen once they are told of an engine."""
        if not self._keepers:
            self._keepers = [asyncio.create_task(self._keep(place, task)) for place in self._places]

    async def open(self, engine: Path) -> None:
        """Have all send to the engine whose sockets are in that folder; returns when all do, and listen.

        Raises OSError when one cannot.
        """
        self._engine = engine
        self._tell_all({"engine": str(engine)})
        linked = [asyncio.create_task(place.linked.wait()) for place in self._places]
        failed = asyncio.create_task(self._failed.wait())
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                for link in linked:
                    await asyncio.wait([link, failed], return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise OSError(f"a front-end process did not start in {START_TIMEOUT_S:g} s") from None
        finally:
            for waiting in (*linked, failed):
                waiting.cancel()
        if self._failed.is_set():
            raise OSError("a front-end process did not start")
        self._has_opened = True
        self._tell_all({"ready": True}, keeps=True)

    def close(self, reason: str) -> None:
        """There is no engine, or soon will be none: they say so to their clients."""
        for place in self._places:
            place.linked.clear()
        if self._has_opened:
            self._tell_all({"reason": reason})

    async def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Let them end what is open: they have that time, or STOP_TIMEOUT_S where it is less."""
        self._is_stopping = True
        for place in self._places:
            if place.process is not None and place.process.returncode is None:
                place.process.send_signal(signal.SIGTERM)
        if self._keepers:
            _, late = await asyncio.wait(self._keepers, timeout=min(timeout_s, STOP_TIMEOUT_S))
            self.kill()
            for keeper in late:
                keeper.cancel()
        for listener in self._reserved:
            listener.close()

    def kill(self) -> None:
        for place in self._places:
            if place.process is not None and place.process.returncode is None:
                place.process.kill()

    def _tell_all(self, line: Mapping[str, object], keeps: bool = False) -> None:
        self._state = [*self._state, line] if keeps else [line]
        for place in self._places:
            place.tell(line)

    async def _keep(self, place: _Place, task: Path) -> None:
        while True:
            worker = [sys.executable, "-m", "tutti.frontends.processes.worker"]
            command = [*worker, str(len(self._places)), str(task), str(self._stdout)]
            passed = [self._stdout] if self._stdout >= 0 else []
            pipe = asyncio.subprocess.PIPE
            process = place.process = await asyncio.create_subprocess_exec(
                *command, stdin=pipe, stdout=pipe, pass_fds=passed, start_new_session=True
            )
            if self._is_stopping:
                process.kill()
            for line in self._state:
                place.tell(line)
            assert process.stdout is not None
            async for said in process.stdout:
                if said.decode().strip() == f"linked {self._engine}":
                    place.linked.set()
            status = await process.wait()
            place.linked.clear()
            if self._is_stopping:
                return
            if not self._has_opened:
                self._failed.set()
                return
            _log.error("a front-end process ended with status %d and is started anew", status)
            await asyncio.sleep(RESTART_DELAY_S)
