"""The flags of `tutti serve`: their names, their values, and which do not go together. Knows no server.

They carry tritonserver's names and defaults where they mean the same, but for the host.
"""

import argparse
import difflib
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from tutti import SERVER_NAME
from tutti.app import foreign_flags
from tutti.app.reports import Supervised
from tutti.console.arguments import Terse, shown
from tutti.console.help_format import Help, examples
from tutti.core.operations import LOADS_AT_ONCE
from tutti.frontends import ports
from tutti.frontends.gate import CATEGORIES
from tutti.frontends.grpc import keepalive
from tutti.frontends.size_limits import CASE_MATTERS, Limits
from tutti.observing.logs import FORMATS

# Of one machine's cores, front-ends that are processes of their own get a quarter, and no more than this.
MAX_FRONT_ENDS = 4

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
    parser = Terse(
        prog="tutti serve",
        usage="tutti serve MODEL_REPOSITORY [flags]    (tutti serve --help lists them)",
        description="Serve a model repository over HTTP and gRPC.",
        epilog=examples(
            "tutti serve models",
            "tutti serve models --check  # say what would be served, and what not and why",
            "tutti serve models --host 0.0.0.0 --api-key-file keys.txt --model-control-mode poll",
            "tutti serve models --ray --gpu-replicas 2 --cpu-replicas 1",
        ),
        formatter_class=Help,
    )
    for add in (_add_repository, _add_addresses, _add_execution, _add_processes, _add_access, _add_logs, _add_ray):
        add(parser)
    foreign_flags.add(parser)
    return parser


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
    models.add_argument(
        "--repository-poll-secs",
        type=_seconds,
        default=15.0,
        metavar="SECONDS",
        help="with poll control: look at the repository as often (default: %(default)g)",
    )
    models.add_argument(
        "--exit-on-error",
        type=_boolean,
        default=True,
        metavar="BOOL",
        help="exit when a model cannot be loaded (default: true)",
    )
    models.add_argument(
        "--strict-readiness",
        type=_boolean,
        default=True,
        metavar="BOOL",
        help="/v2/health/ready says no while a model is not available (default: true)",
    )
    models.add_argument(
        "--model-load-thread-count",
        type=_count,
        metavar="N",
        help=f"models that are loaded side by side (default: {LOADS_AT_ONCE})",
    )


def _add_addresses(serve: argparse.ArgumentParser) -> None:
    doors = serve.add_argument_group("addresses and limits")
    doors.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: %(default)s)"
    )
    for flag, name, port in (("http", "HTTP", 8000), ("grpc", "gRPC", 8001), ("metrics", "the metrics page", 8002)):
        text = f"port of {name}; 0 is any free one (default: {port})"
        doors.add_argument(f"--{flag}-port", type=_port, default=port, metavar="PORT", help=text)
    for name, default in (("http", "--host"), ("grpc", "--host"), ("metrics", "--http-address")):
        text = f"address of {name} alone (default: what {default} says)"
        doors.add_argument(f"--{name}-address", metavar="ADDRESS", help=text)
    for name, what in (("http", "HTTP"), ("grpc", "gRPC"), ("metrics", "the metrics page")):
        doors.add_argument(
            f"--allow-{name}", type=_boolean, default=True, metavar="BOOL", help=f"serve {what} (default: true)"
        )
    doors.add_argument(
        "--server-name",
        default=SERVER_NAME,
        metavar="NAME",
        help="the name that clients are told, for those that look for 'triton' (default: %(default)s)",
    )
    doors.add_argument(
        "--http-max-input-size",
        type=_size,
        default=Limits().max_input_size,
        metavar="BYTES",
        help="of one HTTP request, also when it has been decompressed (default: %(default)s)",
    )
    doors.add_argument(
        "--grpc-max-message-size",
        type=_size,
        default=Limits().max_grpc_message_size,
        metavar="BYTES",
        help="of one gRPC message (default: %(default)s)",
    )
    doors.add_argument(
        "--max-inflight-bytes",
        type=_size,
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
        help="let the front-end be a process of its own even where it is only one, and start the engine's anew when it "
        "ends (default: with a GPU)",
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
    for protocol, name in (("http", "HTTP"), ("grpc", "gRPC")):
        access.add_argument(
            f"--{protocol}-header-forward-pattern",
            type=_pattern,
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
        kind = _boolean if setting.unit == "BOOL" else _number_from(setting.least)
        access.add_argument(setting.flag, type=kind, metavar=setting.unit, help=setting.help)


def _add_logs(serve: argparse.ArgumentParser) -> None:
    logs = serve.add_argument_group("logs and traces")
    logs.add_argument(
        "--log-verbose",
        type=_level,
        default=0,
        metavar="LEVEL",
        help="1 or more: a line for each request, and what is said while a fault is looked for (default: 0)",
    )
    for name in ("info", "warning", "error"):
        logs.add_argument(
            f"--log-{name}", type=_boolean, default=True, metavar="BOOL", help="log lines of that kind (default: true)"
        )
    logs.add_argument("--log-file", default="", metavar="FILE", help="log there (default: to standard error)")
    logs.add_argument(
        "--log-format",
        choices=FORMATS,
        default="default",
        help="how lines and their times look; json: an object a line, of the access log, too (default: default)",
    )
    logs.add_argument(
        "--allow-gpu-metrics",
        type=_boolean,
        metavar="BOOL",
        help="the machine's GPUs on the metrics page (default: true, on Ray false)",
    )
    logs.add_argument(
        "--allow-cpu-metrics",
        type=_boolean,
        default=True,
        metavar="BOOL",
        help="the machine's processors and memory on the metrics page (default: true)",
    )
    logs.add_argument(
        "--metrics-interval-ms",
        type=_interval_ms,
        metavar="MS",
        help="how old what the page says of GPUs may be; the rest is of the moment (default: 1000)",
    )
    logs.add_argument(
        "--log-slow-ms",
        type=_milliseconds,
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
    ray.add_argument("--gateways", type=_count, metavar="N", help="how many share the ports (default: 1)")
    ray.add_argument(
        "--gpu-replicas",
        type=_count_or_none,
        metavar="N",
        help="replicas with a GPU (default: one for each GPU of the cluster)",
    )
    ray.add_argument("--cpu-replicas", type=_count_or_none, metavar="N", help="replicas without one (default: 1)")
    ray.add_argument(
        "--placement",
        type=Path,
        metavar="FILE",
        help="YAML with pools and the models they take, docs/cluster.md (default: the pools gpu and cpu)",
    )
    ray.add_argument(
        "--hang-timeout-secs",
        type=_seconds,
        metavar="SECONDS",
        help="replace a replica that has work and has ended none of it for so long (default: 60)",
    )
    ray.add_argument(
        "--num-gpus",
        type=_count_or_none,
        metavar="N",
        help="logical GPUs of a cluster started here (default: those found)",
    )


def _with_plain_switches(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """The arguments with switches that have a value, as `--allow-client-shm=true`, given or left out."""
    switches = {flag for action in parser._actions if action.nargs == 0 for flag in action.option_strings}
    plain: list[str] = []
    for argument in _joined(switches, arguments):
        name, has_value, value = argument.partition("=")
        if has_value and name in switches:
            try:
                plain += [name] if _boolean(value) else []
            except argparse.ArgumentTypeError as error:
                parser.error(f"argument {name}: {error}")
        else:
            plain.append(argument)
    return plain


def _joined(switches: Collection[str], arguments: Sequence[str]) -> Iterator[str]:
    """The arguments with a switch and the true or false behind it as one: no folder of models is called so."""
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument in switches and rest and rest[0].lower() in ("true", "false"):
            argument += f"={rest.pop(0)}"
        yield argument


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    named = [path for path in (options.model_repository, *(options.repository or ())) if path is not None]
    if len(named) != 1:
        several = "; links to models in one folder will do" if len(named) > 1 else ""
        parser.error(f"expected one model repository: MODEL_REPOSITORY or --model-repository PATH{several}")
    if not options.server_name or not options.server_name.isprintable():
        parser.error(f"argument --server-name: expected a name, got {shown(options.server_name)}")
    options.model_repository = named[0]
    if not options.allow_http and not options.allow_grpc:
        parser.error("--allow-http and --allow-grpc are both false: expected one of them at least")
    if twice := ports.given_twice(options):
        parser.error(twice)
    if not options.ray and (alone := _given(options, _ON_RAY)):
        parser.error(f"{alone} needs --ray")
    if options.placement is not None and (counts := _given(options, ("gpu_replicas", "cpu_replicas"))):
        parser.error(f"{counts} does not go with --placement, which says how many replicas its pools have")
    if options.ray_address is not None and options.num_gpus is not None:
        parser.error("--num-gpus is of a cluster started here: it does not go with --ray-address")
    if options.ray and ((options.front_end_processes or 1) > 1 or options.supervise):
        parser.error("--front-end-processes and --supervise do not go with --ray")
    if options.check and options.ray:
        what = "it loads the models in this process; leave --ray out, and ask 'tutti cluster why' for their pools"
        parser.error(f"--check does not go with --ray: {what}")
    if options.allow_client_cuda_shm and options.ray:
        parser.error("--allow-client-cuda-shm does not go with --ray: the gateway has no GPU")
    if options.model_load_thread_count is not None and options.ray:
        parser.error("--model-load-thread-count does not go with --ray: replicas load by themselves")
    if options.ray and (options.allow_gpu_metrics or options.metrics_interval_ms is not None):
        flag = "--allow-gpu-metrics" if options.allow_gpu_metrics else "--metrics-interval-ms"
        parser.error(f"{flag} does not go with --ray: the gateway has no GPUs to show")
    for setting in keepalive.SETTINGS:
        needs_grpcio = not setting.is_native and not any((options.grpc_use_ssl, options.grpc_use_ssl_mutual))
        if getattr(options, setting.dest) is not None and needs_grpcio and options.grpc_server != "grpcio":
            parser.error(f"{setting.flag} needs --grpc-server grpcio (or --grpc-use-ssl, which implies it)")
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
        if not re.fullmatch("[0-9]{1,18}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {shown(text)}")
        return int(text)

    return parse


def _number_from(least: int) -> Callable[[str], int]:
    return _whole(least, 2**31 - 1, f"a whole number from {least} to 2147483647")


_port = _whole(0, 65535, "a port from 0 (any that is free) to 65535")
_size = _whole(1, math.inf, "bytes, which must be greater than 0")
_count = _whole(1, math.inf, "1 or more")
_count_or_none = _whole(0, math.inf, "0 or more")


_MAX_SECONDS = 1e9
# Of what is started, as front-ends: more are a slip, which would take the machine with it.
_MOST_PROCESSES = 1024


def _seconds(text: str) -> float:
    """More than none, and no more than Python's timers take."""
    seconds = float(text) if re.fullmatch(r"[0-9]*\.?[0-9]+([eE][+-]?[0-9]{1,3})?", text) else math.nan
    if not 0 < seconds <= _MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"expected seconds, more than 0, got {shown(text)}")
    return seconds


def _milliseconds(text: str) -> float:
    try:
        ms = float(text)
    except ValueError:
        ms = math.nan
    if not 0 <= ms < math.inf:
        raise argparse.ArgumentTypeError(f"expected milliseconds, 0 or more, got '{text}'")
    return ms


def _interval_ms(text: str) -> float:
    """More than none."""
    try:
        return _seconds(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected milliseconds, more than 0, got '{text}'") from None


def _level(text: str) -> int:
    """As Triton has it, true and false are levels, too."""
    return int(_boolean(text)) if text.lower() in ("true", "false") else _count_or_none(text)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {shown(text)}")
    return text.lower() in ("true", "1")


def _count_or_auto(text: str) -> int | None:
    """None for auto."""
    return (
        None if text == "auto" else _whole(1, _MOST_PROCESSES, f"1 or more, or auto (at most {_MOST_PROCESSES})")(text)
    )


def _unknown(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> str:
    """What of the arguments is not known, and the flags that may have been meant."""
    known = [flag for action in parser._actions for flag in action.option_strings if action.help != argparse.SUPPRESS]
    told = []
    for argument in arguments:
        near = difflib.get_close_matches(argument.partition("=")[0], known, 1) if argument.startswith("-") else []
        told.append(shown(argument) + (f" (did you mean {near[0]}?)" if near else ""))
    return f"unknown: {', '.join(told)}"
