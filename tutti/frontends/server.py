"""All front-ends of one process over one engine: HTTP, gRPC and metrics, started and stopped together."""

import logging
from dataclasses import dataclass

from tutti.engine import Engine
from tutti.frontends import http_api
from tutti.frontends.api import Limits
from tutti.frontends.grpc import GrpcFront
from tutti.frontends.http import HttpFront
from tutti.metrics import Collect, Metrics

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the front-ends listen. Port 0 lets the system choose; None leaves a front-end out."""

    host: str = "127.0.0.1"
    http_port: int | None = 8000
    grpc_port: int | None = 8001
    metrics_port: int | None = 8002


class Server:
    """The listening front-ends. Lives on one event loop."""

    def __init__(
        self, engine: Engine, addresses: Addresses, limits: Limits | None = None, extra: Collect | None = None
    ):
        self._engine = engine
        self._addresses = addresses
        self._limits = limits or Limits()
        self._extra = extra
        self._http: list[HttpFront] = []
        self._grpc: GrpcFront | None = None

    async def start(self) -> Addresses:
        """Listen everywhere; returns the addresses with the ports really taken. Raises OSError if one is in use."""
        wanted = self._addresses
        http_port = grpc_port = metrics_port = None
        if wanted.http_port is not None:
            front = HttpFront(http_api.make_app(self._engine), self._engine, self._limits)
            self._http.append(front)
            http_port = await front.start(wanted.host, wanted.http_port)
        if wanted.grpc_port is not None:
            self._grpc = GrpcFront(self._engine, wanted.host, wanted.grpc_port, self._limits)
            grpc_port = self._grpc.start()
        if wanted.metrics_port is not None:
            metrics = HttpFront(http_api.metrics_app(Metrics(self._engine, self._extra).render))
            self._http.append(metrics)
            metrics_port = await metrics.start(wanted.host, wanted.metrics_port)
        taken = Addresses(wanted.host, http_port, grpc_port, metrics_port)
        _log.info("listening on %s: http %s, grpc %s, metrics %s", wanted.host, http_port, grpc_port, metrics_port)
        return taken

    async def stop(self) -> None:
        """Stop listening; open HTTP exchanges may end."""
        for front in self._http:
            await front.stop()
        if self._grpc is not None:
            self._grpc.stop()
