"""What keeps a GPU part together: lines that raise, die, hang or have no time, records that survive, the report."""

import hashlib
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import check_compiled, frame, kept_programs, kit, load, report
from benchmarks.gpu.context import Context, NotThereYetError
from benchmarks.gpu.frame import Line, Settings

HERE = "tests.benchmarks.test_gpu_frame"
ABOUT = {"card": "none", "driver": "none", "torch": "none", "python": "3", "cpu": "c", "cores": 1, "commit": "abc"}


# Lines, run in processes of their own.
def well(context: Context, value: float) -> None:
    print("a library's own chatter")
    context.emit("a row", {"value": value})


def raises(context: Context) -> None:
    context.emit("before", {"value": 1})
    raise ValueError("this is wrong")


def dies(context: Context) -> None:
    context.emit("before", {"value": 2})
    os.abort()


def hangs(context: Context) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    context.emit("before", {"value": 3, "pid": child.pid})
    time.sleep(600)


def lacks(context: Context) -> None:
    raise NotThereYetError("there is no such flag")


def wrong(context: Context) -> None:
    context.check("an answer", False, off=0.5)


def settings(root: Path, minutes: float = 1.0) -> Settings:
    return Settings("cpu", True, root / "out", root / "work", minutes)


def run(root: Path, *lines: Line, minutes: float = 1.0) -> dict[str, dict[str, Any]]:
    frame.run("part", lines, settings(root, minutes), ABOUT)
    record = json.loads((root / "out" / "part.json").read_text())
    return {entry["line"]: entry for entry in record["lines"]}


def test_a_line_that_fails_costs_the_others_nothing(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        Line("raises", f"{HERE}:raises", 30),
        Line("dies", f"{HERE}:dies", 30),
        Line("lacks", f"{HERE}:lacks", 30),
        Line("needs", f"{HERE}:well", 30, {"value": 1}, needs_gpu=True),
        Line("well", f"{HERE}:well", 30, {"value": 4.5}),
    )
    assert {name: entry["status"] for name, entry in found.items()} == {
        "raises": "failed", "dies": "failed", "lacks": "not there yet", "needs": "needs a GPU", "well": "measured",
    }  # fmt: skip
    assert found["raises"]["reason"] == "ValueError: this is wrong"
    assert "this is wrong" in found["raises"]["log"]
    assert found["dies"]["rows"] == [{"name": "before", "value": 2}]
    assert "died with exit status -6" in found["dies"]["reason"]
    assert found["lacks"]["reason"] == "there is no such flag"
    assert found["well"]["rows"] == [{"name": "a row", "value": 4.5}]


def test_a_line_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    found = run(tmp_path, Line("hangs", f"{HERE}:hangs", 8))["hangs"]
    assert found["status"] == "failed" and "no end after 8 s" in found["reason"]
    (row,) = found["rows"]
    assert not Path(f"/proc/{row['pid']}").exists() or "Z" in Path(f"/proc/{row['pid']}/stat").read_text().split()[2]


def test_a_line_without_time_is_not_begun(tmp_path: Path) -> None:
    found = run(tmp_path, Line("late", f"{HERE}:well", 30, {"value": 1}, least_s=90), minutes=1.0)["late"]
    assert found["status"] == "not measured" and "90 s" in found["reason"]


def test_lines_of_an_earlier_run_are_kept_on_the_same_machine_only(tmp_path: Path) -> None:
    first, second = (Line(name, f"{HERE}:well", 30, {"value": 1}) for name in ("first", "second"))
    run(tmp_path, first, second)
    assert [entry["line"] for entry in frame.earlier("part", [second], settings(tmp_path), ABOUT)] == ["first"]
    assert frame.earlier("part", [second], settings(tmp_path), {**ABOUT, "commit": "other"}) == []


def test_progress_says_the_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, Line("wrong", f"{HERE}:wrong", 30))
    told = capsys.readouterr().err
    assert "[1:00 left] part 1/1: wrong" in told or "[0:59 left] part 1/1: wrong" in told
    assert "an answer: right NO, off 0.5" in told


def test_percentiles_of_several_processes_weigh_their_answers() -> None:
    told = [
        {"answers": 900, "times_ms": [1.0] * 9, "cpu": 0.5},
        {"answers": 100, "times_ms": [10.0] * 100, "cpu": 0.95},
    ]
    figures = load._together(told, 2.0)
    assert (figures.rate, figures.p50_ms, figures.p99_ms) == (500.0, 1.0, 10.0)
    assert figures.generator_cores == pytest.approx(1.45) and figures.is_generator_busy


def test_a_refusal_of_one_process_is_the_measurements() -> None:
    with pytest.raises(load.Refused, match=r"HTTP/1\.1 503"):
        load._together([{"answers": 1, "times_ms": [1.0], "cpu": 0.1}, {"failed": "Refused: HTTP/1.1 503"}], 1.0)


def test_pieces_are_put_together_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(0).bytes(1000)
    listing = {"name": "a.whl", "sha256": hashlib.sha256(data).hexdigest(), "pieces": ["x-1.piece", "x-2.piece"]}
    for number, piece in enumerate((data[:600], data[600:]), 1):
        (tmp_path / f"x-{number}").mkdir()
        (tmp_path / f"x-{number}" / f"x-{number}.piece").write_bytes(piece)
    path = tmp_path / "x-1" / "x.json"
    path.write_text(json.dumps(listing))
    monkeypatch.setattr(kept_programs, "KIT", tmp_path)
    assert kept_programs._whole(path, tmp_path).read_bytes() == data
    (tmp_path / "x-2" / "x-2.piece").write_bytes(data[600:][::-1])
    with pytest.raises(ValueError, match="expected sha256"):
        kept_programs._whole(path, tmp_path)
    (tmp_path / "x-2" / "x-2.piece").unlink()
    with pytest.raises(NotThereYetError, match=r"not carried yet: x-2\.piece"):
        kept_programs._whole(path, tmp_path)


def test_a_transfer_that_is_too_large_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    with (tmp_path / "base" / "large").open("wb") as file:
        file.truncate(kit.MOST + 1)
    with pytest.raises(SystemExit, match=r"base: 60\.0 MiB"):
        kit.sizes(tmp_path)


def record(part: str, **more: Any) -> dict[str, Any]:
    about = {**ABOUT, "card": "H100"}
    head = {"part": part, "machine": about, "command": "c", "device": "cuda", "short": False, "began": "now"}
    return {**head, "lines": [{"line": "l", "status": "measured", "reason": "", "rows": []}], **more}


def entry(*rows: dict[str, Any], status: str = "measured") -> list[dict[str, Any]]:
    return [{"line": "l", "status": status, "reason": "it fell" if status == "failed" else "", "rows": list(rows)}]


def reached(page: str, text: str) -> str:
    (line,) = (line for line in page.splitlines() if line.startswith(f"| {text}"))
    return line.split("|")[-2].strip()


def test_report_judges_targets_by_the_rows() -> None:
    served = {"precision": "fp16", "protocol": "http", "front_ends": 4, "server cores": 2.0, "load cores": 1.0}
    rows = [
        {"name": "1", "model": "vit", "clients": 64, "of bare": 0.93, "rows/s": 5000.0, "busy": 0.94, **served},
        {"name": "2", "model": "vit", "clients": 1, "of bare": 0.99, "rows/s": 100.0, "over bare ms": 0.2, **served},
        {"name": "3", "model": "tiny", "front_ends": 1, "protocol": "http", "requests/s": 10_000.0},
        {"name": "4", "model": "tiny", "front_ends": 8, "protocol": "http", "requests/s": 49_000.0},
    ]
    records = {
        "served": record("served", lines=entry(*rows)),
        "check": record("check", lines=entry({"name": "a", "right": True}, {"name": "b", "right": False})),
        "triton": record(
            "triton", lines=entry({"name": "t", "model": "vit", "times": 2.5, "protocol": "http", "clients": 64})
        ),
    }
    page = report.render(records)
    assert reached(page, "ViT-B/16, 64 and more clients: at least .90") == "yes"
    assert reached(page, "ViT-B/16, 64 and more clients: the device busy") == "**no**"
    assert reached(page, "ViT-B/16, one client") == "yes"
    assert reached(page, "ViT-B/16: at least 2 times") == "yes"
    assert reached(page, "the tiny model") == "**no**"
    assert reached(page, "everything in `check`") == "**no**" and "l: b" in page
    assert reached(page, "MiniLM, one client") == "", "not measured"
    assert "H100" in page


def test_a_failed_line_of_check_is_not_right_however_many_rows_are() -> None:
    records = {"check": record("check", lines=entry({"name": "a", "right": True}, status="failed"))}
    assert reached(report.render(records), "everything in `check`") == "**no**"


def test_a_short_record_does_not_replace_a_full_one(tmp_path: Path) -> None:
    for name, is_short in (("full", False), ("short", True)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "served.json").write_text(json.dumps(record("served", short=is_short)))
    assert not report.read([tmp_path / "full", tmp_path / "short"])["served"]["short"]
    assert report.read([tmp_path / "short"])["served"]["short"]


def test_lines_of_several_runs_come_together_and_say_what_they_were_measured_at(tmp_path: Path) -> None:
    """What one run had no time for keeps what another has measured."""
    at = {"old": ("a1b2c3d", {"first": 1.0, "second": 2.0}), "new": ("e4f5a6b", {"first": 3.0, "second": 0.0})}
    for name, (commit, values) in at.items():
        (tmp_path / name).mkdir()
        lines = [
            {"line": line, "status": "measured", "reason": "", "seconds": 1.0,
             "rows": [{"name": "row", "value": value}] if value else []}
            for line, value in values.items()
        ]  # fmt: skip
        made = record("limits", lines=lines)
        made["machine"] = {**made["machine"], "commit": commit}
        (tmp_path / name / "limits.json").write_text(json.dumps(made))
    page = report.render(report.read([tmp_path / "old", tmp_path / "new"]))
    assert "| first | row | value 3 |" in page and "value 1 " not in page
    assert "| second | | at commit a1b2c3d |\n| second | row | value 2 |" in page


CALLS = sorted((Path(kit.__file__).parent / "kit_texts" / "calls").iterdir())


@pytest.mark.parametrize("path", CALLS, ids=lambda path: path.name)
def test_the_kits_calls_ask_for_lines_that_there_are_within_ten_minutes(path: Path) -> None:
    assert os.access(path, os.X_OK)
    runs = [shlex.split(line)[1:] for line in path.read_text().splitlines() if line.startswith('"$run"')]
    assert runs and sum(float(words[words.index("--minutes") + 1]) for words in runs) <= 9.5
    for part, *words in runs:
        names = [line.name for line in command.PARTS[part](False)]
        for text in [after for word, after in itertools.pairwise(words) if word == "--only"]:
            assert any(text in name for name in names), text


def test_what_a_crash_has_left_is_one_line() -> None:
    log = "\n".join(
        [*map(str, range(100)), "Fatal Python error: Segmentation fault", "", '  File "a.py", line 3 in run']
    )
    assert check_compiled.crash(log) == (
        '95 / 96 / 97 / 98 / 99 / Fatal Python error: Segmentation fault / File "a.py", line 3 in run'
    )
    assert check_compiled.crash("\n".join(map(str, range(100)))).startswith("40 / 41 / ")
    assert check_compiled.crash("") == ""
