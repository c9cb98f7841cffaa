"""`tutti ensemble`: check, show, draw, explain and build the ensembles of a repository."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tutti.app import explain
from tutti.backends import completion
from tutti.console.arguments import Parser
from tutti.console.help_format import Help, examples
from tutti.core.errors import ConfigError, reason
from tutti.ensembles import folder_plans, graph, picture, show
from tutti.ensembles.source import graph_of
from tutti.repository import folders, unserved
from tutti.repository.model_config import ModelConfig

_REPOSITORY = Path("model_repository")


def main(arguments: Sequence[str]) -> int:
    """Run one of the commands; returns its exit status. Raises ConfigError for a graph that cannot run."""
    if arguments[:1] == ["explain"]:
        return explain.main(arguments[1:], "tutti ensemble explain")
    options = make_parser().parse_args(arguments)
    run: dict[str, Any] = {"check": _check, "show": _show, "draw": _draw, "build": _build}
    explain.check_folder(options.repository)
    try:
        status: int = run[options.what](options)
    except OSError as error:  # of a file that is written, or read
        raise ConfigError(f"'{error.filename}': {reason(error)}") from None
    return status


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tutti ensemble",
        description="Look at the ensembles of a repository, run them here, and build them.",
        epilog=examples(
            "tutti ensemble check --repository models", "tutti ensemble draw pipeline --output pipeline.svg"
        ),
        formatter_class=Help,
    )
    commands = parser.add_subparsers(dest="what", required=True)
    for name, text, lines in (
        (
            "check",
            "check one ensemble, or all, against the models they use",
            ("tutti ensemble check", "tutti ensemble check pipeline --repository models"),
        ),
        (
            "show",
            "show inputs, steps in the order of their execution, conditions and outputs",
            ("tutti ensemble show pipeline",),
        ),
        ("draw", "draw the graph as a picture, SVG", ("tutti ensemble draw pipeline --output pipeline.svg",)),
    ):
        description = f"{text[0].upper()}{text[1:]}."
        command = commands.add_parser(
            name, help=text, description=description, epilog=examples(*lines), formatter_class=Help
        )
        which = "the ensemble (default: all)" if name == "check" else "the ensemble"
        command.add_argument("name", nargs="?" if name == "check" else None, help=which)
        _add_repository(command)
        if name == "draw":
            command.add_argument("--output", type=Path, metavar="FILE", help="where to write it (default: NAME.svg)")
    text = "run one request here, and show when each step ran, for how many rows, or why not: tutti explain"
    explain.add_to(commands, "tutti ensemble explain", text)
    _add_build(commands)
    return parser


def _add_build(commands: Any) -> None:
    build = commands.add_parser(
        "build",
        help="write config.pbtxt from a graph written in Python",
        description="Write config.pbtxt from a graph written in Python.",
        epilog=examples("tutti ensemble build graph.py --repository models", "tutti ensemble build graph.py --check"),
        formatter_class=Help,
    )
    build.add_argument("file", type=Path, help="a Python file with a function build(repository) -> Graph")
    _add_repository(build)
    build.add_argument(
        "--check", action="store_true", help="fail if config.pbtxt is not what would be written (default: write it)"
    )


def _add_repository(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--repository",
        type=Path,
        default=_REPOSITORY,
        metavar="FOLDER",
        help="the folder of models (default: %(default)s)",
    )


def planned(root: Path, name: str) -> graph.Plan:
    """The checked plan of one of the repository's ensembles. Raises ConfigError."""
    folders.check_known(root, name)
    folder = completion.open_model(root, name)
    if not folder.config.is_ensemble:
        raise ConfigError(f"model '{name}' is no ensemble")
    return folder_plans.planned(folder, lambda model, version: _config_of(root, model, version))


def _config_of(root: Path, name: str, version: str) -> ModelConfig:
    folder = completion.open_model(root, name)
    if version and int(version) not in folder.versions:
        raise ConfigError(f"model '{name}' has no version {version}, it has {list(folder.versions)}")
    return folder.config


def _check(options: argparse.Namespace) -> int:
    names = [options.name] if options.name is not None else folders.model_names(options.repository)
    failures = checked = 0
    for name in names:
        try:
            if options.name is None and not completion.open_model(options.repository, name).config.is_ensemble:
                continue
            checked += 1
            plan = planned(options.repository, name)
            print(f"{name}: {len(plan.steps)} steps, right")
        except ConfigError as error:
            failures += 1
            print(f"{name}: {error}", file=sys.stderr)
    if not names:
        raise ConfigError("; ".join(unserved.unserved(options.repository)) or f"'{options.repository}' holds no model")
    if not checked and not failures:
        print(f"no ensembles among the {len(names)} models of {options.repository}")
    return 1 if failures else 0


def _show(options: argparse.Namespace) -> int:
    print(show.table(planned(options.repository, options.name)))
    return 0


def _draw(options: argparse.Namespace) -> int:
    path = options.output or Path(f"{options.name}.svg")
    path.write_text(picture.draw(planned(options.repository, options.name)), encoding="utf-8")
    print(path)
    return 0


def _build(options: argparse.Namespace) -> int:
    written = graph_of(options.file, options.repository)
    where = "" if options.repository == _REPOSITORY else f" --repository {shlex.quote(str(options.repository))}"
    text = f"# Written by `tutti ensemble build {options.file.as_posix()}`.\n{written.config()}"
    path = options.repository / written.name / "config.pbtxt"
    if options.check:
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            raise ConfigError(
                f"{path} is not what {options.file} makes: run tutti ensemble build {options.file}{where}"
            )
        return 0
    (path.parent / "1").mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(path)
    specs = completion.open_model(options.repository, written.name).config.inputs
    inputs = " ".join(shlex.quote(f"{spec.name}=...") for spec in specs)
    print(f"try it: tutti explain {written.name} {inputs}{where}", file=sys.stderr)
    return 0
