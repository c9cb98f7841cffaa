"""Gateways that watch each other: who hangs is told by missed beats, and killed; nobody else is."""

import itertools
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving import wait_until
from tutti.ray_app.watch import Missed, Watch, is_possible

linux = pytest.mark.skipif(not is_possible(), reason="needs pidfd_open")
BEATS = """
import sys, time
from pathlib import Path
from tutti.ray_app.watch import Watch
watch = Watch(sys.argv[1], Path(sys.argv[2]))
while True:
    watch.beat()
    print(".", flush=True)
    sys.stdin.readline()
"""


def test_who_does_not_beat_is_told_once() -> None:
    missed = Missed(limit=3)
    assert [missed.look({1: 7, 2: beat}) for beat in range(6)] == [[], [], [], [1], [], []]


def test_one_beat_is_enough_to_live() -> None:
    missed = Missed(limit=3)
    looks = [missed.look({1: beat}) for beat in (1, 1, 1, 2, 2, 2, 3, 3, 3, 3)]
    assert looks == [[]] * 9 + [[1]]


def test_who_has_gone_and_come_again_begins_anew() -> None:
    missed = Missed(limit=2)
    assert [missed.look(beats) for beats in ({1: 1}, {1: 1}, {}, {1: 1}, {1: 1}, {1: 1})] == [[]] * 5 + [[1]]


def test_as_a_history_tells() -> None:
    """Against the whole history: told when the last `limit` looks found the beat of the one before."""
    chance = random.Random(0)
    for _ in range(200):
        limit = chance.randint(1, 4)
        missed = Missed(limit)
        history: list[int] = []
        beat = 0
        for _ in range(30):
            beat += chance.random() < 0.4
            history.append(beat)
            same = [a == b for a, b in itertools.pairwise(history)]
            run = next((n for n, is_same in enumerate(reversed(same)) if not is_same), len(same))
            assert missed.look({5: beat}) == ([5] if run == limit else [])


class Other:
    """A process of the group that beats when it is told to."""

    def __init__(self, root: Path, group: str = "g") -> None:
        command = [sys.executable, "-c", BEATS, group, str(root)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._heard()

    def beat(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self._heard()

    def _heard(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == ".\n"

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    one = Watch("g", tmp_path)
    yield one
    one.close()


@linux
def test_a_process_that_hangs_is_killed_and_one_that_beats_is_not(watch: Watch, tmp_path: Path) -> None:
    good, hung, stranger = Other(tmp_path), Other(tmp_path), Other(tmp_path, "another")
    try:
        os.kill(hung.process.pid, signal.SIGSTOP)
        killed = []
        for _ in range(25):
            good.beat()
            killed += watch.look()
        assert killed == [hung.process.pid]
        assert hung.process.wait(60) == -signal.SIGKILL
        assert good.process.poll() is None
        assert stranger.process.poll() is None, "it hangs, but has other ports"
        (folder,) = tmp_path.glob("*-g")
        wait_until(lambda: watch.look() == [] and str(hung.process.pid) not in os.listdir(folder))
        assert {str(good.process.pid), str(os.getpid())} == set(os.listdir(folder))
    finally:
        for one in (good, hung, stranger):
            one.end()


@linux
def test_a_number_that_is_another_process_by_now_is_not_killed(watch: Watch, tmp_path: Path) -> None:
    """The file of a process that has ended names one that lives, and holds no lock."""
    innocent = subprocess.Popen(["sleep", "600"])
    try:
        (folder,) = tmp_path.glob("*-g")
        (folder / str(innocent.pid)).write_bytes(bytes(8))
        assert [watch.look() for _ in range(25)] == [[]] * 25
        assert innocent.poll() is None
        assert not (folder / str(innocent.pid)).exists()
    finally:
        innocent.kill()
        innocent.wait()


@linux
def test_a_folder_that_others_write_to_is_refused(tmp_path: Path) -> None:
    one = Watch("g", tmp_path)
    (folder,) = tmp_path.glob("*-g")
    one.close()
    assert not folder.exists(), "the last one of a group leaves nothing behind"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="not this user's alone"):
        Watch("g", tmp_path)
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(PermissionError):
        Watch("g", tmp_path)
