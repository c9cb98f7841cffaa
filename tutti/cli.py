"""The `tutti` command, and the composition root of the single process."""

import argparse
import asyncio
import importlib.util
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tutti import __version__
from tutti.errors import ConfigError, TuttiError
from tutti.frontends.api import Limits
from tutti.frontends.server import Addresses, Server

_log = logging.getLogger("tutti")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "export":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "serve":
        _check(parser, options)
    try:
        if options.command == "export":
            from export.cli import main as export

            return export(rest)
        return _serve(options)
    except TuttiError as error:
        print(f"tutti: {error}", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    """Flags carry tritonserver's names and defaults where they mean the same, but for the host."""
    parser = argparse.ArgumentParser(prog="tutti", description="Serve a Triton model repository.")
    parser.add_argument("--version", action="version", version=f"tutti {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve a model repository over HTTP and gRPC")
    serve.add_argument("model_repository", type=Path)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--http-port", type=int, default=8000)
    serve.add_argument("--grpc-port", type=int, default=8001)
    serve.add_argument("--metrics-port", type=int, default=8002)
    serve.add_argument("--http-max-input-size", type=int, default=Limits().max_input_size, metavar="BYTES")
    serve.add_argument("--grpc-max-message-size", type=int, default=Limits().max_grpc_message_size, metavar="BYTES")
    serve.add_argument(
        "--model-control-mode",
        choices=("none", "explicit"),
        default="none",
        help="explicit: start with --load-model only, and let clients load and unload (default: none, load everything)",
    )
    serve.add_argument("--load-model", action="append", metavar="NAME", help="with explicit control; * for all")
    serve.add_argument(
        "--exit-on-error",
        type=_boolean,
        default=True,
        metavar="BOOL",
        help="exit when a model cannot be loaded (default: true)",
    )
    serve.add_argument("--log-verbose", type=int, default=0, metavar="LEVEL")
    ray = serve.add_argument_group("on Ray")
    ray.add_argument("--ray", action="store_true", help="serve through replicas on a Ray cluster")
    ray.add_argument("--ray-address", help="join this cluster (default: start one on this machine)")
    ray.add_argument("--gpu-replicas", type=int, help="default: one for each GPU of the cluster")
    ray.add_argument("--cpu-replicas", type=int, default=1)
    ray.add_argument("--num-gpus", type=int, help="logical GPUs of a cluster started here (default: those found)")
    commands.add_parser("export", help="export a model into a repository (see: tutti export --help)", add_help=False)
    return parser


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.load_model and options.model_control_mode != "explicit":
        parser.error("--load-model needs --model-control-mode explicit")
    if options.ray and options.model_control_mode != "none":
        parser.error("--model-control-mode explicit is not supported with --ray")


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"expected true or false, got '{text}'")
    return text.lower() in ("true", "1")


def _serve(options: argparse.Namespace) -> int:
    logging.basicConfig(
        level=logging.DEBUG if options.log_verbose else logging.INFO,
        format="%(asctime)s %(levelname).1s %(name)s: %(message)s",
    )
    if options.ray:
        missing = [name for name in ("ray", "psutil") if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(f"--ray needs {' and '.join(missing)}: pip install 'tutti[ray]'")
        from ray_app.run import serve_on_ray

        return serve_on_ray(options)
    import uvloop

    status: int = uvloop.run(_serve_here(options))
    return status


def addresses(options: argparse.Namespace) -> Addresses:
    return Addresses(options.host, options.http_port, options.grpc_port, options.metrics_port)


async def _serve_here(options: argparse.Namespace) -> int:
    import ensembles
    from tutti import collector, local

    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    is_explicit = options.model_control_mode == "explicit"
    engine = local.make_engine(options.model_repository, local.loop_timer(loop), ensembles.load, is_explicit)
    names = (options.load_model or []) if is_explicit and "*" not in (options.load_model or []) else None
    await asyncio.to_thread(engine.load_all, names)
    if engine.failures() and options.exit_on_error:
        _log.error("%d models could not be loaded (--exit-on-error=false serves the others)", len(engine.failures()))
        await asyncio.to_thread(engine.close)
        return 1
    limits = Limits(options.http_max_input_size, options.grpc_max_message_size)
    server = Server(engine, addresses(options), limits)
    try:
        await server.start()
        collector.settle()
        _log.info("ready: %d models from %s", len(engine.models()), options.model_repository)
        await stop.wait()
        _log.info("stopping: open requests may end")
    except OSError as error:
        _log.error("cannot listen: %s", error)
        return 1
    finally:
        await server.stop()
        await asyncio.to_thread(engine.close)
    return 0


if __name__ == "__main__":
    sys.exit(main())
