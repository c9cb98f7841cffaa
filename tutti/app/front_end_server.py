"""All front-ends of one process over one Api: HTTP, gRPC and metrics, started and stopped together."""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tutti.core import files
from tutti.core.errors import ConfigError, InferError, Unavailable, reason, sayable
from tutti.core.temporary_folders import Folder
from tutti.frontends.grpc.aio import GrpcioFront, TlsFiles
from tutti.frontends.grpc.native import GrpcFront
from tutti.frontends.http import routes as http_api
from tutti.frontends.http.infer import HttpFront
from tutti.frontends.http.server import HttpServer
from tutti.frontends.processes.engine_link import EngineSide
from tutti.frontends.processes.pool import check_free
from tutti.frontends.processes.worker_task import Logging, Task
from tutti.frontends.v2.api import Api
from tutti.frontends.v2.metrics_page import Collect, Metrics

_log = logging.getLogger(__name__)

GrpcServer = Literal["native", "grpcio"]
_LAST_S = 0.1
# How long what is inside may take when the server stops.
_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files. With `root_certificate` clients must show a certificate that it signed.

    `protocol`, "http" or "grpc", is whose flags named them.
    """

    certificate: Path
    key: Path
    root_certificate: Path | None = None
    protocol: str = "http"

    def context(self) -> ssl.SSLContext:
        """For HTTP. Raises ConfigError when a file cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        prefix = f"--{self.protocol}"
        certificate, key = (
            f"{prefix}-server-cert {sayable(self.certificate)}",
            f"{prefix}-server-key {sayable(self.key)}",
        )
        root = f"{prefix}-root-cert {sayable(self.root_certificate)}"
        _check_pem(certificate, self.certificate, "CERTIFICATE")
        _check_pem(key, self.key, "KEY")
        if self.root_certificate is not None:
            _check_pem(root, self.root_certificate, "CERTIFICATE")
        try:
            context.load_cert_chain(self.certificate, self.key, password=_ask_nobody)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{certificate}, {key}: no certificate and its key: {_of_openssl(error)}") from None
        if self.root_certificate is not None:
            try:
                context.load_verify_locations(self.root_certificate)
            except (OSError, ValueError) as error:
                raise ConfigError(f"{root}: {_of_openssl(error)}") from None
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def files(self) -> TlsFiles:
        """For gRPC. Raises ConfigError when a file cannot be used."""
        self.context()  # grpcio says nothing of a bad file
        root = self.root_certificate
        return TlsFiles(
            self.certificate.read_bytes(), self.key.read_bytes(), None if root is None else root.read_bytes()
        )


def _check_pem(flag: str, path: Path, kind: str) -> None:
    """Raises ConfigError for what is no file in PEM, which OpenSSL would not name, or would wait for."""
    try:
        text = files.read_utf8(path)
    except (OSError, ValueError, ConfigError) as error:  # ConfigError: it is no text
        raise ConfigError(f"{flag}: {reason(error)}") from None
    if f"{kind}-----" not in text:
        raise ConfigError(f"{flag}: expected a file in PEM, with -----BEGIN {kind}-----")


def _ask_nobody() -> str:
    """Of a key with a password OpenSSL would ask the terminal."""
    raise ValueError("the key has a password; expected one without, as openssl pkey -in KEY -out OTHER makes it")


def _of_openssl(error: Exception) -> str:
    """What it says, without the line of its source."""
    return (getattr(error, "reason", None) or reason(error)).lower().replace("_", " ")


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
    # Front-end processes have the ports, and reach this process by sockets in this folder.
    behind: Path | None = None
    # With other processes, which may come and go; each then takes the first free one of so many metrics ports.
    shares_ports: bool = False
    metrics_ports: int = 1
    # Where they are not the host.
    grpc_host: str = ""
    metrics_host: str = ""

    @property
    def url(self) -> str:
        """Where a client on this machine asks over HTTP; "" where none can."""
        if self.http_port is None:
            return ""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(
            self.host, f"[{self.host}]" if ":" in self.host else self.host
        )
        return f"http{'s' if self.http_tls is not None else ''}://{host}:{self.http_port}"

    def check_free(self) -> None:
        """Raises OSError when somebody else listens on a port, or it cannot be had: told before anything is loaded."""
        is_behind = self.behind is not None
        http, grpc = ("http", self.host, self.http_port), ("grpc", self.grpc_host or self.host, self.grpc_port)
        doors = () if is_behind else (http, grpc)
        metrics = ("metrics", self.metrics_host or self.host, self.metrics_port if self.metrics_ports == 1 else None)
        for name, host, port in (*doors, metrics):
            if port is not None:  # any that is free needs the address, too
                check_free(host, port, socket.AF_INET6 if ":" in host else socket.AF_INET, name)


def _at(host: str, address: str, port: int | None) -> str:
    """A port as the log shows it beside the host: with the address where that is another."""
    return f"{address}:{port}" if port is not None and address not in ("", host) else str(port)


class Server:
    """The listening front-ends. Lives on one event loop."""

    def __init__(
        self,
        api: Api,
        addresses: Addresses,
        extra: Collect | None = None,
        sample: Callable[[], None] | None = None,
        shows_host: bool = True,
    ) -> None:
        """`extra` adds families to the metrics page; before each page `sample` is called, in a thread.

        `shows_host`: the machine's processors and memory are on the page.
        """
        self._api = api
        self._addresses = addresses
        self._extra = extra
        self._sample = sample
        self._shows_host = shows_host
        self._http: list[HttpServer] = []
        self._grpc: GrpcFront | None = None
        self._grpcio: GrpcioFront | None = None
        self._link: EngineSide | None = None
        self._sockets: Folder | None = None

    async def start(self) -> Addresses:
        """Listen everywhere; returns the addresses with the ports really taken. Raises OSError if one is in use.

        HTTP comes last: whoever asks there whether the server is ready may count on the other ports.
        """
        wanted = self._addresses
        http_port = grpc_port = metrics_port = None
        if wanted.behind is not None:
            return await self._start_behind(wanted.behind)
        if wanted.grpc_port is not None:
            grpc_port = await self._start_grpc(wanted.grpc_host or wanted.host, wanted.grpc_port)
        if wanted.metrics_port is not None:
            metrics_port = await self._start_metrics()
        if wanted.http_port is not None:
            front = HttpFront(http_api.make_app(self._api), self._api)
            self._http.append(front)
            tls = wanted.http_tls.context() if wanted.http_tls is not None else None
            http_port = await front.start(wanted.host, wanted.http_port, wanted.shares_ports, tls)
        taken = Addresses(wanted.host, http_port, grpc_port, metrics_port)
        others = _at(wanted.host, wanted.grpc_host, grpc_port), _at(wanted.host, wanted.metrics_host, metrics_port)
        _log.info("listening on %s: http %s, grpc %s, metrics %s", wanted.host, http_port, *others)
        return taken

    async def _start_metrics(self) -> int:
        metrics = Metrics(self._api.engine, self._extra, self._shows_host)
        front = HttpServer(http_api.metrics_app(metrics.render, self._api.http.gate, self._sample))
        self._http.append(front)
        first, host = self._addresses.metrics_port, self._addresses.metrics_host or self._addresses.host
        assert first is not None
        for port in range(first, first + self._addresses.metrics_ports - 1):
            try:
                return await front.start(host, port)
            except OSError:
                continue  # another's
        return await front.start(host, first + self._addresses.metrics_ports - 1)

    def write_task(self, folder: Path) -> Path:
        """The file that tells front-end processes what to do; `folder` is for the sockets of all processes."""
        wanted, api = self._addresses, self._api
        assert wanted.http_port is not None and wanted.grpc_port is not None
        if wanted.grpc_tls is not None or wanted.grpc_server != "native":
            raise ConfigError("front-end processes need the native gRPC server, without TLS")
        ports = wanted.http_port, wanted.grpc_port
        logging = Logging(api.logs.settings(), *api.requests.wanted)
        return Task(folder, wanted.host, *ports, api.limits, api.http, api.grpc, logging, wanted.http_tls).write()

    async def _start_behind(self, folder: Path) -> Addresses:
        """Here is only what front-end processes pass on, on Unix sockets, and the metrics."""
        wanted = self._addresses
        self._grpcio = GrpcioFront(self._api, f"unix:{folder / 'grpc'}")
        await self._grpcio.start()
        front = HttpFront(http_api.make_app(self._api), self._api)
        self._http.append(front)
        await front.start_unix(folder / "http")
        metrics_port = await self._start_metrics() if wanted.metrics_port is not None else None
        self._link = EngineSide(self._api)
        await self._link.listen(folder / "engine")
        return Addresses(wanted.host, wanted.http_port, wanted.grpc_port, metrics_port)

    async def leave(self, error: InferError, grace_s: float) -> None:
        """Before this process ends for good: what is inside may be answered for `grace_s`, and gets the error then.

        Nothing that may block for ever is waited for.
        """
        waiting = [front.stop(0.0, grace_s, error) for front in self._http]
        if self._link is not None:
            waiting.append(self._link.settle(grace_s))
        if self._grpc is not None:
            waiting.append(self._grpc.drain(grace_s))
        await asyncio.gather(*waiting)
        if self._grpc is not None:
            self._grpc.refuse_open(error)
        if self._grpcio is not None:
            self._grpcio.refuse_open(error)
            await self._grpcio.stop(_LAST_S)
        if self._grpc is not None:
            self._grpc.stop()
        if self._sockets is not None:
            self._sockets.cleanup()
        await asyncio.sleep(_LAST_S)  # what was written last is on its way
        self._api.requests.close(_LAST_S)

    async def stop(self, drain_s: float = 0.0) -> None:
        """Stop listening; open exchanges may end.

        Where others share the ports, clients get `drain_s` to go there: connections over HTTP are answered once more
        and closed, gRPC refuses calls from a moment without any on, if there is one.
        """
        if self._link is not None:
            self._link.close()
        late = Unavailable(f"the server stops, and the request had not ended within {_GRACE_S:g} s")
        waiting = [front.stop(drain_s, _GRACE_S, late) for front in self._http]
        if self._grpc is not None:
            waiting.append(self._grpc.finish(drain_s, _GRACE_S))
        await asyncio.gather(*waiting)
        if self._grpc is not None:
            self._grpc.refuse_open(late)
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
        self._sockets = Folder()
        path = str(self._sockets.path / "grpc")
        self._grpcio = GrpcioFront(self._api, f"unix:{path}")
        await self._grpcio.start()
        self._grpc = GrpcFront(self._api, host, port, path, shares_port=self._addresses.shares_ports)
        return self._grpc.start()
