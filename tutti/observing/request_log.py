"""A line for each request: the access log, the slow ones with where their time went, and, verbosely, all of them.

Whoever answers a request only puts an event into a queue; a thread of its own writes. A full disk or a slow reader
costs lines, which are counted and told of later, and never holds up a request. Knows nothing of protocols.
"""

import functools
import json
import logging
import os
import select
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Concatenate, NamedTuple, ParamSpec

from tutti.core.errors import ConfigError, reason, sayable
from tutti.core.types import Spent
from tutti.observing.logs import Logs, one_line, utc

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")

STDOUT = "-"
NAME = "tutti.requests"
# Events that wait to be written.
MOST_EVENTS = 8192
# What comes within such a time is written together.
_TOGETHER_S = 0.02
_AT_ONCE = 256
# Lines are whole where several processes write them into one pipe: of this size at most at a time.
_PIPE_BYTES = 4096
_MOST_TEXT, _MOST_NAME, _MOST_STEPS = 1500, 256, 12
_TELL_EVERY_S = 10.0
_LEAST_DELAY_S, _GREATEST_DELAY_S = 0.5, 30.0


class Event(NamedTuple):
    """One request that has been answered. `status` is the protocol's; sizes are bytes, 0 where not known.

    `request` is what was asked: "infer", "generate", or another call's name.
    """

    at_s: float
    id: str
    protocol: str
    request: str
    model: str
    version: str
    status: int | str
    bytes_in: int
    bytes_out: int
    total_ns: int
    spent: Spent | None = None
    pool: str = ""
    client: str = ""
    error: str = ""


class RequestLog:
    """Takes events from any thread. `is_on` says whether anybody wants them: whoever makes them asks first."""

    def __init__(self, logs: Logs, access: str = "", slow_ms: float = 0.0, stdout: int = 1) -> None:
        """`access` is a file, STDOUT, or "" for no access log; requests from `slow_ms` on are warned of, none for 0.

        Raises ConfigError where the file cannot be written.
        """
        self._logs = logs
        # What it was made with: (access, slow_ms).
        self.wanted = access, slow_ms
        self._slow_ns = int(slow_ms * 1e6)
        self._access: Output | None = None
        if access:
            self._access = Output(stdout) if access == STDOUT else Output(path=access)
        self._log = Output(stream=logs)
        self.is_on = False
        self._look()
        logs.listen(self._look)
        self._events: deque[Event] = deque()
        self._dropped = self._told = 0
        self._why = ""
        self._told_s = -_TELL_EVERY_S
        self._wake = threading.Event()
        self._is_closing = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def _look(self) -> None:
        self.is_on = self._access is not None or self._slow_ns > 0 or self._logs.is_verbose

    def wants(self, total_ns: int) -> bool:
        """Whether a request that took so long is to be noted."""
        return self._access is not None or self._logs.is_verbose or 0 < self._slow_ns <= total_ns

    def note(self, event: Event) -> None:
        """Have the event written soon, or count it where too many wait."""
        if len(self._events) >= MOST_EVENTS:
            self._dropped += 1
            return
        self._events.append(event)
        if not self._wake.is_set():
            self._wake.set()
            if self._thread is None:
                self._start()

    def missed(self, count: int = 1) -> None:
        """Count lines that could not be made: an error of ours, which is told where it was caught."""
        self._dropped += count
        self._why = "they could not be made, which is an error of the server's own"

    def close(self, timeout_s: float = 1.0) -> None:
        """Write what waits, if that takes no longer."""
        self._is_closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
        if self._access is not None and (self._thread is None or not self._thread.is_alive()):
            self._access.close()

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="request log", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            self._wake.wait(_TELL_EVERY_S if self._lost() > self._told else None)
            self._is_closing.wait(_TOGETHER_S)
            self._wake.clear()
            try:
                while self._events:
                    self._write([self._events.popleft() for _ in range(min(_AT_ONCE, len(self._events)))])
                self._tell()
            except Exception:  # whatever it is, later requests are noted
                _log.exception("the request log could not be written")
            if self._is_closing.is_set() and not self._events:
                return

    def _write(self, events: Sequence[Event]) -> None:
        if self._access is not None:
            self._access.write(self._made(events, lambda event: [line(event, self._logs.is_json)]))
        self._log.write([said for said in self._made(events, self._said) if said])

    def _made(self, events: Sequence[Event], make: Callable[[Event], list[bytes]]) -> list[bytes]:
        """The lines of all events but those that cannot be made: these are counted."""
        lines: list[bytes] = []
        for event in events:
            try:
                lines += make(event)
            except Exception:
                _log.exception("a line of the request log could not be made")
                self.missed()
        return lines

    def _said(self, event: Event) -> list[bytes]:
        said = []
        if 0 < self._slow_ns <= event.total_ns:
            said.append(self._logs.line(logging.WARNING, NAME, slow(event), fields(event)))
        if self._logs.is_verbose:
            said.append(self._logs.line(logging.DEBUG, NAME, _as_text(fields(event)), fields(event)))
        return said

    def _lost(self) -> int:
        return self._dropped + self._log.lost + (self._access.lost if self._access is not None else 0)

    def _tell(self) -> None:
        """Now and then, how many lines there are not."""
        lost = self._lost()
        now_s = time.monotonic()
        if lost == self._told or (now_s - self._told_s < _TELL_EVERY_S and not self._is_closing.is_set()):
            return
        outputs = [output for output in (self._access, self._log) if output is not None and output.why]
        why = outputs[0].why if outputs else self._why or "they came faster than they could be written"
        lost_lines = f"{lost - self._told} lines of the request log were left out: {why}"
        before = self._log.lost
        self._log.write([self._logs.line(logging.WARNING, NAME, lost_lines, {})])
        if self._log.lost == before:
            self._told, self._told_s = lost, now_s
        else:  # it cannot be told there either
            self._log.lost = before


def harmless(note: Callable[Concatenate[RequestLog, _P], None]) -> Callable[Concatenate[RequestLog, _P], None]:
    """For what makes events: where that fails the line is lost, and never the answer that it is about."""

    @functools.wraps(note)
    def guarded(log: RequestLog, /, *args: _P.args, **more: _P.kwargs) -> None:
        try:
            note(log, *args, **more)
        except Exception:
            _log.exception("a line of the request log could not be made")
            log.missed()

    return guarded


class Output:
    """A file or a stream that may be full, slow or gone. One thread writes to it."""

    def __init__(self, file: int = -1, path: str = "", stream: Logs | None = None) -> None:
        """A descriptor, or a path, which is opened again where it has been moved, or the stream that logs go to.

        Raises ConfigError where the path cannot be opened.
        """
        self.lost = 0
        # The last failure.
        self.why = ""
        self._file = file
        self._path = path
        self._stream = stream
        # After a failure nothing is tried for a while; and the next line begins anew where one has been cut.
        self._delay_s = self._until_s = 0.0
        self._is_cut = False
        if path:
            try:
                self._open()
            except OSError as error:
                raise ConfigError(f"--access-log {path}: {reason(error)}") from None

    def write(self, lines: Sequence[bytes]) -> None:
        """Write the lines, each with its end, or count them."""
        if not lines:
            return
        if time.monotonic() < self._until_s:
            self.lost += len(lines)
            return
        left = deque(lines)
        try:
            file = self._descriptor()
            while left:
                count, piece = _piece(left, file)
                self._put(file, b"\n" + piece if self._is_cut else piece)
                for _ in range(count):
                    left.popleft()
        except Exception as error:  # a stream may be gone in other ways than by the system's word
            self.lost += len(left)
            self.why = reason(error)
            self._delay_s = min(max(2 * self._delay_s, _LEAST_DELAY_S), _GREATEST_DELAY_S)
            self._until_s = time.monotonic() + self._delay_s
        else:
            self._delay_s = 0.0

    def close(self) -> None:
        """A file that was opened here."""
        if self._path and self._file >= 0:
            file, self._file = self._file, -1
            os.close(file)

    def _put(self, file: int, data: bytes) -> None:
        offset = 0
        while offset < len(data):
            try:
                offset += os.write(file, data[offset:])
                self._is_cut = offset < len(data)
            except BlockingIOError:  # another process may have made the stream so
                select.select([], [file], [], 1.0)

    def _descriptor(self) -> int:
        if self._stream is not None:
            return int(self._stream.stream.fileno())
        if self._path and self._file >= 0 and self._has_moved():
            self.close()
        if self._path and self._file < 0:
            self._open()
        return self._file

    def _has_moved(self) -> bool:
        try:
            current = os.stat(self._path)
        except FileNotFoundError:
            return True
        opened = os.fstat(self._file)
        return (current.st_dev, current.st_ino) != (opened.st_dev, opened.st_ino)

    def _open(self) -> None:
        # A pipe without a reader is an error at once: opening it would wait for one.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
        self._file = os.open(self._path, flags, 0o644)


def check_access(path: str) -> None:
    """Raises ConfigError for an access log that cannot be written on this machine; one that is not there is begun."""
    if path and path != STDOUT:
        Output(path=path).close()


def _piece(lines: Iterable[bytes], file: int) -> tuple[int, bytes]:
    """How many of the lines are written at once, and they."""
    pieces: list[bytes] = []
    size = 0
    limit = _PIPE_BYTES if stat.S_ISFIFO(os.fstat(file).st_mode) else 1 << 16
    for piece in lines:
        if pieces and size + len(piece) > limit:
            break
        pieces.append(piece)
        size += len(piece)
    return len(pieces), b"".join(pieces)


def fields(event: Event) -> dict[str, Any]:
    """What is known of a request, by the names that it has in the log; milliseconds and bytes."""
    spent = event.spent
    shown: dict[str, Any] = {
        "id": event.id[:_MOST_NAME], "protocol": event.protocol, "request": event.request[:_MOST_NAME],
        "model": event.model[:_MOST_NAME], "version": event.version[:_MOST_NAME], "status": event.status,
        "bytes_in": event.bytes_in, "bytes_out": event.bytes_out,
    }  # fmt: skip
    if spent is not None and spent.is_cached:
        shown["cache"] = "hit"
    elif spent is not None:
        shown |= {"queue_ms": _ms(spent.queue_ns), "compute_ms": _ms(spent.compute_ns)}
    shown["total_ms"] = _ms(event.total_ns)
    if spent is not None and spent.rows:
        shown["batch_rows"] = spent.rows
    if spent is not None and spent.steps:
        longest = sorted(spent.steps, key=lambda step: -step[1] - step[2])[:_MOST_STEPS]
        shown["steps"] = {
            name: {"queue_ms": _ms(queue), "compute_ms": _ms(ns), **({"batch_rows": rows} if rows else {})}
            for name, queue, ns, rows in longest
        }
    replica = spent.replica if spent is not None else ""
    shown |= {
        "pool": event.pool[:_MOST_NAME],
        "replica": replica,
        "client": event.client[:_MOST_NAME],
        "error": event.error[:_MOST_TEXT],
    }
    said = {key: sayable(value) if isinstance(value, str) else value for key, value in shown.items()}
    return {key: value for key, value in said.items() if value != ""}


def line(event: Event, is_json: bool) -> bytes:
    """The event's line in the access log."""
    known = fields(event)
    if is_json:
        return json.dumps({"time": utc(event.at_s), **known}).encode() + b"\n"
    return f"{utc(event.at_s)} {_as_text(known)}\n".encode()


def _as_text(known: Mapping[str, Any]) -> str:
    shown = dict(known)
    if "steps" in shown:
        each = [
            f"{name}:{step['queue_ms']:g}+{step['compute_ms']:g}"
            + (f"/{step['batch_rows']}" if "batch_rows" in step else "")
            for name, step in shown["steps"].items()
        ]
        shown["steps"] = ",".join(each)
    return " ".join([f"{key}={_value(value)}" for key, value in shown.items()])


def _value(value: object) -> str:
    """Quoted where it is not one plain word."""
    text = str(value)
    is_plain = text.isascii() and text.isprintable() and not set(' "=\\') & set(text)
    return text if is_plain else one_line(json.dumps(text, ensure_ascii=False))


def slow(event: Event) -> str:
    """A sentence about a slow request: who, how long, and where the time went."""
    who = f"{event.protocol} {event.request}" + (f" of model '{event.model}'" if event.model else "")
    known = f" (id {event.id})" if event.id else ""
    how = f"slow: {who}{known} took {_shown(event.total_ns)} ms: {_where(event)}"
    return how + (f"; it failed with {event.status}: {event.error[:_MOST_TEXT]}" if event.error else "")


def _where(event: Event) -> str:
    spent = event.spent
    if spent is None:
        return "it was not executed" if event.error else "where, is not known"
    if spent.is_cached:
        return "its answer was cached"
    other_ns = event.total_ns - spent.queue_ns - spent.compute_ns
    told = f"{_shown(spent.queue_ns)} in the queue, {_shown(spent.compute_ns)} executed{_batch(spent.rows)}"
    told += f" on replica {spent.replica}" if spent.replica else ""
    if spent.steps:
        name, queue_ns, compute_ns, rows = max(spent.steps, key=lambda step: step[1] + step[2])
        longest = f"the longest step '{name}' waited {_shown(queue_ns)} and was executed for {_shown(compute_ns)}"
        return f"all steps were {told}; {longest}{_batch(rows)}"
    return f"{told}, {_shown(max(0, other_ns))} elsewhere"


def _batch(rows: int) -> str:
    return f" in a batch of {rows} rows" if rows > 1 else ""


def _ms(ns: int) -> float:
    """As in the answer's headers."""
    return ns // 10_000 / 100


def _shown(ns: int) -> str:
    return f"{_ms(ns):.2f}".rstrip("0").rstrip(".")
