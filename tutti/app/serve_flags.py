"""The flags of `tutti serve`, in groups. They carry tritonserver's names and defaults where they mean the same."""

import argparse
from pathlib import Path
from typing import Any

from tutti import SERVER_NAME
from tutti.app.flag_values import (
    boolean,
    count,
    count_or_auto,
    count_or_none,
    interval_ms,
    level,
    milliseconds,
    number_from,
    pattern,
    port,
    seconds,
    size,
)
from tutti.app.reports import Supervised
from tutti.core.operations import LOADS_AT_ONCE
from tutti.frontends.gate import CATEGORIES
from tutti.frontends.grpc import keepalive
from tutti.frontends.size_limits import Limits
from tutti.observing.logs import FORMATS

# Of one machine's cores, front-ends that are processes of their own get a quarter, and no more than this.
MAX_FRONT_ENDS = 4
# One of argparse's, whose class has no public name.
Group = Any


def _add_repository(serve: argparse.ArgumentParser) -> None:
    models = serve.add_argument_group("models")
    models.add_argument("model_repository", type=Path, nargs="?", help="the folder of models")
    models.add_argument(
        "--model-repository",
        "--model-store",
        type=Path,
        action="append",
        metavar="PATH",
        dest="repository",
        help="the same, as Triton has it; there is one (default: what comes without a flag)",
    )
    models.add_argument(
        "--check",
        action="store_true",
        help="load all models, say what is served and what is not and why, and end: with 0 where all could be, else 1 "
        "(default: serve)",
    )
    models.add_argument(
        "--model-control-mode",
        choices=("none", "poll", "explicit"),
        default="none",
        help="poll: follow changes of the repository; explicit: start with --load-model only, and let clients load "
        "and unload, which with a writable repository is running their code (default: none, load everything)",
    )
    models.add_argument(
        "--load-model",
        action="append",
        metavar="NAME",
        help="with explicit control: load it at the start, * for all; repeat for more (default: none)",
    )
    _add_loading(models)


def _add_loading(models: Group) -> None:
    """How they are loaded, and when the server is ready."""
    models.add_argument(
        "--repository-poll-secs",
        type=seconds,
        default=15.0,
        metavar="SECONDS",
        help="with poll control: look at the repository as often (default: %(default)g)",
    )
    models.add_argument(
        "--exit-on-error",
        type=boolean,
        default=True,
        metavar="BOOL",
        help="exit when a model cannot be loaded (default: true)",
    )
    models.add_argument(
        "--strict-readiness",
        type=boolean,
        default=True,
        metavar="BOOL",
        help="/v2/health/ready says no while a model is not available (default: true)",
    )
    models.add_argument(
        "--model-load-thread-count",
        type=count,
        metavar="N",
        help=f"models that are loaded side by side (default: {LOADS_AT_ONCE})",
    )


def _add_addresses(serve: argparse.ArgumentParser) -> None:
    doors = serve.add_argument_group("addresses and limits")
    doors.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: %(default)s)"
    )
    for flag, name, usual in (("http", "HTTP", 8000), ("grpc", "gRPC", 8001), ("metrics", "the metrics page", 8002)):
        text = f"port of {name}; 0 is any free one (default: {usual})"
        doors.add_argument(f"--{flag}-port", type=port, default=usual, metavar="PORT", help=text)
    for name, default in (("http", "--host"), ("grpc", "--host"), ("metrics", "--http-address")):
        text = f"address of {name} alone (default: what {default} says)"
        doors.add_argument(f"--{name}-address", metavar="ADDRESS", help=text)
    for name, title in (("http", "HTTP"), ("grpc", "gRPC"), ("metrics", "the metrics page")):
        doors.add_argument(
            f"--allow-{name}", type=boolean, default=True, metavar="BOOL", help=f"serve {title} (default: true)"
        )
    doors.add_argument(
        "--server-name",
        default=SERVER_NAME,
        metavar="NAME",
        help="the name that clients are told, for those that look for 'triton' (default: %(default)s)",
    )
    _add_limits(doors)


def _add_limits(doors: Group) -> None:
    """How much a client may send, and how."""
    doors.add_argument(
        "--http-max-input-size",
        type=size,
        default=Limits().max_input_size,
        metavar="BYTES",
        help="of one HTTP request, also when it has been decompressed (default: %(default)s)",
    )
    doors.add_argument(
        "--grpc-max-message-size",
        type=size,
        default=Limits().max_grpc_message_size,
        metavar="BYTES",
        help="of one gRPC message (default: %(default)s)",
    )
    doors.add_argument(
        "--max-inflight-bytes",
        type=size,
        default=Limits().max_inflight_bytes,
        metavar="BYTES",
        help="of all large requests and answers that the front-ends hold; what is beyond is refused with 503 "
        "(default: %(default)s)",
    )
    doors.add_argument(
        "--allow-client-shm", action="store_true", help="let clients register system shared memory (default: not)"
    )
    doors.add_argument(
        "--allow-client-cuda-shm",
        action="store_true",
        help="let clients register CUDA shared memory: other processes' allocations on this machine's GPUs, which the "
        "server then reads and writes; needs cuda-bindings, and does not go with --ray (default: not)",
    )


def _add_execution(serve: argparse.ArgumentParser) -> None:
    execution = serve.add_argument_group("execution")
    execution.add_argument(
        "--cache-config",
        default="local,size=1048576",
        metavar="local,size=BYTES",
        help="the response cache, for models that ask for it (default: %(default)s; size=0 for none)",
    )
    execution.add_argument(
        "--rate-limit",
        type=str.lower,
        choices=("off", "execution_count"),
        default="off",
        help="execution_count: instances with a rate_limiter execute when the resources they share are free, by their "
        "priorities (default: off, and a model that has one is refused)",
    )
    execution.add_argument(
        "--rate-limit-resource",
        action="append",
        default=[],
        metavar="NAME:COUNT[:DEVICE]",
        help="with --rate-limit: how many there are of a resource; repeat for more (default: as many as the neediest "
        "instance needs)",
    )


def _add_processes(serve: argparse.ArgumentParser) -> None:
    processes = serve.add_argument_group("processes and time limits")
    processes.add_argument(
        "--front-end-processes",
        type=count_or_auto,
        default=None,
        metavar="N",
        help="processes that read requests and write answers, sharing the ports, in front of the engine's, which is "
        "started anew when a device fails or a model crashes it, while clients keep their connections; 1 is within "
        f"the engine's (default: auto, 1 without a GPU, with one a process for 4 cores, {MAX_FRONT_ENDS} at most)",
    )
    processes.add_argument(
        "--supervise",
        action="store_true",
        help="let the front-end be a process of its own even where it is only one, and start the engine's anew when it "
        "ends (default: with a GPU)",
    )
    processes.add_argument("--engine-of", type=Supervised.parse, help=argparse.SUPPRESS)
    processes.add_argument(
        "--exit-timeout-secs",
        type=seconds,
        default=30.0,
        metavar="SECONDS",
        help="asked to stop, end after this whatever has not (default: %(default)g); asked again, end at once",
    )
    processes.add_argument(
        "--control-timeout-secs",
        type=seconds,
        default=120.0,
        metavar="SECONDS",
        help="answer a load or unload after this, saying what is waited for; it goes on (default: %(default)g)",
    )


def _add_access(serve: argparse.ArgumentParser) -> None:
    access = serve.add_argument_group("access")
    access.add_argument(
        "--http-restricted-api",
        action="append",
        default=[],
        metavar="APIS:KEY=VALUE",
        help=f"comma-separated APIs that need the header KEY: VALUE, of {', '.join(CATEGORIES)}; repeat for more "
        "(default: none)",
    )
    access.add_argument(
        "--grpc-restricted-protocol",
        action="append",
        default=[],
        metavar="APIS:KEY=VALUE",
        help="the same for gRPC, where the header is triton-grpc-protocol-KEY (default: none)",
    )
    access.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="one key a line; every call must carry one of them (default: none is asked for)",
    )
    _add_tls(access)


def _add_tls(access: Group) -> None:
    """Connections that are encrypted."""
    for protocol, name in (("http", "HTTP"), ("grpc", "gRPC")):
        access.add_argument(
            f"--{protocol}-header-forward-pattern",
            type=pattern,
            metavar="REGEX",
            help=f"{name} headers that models get as parameters, by their lower-case names (default: none)",
        )
    for protocol, name in (("http", "HTTP"), ("grpc", "gRPC")):
        for flag, text in (("", "TLS"), ("-mutual", "TLS, for clients with a certificate of the root's only")):
            access.add_argument(
                f"--{protocol}-use-ssl{flag}", action="store_true", help=f"{name} over {text} (default: not)"
            )
        for flag, text in (("server-cert", "certificate"), ("server-key", "key"), ("root-cert", "clients' root")):
            access.add_argument(
                f"--{protocol}-{flag}", type=Path, metavar="PEM", help=f"{name}: the file of the {text} (default: none)"
            )
    access.add_argument(
        "--grpc-server",
        choices=("native", "grpcio"),
        default="native",
        help="grpcio is slower; it is used in any case with --grpc-use-ssl (default: native)",
    )
    for setting in keepalive.SETTINGS:
        kind = boolean if setting.unit == "BOOL" else number_from(setting.least)
        access.add_argument(setting.flag, type=kind, metavar=setting.unit, help=setting.help)


def _add_logs(serve: argparse.ArgumentParser) -> None:
    logs = serve.add_argument_group("logs and traces")
    logs.add_argument(
        "--log-verbose",
        type=level,
        default=0,
        metavar="LEVEL",
        help="1 or more: a line for each request, and what is said while a fault is looked for (default: 0)",
    )
    for name in ("info", "warning", "error"):
        logs.add_argument(
            f"--log-{name}", type=boolean, default=True, metavar="BOOL", help="log lines of that kind (default: true)"
        )
    logs.add_argument("--log-file", default="", metavar="FILE", help="log there (default: to standard error)")
    logs.add_argument(
        "--log-format",
        choices=FORMATS,
        default="default",
        help="how lines and their times look; json: an object a line, of the access log, too (default: default)",
    )
    _add_metrics(logs)


def _add_metrics(logs: Group) -> None:
    """What is measured, and told of single requests."""
    logs.add_argument(
        "--allow-gpu-metrics",
        type=boolean,
        metavar="BOOL",
        help="the machine's GPUs on the metrics page (default: true, on Ray false)",
    )
    logs.add_argument(
        "--allow-cpu-metrics",
        type=boolean,
        default=True,
        metavar="BOOL",
        help="the machine's processors and memory on the metrics page (default: true)",
    )
    logs.add_argument(
        "--metrics-interval-ms",
        type=interval_ms,
        metavar="MS",
        help="how old what the page says of GPUs may be; the rest is of the moment (default: 1000)",
    )
    logs.add_argument(
        "--log-slow-ms",
        type=milliseconds,
        default=0.0,
        metavar="MS",
        help="warn of each request that took so long, and say where its time went (default: 0, of none)",
    )
    logs.add_argument(
        "--access-log",
        default="",
        metavar="FILE",
        help="a line for each request, - for standard output: id, model, status, sizes and times (default: none)",
    )
    logs.add_argument(
        "--trace-config",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="rate, level, count, log-frequency, mode, triton,file, opentelemetry,url, opentelemetry,resource; repeat "
        "for more (default: level=OFF)",
    )


def _add_ray(serve: argparse.ArgumentParser) -> None:
    ray = serve.add_argument_group("on Ray")
    ray.add_argument("--ray", action="store_true", help="serve through replicas on a Ray cluster (default: not)")
    ray.add_argument("--ray-address", metavar="ADDRESS", help="join this cluster (default: start one on this machine)")
    ray.add_argument("--gateways", type=count, metavar="N", help="how many share the ports (default: 1)")
    ray.add_argument(
        "--gpu-replicas",
        type=count_or_none,
        metavar="N",
        help="replicas with a GPU (default: one for each GPU of the cluster)",
    )
    ray.add_argument("--cpu-replicas", type=count_or_none, metavar="N", help="replicas without one (default: 1)")
    ray.add_argument(
        "--placement",
        type=Path,
        metavar="FILE",
        help="YAML with pools and the models they take, docs/cluster.md (default: the pools gpu and cpu)",
    )
    ray.add_argument(
        "--hang-timeout-secs",
        type=seconds,
        metavar="SECONDS",
        help="replace a replica that has work and has ended none of it for so long (default: 60)",
    )
    ray.add_argument(
        "--num-gpus",
        type=count_or_none,
        metavar="N",
        help="logical GPUs of a cluster started here (default: those found)",
    )


def add(serve: argparse.ArgumentParser) -> None:
    """All of them, group by group."""
    for add_group in (
        _add_repository,
        _add_addresses,
        _add_execution,
        _add_processes,
        _add_access,
        _add_logs,
        _add_ray,
    ):
        add_group(serve)
