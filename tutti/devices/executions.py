"""Which execution a device begins next, and when. Pure: takes `now`, returns decisions.

Executions are launched a little ahead of their turn, so that the device never waits for the host; where several
pipelines share it, no earlier than that needs, so that their shares can decide.
"""

from collections import deque
from collections.abc import Callable, Sequence

from tutti.devices.pipeline import Batch, Execution, Pipeline, Turn
from tutti.devices.sharing import Shares

# One execution is launched ahead of the one that runs; of short ones as many as take this long, up to so many.
_AHEAD_NS = 1_000_000
_MOST_AHEAD = 8
# Where pipelines share a device, whose turn is next is decided so long before the device would wait for it.
LEAD_NS = 300_000


class Executions:
    """The executions of one device: what asks for its turn, and what was granted one and has not ended."""

    def __init__(self, is_there: Callable[[Batch], bool]) -> None:
        """`is_there` tells whether a staged batch's inputs have reached the device."""
        self._is_there = is_there
        self._shares = Shares()
        self._asking: dict[Pipeline, None] = {}
        # In the order of their turns.
        self.granted: deque[Execution] = deque()
        # When all that was granted is expected to have ended.
        self.end_ns = 0

    def add(self, pipeline: Pipeline) -> None:
        self._shares.add(pipeline, pipeline.weight)

    def remove(self, pipeline: Pipeline) -> None:
        self._shares.remove(pipeline)

    def ask(self, pipeline: Pipeline) -> None:
        """Something of the pipeline waits for its turn."""
        if pipeline not in self._asking:
            self._shares.asks(pipeline)
            self._asking[pipeline] = None

    def are_shared(self, pipelines: Sequence[Pipeline]) -> bool:
        """Whether several of the pipelines have work."""
        held = [execution.pipeline for execution in self.granted if isinstance(execution, Turn)]
        return sum([p.open > 0 or p in self._asking or p in held for p in pipelines]) > 1

    def next(self, now_ns: int, is_shared: bool) -> Execution | int:
        """What is launched now, with its turn granted; else when to ask again, 0 for when something has ended.

        `is_shared`: several pipelines have work.
        """
        if not self._asking:
            return 0
        wait_ns = self._wait_ns(now_ns, is_shared)
        if wait_ns:
            return now_ns + wait_ns if wait_ns > 0 else 0
        pipeline = self._choose()
        execution = pipeline.take()
        if not pipeline.asks():
            del self._asking[pipeline]
        return execution

    def grant(self, execution: Execution, now_ns: int, copies_end_ns: int) -> None:
        """It will execute after those before it, and not before its inputs are there."""
        begins_ns = max(now_ns, self.end_ns) if self.granted else now_ns
        if not self.granted:
            execution.turn_ns = now_ns
        self.granted.append(execution)  # first: a device that is lost says so when it is asked
        if isinstance(execution, Batch) and not self._is_there(execution):
            begins_ns = max(begins_ns, copies_end_ns)
        self.end_ns = begins_ns + execution.expected_ns
        self._shares.charge(execution.pipeline, execution.expected_ns)

    def ended(self, execution: Execution, device_ns: int, now_ns: int) -> None:
        """It has executed, and had `device_ns` of the device for itself."""
        self.granted.remove(execution)
        self._shares.charge(execution.pipeline, device_ns - execution.expected_ns)
        self.end_ns = now_ns + sum([other.expected_ns for other in self.granted])
        if self.granted and not self.granted[0].turn_ns:
            self.granted[0].turn_ns = now_ns

    def clear(self) -> list[Execution]:
        """Forget all that asks or was granted; returns what was granted."""
        granted = list(self.granted)
        self.granted.clear()
        self._asking.clear()
        return granted

    def _wait_ns(self, now_ns: int, is_shared: bool) -> int:
        """0 where another execution may be launched; how long not, -1 until one has ended."""
        granted = self.granted
        if not granted:
            return 0
        if len(granted) >= (2 if isinstance(granted[-1], Turn) else _MOST_AHEAD):
            return -1
        if is_shared and granted[-1].expected_ns:
            return max(0, self.end_ns - LEAD_NS - now_ns)
        ahead_ns = _total_ns(granted) - granted[0].expected_ns
        return 0 if len(granted) < 2 or 0 < ahead_ns < _AHEAD_NS else -1

    def _choose(self) -> Pipeline:
        """By share, of those whose inputs are there; of all, where none are."""
        there = [pipeline for pipeline in self._asking if not pipeline.staged or self._is_there(pipeline.staged[0])]
        chosen = self._shares.choose(there or self._asking)
        assert isinstance(chosen, Pipeline)
        return chosen


def _total_ns(executions: Sequence[Execution]) -> int:
    return sum([execution.expected_ns for execution in executions])
