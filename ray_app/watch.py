"""Gateways of a machine watch each other: one that hangs keeps its sockets, and goes on being given connections.

Each beats in a file that it keeps locked. Who sees a lock that is held, and no beat, kills the process: its connections
are reset, it gets no new ones, and Serve starts another, as of any gateway that dies. Knows nothing of Ray.
"""

import fcntl
import logging
import os
import signal
import stat
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

_log = logging.getLogger(__name__)

BEAT_S = 0.5
# A gateway hangs when another one has seen no new beat in this many looks.
MISSED = 10
_BYTES = 8


class Missed:
    """Counts the looks at which others had not beaten since the one before. Pure.

    Looks are counted, not seconds: where the whole machine stands still, who looks does, too.
    """

    def __init__(self, limit: int = MISSED) -> None:
        self._limit = limit
        self._seen: dict[int, tuple[int, int]] = {}

    def look(self, beats: Mapping[int, int]) -> list[int]:
        """`beats` are those of each process that lives, by its id; returns who hangs, once."""
        seen = {}
        for process, beat in beats.items():
            before, missed = self._seen.get(process, (-1, 0))
            seen[process] = beat, missed + 1 if beat == before else 0
        self._seen = seen
        return [process for process, (_, missed) in seen.items() if missed == self._limit]


class Taken(Protocol):
    """Where a gateway listens."""

    @property
    def host(self) -> str: ...
    @property
    def http_port(self) -> int | None: ...
    @property
    def grpc_port(self) -> int | None: ...


def group(taken: Taken, grpc_host: str = "") -> str:
    """Of the gateways that share ports with this one, by HTTP's; by gRPC's, where they leave that out.

    Gateways of other applications on this machine are in groups of their own: nobody kills another's.
    """
    if taken.http_port is not None:
        return f"{taken.host}-{taken.http_port}"
    return f"{grpc_host or taken.host}-grpc-{taken.grpc_port}"


class Watch:
    """This process among those of its group. Every call is short: it may be made on an event loop."""

    def __init__(self, group: str, root: Path | None = None) -> None:
        """Raises OSError where there is no folder that other users cannot write to."""
        self._place = root or Path(tempfile.gettempdir()), group
        self._folder = _own_folder(*self._place)
        self._path = self._folder / str(os.getpid())
        self._missed = Missed()
        self._beats = 0
        self._file = self._create()

    def beat(self) -> None:
        """Tell the others that this process does not hang."""
        self._beats += 1
        os.pwrite(self._file, self._beats.to_bytes(_BYTES, "little"), 0)

    def look(self) -> list[int]:
        """Kill the processes that hang; returns their ids."""
        hung = self._missed.look(self._others())
        return [process for process in hung if self._kill(process)]

    def close(self) -> None:
        """Leave the group."""
        self._path.unlink(missing_ok=True)
        os.close(self._file)
        with suppress(OSError):  # the folder is not empty while others are in the group
            self._folder.rmdir()

    def _create(self) -> int:
        while True:
            try:
                file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
            except FileNotFoundError:  # the last of the group has just left, and taken the folder with it
                _own_folder(*self._place)
                continue
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(self._path, file):
                os.ftruncate(file, 0)
                return file
            os.close(file)  # another process has removed the file between opening and locking

    def _others(self) -> dict[int, int]:
        """The beats of the other processes that live, by process id."""
        beats = {}
        for name in os.listdir(self._folder):
            if name.isdecimal() and int(name) != os.getpid() and (beat := self._beat_of(name)) is not None:
                beats[int(name)] = beat
        return beats

    def _beat_of(self, name: str) -> int | None:
        """A process's beat; None where it has ended, and its file is then removed."""
        path = self._folder / name
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            if _is_locked(file):
                return int.from_bytes(os.pread(file, _BYTES, 0), "little")
            if _is_at(path, file):
                path.unlink(missing_ok=True)
            return None
        finally:
            os.close(file)

    def _kill(self, process: int) -> bool:
        """Kill a process; returns whether it was there. A number that is another process's by now holds no lock."""
        try:
            handle = os.pidfd_open(process)
        except ProcessLookupError:
            return False
        try:
            if self._beat_of(str(process)) is None:
                return False
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)
        return True


def is_possible() -> bool:
    """Processes that can be named without mistaking one for another, which Linux has."""
    return sys.platform == "linux" and hasattr(os, "pidfd_open")


def _own_folder(root: Path, group: str) -> Path:
    """Of this user and this namespace of process ids, in which the numbers mean what they say."""
    namespace = os.stat("/proc/self/ns/pid").st_ino
    folder = root / f"tutti-{os.getuid()}-{namespace}-{group}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{folder} is not this user's alone")
    return folder


def _is_at(path: Path, file: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(file).st_ino
    except FileNotFoundError:
        return False


def _is_locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
