"""The options of `tutti serve`: what was said by its flags, and which of them do not go together. Knows no server."""

import argparse
import difflib
from collections.abc import Collection, Iterator, Sequence

from tutti.app import foreign_flags, serve_flags
from tutti.app.flag_values import boolean
from tutti.console.arguments import Terse, shown
from tutti.console.help_format import Help, examples
from tutti.frontends import ports
from tutti.frontends.grpc import keepalive

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
    serve_flags.add(parser)
    foreign_flags.add(parser)
    return parser


def _with_plain_switches(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """The arguments with switches that have a value, as `--allow-client-shm=true`, given or left out."""
    switches = {flag for action in parser._actions if action.nargs == 0 for flag in action.option_strings}
    plain: list[str] = []
    for argument in _joined(switches, arguments):
        name, has_value, value = argument.partition("=")
        if has_value and name in switches:
            try:
                plain += [name] if boolean(value) else []
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
    _check_ray(parser, options)
    for setting in keepalive.SETTINGS:
        needs_grpcio = not setting.is_native and not any((options.grpc_use_ssl, options.grpc_use_ssl_mutual))
        if getattr(options, setting.dest) is not None and needs_grpcio and options.grpc_server != "grpcio":
            parser.error(f"{setting.flag} needs --grpc-server grpcio (or --grpc-use-ssl, which implies it)")
    if options.rate_limit_resource and options.rate_limit == "off":
        parser.error("--rate-limit-resource needs --rate-limit execution_count")
    if options.load_model and options.model_control_mode != "explicit":
        parser.error("--load-model needs --model-control-mode explicit")
    _check_tls(parser, options)


def _check_ray(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """What is of Ray alone, and what does not go with it."""
    if not options.ray and (alone := _given(options, _ON_RAY)):
        parser.error(f"{alone} needs --ray")
    if options.placement is not None and (counts := _given(options, ("gpu_replicas", "cpu_replicas"))):
        parser.error(f"{counts} does not go with --placement, which says how many replicas its pools have")
    if options.ray_address is not None and options.num_gpus is not None:
        parser.error("--num-gpus is of a cluster started here: it does not go with --ray-address")
    if options.ray and ((options.front_end_processes or 1) > 1 or options.supervise):
        parser.error("--front-end-processes and --supervise do not go with --ray")
    if options.check and options.ray:
        why = "it loads the models in this process; leave --ray out, and ask 'tutti cluster why' for their pools"
        parser.error(f"--check does not go with --ray: {why}")
    if options.allow_client_cuda_shm and options.ray:
        parser.error("--allow-client-cuda-shm does not go with --ray: the gateway has no GPU")
    if options.model_load_thread_count is not None and options.ray:
        parser.error("--model-load-thread-count does not go with --ray: replicas load by themselves")
    if options.ray and (options.allow_gpu_metrics or options.metrics_interval_ms is not None):
        flag = "--allow-gpu-metrics" if options.allow_gpu_metrics else "--metrics-interval-ms"
        parser.error(f"{flag} does not go with --ray: the gateway has no GPUs to show")
    if options.rate_limit != "off" and options.ray:
        parser.error("--rate-limit does not go with --ray")


def _check_tls(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
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


def _unknown(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> str:
    """What of the arguments is not known, and the flags that may have been meant."""
    known = [flag for action in parser._actions for flag in action.option_strings if action.help != argparse.SUPPRESS]
    told = []
    for argument in arguments:
        near = difflib.get_close_matches(argument.partition("=")[0], known, 1) if argument.startswith("-") else []
        told.append(shown(argument) + (f" (did you mean {near[0]}?)" if near else ""))
    return f"unknown: {', '.join(told)}"
