"""Temporary folders: none stays behind a process that was killed, and none of a living one goes."""

import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.serving import wait_until
from tutti.app import cli, process
from tutti.core import temporary_folders
from tutti.core.temporary_folders import Folder

ROOT = Path(__file__).parents[2]
MAKES = """
import sys, tempfile
from pathlib import Path
from tutti.backends.python import execution_env
from tutti.core.temporary_folders import Folder
tempfile.tempdir = sys.argv[1]
archive = sys.argv[2:]
folder = Folder()
(folder.path / "file").write_text("x")
print(execution_env._unpack(Path(archive[0])) if archive else folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


@contextmanager
def another(temporary: Path, *archive: Path) -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """A process that has a folder there, and where it, or its environment, is."""
    command = [sys.executable, "-c", MAKES, str(temporary), *map(str, archive)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as other:
        assert other.stdout is not None
        yield other, Path(other.stdout.readline().strip())
        other.kill()


def test_what_a_killed_process_leaves_is_cleared_and_nothing_of_a_living_one(temporary: Path) -> None:
    own = Folder("own")
    with another(temporary) as (other, theirs):
        assert temporary_folders.clear() == []
        assert (theirs / "file").exists()
        other.kill()
        other.wait()
        assert temporary_folders.clear() == [theirs]
    assert sorted(path.name for path in temporary.iterdir()) == [own.path.name, own.path.name + ".lock"]
    own.cleanup()
    assert list(temporary.iterdir()) == []


def test_unpacked_environments_are_such_folders(temporary: Path, tmp_path: Path) -> None:
    archive = tmp_path / "environment.tar"
    with tarfile.open(archive, "w") as packed:
        packed.add(Path(__file__), "bin/python")
    with another(temporary, archive) as (other, environment):
        assert (environment / "bin" / "python").exists()
        other.kill()
        other.wait()
    temporary_folders.clear()
    assert list(temporary.iterdir()) == []


def test_a_server_clears_as_it_starts(temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "serve", lambda *_: 0)
    with another(temporary) as (other, _):
        other.kill()
        other.wait()
    assert cli.main(["serve", str(tmp_path), "--front-end-processes", "1"]) == 0
    wait_until(lambda: not list(temporary.iterdir()))


def test_a_folder_ends_with_its_process_that_ends_by_itself(temporary: Path) -> None:
    with another(temporary) as (other, theirs):
        assert theirs.exists()
        other.communicate("")
        assert other.returncode == 0
    assert list(temporary.iterdir()) == []


def test_what_looks_like_a_folder_and_is_another_thing_stays(temporary: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (temporary / "tutti-a.lock").symlink_to(tmp_path / "kept")
    (temporary / "tutti-b.lock").mkdir()
    (temporary / "tutti-c").mkdir()
    assert temporary_folders.clear() == []
    assert len(list(temporary.iterdir())) == 3
