"""The processes a local cluster leaves to us: none may outlive the command that started it."""

import ctypes
import sys
from collections.abc import Mapping

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_HEAD = ("gcs_server", "raylet")
# A killed process ends only when the system has taken its memory back.
_KILL_TIMEOUT_S = 5.0


def adopt_orphans() -> None:
    """On Linux, processes whose parent dies below us become our children, so that they can be found and ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def has_dead_children() -> bool:
    """Whether a process started here has ended: of a running cluster, none does."""
    return any(child.status() == psutil.STATUS_ZOMBIE for child in psutil.Process().children())


def of_the_head() -> dict[psutil.Process, str]:
    """Those of the head that this process has started, without which there is no cluster, and their names."""
    return {child: name for child in psutil.Process().children() if (name := child.name()) in _HEAD}


def ended(names: Mapping[psutil.Process, str]) -> str:
    """Which of the processes have ended, for people."""
    return ", ".join(f"{name} (process {process.pid})" for process, name in names.items() if not _is_alive(process))


def end_descendants(grace_s: float) -> int:
    """Terminate every descendant, kill what is left after `grace_s`; returns how many had to be ended."""
    children = psutil.Process().children(recursive=True)
    running = [process for process in children if _is_alive(process)]
    for process in running:
        _signal(process, "terminate")
    _, stubborn = psutil.wait_procs(running, timeout=grace_s)
    for process in stubborn:
        _signal(process, "kill")
    psutil.wait_procs(stubborn, timeout=_KILL_TIMEOUT_S)
    # Reap adopted and ended children: no other process waits for them.
    psutil.wait_procs([child for child in psutil.Process().children() if not _is_alive(child)], timeout=0)
    return len(running)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _signal(process: psutil.Process, how: str) -> None:
    try:
        getattr(process, how)()
    except psutil.NoSuchProcess:
        return
