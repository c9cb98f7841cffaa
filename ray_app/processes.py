"""The processes a local cluster leaves to us: none may outlive the command that started it."""

import ctypes
import sys

import psutil

_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """On Linux, processes whose parent dies below us become our children, so that they can be found and ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def has_dead_children() -> bool:
    """Whether a process started here has ended: of a running cluster, none does."""
    return any(child.status() == psutil.STATUS_ZOMBIE for child in psutil.Process().children())


def end_descendants(grace_s: float) -> int:
    """Terminate every descendant, kill what is left after `grace_s`; returns how many had to be ended."""
    found = psutil.Process().children(recursive=True)
    running = [process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    for process in running:
        _signal(process, "terminate")
    _, stubborn = psutil.wait_procs(running, timeout=grace_s)
    for process in stubborn:
        _signal(process, "kill")
    psutil.wait_procs(stubborn, timeout=grace_s)
    return len(running)


def _signal(process: psutil.Process, how: str) -> None:
    try:
        getattr(process, how)()
    except psutil.NoSuchProcess:
        return
