"""The log of requests: lines that anything can parse, and an output that may be slow, full or moved away."""

import errno
import json
import logging
import os
import shlex
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.serving import Gather, wait_until
from tutti.core.errors import ConfigError
from tutti.core.types import Call, InferRequest, Raw, Spent
from tutti.frontends.grpc import log_events as grpc_events
from tutti.frontends.http import log_events as http_events
from tutti.frontends.http.exchange import Exchange
from tutti.observing import request_log
from tutti.observing.logs import Logs
from tutti.observing.request_log import Event, RequestLog, line, slow

MS = 1_000_000
NASTY = [
    "plain", "two words", "line\nbreak\r\n", "quote\" and \\ and 'x'", "half \ud800 of a pair",
    "\u2028\u2029\x85\x9b31m", "a=b", "é", "\x1b[31m", "\x00", "tab\t", "", "x" * 10_000,
]  # fmt: skip


def event(total_ms: float = 4.0, **more: Any) -> Event:
    values = {
        "at_s": 1_764_216_000.1234, "id": "r1", "protocol": "http", "request": "infer", "model": "m", "version": "1",
        "status": 200, "bytes_in": 163, "bytes_out": 291, "total_ns": int(total_ms * MS), "client": "127.0.0.1:5",
    }  # fmt: skip
    return Event(**(values | more))


Open = Callable[..., Logs]


@pytest.fixture
def logs_to() -> Iterator[Open]:
    """Logs that go to a file, which is closed in the end."""
    opened: list[Logs] = []

    def open_(path: Path, log_format: str = "json") -> Logs:
        opened.append(Logs(file=str(path), log_format=log_format))
        return opened[-1]

    yield open_
    for logs in opened:
        logs._handler.close()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(one) for one in path.read_text().splitlines()]


@pytest.mark.parametrize("nasty", NASTY)
def test_a_line_is_one_whatever_clients_send(nasty: str) -> None:
    one = event(id=nasty, model=nasty, client=nasty, error=nasty, spent=Spent(MS, 2 * MS, 3, steps=((nasty, 1, 2, 3),)))
    whole = line(one, is_json=True)
    assert json.loads(whole)["status"] == 200
    assert len(whole) < 4096 + 2 * 6000
    shown = nasty.encode("utf-8", "backslashreplace").decode()
    assert json.loads(whole).get("model", "") == shown[:256]
    for text in (whole.decode(), line(one, is_json=False).decode()):
        assert text.endswith("\n")
        assert len(text.splitlines()) == 1
        assert text[:-1].isprintable()


def test_a_line_says_what_is_known() -> None:
    spent = Spent(410_000, 3_200_000, 8)
    known = {
        "time": "2025-11-27T04:00:00.123Z", "id": "r1", "protocol": "http", "request": "infer", "model": "m",
        "version": "1", "status": 503, "bytes_in": 163, "bytes_out": 291, "queue_ms": 0.41, "compute_ms": 3.2,
        "total_ms": 4.0, "batch_rows": 8, "pool": "gpu", "client": "127.0.0.1:5", "error": "no \"room\" left",
    }  # fmt: skip
    one = event(spent=spent, pool="gpu", status=503, error='no "room" left')
    assert json.loads(line(one, is_json=True)) == known
    time, *pairs = shlex.split(line(one, is_json=False).decode())
    assert [time, *pairs] == [known["time"], *(f"{key}={value}" for key, value in known.items() if key != "time")]


def test_of_many_steps_the_longest_are_told() -> None:
    steps = tuple((f"step{n}", n * MS, 0, 0) for n in range(100))
    told = json.loads(line(event(spent=Spent(1, 1, steps=steps)), is_json=True))["steps"]
    assert list(told)[:2] == ["step99", "step98"]
    assert len(told) == 12


def test_of_a_step_the_rows_of_its_batch_are_told() -> None:
    one = event(spent=Spent(1, 1, steps=(("a", 3 * MS, 5 * MS, 24), ("b", 0, MS, 0))))
    assert json.loads(line(one, is_json=True))["steps"] == {
        "a": {"queue_ms": 3, "compute_ms": 5, "batch_rows": 24},
        "b": {"queue_ms": 0, "compute_ms": 1},
    }
    assert b" steps=a:3+5/24,b:0+1 " in line(one, is_json=False)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"spent": Spent(790 * MS, 20 * MS, 8)}, "790 in the queue, 20 executed in a batch of 8 rows, 2 elsewhere"),
        ({"spent": Spent(790 * MS, 20 * MS, 1)}, "790 in the queue, 20 executed, 2 elsewhere"),
        ({"spent": Spent(is_cached=True)}, "its answer was cached"),
        ({}, "where, is not known"),
        ({"status": 503, "error": "no replica"}, "it was not executed; it failed with 503: no replica"),
        (
            {"spent": Spent(10 * MS, 800 * MS, steps=(("a", 0, MS, 9), ("b", 10 * MS, 799 * MS, 1)))},
            "all steps were 10 in the queue, 800 executed; the longest step 'b' waited 10 and was executed for 799",
        ),
        (
            {"spent": Spent(0, 800 * MS, steps=(("a", 0, MS, 0), ("b", 0, 799 * MS, 24)))},
            "all steps were 0 in the queue, 800 executed; the longest step 'b' waited 0 and was executed for 799 in a "
            "batch of 24 rows",
        ),
    ],
)
def test_a_slow_request_says_where_its_time_went(more: dict[str, Any], says: str) -> None:
    assert slow(event(812, **more)) == f"slow: http infer of model 'm' (id r1) took 812 ms: {says}"


@pytest.mark.parametrize("log_format", ["default", "json"])
def test_slow_requests_are_warned_of_and_others_not(logs_to: Open, tmp_path: Path, log_format: str) -> None:
    logs = logs_to(tmp_path / "log", log_format)
    log = RequestLog(logs, slow_ms=100)
    assert log.is_on
    assert [log.wants(int(ms * MS)) for ms in (99.9, 100)] == [False, True]
    for ms in (1, 100, 99, 5000):
        log.note(event(ms, id=f"r{ms}\nE fake", model="\ud800"))
    log.close(20)
    text = (tmp_path / "log").read_text()
    assert len(text.splitlines()) == 2
    if log_format == "json":
        assert [(one["level"], one["total_ms"]) for one in read(tmp_path / "log")] == [
            ("WARNING", 100),
            ("WARNING", 5000),
        ]
    else:
        assert [one[23:42] for one in text.splitlines()] == [" W tutti.requests: "] * 2


def test_what_is_logged_changes_with_the_settings(logs_to: Open, tmp_path: Path) -> None:
    logs = logs_to(tmp_path / "log")
    log = RequestLog(logs)
    assert not log.is_on
    logs.update({"log_verbose_level": 1})
    assert log.is_on
    assert log.wants(0)
    log.note(event(id="shown"))
    wait_until(lambda: "shown" in (tmp_path / "log").read_text())
    logs.update({"log_verbose_level": 0})
    assert not log.is_on
    log.note(event(id="late"))
    log.close(20)
    (one,) = read(tmp_path / "log")
    assert (one["level"], one["id"]) == ("DEBUG", "shown")


def test_warnings_that_are_off_are_none(logs_to: Open, tmp_path: Path) -> None:
    logs = logs_to(tmp_path / "log")
    logs.update({"log_warning": False})
    log = RequestLog(logs, slow_ms=1)
    log.note(event(10))
    log.close(20)
    assert (tmp_path / "log").read_text() == ""


def test_a_file_that_was_moved_is_begun_anew(logs_to: Open, tmp_path: Path) -> None:
    path = tmp_path / "access"
    path.write_text("before\n")
    log = RequestLog(logs_to(tmp_path / "log"), str(path))
    log.note(event(id="one"))
    wait_until(lambda: "one" in path.read_text())
    path.rename(tmp_path / "old")
    log.note(event(id="two"))
    wait_until(lambda: path.exists() and "two" in path.read_text())
    path.unlink()
    log.note(event(id="three"))
    log.close(20)
    assert "three" in path.read_text()
    assert (tmp_path / "old").read_text().startswith("before\n")
    assert len((tmp_path / "old").read_text().splitlines()) == 2


def test_a_full_disk_costs_lines_which_are_counted(logs_to: Open, tmp_path: Path) -> None:
    log = RequestLog(logs_to(tmp_path / "log"), "/dev/full")
    for _ in range(10):
        log.note(event())
    log.close(20)
    (told,) = read(tmp_path / "log")
    assert (told["level"], told["message"]) == (
        "WARNING", "10 lines of the request log were left out: No space left on device",
    )  # fmt: skip


def test_a_reader_that_does_not_read_holds_nobody_up(
    logs_to: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody reads until all have been noted: what neither the pipe nor the queue takes is counted."""
    monkeypatch.setattr(request_log, "MOST_EVENTS", 500)
    theirs, ours = os.pipe()
    logs = logs_to(tmp_path / "log", "default")
    log = RequestLog(logs, "-", stdout=ours)
    count = 5000
    for number in range(count):
        log.note(event(id=f"r{number}"))
    seen = bytearray()

    def read_all() -> None:
        while piece := os.read(theirs, 65536):
            seen.extend(piece)

    reader = threading.Thread(target=read_all)
    reader.start()
    log.close(20)
    os.close(ours)
    reader.join(20)
    os.close(theirs)
    lines = seen.decode().splitlines()
    assert all(" status=200 " in one for one in lines)
    told = (tmp_path / "log").read_text()
    assert f" {count - len(lines)} lines of the request log were left out: they came faster than" in told


def test_a_cut_line_does_not_spoil_the_next(logs_to: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RequestLog(logs_to(tmp_path / "log"), str(tmp_path / "access"))
    assert log._access is not None
    write = os.write
    turns = iter(["a part", "nothing"])

    def cut(file: int, data: bytes) -> int:
        turn = next(turns, "all")
        if turn == "nothing":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[:20] if turn == "a part" else data)

    monkeypatch.setattr(os, "write", cut)
    log._access.write([line(event(id="one"), is_json=True)])
    assert (log._access.lost, log._access.why) == (1, "No space left on device")
    log._access._until_s = 0.0
    log._access.write([line(event(id="two"), is_json=True)])
    log.close(20)
    begun, whole = (tmp_path / "access").read_text().splitlines()
    assert (begun, json.loads(whole)["id"]) == ('{"time": "2025-11-27', "two")


def test_a_file_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--access-log {tmp_path}: Is a directory"):
        RequestLog(Logs(), str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="No such device"):  # nobody reads it: opening would wait
        RequestLog(Logs(), str(tmp_path / "pipe"))


@pytest.mark.parametrize("nasty", NASTY)
def test_the_servers_own_lines_are_json_too(logs_to: Open, tmp_path: Path, nasty: str) -> None:
    logs = logs_to(tmp_path / "log")
    record = logging.LogRecord("tutti.x", logging.ERROR, "", 0, "%s", (nasty,), None)
    try:
        raise ValueError(nasty)
    except ValueError as error:
        record.exc_info = type(error), error, error.__traceback__
    logs._handler.handle(record)
    (one,) = read(tmp_path / "log")
    assert (one["level"], one["logger"]) == ("ERROR", "tutti.x")
    assert one["message"] == nasty.encode("utf-8", "backslashreplace").decode()
    assert "ValueError" in one["exception"]


def test_what_cannot_be_told_is_lost_and_nothing_else(logs_to: Open, tmp_path: Path) -> None:
    log = RequestLog(logs_to(tmp_path / "log"), str(tmp_path / "access"))
    broken, whole = Call(InferRequest("m", {}), Gather(0)), Call(InferRequest("m", {}), Gather(0))
    whole.token = Exchange(SimpleNamespace(peer=("127.0.0.1", 5), has_gone=False), b"POST", b"/", True)  # type: ignore[arg-type]
    answer: list[Raw] = [b"HTTP/1.1 200 OK\r\n", b"x-request-id: ", b"whole", b"\r\n\r\n", memoryview(b"data")]
    http_events.note_calls(log, [(broken, b""), (whole, answer), (whole, b"".join(answer))], 0)
    grpc_events.note_call(log, broken, (-99, "no code"), (1, 2), "")
    grpc_events.note_method(log, "/path", (-99, "no code"), (1, 2), "", 0)
    log.close(20)
    assert [(one["id"], one["bytes_out"]) for one in read(tmp_path / "access")] == [("whole", 4)] * 2
    assert read(tmp_path / "log")[-1]["message"].startswith("3 lines of the request log were left out: they could not")


def test_an_event_that_is_none_costs_its_own_line(logs_to: Open, tmp_path: Path) -> None:
    log = RequestLog(logs_to(tmp_path / "log"), str(tmp_path / "access"))
    log.note(event(total_ns="long"))
    log.note(event(id="beside"))
    wait_until(lambda: "beside" in (tmp_path / "access").read_text())
    log.note(event(id="after"))
    log.close(20)
    assert [one["id"] for one in read(tmp_path / "access")] == ["beside", "after"]
    assert read(tmp_path / "log")[-1]["message"].startswith("1 lines of the request log were left out: they could not")


@pytest.mark.parametrize("broken", ["_descriptor", "_tell"])
def test_the_log_goes_on_after_any_error(
    logs_to: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setattr(request_log, "_LEAST_DELAY_S", 0.0)
    log = RequestLog(logs_to(tmp_path / "log"), str(tmp_path / "access"))
    owner: Any = log if broken == "_tell" else log._access
    whole = getattr(owner, broken)
    failed = threading.Event()

    def fail_once() -> Any:
        if failed.is_set():
            return whole()
        failed.set()
        raise RuntimeError("once")

    monkeypatch.setattr(owner, broken, fail_once)
    log.note(event(id="first"))
    assert failed.wait(20)
    log.note(event(id="next"))
    wait_until(lambda: "next" in (tmp_path / "access").read_text())
    log.close(20)
    assert ("first" in (tmp_path / "access").read_text()) == (broken == "_tell")
    if broken == "_descriptor":
        assert read(tmp_path / "log")[-1]["message"] == "1 lines of the request log were left out: once"
