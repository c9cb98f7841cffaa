"""A front-end process: the same HTTP and gRPC front-ends, on ports that it shares with its siblings.

What they decode goes over the link to the engine's process; everything but plain infer is passed on to it whole. Run as
a module with the path of a file that says what to do.
"""

import asyncio
import pickle
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import uvloop

from tutti import collector
from tutti.frontends.api import Api
from tutti.frontends.grpc import GrpcFront
from tutti.frontends.http import HttpFront
from tutti.frontends.http_connection import Exchange
from tutti.frontends.link import FrontEnd, RegionsElsewhere
from tutti.frontends.task import Task

_HOP_HEADERS = frozenset({b"connection", b"keep-alive", b"content-length", b"transfer-encoding", b"expect"})


async def serve(task: Task) -> None:
    """Serve until told to end, or until the engine's process has gone."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    link = await FrontEnd.connect(task.sockets / "engine", stop.set)
    engine, regions = cast(Any, link), cast(Any, RegionsElsewhere())
    api = Api(engine, task.limits, task.http, task.grpc, shared_memory=regions, is_front_end=True)
    grpc = GrpcFront(api, task.host, task.grpc_port, str(task.sockets / "grpc"), link.ask_raw, shares_port=True)
    grpc.start()
    http = HttpFront(pass_on(task.sockets / "http"), api)
    tls = task.http_tls.context() if task.http_tls is not None else None
    await http.start(task.host, task.http_port, reuse_port=True, tls=tls)
    collector.settle()
    print("ready", flush=True)
    await stop.wait()
    await http.stop()
    grpc.stop()


def pass_on(path: Path) -> Any:
    """An app that has the engine's own HTTP server answer; the connection ends with the answer."""

    async def app(scope: Any, _: Any, __: Any) -> None:
        exchange: Exchange = scope["exchange"]
        reader, writer = await asyncio.open_unix_connection(str(path))
        try:
            writer.writelines(_request(exchange))
            exchange.keep_alive = False
            while data := await reader.read(65536):
                await exchange.connection.send_part(exchange, data)
            exchange.connection.deliver(exchange, b"")
        finally:
            writer.close()

    return app


def _request(exchange: Exchange) -> Sequence[Any]:
    head = [b"%s %s HTTP/1.1" % (exchange.method, exchange.url)]
    head += [b"%s: %s" % header for header in exchange.headers if header[0] not in _HOP_HEADERS]
    head += [b"content-length: %d" % len(exchange.body), b"connection: close", b"", b""]
    return [b"\r\n".join(head), exchange.body]


if __name__ == "__main__":
    uvloop.run(serve(pickle.loads(Path(sys.argv[1]).read_bytes())))
