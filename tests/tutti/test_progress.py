"""Progress: what a line says, when it comes, and what is left of it on a terminal and in a log."""

import io
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving import wait_until
from tutti.console import progress

ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def at_times(monkeypatch: pytest.MonkeyPatch, out: io.StringIO) -> str:
    """What is written of a line that is told each half second, for eleven seconds."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0] + 10)
    shown = progress.Progress(out)
    for number in range(23):
        clock[0] = number / 2
        shown.show(f"at {number / 2:g}" + "." * (number == 0))
    shown.clear()
    return out.getvalue()


def test_a_log_has_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    assert at_times(monkeypatch, io.StringIO()) == "at 0.\nat 5\nat 10\n"


def test_a_terminal_has_one_line_that_is_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    told = at_times(monkeypatch, Terminal())
    assert told.startswith("\rat 0.\x1b[K\rat 0.5\x1b[K\rat 1\x1b[K\rat 1.5")
    assert told.endswith("\rat 11\x1b[K\r\x1b[K")
    assert "\n" not in told
    monkeypatch.setenv("TERM", "dumb")
    assert "\r" not in at_times(monkeypatch, Terminal())


def test_no_line_is_longer_than_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "20")
    out = Terminal()
    progress.Progress(out).show("x" * 50)
    assert out.getvalue() == "\r" + "x" * 18 + "…\x1b[K"
    assert progress.cut("short", 5) == "short"


def test_a_log_has_a_line_that_says_nothing_new_more_and_more_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, out = [0.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    shown = progress.Progress(out)
    for second in range(400):
        clock[0] = second
        shown.show(f"{second}", "read" if second < 380 else "checks")
    assert out.getvalue().split() == [
        "0",
        "5",
        "15",
        "35",
        "75",
        "135",
        "195",
        "255",
        "315",
        "375",
        "380",
        "385",
        "395",
    ]


def test_a_line_that_comes_again_soon_with_something_new_waits_for_its_time() -> None:
    repeats = progress.Repeats(2.0)
    times = [(0.0, "a"), (1.0, "b"), (2.0, "b"), (3.0, "b"), (4.0, "b"), (6.0, "b"), (7.0, "c"), (8.0, "c")]
    assert [repeats.is_due(about, now_s) for now_s, about in times] == [
        True, False, True, False, True, False, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (("export", "", 0, 0, 0.0, 3.9, None), "export, 3 s"),
        (("export", "fp32", 0, 4, 0.0, 3.0, None), "export [1/4], 3 s: fp32"),
        (("export", "int8", 1, 4, 0.0, 12.0, 28.0), "export [2/4], 12 s, about 30 s left: int8"),
        (("export", "int8", 1, 4, 0.0, 95.0, 70.0), "export [2/4], 1 min 35 s, about a minute left: int8"),
        (("simulate", "", 0, 0, 0.25, 10.0, 3.0), "simulate, 25%, 10 s, a few seconds left"),
    ],
)
def test_what_a_line_says(given: tuple[str, str, int, int, float, float, float | None], line: str) -> None:
    assert progress.told(*given) == line


@pytest.mark.parametrize(
    ("given", "left_s"),
    [
        # done, total, share, passed_s, step_s, is_alike
        ((0, 4, 0.0, 3.0, 3.0, True), None),
        ((1, 4, 0.0, 12.0, 2.0, True), 28.0),
        ((1, 4, 0.0, 12.0, 2.0, False), None),  # what has been read says nothing of what is to be built
        ((3, 4, 0.0, 95.0, 5.0, True), 25.0),
        ((3, 4, 0.0, 95.0, 50.0, True), None),  # it takes longer than those before it: nobody knows how long
        ((1, 4, 0.0, 95.0, 85.0, True), None),
        ((0, 0, 0.25, 10.0, 10.0, False), 30.0),
        ((0, 0, 0.01, 10.0, 10.0, False), None),
        ((1, 3, 0.5, 20.0, 10.0, True), 25.0),
        ((1, 3, 0.5, 20.0, 10.0, False), None),
        ((2, 3, 0.5, 20.0, 10.0, False), 10.0),
    ],
)
def test_what_is_left_is_told_where_somebody_knows(
    given: tuple[int, int, float, float, float, bool], left_s: float | None
) -> None:
    assert progress.left_s(*given) == left_s


def test_the_pace_of_pieces_is_that_of_those_that_are_done() -> None:
    """Of ten models nine are loaded in 9 s and the last takes a minute: never that no time is left."""
    pace = progress.Pace()
    told = [pace.left_s(min(9, second), 10, second) for second in range(70)]
    assert told[:10] == [None, *(float(10 - second) for second in range(1, 10))]
    assert told[10] == 0.0 and set(told[11:]) == {None}


def test_estimates_are_no_closer_than_they_are_known() -> None:
    assert [progress.amount(s) for s in (0.0, 5, 5.1, 41, 50, 51, 89, 90, 150, 7800)] == [
        "a few seconds", "a few seconds", "about 10 s", "about 50 s", "about 50 s", "about a minute", "about a minute",
        "about 2 min", "about 2 min", "about 2 h 10 min",
    ]  # fmt: skip


def test_times_are_told_as_people_do() -> None:
    assert [progress.clock(s) for s in (0, 39.2, 185, 7800)] == ["0 s", "40 s", "3 min 05 s", "2 h 10 min"]
    assert progress.clock(59.9, is_up=False) == "59 s"


def test_short_work_is_not_told_of() -> None:
    out = io.StringIO()
    with progress.Work("work", out=out) as work:
        work.step("one", total=2)
        work.step("two")
    assert out.getvalue() == ""


WORK = """
import sys, threading
from tutti.console.progress import Work
with Work("export", 3) as work:
    work.step("fp32")
    work.step("int8")
    assert not sys.stdin.readline()  # until whoever looks has seen a line
print("published")
"""


def test_a_terminal_is_told_of_long_work_and_left_clean() -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", WORK], stdin=subprocess.PIPE, stdout=theirs, stderr=theirs, cwd=ROOT,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "79"},
    ) as process:  # fmt: skip
        os.close(theirs)
        seen = b""
        while not re.search(rb"\rexport \[2/3\], \d+ s(, [a-z0-9 ]+ left)?: int8", seen):
            seen += os.read(ours, 1024)
        assert process.stdin is not None
        process.stdin.close()
        try:
            while part := os.read(ours, 1024):
                seen += part
        except OSError:  # how a terminal of Linux ends
            pass
    os.close(ours)
    assert seen.endswith(b"\r\x1b[Kpublished\r\n")
    assert b"\n" not in seen.removesuffix(b"published\r\n")
    assert process.returncode == 0


def test_the_last_line_of_a_log_is_without_its_time(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for text, line in (
        ("", ""),
        ("one\n2026-11-27 05:07:54,534\tWARNING two words\n\n", "WARNING two words"),
        ("x\n" * 9_000 + "Collecting torch==2.13\n", "Collecting torch==2.13"),
    ):
        log.write_text(text)
        with log.open("rb") as file:
            assert progress.last_line(file.fileno()) == line
            assert file.tell() == 0


def test_commands_of_others_are_told_of_and_their_failures_shown() -> None:
    own = "import sys; print('found it', flush=True); sys.stdin.read(); sys.exit(int(sys.argv[1]))"
    for status in (0, 3):
        command = [sys.executable, "-m", "tutti.console.progress", "installing", sys.executable, "-c", own, str(status)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == status
        assert done.stdout == ""
        if status:
            assert done.stderr.endswith("found it\ninstalling: it ended with status 3\n")


def test_commands_of_others_that_end_otherwise_are_told_of_in_a_sentence(tmp_path: Path) -> None:
    """Stopped by hand as a terminal does it, killed, and not there at all."""
    telling = [sys.executable, "-m", "tutti.console.progress", "installing"]
    own = "import os, signal, sys; open(sys.argv[1], 'w').close(); signal.pause()"
    asleep = [*telling, sys.executable, "-c", own, str(tmp_path / "on")]
    with subprocess.Popen(asleep, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True) as process:
        wait_until((tmp_path / "on").exists, 60.0)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate()
    assert (process.returncode, said.splitlines()[-1]) == (130, "installing: stopped by hand")
    killed = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    for command, status, ending in (
        (killed, 137, "installing: it was killed, by another process or by the system for want of memory\n"),
        ([str(tmp_path / "none")], 1, f"installing: {tmp_path / 'none'}: No such file or directory\n"),
    ):
        done = subprocess.run([*telling, *command], capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == status
        assert done.stderr.endswith(ending)
        assert "Traceback" not in done.stderr
