"""The flags of `tutti serve`: their names, their values, and which do not go together. Knows no server.

They carry tritonserver's names and defaults where they mean the same, but for the host.
"""

import argparse
import difflib
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tutti import SERVER_NAME
from tutti.frontends.gate import CATEGORIES
from tutti.frontends.limits import CASE_MATTERS, Limits
from tutti.reports import Supervised

# Of one machine's cores, front-ends that are processes of their own get a quarter, and no more than this.
MAX_FRONT_ENDS = 4
# Flags that need no value, and may have one.
_SWITCHES = frozenset(
    [
        "--allow-client-shm", "--allow-client-cuda-shm", "--supervise", "--ray", "--check",
        "--http-use-ssl", "--http-use-ssl-mutual", "--grpc-use-ssl", "--grpc-use-ssl-mutual",
    ]
)  # fmt: skip


# Flags that say something of Ray only, and are None where they have not been given.
_ON_RAY = ("ray_address", "gateways", "gpu_replicas", "cpu_replicas", "placement", "hang_timeout_secs", "num_gpus")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of `tutti serve`. Ends the process where they make no sense."""
    parser = make_parser()
    options, unknown = parser.parse_known_args(_with_plain_switches(parser, arguments))
    if unknown:
        parser.error(_unknown(parser, unknown))
    _check(parser, options)
    return options


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tutti serve",
        usage="tutti serve MODEL_REPOSITORY [flags]    (tutti serve --help lists them)",
        description="Serve a model repository over HTTP and gRPC.",
    )
    for add in (_add_repository, _add_addresses, _add_execution, _add_processes, _add_access, _add_logs, _add_ray):
        add(parser)
    return parser


def _add_repository(serve: argparse.ArgumentParser) -> None:
    models = serve.add_argument_group("models")
    models.add_argument("model_repository", type=Path, nargs="?")
    models.add_argument(
        "--model-repository",
        "--model-store",
        type=Path,
        metavar="PATH",
        dest="repository",
        help="the same, as Triton has it",
    )
    models.add_argument(
        "--check",
        action="store_true",
        help="load all models, say what is served and what is not and why, and end: with 0 where all could be, else 1",
    )
    models.add_argument(
        "--model-control-mode",
        choices=("none", "poll", "explicit"),
        default="none",
        help="poll: follow changes of the repository; explicit: start with --load-model only, and let clients load "
        "and unload, which with a writable repository is running their code (default: none, load everything)",
    )
    models.add_argument("--load-model", action="append", metavar="NAME", help="with explicit control; * for all")
    models.add_argument(
        "--repository-poll-secs", type=_seconds, default=15.0, metavar="SECONDS", help="with poll control"
    )
    models.add_argument(
        "--exit-on-error",
        type=_boolean,
        default=True,
        metavar="BOOL",
        help="exit when a model cannot be loaded (default: true)",
    )


def _add_addresses(serve: argparse.ArgumentParser) -> None:
    doors = serve.add_argument_group("addresses and limits")
    doors.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    doors.add_argument("--http-port", type=_port, default=8000)
    doors.add_argument("--grpc-port", type=_port, default=8001)
    doors.add_argument("--metrics-port", type=_port, default=8002)
    doors.add_argument(
        "--server-name",
        default=SERVER_NAME,
        metavar="NAME",
        help="the name that clients are told, for those that look for 'triton' (default: %(default)s)",
    )
    doors.add_argument("--http-max-input-size", type=_size, default=Limits().max_input_size, metavar="BYTES")
    doors.add_argument("--grpc-max-message-size", type=_size, default=Limits().max_grpc_message_size, metavar="BYTES")
    doors.add_argument(
        "--max-inflight-bytes",
        type=_size,
        default=Limits().max_inflight_bytes,
        metavar="BYTES",
        help="of all large requests and answers that the front-ends hold; what is beyond is refused with 503 "
        "(default: %(default)s)",
    )
    doors.add_argument("--allow-client-shm", action="store_true", help="let clients register system shared memory")
    doors.add_argument(
        "--allow-client-cuda-shm",
        action="store_true",
        help="let clients register CUDA shared memory: other processes' allocations on this machine's GPUs, which the "
        "server then reads and writes; needs cuda-bindings, and does not go with --ray",
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
        help="how many there are of a resource (default: as many as the neediest instance needs)",
    )


def _add_processes(serve: argparse.ArgumentParser) -> None:
    processes = serve.add_argument_group("processes and time limits")
    processes.add_argument(
        "--front-end-processes",
        type=_count_or_auto,
        default=None,
        metavar="N",
        help="processes that read requests and write answers, sharing the ports, in front of the engine's, which is "
        "started anew when a device fails or a model crashes it, while clients keep their connections; 1 is within "
        f"the engine's (default: auto, 1 without a GPU, with one a process for 4 cores, {MAX_FRONT_ENDS} at most)",
    )
    processes.add_argument(
        "--supervise",
        action="store_true",
        help="let the front-end be a process of its own even where it is only one",
    )
    processes.add_argument("--engine-of", type=Supervised.parse, help=argparse.SUPPRESS)
    processes.add_argument(
        "--exit-timeout-secs",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="asked to stop, end after this whatever has not (default: %(default)g); asked again, end at once",
    )
    processes.add_argument(
        "--control-timeout-secs",
        type=_seconds,
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


def _add_logs(serve: argparse.ArgumentParser) -> None:
    logs = serve.add_argument_group("logs and traces")
    logs.add_argument("--log-verbose", type=_count_or_none, default=0, metavar="LEVEL")
    logs.add_argument("--log-file", default="", metavar="FILE")
    logs.add_argument("--log-format", choices=("default", "ISO8601"), default="default")
    logs.add_argument(
        "--trace-config",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="rate, level, count, log-frequency, mode, triton,file, opentelemetry,url, opentelemetry,resource",
    )


def _add_ray(serve: argparse.ArgumentParser) -> None:
    ray = serve.add_argument_group("on Ray")
    ray.add_argument("--ray", action="store_true", help="serve through replicas on a Ray cluster")
    ray.add_argument("--ray-address", help="join this cluster (default: start one on this machine)")
    ray.add_argument("--gateways", type=_count, help="how many share the ports (default: 1)")
    ray.add_argument("--gpu-replicas", type=_count_or_none, help="default: one for each GPU of the cluster")
    ray.add_argument("--cpu-replicas", type=_count_or_none, help="default: 1")
    ray.add_argument("--placement", type=Path, help="YAML with pools and the models they take (docs/cluster.md)")
    ray.add_argument(
        "--hang-timeout-secs",
        type=_seconds,
        help="replace a replica that has work and has ended none of it for so long (default: 60)",
    )
    ray.add_argument(
        "--num-gpus", type=_count_or_none, help="logical GPUs of a cluster started here (default: those found)"
    )


def _with_plain_switches(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """The arguments with switches that have a value, as `--allow-client-shm=true`, given or left out."""
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
    if not options.ray and (alone := _given(options, _ON_RAY)):
        parser.error(f"{alone} needs --ray")
    if options.placement is not None and (counts := _given(options, ("gpu_replicas", "cpu_replicas"))):
        parser.error(f"{counts} does not go with --placement, which says how many replicas its pools have")
    if options.ray_address is not None and options.num_gpus is not None:
        parser.error("--num-gpus is of a cluster started here: it does not go with --ray-address")
    if options.ray and ((options.front_end_processes or 1) > 1 or options.supervise):
        parser.error("--front-end-processes and --supervise do not go with --ray")
    if options.check and options.ray:
        parser.error("--check does not go with --ray: it loads the models on this machine")
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


def _given(options: argparse.Namespace, names: Sequence[str]) -> str:
    """The first flag of these that was given; "" where none was."""
    return next((f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None), "")


def _pattern(text: str) -> str:
    try:
        re.compile(text.removeprefix(CASE_MATTERS))
        return text
    except re.error as error:
        raise argparse.ArgumentTypeError(f"not a regular expression: {error}") from None


def _whole(least: int, most: float, expected: str) -> Callable[[str], int]:
    """A parser of whole numbers in a range, which is told in words to who gives another."""

    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]+", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"expected {expected}, got '{text}'")
        return int(text)

    return parse


_port = _whole(0, 65535, "a port from 0 (any that is free) to 65535")
_size = _whole(1, math.inf, "bytes, which must be greater than 0")
_count = _whole(1, math.inf, "1 or more")
_count_or_none = _whole(0, math.inf, "0 or more")


def _seconds(text: str) -> float:
    """More than none."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds, more than 0, got '{text}'")
    return seconds


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"expected true or false, got '{text}'")
    return text.lower() in ("true", "1")


def _count_or_auto(text: str) -> int | None:
    """None for auto."""
    return None if text == "auto" else _whole(1, math.inf, "1 or more, or auto")(text)


def _unknown(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> str:
    """What of the arguments is not known, and the flags that may have been meant."""
    known = [flag for action in parser._actions for flag in action.option_strings if action.help != argparse.SUPPRESS]
    told = []
    for argument in arguments:
        near = difflib.get_close_matches(argument.partition("=")[0], known, 1) if argument.startswith("-") else []
        told.append(f"'{argument}'" + (f" (did you mean {near[0]}?)" if near else ""))
    return f"unknown: {', '.join(told)}"
