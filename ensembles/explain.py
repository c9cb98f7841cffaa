"""What happened to a request in a graph, step by step: when, for how many rows, beside whom, and what was left out.

A request asks for it with the parameter `tutti_explain`; what is told here is part of what it gets then.
"""

from collections.abc import Sequence
from typing import Any

import orjson

from tutti.core.types import Call, InferResponse, Spent, Times, now_ns
from tutti.observing.explanations import AT_REPLICA, PARAMETER, Explained, Facts, told_in, us

# Notes of a step's model that are shown to people; those of the slowest request, where there are several.
_TOLD = (
    "batch_requests", "instance", "device", "pool", "replica", "cache", "waiting_requests", "busy_instances",
    "instances", "steps", AT_REPLICA,
)  # fmt: skip


_NOTHING = 0, Spent()


class StepsTimes:
    """When the steps of a graph were executed. What steps add, they add one at a time."""

    __slots__ = ("_each", "_known")

    def __init__(self) -> None:
        self._each: list[tuple[str, Times, int]] = []
        # The last answer, and how many steps it covered: all requests of a frame ask for the same one.
        self._known: tuple[int, Spent] = _NOTHING

    def add(self, step: str, times: Times, arrived_ns: int) -> None:
        """A request of the step has been executed, which arrived there then."""
        self._each.append((step, times, arrived_ns))

    def spent(self, arrived_ns: int) -> Spent:
        """Where the time of a request to the graph went. What ran beside each other is added up."""
        count, known = self._known
        if count != len(self._each):  # set both at once: other threads add steps and ask meanwhile
            count = len(self._each)
            known = self._sum(count)
            self._known = count, known
        return known

    def _sum(self, count: int) -> Spent:
        sums: dict[str, tuple[int, int, int]] = {}
        for name, times, at_ns in self._each[:count]:
            spent, (queue_ns, compute_ns, rows) = times.spent(at_ns), sums.get(name, (0, 0, 0))
            sums[name] = queue_ns + spent.queue_ns, compute_ns + spent.compute_ns, max(rows, spent.rows)
        steps = tuple([(name, *sum_ns) for name, sum_ns in sums.items()])
        return Spent(sum([step[1] for step in steps]), sum([step[2] for step in steps]), steps=steps)


def begun_ns(call: Call) -> int:
    """Since when a call's times are told: since the request came, also where the call is for a part of its graph."""
    return call.trace.start_ns if isinstance(call.trace, Explained) else now_ns()


def tell_decoupled(outer: Call, step: str, call: Call) -> None:
    """Add a decoupled step, all of whose answers have come, to what is told of the request."""
    if isinstance(outer.trace, Facts) and isinstance(call.trace, Facts):
        begin_ns = begun_ns(outer)
        told = Explanation(begin_ns, outer.rows)
        entry = told.begun(step, call.arrived_ns, call.rows, 1, None)
        told.ended(entry, now_ns(), [call.trace], 0)
        told.tell(step, outer, now_ns())


class Explanation:
    """One frame's steps. Times are microseconds since it began."""

    def __init__(self, start_ns: int, rows: int) -> None:
        self._start_ns = start_ns
        self._rows = rows
        self._steps: list[dict[str, Any]] = []

    def begun(self, step: str, at_ns: int, rows: int, calls: int, items: int | None) -> dict[str, Any]:
        """A step that runs for `rows` rows, in `calls` requests to its model."""
        entry: dict[str, Any] = {"step": step, "rows": rows, "of_rows": self._rows, "start_us": self._us(at_ns)}
        entry["model_requests"] = calls
        if items is not None:
            entry["items"] = items
        self._steps.append(entry)
        return entry

    def skipped(self, step: str, at_ns: int, why: str) -> None:
        self._steps.append(
            {"step": step, "rows": 0, "of_rows": self._rows, "start_us": self._us(at_ns), "skipped": why}
        )

    def answered(self, entry: dict[str, Any] | None, answer: InferResponse) -> None:
        """One of a step's requests is back: a replica has told of it."""
        told = told_in(answer) if entry is not None else None
        if entry is not None and told is not None:
            entry[AT_REPLICA] = told

    def ended(self, entry: dict[str, Any], at_ns: int, times: Sequence[Facts], shed: int) -> None:
        """The step's requests are back; the longest of each stage counts."""
        entry["end_us"] = self._us(at_ns)
        stages = [facts.stages() for facts in times]
        for name in dict.fromkeys(name for stage in stages for name in stage):
            entry[name] = max(stage.get(name, 0.0) for stage in stages)
        entry["batch_rows"] = max((facts.notes.get("batch_rows", 0) for facts in times), default=0)
        slowest = max(times, key=lambda facts: sum(facts.stages().values()), default=None)
        if slowest is not None:
            entry.update({note: slowest.notes[note] for note in _TOLD if note in slowest.notes})
        if shed:
            entry["shed_requests"] = shed

    def tell(self, name: str, call: Call, at_ns: int) -> None:
        """Add what is known to the call's own explanation; or to its answer, where it has none, as in a segment."""
        if isinstance(call.trace, Facts):
            call.trace.note("rows", self._rows)
            call.trace.note("steps", [*call.trace.notes.get("steps", []), *self._steps])
        elif isinstance(call.answer, InferResponse):
            call.answer.parameters[PARAMETER] = orjson.dumps(
                {"ensemble": name, "rows": self._rows, "total_us": self._us(at_ns), "steps": self._steps}
            ).decode()

    def _us(self, ns: int) -> float:
        return us(ns - self._start_ns)
