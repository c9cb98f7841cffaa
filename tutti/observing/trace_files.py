"""Triton's trace files, written by a thread of their own soon after each request: none waits for a disk.

Without a log frequency all traces are in one file, an array of JSON that ends with its bracket after each write: so it
can be read at any time, and after the server was killed. With one, every so many traces make a file.
"""

import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tutti.observing.trace_records import Record

_log = logging.getLogger(__name__)

# Traces that wait to be written, and those that wait for their file to be full: more are dropped.
MAX_WAITING = 10_000
MAX_WAITING_BYTES = 32 * 1024 * 1024
# With a frequency a file has so many traces, unless they are too large to wait for each other.
MAX_HELD_BYTES = 8 * 1024 * 1024
# What comes within such a time is written together.
_TOGETHER_S = 0.02
_FLUSH_S = 10.0
_LEAST_DELAY_S, _GREATEST_DELAY_S = 1.0, 60.0
_PIECE_BYTES = 1024 * 1024
# Of a version: a longer one is no number of Triton's.
_MOST_DIGITS = 19


class JsonWriter:
    """Writes traces to `file`; or with a log frequency every so many of them to `file.0`, `file.1`, ...

    Traces that come faster than they can be written are dropped, and a full disk costs the traces: no more. Both are
    told by the log.
    """

    def __init__(self, file: str, log_frequency: Callable[[], int]) -> None:
        """`log_frequency` is asked again and again; 0 for none."""
        self._file = file
        self._log_frequency = log_frequency
        self._changed = threading.Condition()
        self._waiting: list[Record] = []
        self._waiting_bytes = 0
        self._dropped = 0
        self._is_flushing = False
        self._is_writing = False
        self._thread: threading.Thread | None = None
        # The thread's own, from here on: what is to be written, and of how many traces.
        self._texts: list[bytes] = []
        self._held = 0
        self._traces = 0
        # After a failure nothing is tried for so long, each time twice as long.
        self._delay_s = self._waits_until_s = 0.0
        self._files = 0
        self._is_begun = False
        # The file that says to other processes that the name is this one's.
        self._claim: Any = None

    def write(self, record: Record) -> None:
        """Have a finished trace written, with its steps. Never blocks."""
        size = sum([len(tensor["data"]) for trace in record.all() for _, tensor in trace.tensors])
        with self._changed:
            if self._waits_until_s > time.monotonic():
                return
            if len(self._waiting) >= MAX_WAITING or self._waiting_bytes + size > MAX_WAITING_BYTES:
                self._dropped += 1
                return
            self._waiting.append(record)
            self._waiting_bytes += size
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self) -> None:
        """Write all that came so far. Blocks, for a disk that does not answer no longer than some seconds."""
        with self._changed:
            if self._thread is None:
                return
            self._is_flushing = True
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: not self._is_flushing, _FLUSH_S):
                _log.error("traces could not be written within %g s", _FLUSH_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_flushing)
                is_flushing = self._is_flushing
                records, self._waiting, self._waiting_bytes = self._waiting, [], 0
                dropped, self._dropped = self._dropped, 0
            if dropped:
                _log.error("%d traces were dropped: they come faster than they can be written", dropped)
            try:
                self._take(records, is_flushing)
            except Exception:
                _log.exception("traces could not be written")
            with self._changed:
                if is_flushing:
                    self._is_flushing = False
                    self._changed.notify_all()
                else:
                    self._changed.wait_for(lambda: self._is_flushing, _TOGETHER_S)

    def _take(self, records: list[Record], is_flushing: bool) -> None:
        for record in records:
            entries = [json.dumps(entry).encode() for trace in record.all() for entry in entries_of(trace)]
            self._texts += entries
            self._held += sum(map(len, entries))
            self._traces += 1
            frequency = self._log_frequency()
            if self._held >= MAX_HELD_BYTES or (frequency and self._traces >= frequency):
                self._put()
        if self._traces and (is_flushing or not self._log_frequency()):
            self._put()

    def _put(self) -> None:
        """Write what is held; where that fails it is dropped, and so is what comes before the next try."""
        texts, self._texts, self._held, self._traces = self._texts, [], 0, 0
        if self._waits_until_s > time.monotonic():
            return
        try:
            if self._claim is None:
                self._claim_name()
            if self._log_frequency():
                Path(f"{self._file}.{self._files}").write_bytes(b"[%b]" % b", ".join(texts))
                self._files += 1
            else:
                self._append(Path(self._file), b", ".join(texts))
        except OSError as error:
            self._delay_s = min(max(2 * self._delay_s, _LEAST_DELAY_S), _GREATEST_DELAY_S)
            self._waits_until_s = time.monotonic() + self._delay_s
            _log.error("traces are dropped for %g s, they cannot be written: %s", self._delay_s, error)
        else:
            self._delay_s = 0.0

    def _claim_name(self) -> None:
        """Take the files' name for this process; one of its own where another, as a second gateway, has that.

        What an earlier server has left is kept as `file.before`: it may tell why that has ended.
        """
        path = Path(f"{self._file}.0" if self._log_frequency() else self._file)
        claim = path.open("ab")
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            claim.close()
            self._file = f"{self._file}-{os.getpid()}"
            _log.warning("traces go to %s: another process writes to %s", self._file, path)
            self._claim_name()
            return
        except OSError:  # a file system without locks
            _log.debug("%s cannot be locked", path, exc_info=True)
        if claim.tell() and not self._log_frequency():
            path.replace(f"{path}.before")
            claim.close()
            self._claim_name()
            return
        self._claim = claim

    def _append(self, path: Path, entries: bytes) -> None:
        """Put entries into the file's array; a file that was moved away or emptied is begun anew."""
        if not self._is_begun or not _size(path):
            path.write_bytes(b"[%b]" % entries)
            self._is_begun = True
            return
        with path.open("r+b", buffering=0) as file:
            end = file.seek(-1, os.SEEK_END)
            try:
                # The old bracket goes, and the new one comes, with one write: a kill falls before it or after.
                write_all(file, b", %b]" % entries)
            except OSError:
                file.truncate(end)
                file.seek(end)
                file.write(b"]")
                raise


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def write_all(file: Any, data: bytes) -> None:
    """All of it, in pieces of a megabyte."""
    offset = 0
    while offset < len(data):
        offset += file.write(data[offset : offset + _PIECE_BYTES])


def entries_of(record: Record) -> list[dict[str, Any]]:
    """The objects that a trace is in Triton's files; what Triton's do not say is beside their names.

    A version is -1 where none was asked for and none is known, as in Triton's requests.
    """
    version = int(record.version) if record.version.isdecimal() and len(record.version) < _MOST_DIGITS else -1
    head = {"id": record.id, "model_name": record.request.model_name, "model_version": version}
    if record.request.id:
        head["request_id"] = record.request.id
    if record.parent is not None:
        head["parent_id"] = record.parent.id
    if record.error:
        head["error"] = record.error
    times = [{"name": name, "ns": ns} for name, ns in record.sorted()]
    tensors = [{"id": record.id, "activity": activity, "tensor": tensor} for activity, tensor in record.tensors]
    return [{**head, **record.notes}, {"id": record.id, "timestamps": times}, *tensors]
