"""From the flags of `tutti serve` to what the front-ends are made of, in the single process and in the gateway."""

import re
from pathlib import Path
from typing import Protocol

from tutti.app.front_end_server import Addresses, GrpcServer, Tls
from tutti.core import files
from tutti.core.errors import ConfigError, reason, sayable
from tutti.devices.ipc import CudaIpc
from tutti.frontends import gate, ports
from tutti.frontends.door import Access
from tutti.frontends.gate import Gate
from tutti.frontends.grpc import keepalive
from tutti.frontends.size_limits import CASE_MATTERS, Limits
from tutti.frontends.v2.api import Api
from tutti.frontends.v2.shared_memory import SharedMemory
from tutti.observing import request_log, tracing
from tutti.observing.logs import Logs
from tutti.observing.request_log import RequestLog
from tutti.observing.tracing import Tracer
from tutti.serving.engine import Engine


class Options(ports.Options, Protocol):
    """The flags that concern the front-ends, by their names in `tutti serve --help`."""

    server_name: str
    http_max_input_size: int
    grpc_max_message_size: int
    max_inflight_bytes: int
    allow_client_shm: bool
    allow_client_cuda_shm: bool
    http_restricted_api: list[str]
    grpc_restricted_protocol: list[str]
    api_key_file: Path | None
    http_header_forward_pattern: str | None
    grpc_header_forward_pattern: str | None
    grpc_server: GrpcServer
    trace_config: list[str]
    access_log: str
    log_slow_ms: float
    cache_config: str


def check(options: Options) -> None:
    """Raises ConfigError for a flag that does not make sense, or a file of one that cannot be used; starts nothing."""
    _api_keys(options.api_key_file)
    gate.parse_restricted(options.http_restricted_api)
    gate.parse_restricted(options.grpc_restricted_protocol, gate.GRPC_HEADER_PREFIX)
    tracing.parse_config(options.trace_config)
    cache_size(options.cache_config)
    if twice := ports.given_twice(options):
        raise ConfigError(twice)
    for tls in (_tls(options, "http"), _tls(options, "grpc")):
        if tls is not None:
            tls.context()


def check_written(options: Options) -> None:
    """Raises ConfigError for a file that the front-ends write and cannot; on the machine where they are to run."""
    tracing.check(tracing.parse_config(options.trace_config))
    request_log.check_access(options.access_log)


def make_api(engine: Engine, options: Options, logs: Logs) -> Api:
    """Raises ConfigError for a flag that does not make sense."""
    keys = _api_keys(options.api_key_file)
    http_gate = Gate(gate.parse_restricted(options.http_restricted_api), keys)
    grpc_gate = Gate(gate.parse_restricted(options.grpc_restricted_protocol, gate.GRPC_HEADER_PREFIX), keys)
    return Api(
        engine,
        Limits(
            options.http_max_input_size,
            options.grpc_max_message_size,
            options.max_inflight_bytes,
            keepalive.settings_of(options),
        ),
        Access(http_gate, _pattern(options.http_header_forward_pattern)),
        Access(grpc_gate, _pattern(options.grpc_header_forward_pattern)),
        SharedMemory(options.allow_client_shm, CudaIpc() if options.allow_client_cuda_shm else None),
        Tracer(tracing.parse_config(options.trace_config)),
        logs,
        server_name=options.server_name,
        requests=RequestLog(logs, options.access_log, options.log_slow_ms),
    )


def addresses(options: Options) -> Addresses:
    """Raises ConfigError when a file of a certificate cannot be used."""
    host = options.http_address or options.host
    return Addresses(
        host,
        options.http_port if options.allow_http else None,
        options.grpc_port if options.allow_grpc else None,
        options.metrics_port if options.allow_metrics else None,
        _tls(options, "http"),
        _tls(options, "grpc"),
        options.grpc_server,
        grpc_host=options.grpc_address or options.host,
        metrics_host=options.metrics_address or host,
    )


def cache_size(text: str) -> int:
    """Bytes of `local,size=BYTES`. Raises ConfigError."""
    match = re.fullmatch(r"local,size=([0-9]{1,15})", text)
    if match is None:
        raise ConfigError(f"--cache-config: expected local,size=BYTES, got '{text}'")
    return int(match[1])


def _api_keys(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        return gate.parse_api_keys(files.read_utf8(path))
    except (OSError, ValueError, ConfigError) as error:
        raise ConfigError(f"--api-key-file {sayable(path)}: {reason(error)}") from None


def _pattern(text: str | None) -> re.Pattern[str] | None:
    if not text:
        return None
    # The names of headers have no case, unless the pattern says so.
    flags = re.NOFLAG if text.startswith(CASE_MATTERS) else re.IGNORECASE
    return re.compile(text.removeprefix(CASE_MATTERS), flags)


def _tls(options: Options, protocol: str) -> Tls | None:
    is_mutual = getattr(options, f"{protocol}_use_ssl_mutual")
    if not is_mutual and not getattr(options, f"{protocol}_use_ssl"):
        return None
    root = getattr(options, f"{protocol}_root_cert") if is_mutual else None
    tls = Tls(getattr(options, f"{protocol}_server_cert"), getattr(options, f"{protocol}_server_key"), root, protocol)
    tls.context()  # before anything is loaded
    return tls
