"""What happened to a request in a graph, step by step: when, for how many rows, beside whom, and what was left out.

A request asks for it with the parameter `tutti_explain`; its answer then has a parameter of that name, in JSON.
"""

from typing import Any

import orjson

from tutti.types import Call, Trace

PARAMETER = "tutti_explain"


class StepTimes:
    """Timestamps of one step's request, as the scheduler tells them: a call's trace."""

    __slots__ = ("_also", "marks", "notes")

    def __init__(self, also: Trace | None = None) -> None:
        """`also` is told the same."""
        self._also = also
        self.marks: dict[str, int] = {}
        self.notes: dict[str, Any] = {}

    def record(self, activity: str, ns: int) -> None:
        self.marks[activity] = ns
        if self._also is not None:
            self._also.record(activity, ns)

    def note(self, what: str, value: object) -> None:
        self.notes[what] = value
        if self._also is not None:
            self._also.note(what, value)

    def follow(self, call: Call) -> None:
        if self._also is not None:
            self._also.follow(call)


class Explanation:
    """One frame's steps. Times are microseconds since it began."""

    def __init__(self, start_ns: int, requests: int, rows: int) -> None:
        self._start_ns = start_ns
        self._requests = requests
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

    def ended(self, entry: dict[str, Any], at_ns: int, times: list[StepTimes], shed: int) -> None:
        """The step's requests are back; the longest of each stage counts."""
        entry["end_us"] = self._us(at_ns)
        for name, first, last in (
            ("queue_us", "QUEUE_START", "COMPUTE_START"),
            ("input_us", "COMPUTE_START", "COMPUTE_INPUT_END"),
            ("compute_us", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START"),
            ("output_us", "COMPUTE_OUTPUT_START", "COMPUTE_END"),
        ):
            spans = [one.marks[last] - one.marks[first] for one in times if first in one.marks and last in one.marks]
            if spans:
                entry[name] = round(max(spans) / 1000, 1)
        entry["batch_rows"] = max((one.notes.get("batch_rows", 0) for one in times), default=0)
        if shed:
            entry["shed_requests"] = shed

    def text(self, name: str, at_ns: int) -> str:
        """As JSON."""
        return orjson.dumps(
            {
                "ensemble": name,
                "requests": self._requests,
                "rows": self._rows,
                "total_us": self._us(at_ns),
                "steps": self._steps,
            }
        ).decode()

    def _us(self, ns: int) -> float:
        return round((ns - self._start_ns) / 1000, 1)


def waterfall(explained: dict[str, Any], width: int = 40) -> str:
    """The parameter's JSON, read, as a table with a bar per step."""
    total = max(explained["total_us"], 0.1)
    lines = [
        f"{explained['ensemble']}: {explained['rows']} rows of {explained['requests']} requests in {total:,.0f} us",
        f"{'step':<24} {'rows':>9} {'queue':>9} {'compute':>9} {'total us':>9} {'batch':>6}",
    ]
    for step in explained["steps"]:
        rows = f"{step['rows']}/{step['of_rows']}" + (f" x{step['items']}" if "items" in step else "")
        if "skipped" in step:
            lines.append(f"{step['step']:<24} {rows:>9}  left out: {step['skipped']}")
            continue
        took = step.get("end_us", total) - step["start_us"]
        begin = int(step["start_us"] / total * width)
        length = max(1, round(took / total * width))
        bar = " " * begin + "█" * min(length, width - begin)
        shed = f" shed {step['shed_requests']}" if "shed_requests" in step else ""
        lines.append(
            f"{step['step']:<24} {rows:>9} {step.get('queue_us', 0):>9,.0f} {step.get('compute_us', 0):>9,.0f} "
            f"{took:>9,.0f} {step.get('batch_rows', 0):>6} |{bar:<{width}}|{shed}"
        )
    return "\n".join(lines)
