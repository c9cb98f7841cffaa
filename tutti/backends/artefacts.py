"""Compiled models on disk: each entry is a folder that the first process makes and all that come after it use.

A folder is an entry only with a manifest that has its key in full, and the size and the SHA-256 of each file; it gets
its name when all of that is there. Anything else under its name is made anew. Any entry may be deleted at any time.
Knows nothing of PyTorch.
"""

import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "TUTTI_CACHE_DIR"
MANIFEST = "manifest.json"
_POLL_S = 0.2

Make = Callable[[Path], None]
"""Fills the folder of an entry."""


class CacheError(Exception):
    """An entry cannot be made or kept: the message says why."""


def default_root() -> Path:
    """`$TUTTI_CACHE_DIR/compiled`, by default `~/.cache/tutti/compiled`. Raises CacheError without a home."""
    folder = os.environ.get(VARIABLE, "")
    try:
        return (Path(folder) if folder else Path.home() / ".cache" / "tutti").absolute() / "compiled"
    except RuntimeError as error:
        raise CacheError(f"there is no folder for compiled models: {error} (set {VARIABLE})") from None


def entry(root: Path, name: str, key: Mapping[str, str], make: Make, wait_s: float) -> Path:
    """The folder of the entry `name` for `key`, made now unless it is there. Blocks while another process makes it.

    Raises CacheError when the folder cannot be written, or another process takes longer than `wait_s` seconds, and
    what `make` raises; then nothing is left behind.
    """
    path = root / name
    if is_whole(path, key):
        return path
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(root / f".{name}.lock", wait_s):
            if not is_whole(path, key):  # another process may have made it meanwhile
                _make(path, key, make)
    except OSError as error:
        raise CacheError(f"cannot write to {root}: {error.strerror or error} ({VARIABLE} names another)") from None
    return path


def is_whole(path: Path, key: Mapping[str, str]) -> bool:
    """Whether the folder is this user's, or root's, alone, and has what its manifest says, which is for `key`."""
    try:
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o022 or status.st_uid not in (0, os.geteuid()):
            return False
        manifest = json.loads((path / MANIFEST).read_bytes())
        files: dict[str, tuple[int, str]] = {name: tuple(told) for name, told in manifest["files"].items()}
        return manifest["key"] == dict(key) and all(_told(path / name) == told for name, told in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size(path: Path) -> int:
    """How many bytes a folder's files take."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _make(path: Path, key: Mapping[str, str], make: Make) -> None:
    """The lock of this entry is held."""
    for old in [path, *path.parent.glob(f".{path.name}.*.part")]:  # broken, or of a process that ended meanwhile
        _remove(old)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        make(work)
        files = {str(file.relative_to(work)): _told(file) for file in sorted(work.rglob("*")) if file.is_file()}
        (work / MANIFEST).write_text(json.dumps({"key": dict(key), "files": files}, indent=1), encoding="utf-8")
        work.rename(path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _told(file: Path) -> tuple[int, str]:
    return file.stat().st_size, digest(file)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


@contextmanager
def _locked(path: Path, wait_s: float) -> Iterator[None]:
    """The kernel drops the lock of a process that ends: none is ever left over."""
    deadline = time.monotonic() + wait_s
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise CacheError(f"another process has been compiling it for {wait_s:g} s") from None
            time.sleep(_POLL_S)
        yield
