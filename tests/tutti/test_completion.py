"""What shells complete: real ones, asked with the words of a line. Only bash is everywhere; the others are skipped."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.terminal import Terminal
from tests.tutti.test_help import parsers
from tutti.app import completion
from tutti.app.cli import main
from tutti.app.completion import Place

# A line up to the tab, and what must be offered, all of it where the last is True.
LINES: list[tuple[str, set[str], bool]] = [
    ("tutti ", {"serve", "init", "export", "top", "doctor", "completion"}, False),
    ("tutti se", {"serve"}, True),
    ("tutti --v", {"--version"}, True),
    ("tutti serve --http-po", {"--http-port"}, True),
    ("tutti serve --model-control-mode ", {"none", "poll", "explicit"}, True),
    ("tutti serve models --model-control-mode p", {"poll"}, True),
    ("tutti serve --allow-grpc ", {"true", "false"}, True),
    ("tutti serve --load-model ", set(), True),
    ("tutti serve --api-key-file fi", {"file one"}, True),
    ("tutti serve fi", {"file one"}, True),
    ("tutti export ", {"audio", "text", "vision"}, True),
    ("tutti export text --var", {"--variants"}, True),
    ("tutti export vision --repository fi", {"file one"}, True),
    ("tutti loadtest compare --pro", {"--protocol", "--processes"}, True),
    ("tutti completion ", {"bash", "zsh", "fish"}, True),
    ("tutti serve --backend-dir", set(), True),
]
WITH_EQUALS: list[tuple[str, set[str], bool]] = [
    ("tutti serve --model-control-mode=e", {"explicit"}, True),
    ("tutti serve --model-control-mode=", {"none", "poll", "explicit"}, True),
    ("tutti serve --api-key-file=fi", {"file one"}, True),
]


@pytest.fixture(scope="module")
def known() -> list[Place]:
    return list(completion.places())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "file one").touch()
    (tmp_path / "other").touch()
    return tmp_path


def judge(offered: set[str], line: str, expected: set[str], is_all: bool) -> None:
    assert (offered == expected) if is_all else (expected <= offered), (line, offered)


def test_it_knows_every_command_and_every_flag(known: list[Place]) -> None:
    for name, parser in parsers():
        place = next(one for one in known if one.path == name)
        shown = {flag for action in parser._actions if action.help != "==SUPPRESS==" for flag in action.option_strings}
        assert {flag for one in place.flags for flag in one.names} == shown


# bash splits words at = signs, and says so in COMP_WORDBREAKS.
ASK_BASH = """
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*"
_tutti
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(("line", "expected", "is_all"), [*LINES, *WITH_EQUALS])
def test_bash(line: str, expected: set[str], is_all: bool, known: list[Place], folder: Path) -> None:
    words = re.split(r" |(?==)", re.sub(r"=(?=.)", "= ", line))
    script = f"{completion.bash(known)}\n{ASK_BASH}"
    done = subprocess.run(
        ["bash", "--norc", "-c", script, "bash", *words],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    judge(set(filter(None, done.stdout.split("\n"))), line, expected, is_all)


ASK_ZSH = """
compdef() { : }
compadd() { shift; print -l -- "${(@M)@:#$PREFIX*}" }
_describe() { local -a names=("${(@)told%%:*}"); print -l -- "${(@M)names:#$PREFIX*}" }
_files() { print -l -- $PREFIX*(N) }
compset() { PREFIX="${PREFIX#*=}" }
"""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
@pytest.mark.parametrize(("line", "expected", "is_all"), [*LINES, *WITH_EQUALS])
def test_zsh(line: str, expected: set[str], is_all: bool, known: list[Place], folder: Path) -> None:
    """With what zsh's own functions would be asked for."""
    ask = 'words=("$@") CURRENT=$# PREFIX="${@[-1]}"\n_tutti'
    script = f"{ASK_ZSH}\n{completion.zsh(known)}\n{ask}"
    command = ["zsh", "-f", "-c", script, "zsh", *line.split(" ")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=60, check=True)
    judge(set(filter(None, done.stdout.split("\n"))), line, expected, is_all)


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish")
@pytest.mark.parametrize(("line", "expected", "is_all"), [*LINES, *WITH_EQUALS])
def test_fish(line: str, expected: set[str], is_all: bool, known: list[Place], folder: Path) -> None:
    (folder / "tutti.fish").write_text(completion.fish(known))
    command = ["fish", "--no-config", "-c", "source tutti.fish; complete -C $argv[1]", line]
    environment = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=60, check=True)
    assert done.stderr == ""
    offered = {re.sub(r"^--[a-z-]+=", "", one.partition("\t")[0]) for one in done.stdout.splitlines()}
    judge({one.replace("\\ ", " ") for one in offered if one != "-h"}, line, expected, is_all)


def test_a_tab_in_a_real_bash(known: list[Place], folder: Path) -> None:
    (folder / "script").write_text(completion.bash(known))
    terminal = Terminal(["bash", "--norc", "--noprofile", "-i"], folder, PS1="> ", TERM="dumb")
    terminal.press("source ./script && echo has been $((6 * 7))\n")
    terminal.read_until("has been 42")
    terminal.press("tutti ser\t--model-control-mode=exp\t")
    terminal.read_until("tutti serve --model-control-mode=explicit")
    terminal.press("--api-key-file fi\t")
    terminal.read_until(r"--api-key-file file\\ one")
    terminal.press("\x15exit 3\n")  # instead of that line
    assert terminal.end() == 3


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_command_prints_the_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert f"tutti completion {shell}" in capsys.readouterr().out


def test_no_text_ends_a_shells_string(known: list[Place]) -> None:
    told = [
        text for place in known for text in (*dict(place.subcommands).values(), *(flag.help for flag in place.flags))
    ]
    assert all(told)
    assert all(re.fullmatch(r"[\w /.,*-]+", text) for text in told)
    assert completion._short('it\'s "so" $rm `x`: and; more') == "its so rm x"
