"""A listening HTTP/1.1 server over asyncio and llhttp, whose requests an ASGI app answers.

Owns the sockets, their connections from the first to the last, and the app's tasks. Each connection's duties are in
connection.py. infer.py has infer requests answered without the app.
"""

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from tutti.core.errors import InferError
from tutti.core.types import Call, now_ns
from tutti.frontends.held_bytes import STALLED_S, WRITE_TIMEOUT_S, Holding
from tutti.frontends.http.asgi import Reply, scope_of
from tutti.frontends.http.connection import Connection
from tutti.frontends.http.exchange import Exchange, Head
from tutti.frontends.http.status import DIALECT
from tutti.frontends.size_limits import Limits

_SWEEP_S = 5.0

AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]


def new_memory(size: int) -> memoryview:
    """Memory of this process: unlike a bytearray not written before it is needed. Raises MemoryError."""
    array: Any = np.empty(size, np.uint8)
    return memoryview(array)


class HttpServer:
    """One listening HTTP server. Build and use it on one event loop."""

    def __init__(
        self,
        app: AsgiApp,
        limits: Limits | None = None,
        holding: Holding | None = None,
        memory: Callable[[int], memoryview] | None = None,
    ) -> None:
        """Large bodies are received in `memory(size)`; what is held counts into `holding`."""
        self.limits = limits or Limits()
        self.holding = holding or Holding(self.limits.max_inflight_bytes)
        self.memory = memory or new_memory
        self.connections: set[Connection] = set()
        # Connections whose clients leave answers unread.
        self.stalled: set[Connection] = set()
        self.is_draining = False
        self.heads: dict[bytes, Head] = {}
        self._app = app
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._sweep: asyncio.TimerHandle | None = None

    async def start(self, host: str, port: int, reuse_port: bool = False, tls: ssl.SSLContext | None = None) -> int:
        """Listen; returns the port, chosen by the system for 0."""
        self._server = await self._loop.create_server(
            lambda: Connection(self), host, port, reuse_port=reuse_port or None, backlog=1024, ssl=tls
        )
        self._sweep = self._loop.call_later(_SWEEP_S, self._close_idle)
        return int(self._server.sockets[0].getsockname()[1])

    async def start_unix(self, path: Path) -> None:
        """Listen on a Unix socket that only this user can reach, by its folder."""
        self._server = await self._loop.create_unix_server(lambda: Connection(self), str(path))
        self._sweep = self._loop.call_later(_SWEEP_S, self._close_idle)

    async def stop(self, drain_s: float = 0.0, grace_s: float = 5.0, error: InferError | None = None) -> None:
        """Stop listening, let open exchanges end, then close the connections.

        For `drain_s` before that, each connection that asks again is told to close with its answer. With `error` those
        that have not ended are answered with it.
        """
        if self._sweep is not None:
            self._sweep.cancel()
        if self._server is not None:
            self._server.close()
        self.is_draining = True
        deadline = self._loop.time() + drain_s
        while self.connections and self._loop.time() < deadline:
            await asyncio.sleep(0.01)
        deadline = self._loop.time() + grace_s
        while any(connection.pending for connection in self.connections) and self._loop.time() < deadline:
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            if error is not None:
                connection.refuse_open(DIALECT.code_of(error), error.message)
            connection.end()
        for task in self._tasks:
            task.cancel()

    def handle(self, exchange: Exchange) -> None:
        """A complete request."""
        self._start_app(exchange)

    def refused(self, exchange: Exchange, status: int, message: str) -> None:
        """An exchange has been answered with an error, before anybody was asked for its answer."""

    def app_answered(self, exchange: Exchange, reply: Reply, call: Call | None, took_ns: int) -> None:
        """The app is through with an exchange, `call` being the inference that it was; it may not have answered."""

    def _start_app(self, exchange: Exchange) -> None:
        task = exchange.task = self._loop.create_task(self._run_app(exchange))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_app(self, exchange: Exchange) -> None:
        """Let the app answer: in one piece, or as it comes where the app sends it in parts."""
        reply = Reply(exchange)
        scope = scope_of(exchange)
        began_ns = now_ns()
        is_received = False

        async def receive() -> dict[str, Any]:
            nonlocal is_received
            if is_received:  # an app that asks again waits for the client to go: it is cancelled then
                await asyncio.Event().wait()
            is_received = True
            body, exchange.body = exchange.body, b""  # the app gets a copy: let go of the original
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        try:
            await self._app(scope, receive, reply.send)
        except Exception as error:
            request = exchange.method.decode("latin-1"), exchange.url.decode("latin-1")
            failure = DIALECT.failure(error, "%s %s failed", *request)
            if exchange.response is not None:  # the app raises after its answer, to have it logged
                return
            if exchange.parts is None:
                exchange.connection.respond(exchange, *failure)
                reply.status = 0  # `respond` has noted it
            else:
                exchange.connection.abort()  # half a response is out: only a broken connection tells the client
        finally:
            exchange.task = None
            exchange.release()
            self.app_answered(exchange, reply, scope.get("call"), now_ns() - began_ns)

    def make_room(self, size: int) -> None:
        """Break with clients that read nothing of their answers, until there is room, if they are enough."""
        now = self._loop.time()
        for connection in sorted(self.stalled, key=lambda stalled: stalled.read_at):
            if self.holding.held + size <= self.holding.limit:
                return
            connection.close_if_unread(now, STALLED_S)

    def _close_idle(self) -> None:
        now = self._loop.time()
        for connection in list(self.connections):
            connection.close_if_idle(now)
        for connection in list(self.stalled):
            connection.close_if_unread(now, WRITE_TIMEOUT_S)
        self._sweep = self._loop.call_later(_SWEEP_S, self._close_idle)
