"""The parent of a server's processes: it starts the engine's anew when that has ended, in front of it the front-ends.

A process whose device has failed, or that a model has crashed, cannot be mended; another can take its place while the
front-end processes keep their clients' connections. Light: it imports nothing of what its processes do.
"""

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from tutti.app.reports import Supervised
from tutti.app.restarts import UNUSABLE, End, Ended, Restarts
from tutti.core.temporary_folders import Folder
from tutti.frontends.processes.pool import FrontEnds
from tutti.observing.logs import Logs

_log = logging.getLogger("tutti")

# A process that has reported a failed device ends by itself, or is killed: a kernel may hang for ever.
EXIT_DEADLINE_S = 6.0
# One that the driver holds on to may outlive even that.
KILL_TIMEOUT_S = 10.0
# Asked to stop, the engine's process ends by itself in the time that it has, or is killed so long afterwards.
_LATER_S = 1.0
# One that is not ready yet has no callers to wait for.
STOP_STARTING_S = 5.0


class EngineProcess:
    """One process of the engine, and what it has reported."""

    def __init__(self, process: asyncio.subprocess.Process, reports: asyncio.StreamReader, folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.failure = ""
        self.ready_at_s: float | None = None
        # Killed, and the driver holds on to it.
        self.is_given_up = asyncio.Event()
        self._reports = reports

    @classmethod
    async def start(cls, command: Sequence[str], folder: Path) -> "EngineProcess":
        ours, theirs = os.pipe()
        reader = asyncio.StreamReader()
        file = os.fdopen(ours, "rb", buffering=0)  # the reader's transport closes it
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), file)
        supervised = Supervised(theirs, os.getpid(), folder)
        try:
            process = await asyncio.create_subprocess_exec(
                *command, "--engine-of", str(supervised), pass_fds=[theirs], start_new_session=True
            )
        finally:
            os.close(theirs)
        return cls(process, reader, folder)

    async def reports(self) -> AsyncIterator[dict[str, Any]]:
        async for line in self._reports:
            yield json.loads(line)

    def ended(self, now_s: float) -> Ended:
        status = self.process.returncode
        ready_s = None if self.ready_at_s is None else now_s - self.ready_at_s
        return Ended(-signal.SIGKILL if status is None else status, self.failure, ready_s)

    def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()

    async def stop(self, timeout_s: float) -> None:
        """Ask it to end; kill it where it does not in time."""
        if self.process.returncode is None:
            self.process.terminate()
        limit_s = min(STOP_STARTING_S, timeout_s) if self.ready_at_s is None else timeout_s
        await _within(limit_s, self.process.wait())
        self.kill()
        await _within(KILL_TIMEOUT_S, self.process.wait())


class Supervisor:
    """Lives on one event loop."""

    def __init__(self, command: Sequence[str], front_ends: int, exit_timeout_s: float, logs: Logs) -> None:
        """`command` starts an engine, once told where its sockets are and which ports it has in front of it.

        Asked to stop, all processes end within `exit_timeout_s`. `logs` follow the engine's.
        """
        self._command = command
        self._logs = logs
        self._exit_timeout_s = exit_timeout_s
        self._is_late = False
        self._front_ends = FrontEnds(front_ends)
        self._restarts = Restarts()
        self._stop = asyncio.Event()
        self._broken = ""
        self._engine: EngineProcess | None = None
        self._starts = 0

    async def run(self, host: str, http_port: int, grpc_port: int) -> int:
        """Serve until told to end, or until the engine cannot be started; returns the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._ask_to_stop)
        try:
            wanted = (("http", http_port), ("grpc", grpc_port))
            ports = [self._front_ends.reserve(host, port, name) for name, port in wanted]
        except OSError as error:
            _log.error("cannot listen: %s", error)
            return UNUSABLE
        command = [*self._command, "--http-port", str(ports[0]), "--grpc-port", str(ports[1])]
        with Folder() as folder:
            try:
                status = await self._serve(command, folder, f"{host}: http {ports[0]}, grpc {ports[1]}")
            finally:
                await self._front_ends.stop(self._exit_timeout_s)
                if self._engine is not None:
                    await self._engine.stop(self._exit_timeout_s + _LATER_S)
        if self._broken:
            _log.error("cannot listen: %s", self._broken)
            return UNUSABLE
        if self._engine is not None and self._stop.is_set():  # it ended as it was asked to, or was killed
            return 1 if self._is_late else max(0, self._engine.process.returncode or 0)
        return status

    def _ask_to_stop(self) -> None:
        if self._stop.is_set():  # asked again: at once
            self._kill_all()
        else:
            asyncio.get_running_loop().call_later(self._exit_timeout_s + _LATER_S, self._end_late)
        self._stop.set()

    def _end_late(self) -> None:
        _log.error("not all has ended within %g s (--exit-timeout-secs): it is killed", self._exit_timeout_s)
        self._is_late = True
        self._kill_all()

    def _kill_all(self) -> None:
        self._front_ends.kill()
        if self._engine is not None:
            self._engine.kill()

    async def _serve(self, command: Sequence[str], folder: Path, addresses: str) -> int:
        loop = asyncio.get_running_loop()
        while not self._stop.is_set():
            self._starts += 1
            home = folder / str(self._starts)
            home.mkdir()
            engine = self._engine = await EngineProcess.start(command, home)
            following = asyncio.create_task(self._follow(engine, addresses))
            await _first(engine.process.wait(), engine.is_given_up.wait(), self._stop.wait())
            if self._stop.is_set():
                following.cancel()
                break
            await _within(1.0, following)  # the last that it has reported
            self._engine = None
            then = self._restarts.after(engine.ended(loop.time()))
            if isinstance(then, End):
                return then.status
            self._front_ends.close(then.reason)
            reason = f"the engine's process {engine.process.pid} has ended: {then.reason}"
            _log.error("%s; it is started anew in %g s, for the %d. time", reason, then.delay_s, then.count)
            await _within(then.delay_s, self._stop.wait())
        return 0

    async def _follow(self, engine: EngineProcess, addresses: str) -> None:
        """Do what the engine's reports ask for, until it ends."""
        opening: asyncio.Task[None] | None = None
        try:
            async for report in engine.reports():
                if "task" in report:
                    self._front_ends.start(Path(report["task"]))
                elif "ready" in report:
                    engine.ready_at_s = asyncio.get_running_loop().time()
                    opening = asyncio.create_task(self._open(engine, addresses))
                elif "logs" in report:
                    self._logs.update(report["logs"])
                elif "failed" in report:
                    engine.failure = engine.failure or report["failed"]
                    self._front_ends.close(engine.failure)
                    asyncio.get_running_loop().call_later(EXIT_DEADLINE_S, self._give_up, engine)
        finally:
            if opening is not None:
                opening.cancel()

    async def _open(self, engine: EngineProcess, addresses: str) -> None:
        try:
            await self._front_ends.open(engine.folder)
        except OSError as error:
            self._broken = str(error)
            self._stop.set()
            return
        _log.info("listening on %s, engine in process %d", addresses, engine.process.pid)

    def _give_up(self, engine: EngineProcess) -> None:
        if engine.process.returncode is None:
            _log.error("the engine's process %d does not end by itself and is killed", engine.process.pid)
            engine.kill()
            asyncio.get_running_loop().call_later(KILL_TIMEOUT_S, engine.is_given_up.set)


async def _first(*work: Any) -> None:
    """Until one of them is done; the others are not waited for."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in work]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


async def _within(timeout_s: float, work: Any) -> None:
    """Wait for it, but no longer than that."""
    task = asyncio.ensure_future(work)
    await asyncio.wait([task], timeout=timeout_s)
    task.cancel()


def run(
    arguments: Sequence[str],
    host: str,
    http_port: int,
    grpc_port: int,
    front_ends: int,
    exit_timeout_s: float,
    logs: Logs,
) -> int:
    """Serve as `tutti ARGUMENTS` says, in front-end processes and an engine's; returns the exit status."""
    command = [sys.executable, "-m", "tutti.app.cli", *arguments]

    async def serve() -> int:
        return await Supervisor(command, front_ends, exit_timeout_s, logs).run(host, http_port, grpc_port)

    return asyncio.run(serve())
