"""The `tutti` command. Light: what a command needs is imported when it is known which one it is."""

import argparse
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tutti import SERVER_NAME, __version__
from tutti.devices import present
from tutti.errors import ConfigError, TuttiError
from tutti.frontends.gate import CATEGORIES
from tutti.frontends.limits import CASE_MATTERS, Limits
from tutti.logs import Logs
from tutti.reports import Supervised

# Of one machine's cores, front-ends that are processes of their own get a quarter, and no more than this.
_MAX_FRONT_ENDS = 4
# Flags of `serve` that need no value, and may have one.
_SWITCHES = frozenset(
    [
        "--allow-client-shm", "--allow-client-cuda-shm", "--supervise", "--ray",
        "--http-use-ssl", "--http-use-ssl-mutual", "--grpc-use-ssl", "--grpc-use-ssl-mutual",
    ]
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["loadtest"]:  # what follows -- is Locust's, which argparse would take away
        return _loadtest(given[1:])
    options, rest = parse(given)
    try:
        if options.command == "export":
            from export.cli import main as export

            return export(rest)
        if options.command == "ensemble":
            from ensembles.cli import main as ensemble

            return ensemble(rest)
        if options.command == "cluster":
            _needs(options.command, "ray", "psutil")
            from ray_app.cli import main as cluster

            return cluster(rest)
        return _serve(options, given)
    except TuttiError as error:
        print(f"tutti: {error}", file=sys.stderr)
        return 1


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of a command, and what is another parser's to read. Ends the process where they make no sense."""
    parser = make_parser()
    options, rest = parser.parse_known_args(_with_plain_switches(parser, arguments))
    if rest and options.command not in ("export", "ensemble", "cluster"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "serve":
        _check(parser, options)
    return options, rest


def make_parser() -> argparse.ArgumentParser:
    """Flags carry tritonserver's names and defaults where they mean the same, but for the host."""
    parser = argparse.ArgumentParser(prog="tutti", description="Serve a Triton model repository.")
    parser.add_argument("--version", action="version", version=f"tutti {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve a model repository over HTTP and gRPC")
    serve.add_argument("model_repository", type=Path, nargs="?")
    serve.add_argument(
        "--model-repository",
        "--model-store",
        type=Path,
        metavar="PATH",
        dest="repository",
        help="the same, as Triton has it",
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--http-port", type=int, default=8000)
    serve.add_argument("--grpc-port", type=int, default=8001)
    serve.add_argument("--metrics-port", type=int, default=8002)
    serve.add_argument(
        "--server-name",
        default=SERVER_NAME,
        metavar="NAME",
        help="the name that clients are told, for those that look for 'triton' (default: %(default)s)",
    )
    serve.add_argument("--http-max-input-size", type=_size, default=Limits().max_input_size, metavar="BYTES")
    serve.add_argument("--grpc-max-message-size", type=_size, default=Limits().max_grpc_message_size, metavar="BYTES")
    serve.add_argument(
        "--max-inflight-bytes",
        type=int,
        default=Limits().max_inflight_bytes,
        metavar="BYTES",
        help="of all large requests and answers that a front-end's process holds; what is beyond is refused with 503 "
        "(default: %(default)s)",
    )
    serve.add_argument(
        "--model-control-mode",
        choices=("none", "poll", "explicit"),
        default="none",
        help="poll: follow changes of the repository; explicit: start with --load-model only, and let clients load "
        "and unload, which with a writable repository is running their code (default: none, load everything)",
    )
    serve.add_argument("--load-model", action="append", metavar="NAME", help="with explicit control; * for all")
    serve.add_argument("--repository-poll-secs", type=float, default=15.0, metavar="SECONDS", help="with poll control")
    serve.add_argument(
        "--exit-on-error",
        type=_boolean,
        default=True,
        metavar="BOOL",
        help="exit when a model cannot be loaded (default: true)",
    )
    serve.add_argument(
        "--exit-timeout-secs",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="asked to stop, end after this whatever has not (default: %(default)g); asked again, end at once",
    )
    serve.add_argument(
        "--control-timeout-secs",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="answer a load or unload after this, saying what is waited for; it goes on (default: %(default)g)",
    )
    serve.add_argument(
        "--cache-config",
        default="local,size=1048576",
        metavar="local,size=BYTES",
        help="the response cache, for models that ask for it (default: %(default)s; size=0 for none)",
    )
    serve.add_argument(
        "--rate-limit",
        type=str.lower,
        choices=("off", "execution_count"),
        default="off",
        help="execution_count: instances with a rate_limiter execute when the resources they share are free, by their "
        "priorities (default: off, and a model that has one is refused)",
    )
    serve.add_argument(
        "--rate-limit-resource",
        action="append",
        default=[],
        metavar="NAME:COUNT[:DEVICE]",
        help="how many there are of a resource (default: as many as the neediest instance needs)",
    )
    serve.add_argument(
        "--front-end-processes",
        type=_count_or_auto,
        default=None,
        metavar="N",
        help="processes that read requests and write answers, sharing the ports, in front of the engine's, which is "
        "started anew when a device fails or a model crashes it, while clients keep their connections; 1 is within "
        f"the engine's (default: auto, 1 without a GPU, with one a process for 4 cores, {_MAX_FRONT_ENDS} at most)",
    )
    serve.add_argument(
        "--supervise",
        action="store_true",
        help="let the front-end be a process of its own even where it is only one",
    )
    serve.add_argument("--engine-of", type=Supervised.parse, help=argparse.SUPPRESS)
    serve.add_argument("--allow-client-shm", action="store_true", help="let clients register system shared memory")
    serve.add_argument(
        "--allow-client-cuda-shm",
        action="store_true",
        help="let clients register CUDA shared memory: other processes' allocations on this machine's GPUs, which the "
        "server then reads and writes; needs cuda-bindings, and does not go with --ray",
    )
    access = serve.add_argument_group("access")
    access.add_argument(
        "--http-restricted-api",
        action="append",
        default=[],
        metavar="APIS:KEY=VALUE",
        help=f"comma-separated APIs that need the header KEY: VALUE ({', '.join(CATEGORIES)})",
    )
    access.add_argument(
        "--grpc-restricted-protocol",
        action="append",
        default=[],
        metavar="APIS:KEY=VALUE",
        help="the same for gRPC, where the header is triton-grpc-protocol-KEY",
    )
    access.add_argument("--api-key-file", type=Path, help="one key a line; every call must carry one of them")
    access.add_argument("--http-header-forward-pattern", type=_pattern, metavar="REGEX")
    access.add_argument("--grpc-header-forward-pattern", type=_pattern, metavar="REGEX")
    for protocol in ("http", "grpc"):
        access.add_argument(f"--{protocol}-use-ssl", action="store_true")
        access.add_argument(f"--{protocol}-use-ssl-mutual", action="store_true")
        access.add_argument(f"--{protocol}-server-cert", type=Path, metavar="PEM")
        access.add_argument(f"--{protocol}-server-key", type=Path, metavar="PEM")
        access.add_argument(f"--{protocol}-root-cert", type=Path, metavar="PEM")
    access.add_argument(
        "--grpc-server",
        choices=("native", "grpcio"),
        default="native",
        help="grpcio is slower; it is used in any case with --grpc-use-ssl (default: native)",
    )
    logs = serve.add_argument_group("logs and traces")
    logs.add_argument("--log-verbose", type=int, default=0, metavar="LEVEL")
    logs.add_argument("--log-file", default="", metavar="FILE")
    logs.add_argument("--log-format", choices=("default", "ISO8601"), default="default")
    logs.add_argument(
        "--trace-config",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="rate, level, count, log-frequency, mode, triton,file, opentelemetry,url, opentelemetry,resource",
    )
    ray = serve.add_argument_group("on Ray")
    ray.add_argument("--ray", action="store_true", help="serve through replicas on a Ray cluster")
    ray.add_argument("--ray-address", help="join this cluster (default: start one on this machine)")
    ray.add_argument("--gateways", type=int, default=1, help="how many share the ports (default: 1)")
    ray.add_argument("--gpu-replicas", type=int, help="default: one for each GPU of the cluster")
    ray.add_argument("--cpu-replicas", type=int, default=1)
    ray.add_argument("--placement", type=Path, help="YAML with pools and the models they take (docs/cluster.md)")
    ray.add_argument(
        "--hang-timeout-secs",
        type=float,
        default=60.0,
        help="replace a replica that has work and has ended none of it for so long",
    )
    ray.add_argument("--num-gpus", type=int, help="logical GPUs of a cluster started here (default: those found)")
    commands.add_parser("export", help="export a model into a repository (see: tutti export --help)", add_help=False)
    commands.add_parser(
        "ensemble", help="check, show, draw, explain and build ensembles (see: tutti ensemble --help)", add_help=False
    )
    commands.add_parser(
        "cluster", help="plan and simulate pools of replicas on Ray (see: tutti cluster --help)", add_help=False
    )
    commands.add_parser(
        "loadtest",
        help="load a server in open loop, and judge it by a goal (see: tutti loadtest --help)",
        add_help=False,
    )
    return parser


def _with_plain_switches(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """The arguments of `serve` with switches that have a value, as `--allow-client-shm=true`, given or left out."""
    if arguments[:1] != ["serve"]:
        return list(arguments)
    plain = []
    for argument in arguments:
        name, has_value, value = argument.partition("=")
        if has_value and name in _SWITCHES:
            try:
                plain += [name] if _boolean(value) else []
            except argparse.ArgumentTypeError as error:
                parser.error(f"argument {name}: {error}")
        else:
            plain.append(argument)
    return plain


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if (options.model_repository is None) == (options.repository is None):
        parser.error("expected one model repository: MODEL_REPOSITORY or --model-repository PATH")
    options.model_repository = options.model_repository or options.repository
    if options.ray and ((options.front_end_processes or 1) > 1 or options.supervise):
        parser.error("--front-end-processes and --supervise do not go with --ray")
    if options.allow_client_cuda_shm and options.ray:
        parser.error("--allow-client-cuda-shm does not go with --ray: the gateway has no GPU")
    if options.rate_limit != "off" and options.ray:
        parser.error("--rate-limit does not go with --ray")
    if options.rate_limit_resource and options.rate_limit == "off":
        parser.error("--rate-limit-resource needs --rate-limit execution_count")
    if options.load_model and options.model_control_mode != "explicit":
        parser.error("--load-model needs --model-control-mode explicit")
    for protocol in ("http", "grpc"):
        is_wanted = getattr(options, f"{protocol}_use_ssl") or getattr(options, f"{protocol}_use_ssl_mutual")
        files = [getattr(options, f"{protocol}_server_{kind}") for kind in ("cert", "key")]
        if is_wanted and not all(files):
            parser.error(f"--{protocol}-use-ssl needs --{protocol}-server-cert and --{protocol}-server-key")
        if getattr(options, f"{protocol}_use_ssl_mutual") and not getattr(options, f"{protocol}_root_cert"):
            parser.error(f"--{protocol}-use-ssl-mutual needs --{protocol}-root-cert")


def _pattern(text: str) -> str:
    try:
        re.compile(text.removeprefix(CASE_MATTERS))
        return text
    except re.error as error:
        raise argparse.ArgumentTypeError(f"not a regular expression: {error}") from None


def _size(text: str) -> int:
    """Bytes, 1 or more."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be greater than 0, got '{text}'")
    return int(text)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"expected true or false, got '{text}'")
    return text.lower() in ("true", "1")


def _count_or_auto(text: str) -> int | None:
    """None for auto."""
    if text == "auto":
        return None
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected 1 or more, or auto, got '{text}'")
    return int(text)


def front_ends(options: argparse.Namespace, has_gpu: bool, cores: int) -> int:
    """How many front-ends are processes of their own; 0 where they are in the engine's."""
    count: int | None = options.front_end_processes
    if count is None:
        is_own = options.supervise or (has_gpu and not options.ray and not _needs_grpcio(options))
        return max(1, min(_MAX_FRONT_ENDS, cores // 4)) if is_own else 0
    return count if count > 1 or options.supervise else 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _needs_grpcio(options: argparse.Namespace) -> bool:
    return bool(options.grpc_use_ssl or options.grpc_use_ssl_mutual or options.grpc_server != "native")


def _serve(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    # Processes are started with exec: gRPC need not prepare for a fork, nor say that it has not.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    logs = Logs(options.log_verbose, options.log_file, options.log_format)
    logs.install()
    if options.ray:
        _needs("--ray", "ray", "psutil")
        from ray_app.run import serve_on_ray

        options.front_end_processes = 1
        return serve_on_ray(options)
    count = front_ends(options, present.has_gpu(), _cores())
    if count and options.engine_of is None:
        if _needs_grpcio(options):
            raise ConfigError("front-end processes need the native gRPC server, without TLS")
        from tutti import supervisor

        return supervisor.run(arguments, options.host, options.http_port, options.grpc_port, count)
    from tutti import process

    return process.serve(options, logs)


def _needs(what: str, *libraries: str, extra: str = "ray") -> None:
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{what} needs {' and '.join(missing)}: pip install 'tutti[{extra}]'")


def _loadtest(arguments: Sequence[str]) -> int:
    try:
        _needs("loadtest", "locust", "pyarrow", "yaml", extra="loadtest")
    except TuttiError as error:
        print(f"tutti: {error}", file=sys.stderr)
        return 1
    from loadtest.cli import main as loadtest

    return loadtest(arguments)


if __name__ == "__main__":
    sys.exit(main())
