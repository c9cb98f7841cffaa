"""`tutti cluster`: plan the pools of a repository, and simulate how they would do.

Light: its help needs no extra; `tutti.ray_app.planning` does the work.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tutti.console.arguments import Parser, positive, whole
from tutti.console.help_format import Help, examples

# The most GPUs or replicas that a flag takes: a larger number is a typing error.
_MOST = 1_000_000


def main(arguments: Sequence[str]) -> int:
    """Run one of the commands; returns its exit status. Raises ConfigError for what cannot be planned or read."""
    options = make_parser().parse_args(arguments)
    from tutti.ray_app import planning

    {"plan": planning.plan, "why": planning.why, "simulate": planning.simulate}[options.command](options)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tutti cluster",
        description="Plan and simulate pools of replicas on Ray.",
        epilog=examples(
            "tutti cluster plan models --gpus 4 --output pools.yaml",
            "tutti serve models --ray --placement pools.yaml",
        ),
        formatter_class=Help,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_plan(commands)
    _add_why(commands)
    _add_simulate(commands)
    return parser


def _add(commands: Any, name: str, text: str, *lines: str) -> argparse.ArgumentParser:
    """A command's parser; `lines` are examples of its use."""
    description = f"{text[0].upper()}{text[1:]}."
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=description, epilog=examples(*lines), formatter_class=Help
    )
    return parser


def _add_plan(commands: Any) -> None:
    plan = _add(
        commands,
        "plan",
        "make a placement file for a repository, models packed by their memory",
        "tutti cluster plan models --gpus 4 --gpu-memory-gb 80 --output pools.yaml",
    )
    plan.add_argument("model_repository", type=Path, help="the folder of models")
    plan.add_argument("--gpus", type=whole(0, _MOST), required=True, metavar="N", help="of the cluster (required)")
    plan.add_argument(
        "--gpu-memory-gb", type=positive, default=24.0, metavar="GB", help="of each (default: %(default)g)"
    )
    plan.add_argument(
        "--cpu-replicas",
        type=whole(0, _MOST),
        default=1,
        metavar="N",
        help="replicas without a GPU (default: %(default)s)",
    )
    plan.add_argument("--output", type=Path, metavar="FILE", help="write the placement there (default: show it)")


def _add_why(commands: Any) -> None:
    why = _add(
        commands,
        "why",
        "say where each model of a repository lives, and why",
        "tutti cluster why models --gpus 4 --placement pools.yaml",
    )
    why.add_argument("model_repository", type=Path, help="the folder of models")
    why.add_argument("--placement", type=Path, metavar="FILE", help="as for tutti serve (default: its pools)")
    why.add_argument(
        "--gpus", type=whole(0, _MOST), default=0, metavar="N", help="of the cluster (default: %(default)s)"
    )


def _add_simulate(commands: Any) -> None:
    simulate = _add(
        commands,
        "simulate",
        "tell how pools would do under a load, in simulated time",
        "tutti cluster simulate rush.yaml",
        "tutti cluster simulate week.yaml --fluid",
    )
    simulate.add_argument("scenario", type=Path, help="YAML: pools, how fast they are, and the load (docs/cluster.md)")
    simulate.add_argument(
        "--fluid",
        action="store_true",
        help="by half seconds: for days, and thousands of replicas (default: by requests)",
    )
