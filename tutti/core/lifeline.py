"""Processes that end with the one that has started them: a pipe that nobody writes to, and its end."""

import fcntl
import os
import select
import signal


def end_with(lifeline: int) -> None:
    """Have the kernel kill this process's group when the other end of the pipe closes, whatever they do then.

    A thread would not do: what hangs may hold the interpreter's lock. The group is to be this process's own. Raises
    SystemExit where the other end has been closed already.
    """
    os.set_inheritable(lifeline, False)
    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()  # select takes no number from 1,024 on, and it is the server's
    poll.register(lifeline, select.POLLIN)
    if poll.poll(0):
        raise SystemExit("the server has gone")
