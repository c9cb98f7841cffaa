"""Runs a part's lines one after the other, each in a process with a deadline, and keeps what they tell.

The record is written after each row, so that a kill loses no more than the row that was under way. A line that raises,
dies or hangs is recorded as such and the next one runs; one for which no time is left is recorded as not measured.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import psutil

from benchmarks.gpu.context import ROOT

_TICK_S = 15.0
_END_S = 10.0
_LOG_TAIL = 1500
# What a row is of, which its name says to those who read it.
_KEYS = frozenset(
    {"name", "model", "precision", "batch", "compiled", "protocol", "clients", "front_ends", "peak", "per_s", "server"}
)


@dataclass(frozen=True, slots=True)
class Line:
    """`run` is "module:function", called with a Context and `arguments`; it may take `most_s`."""

    name: str
    run: str
    most_s: float
    arguments: dict[str, Any] = field(default_factory=dict)
    needs_gpu: bool = False
    # With less time left it is not begun.
    least_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How a part is run."""

    device: str
    is_short: bool
    out: Path
    work: Path
    minutes: float


class Record:
    """A part's JSON in `out`, with a copy in `work` that the parts after it find when `out` was emptied."""

    def __init__(
        self, part: str, settings: Settings, machine: dict[str, Any], kept: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.part = part
        self._paths = [settings.out / f"{part}.json", settings.work / f"{part}.json"]
        self.lines: list[dict[str, Any]] = list(kept)
        self._head = {
            "part": part,
            "machine": machine,
            "command": f"python -m benchmarks.gpu {' '.join(sys.argv[1:])}",
            "device": settings.device,
            "short": settings.is_short,
            "minutes": settings.minutes,
            "began": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        }
        self.write()

    def write(self) -> None:
        text = json.dumps({**self._head, "lines": self.lines}, indent=1)
        for path in self._paths:
            fresh = path.with_suffix(".json.new")
            fresh.write_text(text)
            fresh.replace(path)


def run(
    part: str, lines: Sequence[Line], settings: Settings, machine: dict[str, Any], kept: Sequence[dict[str, Any]] = ()
) -> Record:
    """All lines, as far as the time goes; the most valuable come first. `kept` are entries of an earlier run."""
    for folder in (settings.out, settings.work):
        folder.mkdir(parents=True, exist_ok=True)
    record = Record(part, settings, machine, kept)
    clock = Clock(settings.minutes * 60)
    for number, line in enumerate(lines, 1):
        clock.say(f"{part} {number}/{len(lines)}: {line.name}")
        entry: dict[str, Any] = {"line": line.name, "status": "running", "reason": "", "seconds": 0.0, "rows": []}
        entry["commit"] = machine.get("commit", "")
        record.lines.append(entry)
        record.write()
        began = time.monotonic()
        if line.needs_gpu and settings.device == "cpu":
            entry.update(status="needs a GPU")
        elif clock.left_s < line.least_s:
            entry.update(status="not measured", reason=f"no time was left: it takes {line.least_s:.0f} s at least")
        else:
            _run_line(line, entry, record, settings, clock)
        entry["seconds"] = round(time.monotonic() - began, 1)
        record.write()
        if entry["reason"]:
            clock.say(f"  {entry['status']}: {entry['reason'].splitlines()[0][:200]}")
    return record


def earlier(part: str, lines: Sequence[Line], settings: Settings, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """What an earlier run on this machine with this commit has of other lines than `lines`."""
    path = settings.work / f"{part}.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    if record.get("machine") != machine or record.get("short") != settings.is_short:
        return []
    again = {line.name for line in lines}
    return [entry for entry in record["lines"] if entry["line"] not in again]


class Clock:
    """The time that a part has, and progress with the time left on the standard error."""

    def __init__(self, seconds: float, to: TextIO | None = None) -> None:
        self._began = time.monotonic()
        self._seconds = seconds
        self._to = to or sys.stderr

    @property
    def left_s(self) -> float:
        return self._began + self._seconds - time.monotonic()

    def say(self, text: str) -> None:
        minutes, seconds = divmod(max(0, int(self.left_s)), 60)
        print(f"[{minutes}:{seconds:02d} left] {text}", file=self._to, flush=True)


def _run_line(line: Line, entry: dict[str, Any], record: Record, settings: Settings, clock: Clock) -> None:
    job = {
        "run": line.run, "arguments": line.arguments, "device": settings.device, "is_short": settings.is_short,
        "out": str(settings.out), "work": str(settings.work),
    }  # fmt: skip
    log = settings.work / f"{record.part}.log"
    most_s = min(line.most_s, clock.left_s)
    with log.open("ab") as errors:
        begins_at = errors.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.child", json.dumps(job)],
            stdout=subprocess.PIPE, stderr=errors, cwd=ROOT, env=_environment(settings), start_new_session=True,
        )  # fmt: skip
        try:
            _read(process, entry, record, clock, time.monotonic() + most_s)
        except TimeoutError:
            entry.update(status="failed", reason=f"no end after {most_s:.0f} s; ended by force")
        finally:
            end(process)
    if entry["status"] == "running":
        entry.update(status="failed", reason=f"its process died with exit status {process.returncode}")
    if entry["status"] == "failed":
        with log.open("rb") as file:
            file.seek(max(begins_at, log.stat().st_size - _LOG_TAIL))
            entry["log"] = file.read().decode(errors="replace")


def _environment(settings: Settings) -> dict[str, str]:
    """On a processor one thread a product: threads that wait for each other spin, where others work beside them."""
    return environment() | ({"OMP_NUM_THREADS": "1"} if settings.device == "cpu" else {})


def environment() -> dict[str, str]:
    """Ours, in which the sources here are found first; torch's allocator is left as it is."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "PYTHONUNBUFFERED": "1"}


def _read(
    process: "subprocess.Popen[bytes]", entry: dict[str, Any], record: Record, clock: Clock, until: float
) -> None:
    """Rows, until the process has nothing more to say. Raises TimeoutError at `until`."""
    assert process.stdout is not None
    unread = b""
    while True:
        left_s = until - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        ready, _, _ = select.select([process.stdout], [], [], min(left_s, _TICK_S))
        if not ready:
            clock.say("  ...")
            continue
        data = os.read(process.stdout.fileno(), 1 << 16)
        if not data:
            return
        *whole, unread = (unread + data).split(b"\n")
        for text in whole:
            _take(json.loads(text), entry, record, clock)


def _take(message: dict[str, Any], entry: dict[str, Any], record: Record, clock: Clock) -> None:
    if "row" in message:
        entry["rows"].append(message["row"])
        clock.say(f"  {shown(message['row'])}")
        record.write()
    else:
        entry.update(message)


def end(process: "subprocess.Popen[bytes]", wait_s: float = _END_S) -> None:
    """The process and all that it started; one that the driver holds fast is left behind."""
    children: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(process.pid).children(recursive=True)
    for number in (process.pid, *(child.pid for child in children)):
        if number == process.pid and process.poll() is not None:
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # those whose parent ended before them
    try:
        process.wait(wait_s)
    except subprocess.TimeoutExpired:
        print(f"process {process.pid} does not end", file=sys.stderr)
    if process.stdout is not None:
        process.stdout.close()


def shown(row: dict[str, Any]) -> str:
    """A row in one line."""
    figures = ", ".join(f"{name} {_figure(value)}" for name, value in row.items() if name not in _KEYS)
    return f"{row['name']}: {figures}"


def _figure(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def table(record: Record) -> str:
    """Everything, shortly: the last that a part prints."""
    shows = [f"{record.part}:"]
    for entry in record.lines:
        reason = f" ({entry['reason'].splitlines()[0][:150]})" if entry["reason"] else ""
        shows.append(f"- {entry['line']}: {entry['status']}{reason}, {entry['seconds']:.0f} s")
        shows += [f"    {shown(row)}" for row in entry["rows"]]
    return "\n".join(shows)
