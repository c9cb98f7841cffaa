"""A front-end process: the same HTTP and gRPC front-ends, on ports that it shares with its siblings.

What they decode goes over the link to the engine's process; everything but plain infer is passed on to it whole. It
outlives that process: its supervisor tells it, on its standard input, of each engine, and ends with it. Run as a module
with how many of its kind there are, the path of a file that says what to do, and the descriptor of the server's
standard output, -1 where there is none.
"""

import asyncio
import json
import logging
import os
import pickle
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import grpc
import uvloop

from tutti.core import garbage
from tutti.core.errors import Unavailable
from tutti.frontends.grpc.native import GrpcFront
from tutti.frontends.http.infer import HttpFront
from tutti.frontends.processes.link import FrontEnd, RegionsElsewhere
from tutti.frontends.processes.relay import Relay
from tutti.frontends.processes.worker_task import Task
from tutti.frontends.v2.api import Api
from tutti.observing.logs import Logs
from tutti.observing.request_log import RequestLog

_log = logging.getLogger(__name__)

# How long what is open may take when the process is asked to stop.
_GRACE_S = 5.0


async def serve(task: Task, stdout: int) -> None:
    """Serve until told to end, or until the supervisor has gone. `stdout` is its standard output, which is not ours."""
    logs = task.logging.logs()
    logs.install()
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    link = FrontEnd(lambda: streams.refuse_soon(), logs.update)
    streams = Streams(task.folder / f"streams-{os.getpid()}", link)
    ports = Ports(task, link, streams.path, logs, task.logging.requests(logs, stdout))
    following = asyncio.create_task(follow(task.folder, link, streams, ports, stop))
    await stop.wait()
    following.cancel()
    await ports.close()
    await streams.close()


class Ports:
    """The HTTP and the gRPC server."""

    def __init__(self, task: Task, link: FrontEnd, streams: Path, logs: Logs, requests: RequestLog) -> None:
        engine, regions, traces = cast(Any, link), cast(Any, RegionsElsewhere()), cast(Any, link.traces)
        api = Api(
            engine, task.limits, task.http, task.grpc, regions, traces, logs, is_front_end=True, requests=requests
        )
        self._requests = requests
        self._task = task
        self._grpc = GrpcFront(api, task.host, task.grpc_port, str(streams), link.ask_raw, shares_port=True)
        self._http = HttpFront(Relay(link, task.http.gate, requests), api, link.memory)
        self._is_open = False

    async def open(self) -> None:
        """Listen, unless it does already."""
        if self._is_open:
            return
        self._is_open = True
        task = self._task
        self._grpc.start()
        tls = task.http_tls.context() if task.http_tls is not None else None
        await self._http.start(task.host, task.http_port, reuse_port=True, tls=tls)
        garbage.settle()

    async def close(self) -> None:
        """Let what is open end, and refuse what does not in time."""
        if self._is_open:
            late = Unavailable(f"the server stops, and the request had not ended within {_GRACE_S:g} s")
            await asyncio.gather(self._http.stop(0.0, _GRACE_S, late), self._grpc.finish(0.0, _GRACE_S))
            self._grpc.refuse_open(late)
            self._grpc.stop()
        self._requests.close()


async def follow(folder: Path, link: FrontEnd, streams: "Streams", ports: Ports, stop: asyncio.Event) -> None:
    """Do what the supervisor says, to its end."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    try:
        async for line in reader:
            await _obey(json.loads(line), link, streams, ports)
        shutil.rmtree(folder, ignore_errors=True)  # the supervisor has been killed, and cannot
    except Exception:
        _log.exception("a front-end process cannot go on")
    stop.set()


async def _obey(told: dict[str, Any], link: FrontEnd, streams: "Streams", ports: Ports) -> None:
    if "reason" in told:
        link.reason, link.is_announced = told["reason"], False
        await streams.refuse()
        await ports.open()
    elif "engine" in told:
        engine = Path(told["engine"])
        try:
            await link.connect(engine)
        except OSError as error:  # it has ended already: the supervisor will tell of another
            _log.debug("the engine does not answer: %s", error)
            return
        await streams.send_to(engine / "grpc")
        await ports.open()
        print(f"linked {engine}", flush=True)
    elif told.get("ready"):
        link.is_announced = link.folder is not None


class Streams:
    """The Unix socket, at `path`, where the native gRPC server sends what it does not serve: streams.

    It leads to the engine's server, or to one here that refuses them.
    """

    def __init__(self, path: Path, link: FrontEnd) -> None:
        self.path = path
        self._link = link
        self._refusing: Any = None
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def send_to(self, engine: Path) -> None:
        async with self._turn:
            self._lead_to(engine)
            if self._refusing is not None:  # it must not keep the connection that it has
                refusing, self._refusing = self._refusing, None
                await refusing.stop(None)

    def refuse_soon(self) -> None:
        task = asyncio.get_running_loop().create_task(self.refuse())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def refuse(self) -> None:
        """Refuse streams, if there is no engine."""
        async with self._turn:
            if self._refusing is not None or self._link.folder is not None:
                return
            here = self.path.with_name(self.path.name + ".refusing")
            self._refusing = grpc.aio.server()
            self._refusing.add_generic_rpc_handlers((_Refusal(self._link),))
            self._refusing.add_insecure_port(f"unix:{here}")
            await self._refusing.start()
            self._lead_to(here)

    async def close(self) -> None:
        if self._refusing is not None:
            await self._refusing.stop(None)
        self.path.unlink(missing_ok=True)

    def _lead_to(self, socket: Path) -> None:
        new = self.path.with_name(self.path.name + ".new")
        new.unlink(missing_ok=True)
        new.symlink_to(socket)
        new.replace(self.path)


class _Refusal(grpc.GenericRpcHandler):
    """Ends whatever comes."""

    def __init__(self, link: FrontEnd) -> None:
        self._link = link

    def service(self, _: Any) -> Any:
        async def refuse(__: Any, context: Any) -> None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, self._link.refusal.message)

        return grpc.stream_stream_rpc_method_handler(refuse)


if __name__ == "__main__":
    told: Task = pickle.loads(Path(sys.argv[2]).read_bytes())
    uvloop.run(serve(replace(told, limits=told.limits.of_each(int(sys.argv[1]))), int(sys.argv[3])))
