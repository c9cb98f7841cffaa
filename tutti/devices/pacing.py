"""When the next batch is to be cut: as late as it can be without the device having to wait for it. Pure.

A batch passes the host, which writes it into pinned memory, the copy engine and the execution, one batch at a time in
each. Whatever is cut earlier than needed lacks the requests that come in the meantime.
"""

from dataclasses import dataclass

# What timers and threads may be late by.
_MARGIN_NS = 60_000
# A hundredth of an execution lost is less than the requests that come in the meantime are worth.
_TOLERATED = 100
_FORGETS = 64


@dataclass(frozen=True, slots=True)
class Stages:
    """What a batch is expected to take in each stage, nanoseconds; 0 where that is not known."""

    host_ns: int
    copy_ns: int
    execution_ns: int


class Lateness:
    """What batches are later than reckoned, learned from how long the device waited for them.

    Launching takes the host time, alarms and threads are late, and executions are quicker than the mean: by how much
    depends on the machine and the model.
    """

    def __init__(self) -> None:
        self.ns = 0

    def record(self, waited_ns: int, execution_ns: int) -> None:
        """The device was idle for `waited_ns` before a batch that was cut when `latest_cut_ns` said so."""
        if waited_ns * _TOLERATED > execution_ns:
            self.ns = min(execution_ns, self.ns + waited_ns // 2)
        else:
            self.ns -= -(-self.ns // _FORGETS)


def latest_cut_ns(stages: Stages, copies_end_ns: int, executions_end_ns: int) -> int:
    """The last moment to cut a batch that is to begin executing when what was cut before it allows.

    Copies of earlier batches end at `copies_end_ns` and their executions at `executions_end_ns`. The copy begins at
    the earlier of two times: when the copy engine is free, or, where executions are what takes long, just in time.
    """
    copy_ns = stages.copy_ns + stages.copy_ns // 16
    copy_begins_ns = max(copies_end_ns, executions_end_ns - copy_ns)
    return copy_begins_ns - stages.host_ns - stages.host_ns // 4 - _MARGIN_NS
