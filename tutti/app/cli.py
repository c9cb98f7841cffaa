"""The `tutti` command. Light: what a command needs is imported when it is known which one it is."""

import argparse
import difflib
import io
import os
import resource
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from tutti import __version__
from tutti.app import commands, serve_flags, serve_options
from tutti.app.commands import COMMANDS, need
from tutti.app.restarts import UNUSABLE
from tutti.console.arguments import Terse, plain, shown
from tutti.core import temporary_folders
from tutti.core.errors import MAX_MESSAGE, ConfigError, TuttiError, reason
from tutti.devices import gpu_presence
from tutti.observing.logs import Logs

MAX_FILES = 65536


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show ends no command
            stream.reconfigure(errors="backslashreplace")
    if name not in COMMANDS:
        _parse_general(name)
    try:
        return _serve(rest) if name == "serve" else COMMANDS[name].run(name, rest)
    except TuttiError as error:
        print(f"tutti: {plain(error, MAX_MESSAGE)}", file=sys.stderr)
        return UNUSABLE if name == "serve" else 1
    except BrokenPipeError:  # as of `| head`: who reads has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        where = f"{shown(error.filename)}: " if error.filename else ""
        print(f"tutti {name}: {where}{plain(reason(error))}", file=sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        print(f"tutti {name}: stopped by hand", file=sys.stderr)
        return 128 + signal.SIGINT


def _parse_general(argument: str) -> NoReturn:
    """What is asked without a command: help, the version; or the usage, and the command that was meant."""
    parser = Terse(
        prog="tutti",
        usage="tutti COMMAND ...    (tutti COMMAND --help tells its flags)",
        description="Serve a Triton model repository, make one, and see how well it serves.",
        epilog=commands.overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tutti {__version__}", help="show the version and exit")
    parser.parse_known_args([argument])
    near = difflib.get_close_matches(argument[:100], COMMANDS, 1)
    told = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
    parser.error(f"no command {shown(argument)}; {told}")


def allow_files() -> None:
    """Let this process open as many files as it may, up to MAX_FILES: a connection is one, and 1,024 are usual."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def front_ends(options: argparse.Namespace, has_gpu: bool, cores: int) -> int:
    """How many front-ends are processes of their own; 0 where they are in the engine's."""
    count: int | None = options.front_end_processes
    if count is None:
        is_own = options.supervise or (has_gpu and not options.ray and not _lone(options))
        return max(1, min(serve_flags.MAX_FRONT_ENDS, cores // 4)) if is_own else 0
    return count if count > 1 or options.supervise else 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _lone(options: argparse.Namespace) -> str:
    """What of the options front-end processes do not have, "" for nothing."""
    if options.grpc_use_ssl or options.grpc_use_ssl_mutual or options.grpc_server != "native":
        return "need the native gRPC server, without TLS"
    if not options.allow_http or not options.allow_grpc:
        return "serve HTTP and gRPC both"
    if (options.http_address or options.host) != (options.grpc_address or options.host):
        return "have one address for HTTP and gRPC"
    return ""


def _serve(arguments: Sequence[str]) -> int:
    options = serve_options.parse(arguments)
    _check_log_file(options.log_file)
    # Processes are started with exec: gRPC need not prepare for a fork, nor say that it has not.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    allow_files()
    kinds = options.log_info, options.log_warning, options.log_error
    logs = Logs(options.log_verbose, options.log_file, options.log_format, kinds)
    logs.install()
    temporary_folders.clear_soon()
    if options.ray:
        need("--ray", "ray", "fastapi", "uvicorn", "psutil", "yaml", "pydantic", extra="ray")
        if options.ray_address is None and options.engine_of is None:
            from tutti.ray_app import supervisor as clusters

            return clusters.run(["serve", *arguments], options.exit_timeout_secs)
        from tutti.ray_app.run import serve_on_ray

        return serve_on_ray(options)
    count = front_ends(options, gpu_presence.has_gpu(), _cores())
    if count and options.engine_of is None and not options.check:
        if lone := _lone(options):
            raise ConfigError(f"front-end processes (--front-end-processes, --supervise) {lone}")
        from tutti.app import supervisor

        ports = options.http_port, options.grpc_port
        host = options.http_address or options.host
        return supervisor.run(["serve", *arguments], host, *ports, count, options.exit_timeout_secs, logs)
    from tutti.app import process

    return process.serve(options, logs)


def _check_log_file(path: str) -> None:
    """Raises ConfigError for one that cannot be written, as a FIFO from which nobody reads."""
    if not path:
        return
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--log-file {shown(path)}: {reason(error)}") from None


if __name__ == "__main__":
    sys.exit(main())
