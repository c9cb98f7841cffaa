"""What help says: of every command and every flag, with examples that are right, and with nothing installed besides."""

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tutti.app import cli, commands
from tutti.app.commands import COMMANDS
from tutti.loadtest import cli as loadtest

EXTRAS = (
    "torch transformers onnx onnxscript sklearn skl2onnx safetensors ray psutil yaml pydantic locust pyarrow hpack "
    "geventhttpclient gevent opentelemetry soundfile soxr matplotlib pynvml cuda tensorrt"
)
# Has every help printed, where the extras are not.
WITHOUT_EXTRAS = """
import importlib.util, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in %r.split():
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from tutti.app import cli
for arguments in %r:
    try:
        cli.main(arguments)
    except SystemExit as ended:
        assert not ended.code, arguments
"""


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command with what is below it, as people write them."""
    for name, command in COMMANDS.items():
        yield from below(name, command.parser())


def below(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one, found in action.choices.items():
                yield from below(f"{name} {one}", found)


@pytest.fixture(scope="module")
def tree() -> dict[str, argparse.ArgumentParser]:
    return dict(parsers())


def test_the_whole_tree_is_there(tree: dict[str, argparse.ArgumentParser]) -> None:
    assert {"serve", "export text", "ensemble explain", "cluster plan", "loadtest worker", "top"} <= set(tree)
    assert len(tree) > 20


def test_every_command_says_what_it_does(tree: dict[str, argparse.ArgumentParser]) -> None:
    for name, parser in tree.items():
        assert parser.prog == f"tutti {name}"
        assert parser.description and parser.description.endswith("."), name


def test_every_flag_says_what_it_does_its_unit_and_its_default(tree: dict[str, argparse.ArgumentParser]) -> None:
    """A unit is what stands for the value: argparse's own is the flag's name once more."""
    lacking = []
    for name, parser in tree.items():
        for action in parser._actions:
            if action.help == argparse.SUPPRESS or isinstance(
                action, argparse._SubParsersAction | argparse._HelpAction
            ):
                continue
            what = f"tutti {name} {'/'.join(action.option_strings) or action.dest}"
            if not re.match(r"[/\w]", action.help or ""):
                lacking.append(f"{what}: no help")
            if action.option_strings and not action.required and "default" not in str(action.help):
                lacking.append(f"{what}: no default")
            if action.option_strings and action.nargs != 0 and action.metavar is None and action.choices is None:
                lacking.append(f"{what}: no unit")
    assert not lacking


def test_every_command_ends_with_examples_that_are_right(tree: dict[str, argparse.ArgumentParser]) -> None:
    for name, parser in tree.items():
        lines = (parser.epilog or "").partition("examples:\n")[2].splitlines()
        assert lines, f"tutti {name} has no examples"
        assert parser.format_help().endswith("\n".join(lines) + "\n"), "each is a line of its own"
        for line in lines:
            check(line, name)


def check(line: str, name: str) -> None:
    """That the line is accepted, up to a pipe; of a shell's <(...) what is in it."""
    words = shlex.split(line.partition("<(")[2].partition(")")[0] or line, comments=True)
    words = words[: next((index for index, word in enumerate(words) if word in ("|", ">")), None)]
    assert words[0] == "tutti"
    command, *rest = words[1:]
    if command == name.split()[0]:
        assert words[1:][: len(name.split())] == name.split(), line
    if command == "loadtest":
        loadtest.parse(rest)
    else:
        COMMANDS[command].parser().parse_args(rest)


def test_the_map_has_every_command_and_lines_that_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 0
        told = capsys.readouterr().out
        for group in commands.GROUPS:
            assert f"\n{group}:\n" in told
        for name, command in COMMANDS.items():
            assert f"  {name} " in told and command.help in told and f"$ {command.example}\n" in told
            check(command.example, name)
        assert max(map(len, told.splitlines())) <= 100


def test_all_help_needs_none_of_the_extras() -> None:
    """In a process of its own, where none of them can be imported."""
    arguments = [[], *([*name.split(), "--help"] for name, _ in parsers()), ["completion", "bash"]]
    code = WITHOUT_EXTRAS % (EXTRAS, arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: tutti") == len(arguments) - 1
