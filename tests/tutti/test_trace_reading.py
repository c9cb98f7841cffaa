"""Trace files as people read them: ours and Triton's, whole or cut off."""

import json
from pathlib import Path
from typing import Any

import pytest

from tutti.app import cli
from tutti.observing import trace_reading
from tutti.observing.waterfall import waterfall


def trace(number: int, model: str, at: int, took: int, computes: bool = True, **head: Any) -> list[dict[str, Any]]:
    """As Triton writes one: an object for each activity, the head among them. Microseconds."""
    times = {"REQUEST_START": 0, "QUEUE_START": 1}
    if computes:
        times |= {"COMPUTE_START": 3, "COMPUTE_INPUT_END": 4, "COMPUTE_OUTPUT_START": took - 2, "COMPUTE_END": took - 1}
    times["REQUEST_END"] = took
    shown = [{"id": number, "timestamps": [{"name": k, "ns": (at + v) * 1000}]} for k, v in times.items()]
    shown.insert(1, {"id": number, "activity": "TENSOR_QUEUE_INPUT", "tensor": {"name": "x", "data": "1"}})
    return [{"id": number, "model_name": model, "model_version": 1, **head}, *shown]


SKIPPED = [{"id": 1, "timestamps": [{"name": "SKIPPED costly: not S > 15", "ns": 160_000}]}]
ENTRIES = [
    *trace(3, "ten", 130, 20, parent_id=2, batch_rows=4),
    *trace(2, "inner", 120, 40, False, parent_id=1),
    *trace(1, "e", 100, 100, False, request_id="slow"),
    *SKIPPED,
    *trace(4, "ten", 300, 10),
    *trace(5, "asks", 400, 50, error="it broke"),
    *trace(6, "ten", 410, 20, parent_id=5),
]


def test_requests_with_their_steps() -> None:
    slow, plain, asks = trace_reading.explained(json.dumps(ENTRIES))
    assert (slow["ensemble"], slow["request_id"], slow["total_us"]) == ("e", "slow", 100)
    inner, costly = slow["steps"]
    assert (inner["step"], inner["start_us"], inner["end_us"]) == ("inner", 20, 60)
    (ten,) = inner["steps"]
    assert (ten["step"], ten["start_us"], ten["queue_us"], ten["compute_us"]) == ("ten", 10, 2, 14)
    assert costly == {"step": "costly", "start_us": 60, "skipped": "not S > 15"}
    assert (plain["model"], plain["queue_us"], plain["total_us"]) == ("ten", 2, 10)
    assert (asks["error"], [step["step"] for step in asks["steps_asked"]]) == ("it broke", ["ten"])
    drawn = waterfall(slow)
    assert "e: request 'slow' in 100 us" in drawn
    assert "  ten" in drawn and "left out: not S > 15" in drawn
    assert "failed: it broke" in waterfall(asks)


def test_a_file_that_is_cut_is_read_as_far_as_it_goes() -> None:
    text = json.dumps(ENTRIES)
    whole = trace_reading.explained(text)
    for end in range(1, len(text)):
        found = trace_reading.explained(text[:end])
        assert [one["model"] for one in found] == [one["model"] for one in whole[: len(found)]]


@pytest.mark.parametrize(
    ("content", "arguments", "says"),
    [
        (
            json.dumps(ENTRIES),
            ["none"],
            "has no such request; it has requests to asks, e, ten, with the steps costly, inner",
        ),
        (json.dumps(ENTRIES), ["inne"], "with the steps costly, inner (did you mean 'inner'?)"),
        (json.dumps(ENTRIES), ["costly"], "has no such request; 'costly' is a step that was left out: not S > 15"),
        (json.dumps(ENTRIES), ["inner", "--id", "fast"], "has no such request; it has requests to"),
        (json.dumps(ENTRIES), ["--id", "other"], "has no such request"),
        ("[]", [], "it has requests to none that has ended"),
        ("hello", [], "is no trace file (see --trace-config): expected an array in JSON"),
        ('{"a": 1}', [], "expected an array"),
        ('["a"]', [], "expected objects with an 'id'"),
        ('[{"id": 1, "timestamps": [{}]}]', [], "is no trace file"),
        (None, [], "cannot be read: No such file or directory"),
    ],
)
def test_what_cannot_be_shown_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, arguments: list[str], says: str
) -> None:
    path = tmp_path / "trace.json"
    if content is not None:
        path.write_text(content)
    assert cli.main(["explain", *arguments, "--traces", str(path)]) == 1
    err = capsys.readouterr().err
    assert says in err and len(err.splitlines()) == 1


def test_the_steps_of_ensembles_are_found_by_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(ENTRIES))
    requests = trace_reading.explained(json.dumps(ENTRIES))
    found = trace_reading.explained(json.dumps(ENTRIES), "ten")
    assert found[:3] == requests
    assert [(one["model"], one["within"], one["total_us"]) for one in found[3:]] == [
        ("ten", ["e", "inner"], 20), ("ten", ["asks"], 20),
    ]  # fmt: skip
    assert cli.main(["explain", "ten", "--traces", str(path), "--id", "slow"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("ten version 1: request 'slow' as a step of e / inner, in 20 us\nqueue ")
    assert "in a batch of 4 rows" in shown
    assert cli.main(["explain", "inner", "--traces", str(path), "--json"]) == 0
    (inner,) = json.loads(capsys.readouterr().out)
    assert (inner["ensemble"], [step["step"] for step in inner["steps"]]) == ("inner", ["ten"])


def test_the_slowest_come_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(ENTRIES))
    assert cli.main(["explain", "--traces", str(path), "--slowest", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("e: request 'slow'") < shown.index("asks version 1")
    assert "ten version 1" not in shown
    assert cli.main(["explain", "ten", "--traces", str(path), "--json"]) == 0
    assert [one["total_us"] for one in json.loads(capsys.readouterr().out)] == [20, 20, 10]
