"""The front-end processes of a server, as its engine's process starts, watches and ends them."""

import asyncio
import logging
import pickle
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from tutti.frontends.api import Api
from tutti.frontends.link import EngineEnd
from tutti.frontends.task import Task

_log = logging.getLogger(__name__)

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
RESTART_DELAY_S = 0.2


class FrontEnds:
    """Lives on one event loop. One that ends by itself is started anew."""

    def __init__(self, api: Api, sockets: Path) -> None:
        self._api = api
        self._sockets = sockets
        self._server: asyncio.Server | None = None
        self._reserved: list[socket.socket] = []
        self._processes: set[asyncio.subprocess.Process] = set()
        self._watchers: set[asyncio.Task[None]] = set()
        self._is_stopping = False

    async def start(self, count: int, host: str, http_port: int, grpc_port: int, http_tls: Any) -> tuple[int, int]:
        """Returns when all listen, with the HTTP and the gRPC port. Raises OSError when one cannot."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: EngineEnd(self._api), str(self._sockets / "engine"))
        ports = self._reserve(host, http_port), self._reserve(host, grpc_port)
        task = Task(self._sockets, host, *ports, self._api.limits, self._api.http, self._api.grpc, http_tls)
        path = self._sockets / "task"
        path.write_bytes(pickle.dumps(task))
        started = await asyncio.gather(*(self._start_one(path) for _ in range(count)))
        for process in started:
            watcher = loop.create_task(self._watch(process, path))
            self._watchers.add(watcher)
        return ports

    async def stop(self) -> None:
        """Let them end what is open."""
        self._is_stopping = True
        for watcher in self._watchers:
            watcher.cancel()
        for process in self._processes:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await asyncio.gather(*(process.wait() for process in self._processes))
        except TimeoutError:
            for process in self._processes:
                if process.returncode is None:
                    process.kill()
        if self._server is not None:
            self._server.close()
        for one in self._reserved:
            one.close()

    def _reserve(self, host: str, port: int) -> int:
        """Hold a port for the processes, which share it. Raises OSError when another server has it."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        if port:
            with socket.socket(family) as alone:
                alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                alone.bind((host, port))
        one = socket.socket(family)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        one.bind((host, port))
        self._reserved.append(one)
        return int(one.getsockname()[1])

    async def _start_one(self, path: Path) -> asyncio.subprocess.Process:
        command = [sys.executable, "-m", "tutti.frontends.worker", str(path)]
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, start_new_session=True
        )
        self._processes.add(process)
        assert process.stdout is not None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                line = await process.stdout.readline()
        except TimeoutError:
            line = b""
        if line.strip() != b"ready":
            raise OSError("a front-end process did not start")
        return process

    async def _watch(self, process: asyncio.subprocess.Process, path: Path) -> None:
        while not self._is_stopping:
            code = await process.wait()
            self._processes.discard(process)
            _log.error("a front-end process ended with status %d and is started anew", code)
            await asyncio.sleep(RESTART_DELAY_S)
            try:
                process = await self._start_one(path)
            except OSError as error:
                _log.error("%s", error)
