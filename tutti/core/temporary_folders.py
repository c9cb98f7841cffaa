"""Temporary folders that end with their process, however it ends. Knows nothing of what is in them.

What a killed process leaves behind, the next one removes: beside each folder is a file that its process holds a lock
on, which the kernel drops with the process. The number of a process would not do: it may be another's by then.
"""

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import tempfile
import threading
import weakref
from pathlib import Path

_log = logging.getLogger(__name__)

_PREFIX, _LOCK = "tutti-", ".lock"


class Folder:
    """An empty folder of this user's alone, until `cleanup`, or the end of the process."""

    def __init__(self, kind: str = "") -> None:
        """`kind` is part of its name."""
        self.path, lock = _make(kind)
        self._end = weakref.finalize(self, _remove, self.path, lock)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.cleanup()

    def cleanup(self) -> None:
        self._end()


def clear() -> list[Path]:
    """Remove this user's folders whose processes have ended; returns which. Never raises."""
    removed = []
    with contextlib.suppress(OSError):
        for path in sorted(Path(tempfile.gettempdir()).glob(f"{_PREFIX}*{_LOCK}")):
            with contextlib.suppress(OSError):
                lock = _locked(path)
                if lock is not None:
                    folder = path.with_suffix("")
                    _remove(folder, lock)
                    removed.append(folder)
    if removed:
        _log.info("removed what processes that were killed have left: %s", ", ".join(map(str, removed)))
    return removed


def clear_soon() -> None:
    """The same, in a thread that nobody waits for."""
    threading.Thread(target=clear, name="clear", daemon=True).start()


def _make(kind: str) -> tuple[Path, int]:
    """A new folder, and the descriptor of its lock."""
    root = Path(tempfile.gettempdir())
    while True:
        path = root / f"{_PREFIX}{kind}{'-' if kind else ''}{secrets.token_hex(5)}"
        try:
            lock = _locked(path.with_name(path.name + _LOCK), os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            continue
        if lock is None:  # somebody has cleared it in the moment when it had no lock yet
            continue
        try:
            path.mkdir(mode=0o700)
        except BaseException:
            os.close(lock)  # it is left to be cleared
            raise
        return path, lock


def _locked(path: Path, flags: int = 0) -> int | None:
    """The lock's descriptor; None where another process has it, or it is another user's. Raises OSError."""
    number = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        status = os.fstat(number)
        if status.st_uid == os.geteuid() and os.path.samestat(status, path.lstat()):
            return number
    except BaseException as error:
        os.close(number)
        if isinstance(error, (BlockingIOError, FileNotFoundError)):
            return None
        raise
    os.close(number)
    return None


def _remove(folder: Path, lock: int) -> None:
    """The folder, then its lock: as long as anything is left, it is somebody's to remove."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            folder.with_name(folder.name + _LOCK).unlink(missing_ok=True)
    finally:
        os.close(lock)
