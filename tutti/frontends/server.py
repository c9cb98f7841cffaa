"""All front-ends of one process over one Api: HTTP, gRPC and metrics, started and stopped together."""

import asyncio
import logging
import socket
import ssl
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tutti.errors import ConfigError
from tutti.frontends import http_api
from tutti.frontends.api import Api
from tutti.frontends.front_ends import FrontEnds
from tutti.frontends.grpc import GrpcFront
from tutti.frontends.grpc_aio import GrpcioFront, TlsFiles
from tutti.frontends.http import HttpFront
from tutti.metrics import Collect, Metrics

_log = logging.getLogger(__name__)

GrpcServer = Literal["native", "grpcio"]


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files. With `root_certificate` clients must show a certificate that it signed."""

    certificate: Path
    key: Path
    root_certificate: Path | None = None

    def context(self) -> ssl.SSLContext:
        """For HTTP. Raises ConfigError when a file cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.certificate, self.key)
            if self.root_certificate is not None:
                context.load_verify_locations(self.root_certificate)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"TLS: {self.certificate}, {self.key}: {error}") from None
        return context

    def files(self) -> TlsFiles:
        """For gRPC. Raises ConfigError when a file cannot be used."""
        self.context()  # grpcio says nothing of a bad file
        root = self.root_certificate
        return TlsFiles(
            self.certificate.read_bytes(), self.key.read_bytes(), None if root is None else root.read_bytes()
        )


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the front-ends listen. Port 0 lets the system choose; None leaves a front-end out."""

    host: str = "127.0.0.1"
    http_port: int | None = 8000
    grpc_port: int | None = 8001
    metrics_port: int | None = 8002
    http_tls: Tls | None = None
    grpc_tls: Tls | None = None
    grpc_server: GrpcServer = "native"
    front_end_processes: int = 1
    # With other processes, which may come and go; each then takes the first free one of so many metrics ports.
    shares_ports: bool = False
    metrics_ports: int = 1

    def check_free(self) -> None:
        """Raises OSError when somebody else listens on a port that is to be shared."""
        for port in (self.http_port, self.grpc_port):
            if port:
                try:
                    socket.create_server((self.host, port)).close()
                except OSError as error:
                    raise OSError(error.errno, f"{self.host}:{port}: {error.strerror}") from None


class Server:
    """The listening front-ends. Lives on one event loop."""

    def __init__(
        self,
        api: Api,
        addresses: Addresses,
        extra: Collect | None = None,
        sample: Callable[[], None] | None = None,
    ) -> None:
        """`extra` adds families to the metrics page; before each page `sample` is called, in a thread."""
        self._api = api
        self._addresses = addresses
        self._extra = extra
        self._sample = sample
        self._http: list[HttpFront] = []
        self._grpc: GrpcFront | None = None
        self._grpcio: GrpcioFront | None = None
        self._front_ends: FrontEnds | None = None
        self._sockets: tempfile.TemporaryDirectory[str] | None = None

    async def start(self) -> Addresses:
        """Listen everywhere; returns the addresses with the ports really taken. Raises OSError if one is in use.

        HTTP comes last: whoever asks there whether the server is ready may count on the other ports.
        """
        wanted = self._addresses
        http_port = grpc_port = metrics_port = None
        if wanted.front_end_processes > 1:
            return await self._start_front_ends()
        if wanted.grpc_port is not None:
            grpc_port = await self._start_grpc(wanted.host, wanted.grpc_port)
        if wanted.metrics_port is not None:
            metrics_port = await self._start_metrics()
        if wanted.http_port is not None:
            front = HttpFront(http_api.make_app(self._api), self._api)
            self._http.append(front)
            tls = wanted.http_tls.context() if wanted.http_tls is not None else None
            http_port = await front.start(wanted.host, wanted.http_port, wanted.shares_ports, tls)
        taken = Addresses(wanted.host, http_port, grpc_port, metrics_port)
        _log.info("listening on %s: http %s, grpc %s, metrics %s", wanted.host, http_port, grpc_port, metrics_port)
        return taken

    async def _start_metrics(self) -> int:
        metrics = Metrics(self._api.engine, self._extra)
        front = HttpFront(http_api.metrics_app(metrics.render, self._api.http.gate, self._sample))
        self._http.append(front)
        first = self._addresses.metrics_port
        assert first is not None
        for port in range(first, first + self._addresses.metrics_ports - 1):
            try:
                return await front.start(self._addresses.host, port)
            except OSError:
                continue  # another's
        return await front.start(self._addresses.host, first + self._addresses.metrics_ports - 1)

    async def _start_front_ends(self) -> Addresses:
        """Processes that share the ports; here only what they pass on, on Unix sockets, and the metrics."""
        wanted = self._addresses
        if wanted.grpc_tls is not None or wanted.grpc_server != "native":
            raise ConfigError("--front-end-processes needs the native gRPC server, without TLS")
        self._sockets = tempfile.TemporaryDirectory(prefix="tutti-", ignore_cleanup_errors=True)
        folder = Path(self._sockets.name)
        self._grpcio = GrpcioFront(self._api, f"unix:{folder / 'grpc'}")
        await self._grpcio.start()
        front = HttpFront(http_api.make_app(self._api), self._api)
        self._http.append(front)
        await front.start_unix(folder / "http")
        metrics_port = await self._start_metrics() if wanted.metrics_port is not None else None
        self._front_ends = FrontEnds(self._api, folder)
        assert wanted.http_port is not None and wanted.grpc_port is not None
        tls = wanted.http_tls
        ports = await self._front_ends.start(
            wanted.front_end_processes, wanted.host, wanted.http_port, wanted.grpc_port, tls
        )
        taken = Addresses(wanted.host, *ports, metrics_port)
        _log.info("listening on %s: http %s, grpc %s, metrics %s", wanted.host, *ports, metrics_port)
        return taken

    async def stop(self, drain_s: float = 0.0) -> None:
        """Stop listening; open exchanges may end.

        Where others share the ports, clients get `drain_s` to go there: connections over HTTP are answered once more
        and closed, gRPC is stopped at a moment without calls, if there is one.
        """
        if self._front_ends is not None:
            await self._front_ends.stop()
        await asyncio.gather(*(front.stop(drain_s) for front in self._http))
        if self._grpc is not None:
            await self._grpc.drain(drain_s)
            self._grpc.stop()
        if self._grpcio is not None:
            await self._grpcio.stop(max(0.5, drain_s))
        if self._sockets is not None:
            self._sockets.cleanup()
        self._api.close()

    async def _start_grpc(self, host: str, port: int) -> int:
        tls = self._addresses.grpc_tls
        if tls is not None or self._addresses.grpc_server == "grpcio":
            try:
                files = tls.files() if tls is not None else None
                self._grpcio = GrpcioFront(self._api, f"{host}:{port}", files, self._addresses.shares_ports)
            except RuntimeError as error:
                raise OSError(f"gRPC: {error}") from None
            return await self._grpcio.start()
        # Streams go to a server behind the native one, on a socket that only this user can reach.
        self._sockets = tempfile.TemporaryDirectory(prefix="tutti-", ignore_cleanup_errors=True)
        path = str(Path(self._sockets.name) / "grpc")
        self._grpcio = GrpcioFront(self._api, f"unix:{path}")
        await self._grpcio.start()
        self._grpc = GrpcFront(self._api, host, port, path, shares_port=self._addresses.shares_ports)
        return self._grpc.start()
