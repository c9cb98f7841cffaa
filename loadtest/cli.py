"""`tutti loadtest run|saturate|compare|replay|worker`: what a person asks for, and whether it can be asked.

Light: help, usage and the list of scenarios need no extra; `tutti.loadtest.commands` does the work.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tutti.core import extras
from tutti.frontends import api_keys
from tutti.loadtest import names
from tutti.loadtest.addresses import address
from tutti.loadtest.errors import ScenarioError

INVALID = 2
_MOST_PROCESSES = 256
_HIGHEST_RATE = 1e6
_EXITS = "exit status: 0 the goal is met, 1 it is missed, 2 nothing can be said (and why), 3 it is open"


_EXAMPLES = {
    "run": ("tutti loadtest run steady --url 127.0.0.1:8000", "tutti loadtest run my.yaml --output report --seed 7"),
    "saturate": ("tutti loadtest saturate steady --start 100",),
    "compare": (
        "tutti loadtest compare 127.0.0.1:8000 127.0.0.1:9000 steady --rounds 20",
        "tutti loadtest compare ./monday ./tuesday  # of two runs with --output",
    ),
    "replay": ("tutti loadtest replay trace.csv steady --speed 2",),
    "worker": ("tutti loadtest worker --master-host 10.0.0.1",),
}


def _examples(*commands: str) -> str:
    return "\n".join(["examples:", *(f"  {line}" for command in commands for line in _EXAMPLES[command])])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if absent := extras.absent("loadtest"):
        print(f"tutti loadtest: it needs {' and '.join(absent)}: {extras.install('loadtest')}", file=sys.stderr)
        return INVALID
    return run(options)


def run(options: argparse.Namespace) -> int:
    """Do what was asked for; returns the exit status."""
    from tutti.loadtest.commands import run as work

    return work(options)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, with Locust's own as `locust`; where they make no sense, a command's own usage, and the end."""
    words = list(arguments)
    ours, locust = words, []
    if "--" in words:
        ours, locust = words[: words.index("--")], words[words.index("--") + 1 :]
    parser, commands = make_parser()
    first = next((word for word in ours if not word.startswith("-")), None)
    if first is None and not {"-h", "--help"} & set(ours):
        parser.error(f"{' '.join([*ours, ''])}expected a command: one of {', '.join(commands)}")
    if first is not None and first not in commands:
        parser.error(f"no such command: '{first}'{_near_command(first, commands)}")
    options, rest = parser.parse_known_args(ours)
    command = commands[options.command]
    if rest:
        command.error(f"unrecognized arguments: {' '.join(rest)}{_near_flag(command, rest)}")
    if options.command == "compare" and isinstance(options.a, Path) != isinstance(options.b, Path):
        command.error(f"expected two servers or two folders of runs, got {options.a} and {options.b}")
    options.is_of_runs = options.command == "compare" and isinstance(options.a, Path)
    if options.is_of_runs and options.output is not None:
        command.error("--output: of runs that are over nothing is written: the figures are printed")
    if options.command != "worker" and options.scenario is None:
        options.scenario = "steady" if options.model or options.is_of_runs else None
    if options.command != "worker" and options.scenario is None:
        command.error(f"expected a scenario: a file in YAML, or one of these, which come along:\n{names.listing()}")
    options.words, options.locust = words, locust
    return options


def _near_command(word: str, commands: Iterable[str]) -> str:
    if word in names.packaged() or word.endswith((".yaml", ".yml")):
        return f"; did you mean 'run {word}'?"
    return names.near(word, commands) or f": expected one of {', '.join(commands)}"


def _near_flag(command: argparse.ArgumentParser, rest: Sequence[str]) -> str:
    known = [flag for flag in command._option_string_actions if flag.startswith("--")]
    flags = [word.partition("=")[0] for word in rest if word.startswith("--")]
    return next((hint for flag in flags if (hint := names.near(flag, known))), "")


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and those of its commands."""
    parser = argparse.ArgumentParser(
        prog="tutti loadtest",
        description="Open-loop load tests under Locust. What follows -- goes to Locust, as --expect-workers.",
        epilog=f"{_EXITS}\n\n{_examples('run', 'saturate', 'compare')}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    adders = {
        "run": _add_run, "saturate": _add_saturate, "compare": _add_compare, "replay": _add_replay,
        "worker": _add_worker,
    }  # fmt: skip
    return parser, {name: add(commands) for name, add in adders.items()}


def _add_command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    """A command that takes a scenario; what it takes beside it is added to what this returns."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"scenarios that come along:\n{names.listing()}\n\n{_EXITS}\n\n{_examples(name)}",
    )
    return command


def _add_run(commands: Any) -> argparse.ArgumentParser:
    command = _add_command(commands, "run", "run a scenario, and judge it by its goal")
    _add_common(command)
    command.add_argument(
        "--rate", type=_rate, metavar="N", help="requests a second (default: as the scenario's stages have it)"
    )
    command.add_argument(
        "--seconds", type=_positive, metavar="SECONDS", help="of that rate (default: of the scenario's first stage)"
    )
    _add_web(command)
    return command


def _add_saturate(commands: Any) -> argparse.ArgumentParser:
    command = _add_command(commands, "saturate", "find the highest rate that meets the goal, as bounds")
    command.add_argument(
        "--start", type=_rate, default=10.0, metavar="RATE", help="requests a second to begin with (default: 10)"
    )
    command.add_argument(
        "--seconds", type=_positive, default=10.0, metavar="SECONDS", help="of each probe (default: 10)"
    )
    command.add_argument(
        "--within",
        type=_share,
        default=0.03,
        metavar="SHARE",
        help="until the bounds are this close, of 1 (default: 0.03)",
    )
    _add_common(command)
    return command


def _add_compare(commands: Any) -> argparse.ArgumentParser:
    text = "tell whether server B differs from server A, asked in turns; or run B from run A"
    command = _add_command(commands, "compare", text)
    command.add_argument("a", metavar="A", type=_side, help="HOST:PORT of one server, or the --output of a run")
    command.add_argument("b", metavar="B", type=_side, help="HOST:PORT of the other, or the --output of a later run")
    command.add_argument(
        "--rounds", type=_rounds, default=10, metavar="N", help="that are compared, 3 or more (default: 10)"
    )
    command.add_argument("--seconds", type=_positive, default=2.0, metavar="SECONDS", help="of each (default: 2)")
    command.add_argument(
        "--rate", type=_rate, metavar="N", help="requests a second to each server (default: the scenario's first)"
    )
    _add_common(command)
    return command


def _add_replay(commands: Any) -> argparse.ArgumentParser:
    command = _add_command(commands, "replay", "send the arrivals of a trace: CSV, or an earlier run's Parquet")
    command.add_argument("trace", metavar="TRACE", help="arrivals, or seconds and the rates from then on")
    command.add_argument("--speed", type=_positive, default=1.0, metavar="TIMES", help="times as fast (default: 1)")
    _add_common(command)
    _add_web(command)
    return command


def _add_web(command: argparse.ArgumentParser) -> None:
    command.add_argument("--web", action="store_true", help="with Locust's web page, on port 8089 (default: without)")


def _add_worker(commands: Any) -> argparse.ArgumentParser:
    worker: argparse.ArgumentParser = commands.add_parser(
        "worker",
        help="send a share of a run whose master is on another machine",
        description="Send a share of a run whose master is on another machine.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_examples("worker"),
    )
    worker.add_argument("--master-host", required=True, metavar="HOST", help="the machine of the run (required)")
    worker.add_argument("--master-port", type=_port, default=5557, metavar="PORT", help="of the run (default: 5557)")
    worker.add_argument("--raw", type=Path, metavar="FOLDER", help="for raw requests (default: a temporary one)")
    return worker


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "scenario", nargs="?", metavar="SCENARIO", help="YAML (docs/loadtest.md), or a name from below"
    )
    command.add_argument(
        "--url",
        action="append",
        type=_address,
        metavar="HOST:PORT",
        help="of the server, repeat for more (default: the scenario's)",
    )
    command.add_argument(
        "--model", metavar="NAME", help="asked with seeded data that fit (default: the scenario's, with its data)"
    )
    command.add_argument("--p99-ms", type=_positive, metavar="MS", help="the goal (default: the scenario's)")
    command.add_argument(
        "--protocol", choices=("http", "grpc", "grpc-stream"), help="how to ask (default: the scenario's)"
    )
    command.add_argument(
        "--metrics",
        action="append",
        type=_address,
        metavar="HOST:PORT",
        help="the server's metrics, repeat for more (default: the scenario's)",
    )
    api_keys.add_to(command)
    command.add_argument("--seed", type=_seed, metavar="N", help="of arrivals and payloads (default: the scenario's)")
    command.add_argument("--processes", type=_processes, default=1, metavar="N", help="workers here (default: 1)")
    command.add_argument(
        "--output", type=Path, metavar="FOLDER", help="for the report, JSON and raw requests (default: none is written)"
    )


def _number(text: str, expected: str) -> float:
    # Python takes digits of other scripts, underscores and spaces, too.
    value = float(text) if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", text) else math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text[:80]!r}")
    return value


def _positive(text: str) -> float:
    value = _number(text, "a number above 0")
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text[:80]!r}")
    return value


def _rate(text: str) -> float:
    value = _positive(text)
    if value > _HIGHEST_RATE:
        raise argparse.ArgumentTypeError(f"expected {_HIGHEST_RATE:,.0f} requests a second at most, got {text[:80]!r}")
    return value


def _share(text: str) -> float:
    value = _positive(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"expected a share between 0 and 1, as 0.03, got {text[:80]!r}")
    return value


def _whole(text: str, low: int, high: int | None = None) -> int:
    expected = f"a whole number from {low}" + (f" to {high}" if high is not None else " on")
    if not (text.isascii() and text.isdecimal() and len(text) < 12):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text[:80]!r}")
    if int(text) < low or (high is not None and int(text) > high):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text[:80]!r}")
    return int(text)


def _rounds(text: str) -> int:
    return _whole(text, 3, 10_000)


def _processes(text: str) -> int:
    return _whole(text, 1, _MOST_PROCESSES)


def _port(text: str) -> int:
    return _whole(text, 1, 65_535)


def _seed(text: str) -> int:
    return _whole(text, 0)


def _side(text: str) -> str | Path:
    """A server, or a folder that a run has left."""
    path = Path(text)
    return path if path.is_dir() or os.sep in text else _address(text)


def _address(text: str) -> str:
    try:
        return address(text)
    except ScenarioError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
