"""Compiled models on disk: made once, whole or not there, by whichever process comes first."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tutti.backends import artefacts
from tutti.backends.artefacts import CacheError

KEY = {"model": "abc", "device": "cpu"}
# Says what it does, and waits for a line where it makes the entry.
PROCESS = """
import sys, time
from pathlib import Path
from tutti.backends import artefacts

def make(folder):
    (folder / "code").write_bytes(b"half")
    print("making", flush=True)
    sys.stdin.readline()
    (folder / "code").write_bytes(b"whole")

class Clock:
    monotonic = time.monotonic
    def sleep(self, seconds):
        print("waiting", flush=True)
        time.sleep(seconds)

artefacts.time = Clock()
path = artefacts.entry(Path(sys.argv[1]), "m", {"model": "abc", "device": "cpu"}, make, 60)
print((path / "code").read_text(), flush=True)
"""


class Maker:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self, folder: Path) -> None:
        self.count += 1
        (folder / "code").write_text(f"made {self.count}")
        (folder / "sub").mkdir()
        (folder / "sub" / "more").write_bytes(bytes(100))


def take(root: Path, make: artefacts.Make, key: dict[str, str] = KEY, wait_s: float = 0) -> str:
    return (artefacts.entry(root, "m", key, make, wait_s) / "code").read_text()


def test_an_entry_is_made_once(tmp_path: Path) -> None:
    make = Maker()
    assert [take(tmp_path / "a" / "b", make) for _ in range(3)] == ["made 1"] * 3
    path = tmp_path / "a" / "b" / "m"
    assert artefacts.size(path) > 100
    assert json.loads((path / artefacts.MANIFEST).read_text())["key"] == KEY
    assert (tmp_path / "a" / "b").stat().st_mode & 0o077 == 0


def flip(path: Path) -> None:
    (path / "code").write_text("made 2")


def lose(path: Path) -> None:
    (path / "sub" / "more").unlink()


def garble(path: Path) -> None:
    (path / artefacts.MANIFEST).write_text('{"key": 3, "files": []}')


def no_manifest(path: Path) -> None:
    (path / artefacts.MANIFEST).unlink()


def other_key(path: Path) -> None:
    manifest = json.loads((path / artefacts.MANIFEST).read_text())
    (path / artefacts.MANIFEST).write_text(json.dumps({**manifest, "key": {**KEY, "device": "other"}}))


def open_to_others(path: Path) -> None:
    path.chmod(0o777)


def a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def a_file(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.write_text("not a folder")


@pytest.mark.parametrize(
    "spoil", [flip, lose, garble, no_manifest, other_key, open_to_others, a_link, a_file], ids=lambda f: f.__name__
)
def test_what_is_not_whole_is_made_anew(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    make = Maker()
    take(tmp_path, make)
    spoil(tmp_path / "m")
    assert take(tmp_path, make) == "made 2"
    assert take(tmp_path, make) == "made 2"
    assert make.count == 2
    assert not (tmp_path / "m").is_symlink()


def test_another_users_entry_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take(tmp_path, Maker())
    assert artefacts.is_whole(tmp_path / "m", KEY)
    if os.geteuid() == 0:
        os.chown(tmp_path / "m", 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert not artefacts.is_whole(tmp_path / "m", KEY)


def test_nothing_is_left_of_what_fails(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "code").write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        take(tmp_path, fail)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".m.lock"]
    assert take(tmp_path, Maker()) == "made 1"


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"cannot write to .*file/compiled: .*TUTTI_CACHE_DIR"):
        take(tmp_path / "file" / "compiled", Maker())


def test_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTTI_CACHE_DIR", "/somewhere")
    assert artefacts.default_root() == Path("/somewhere/compiled")
    monkeypatch.delenv("TUTTI_CACHE_DIR")
    assert artefacts.default_root() == Path.home() / ".cache" / "tutti" / "compiled"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(CacheError, match="set TUTTI_CACHE_DIR"):
        artefacts.default_root()


@contextmanager
def process(root: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", PROCESS, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        try:
            yield started
        finally:
            started.kill()


def said(started: subprocess.Popen[str]) -> str:
    assert started.stdout is not None
    return started.stdout.readline().strip()


def test_of_two_processes_one_makes_it_and_the_other_waits(tmp_path: Path) -> None:
    with process(tmp_path) as first, process(tmp_path) as second:
        lines = {said(first): first, said(second): second}
        assert set(lines) == {"making", "waiting"}
        with pytest.raises(CacheError, match="another process has been compiling it for 0 s"):
            take(tmp_path, Maker())
        maker = lines["making"]
        assert maker.stdin is not None
        maker.stdin.write("go on\n")
        maker.stdin.flush()
        assert said(maker) == "whole"
        rest = lines["waiting"].communicate(timeout=60)[0].split()
    assert set(rest) <= {"waiting", "whole"}
    assert rest[-1] == "whole"


def test_a_process_that_is_killed_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    with process(tmp_path) as first:
        assert said(first) == "making"
        assert [path for path in tmp_path.iterdir() if path.suffix == ".part"]
        first.kill()
        first.wait()
        assert take(tmp_path, Maker(), wait_s=60) == "made 1"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".m.lock", "m"]
