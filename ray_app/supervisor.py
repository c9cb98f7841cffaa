"""The parent of a cluster of this machine alone: it starts another when that has ended, and leaves no process behind.

Ray keeps what it knows of a cluster in the memory of its head: when the head ends, or the process that started it, the
cluster is lost with all that it serves. Light: it imports nothing of what the cluster does.
"""

import asyncio
import logging
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tutti.app.restarts import End, Restarts
from tutti.app.supervisor import EngineProcess
from tutti.ray_app import processes

_log = logging.getLogger("tutti")

# Processes that are left of an ended cluster get this long to end by themselves.
GRACE_S = 2.0
# A process that was asked to end is killed this long after its time is up.
LATE_S = 10.0


class Supervisor:
    """Lives on one event loop."""

    def __init__(self, command: Sequence[str], exit_timeout_s: float) -> None:
        """`command` starts a cluster and serves on it, until it is told to end."""
        self._command = command
        self._exit_timeout_s = exit_timeout_s
        self._restarts = Restarts()
        self._stop = asyncio.Event()
        self._cluster: EngineProcess | None = None

    async def run(self) -> int:
        """Serve until told to end, or until the cluster cannot be started; returns the exit status."""
        processes.adopt_orphans()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._ask_to_stop)
        with tempfile.TemporaryDirectory(prefix="tutti-", ignore_cleanup_errors=True) as folder:
            while True:
                cluster = await self._serve(Path(folder))
                if self._stop.is_set():
                    return max(0, cluster.process.returncode or 0)
                then = self._restarts.after(cluster.ended(loop.time()))
                if isinstance(then, End):
                    return then.status
                message = f"the cluster of process {cluster.process.pid} has ended: {then.reason}"
                _log.error("%s; it is started anew in %g s, for the %d. time", message, then.delay_s, then.count)
                if await self._is_stopped_within(then.delay_s):
                    return 0

    async def _serve(self, folder: Path) -> EngineProcess:
        """One cluster, from its start until nothing is left of it."""
        cluster = self._cluster = await EngineProcess.start(self._command, folder)
        if self._stop.is_set():  # asked to stop while the process started
            cluster.process.terminate()
        following = asyncio.create_task(self._follow(cluster))
        await cluster.process.wait()
        await asyncio.wait([following], timeout=1.0)  # its last reports may still be under way
        following.cancel()
        self._cluster = None
        await asyncio.to_thread(processes.end_descendants, GRACE_S)
        return cluster

    async def _follow(self, cluster: EngineProcess) -> None:
        async for report in cluster.reports():
            if "ready" in report:
                cluster.ready_at_s = asyncio.get_running_loop().time()
            elif "failed" in report:
                cluster.failure = report["failed"]

    def _ask_to_stop(self) -> None:
        """The cluster's process is told each time: it ends at once when it is asked again."""
        is_first = not self._stop.is_set()
        self._stop.set()
        if self._cluster is None or self._cluster.process.returncode is not None:
            return
        self._cluster.process.terminate()
        if is_first:
            asyncio.get_running_loop().call_later(self._exit_timeout_s + LATE_S, self._cluster.kill)

    async def _is_stopped_within(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._stop.wait()
        except TimeoutError:
            return False
        return True


def run(arguments: Sequence[str], exit_timeout_s: float) -> int:
    """Serve as `tutti ARGUMENTS` says, on a cluster of this machine; returns the exit status."""
    command = [sys.executable, "-m", "tutti.app.cli", *arguments]

    async def serve() -> int:
        return await Supervisor(command, exit_timeout_s).run()

    return asyncio.run(serve())
