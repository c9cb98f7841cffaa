"""`benchmarks/gpu.md` from the parts' JSON: the targets beside what was measured, then every figure.

What no record has is "not measured". A short run shows that all works; its figures stand for nothing and are left out
of the targets.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import frame, machine

PATH = Path(__file__).parents[1] / "gpu.md"
PARTS = ("check", "limits", "served", "triton", "onnxruntime")
_TITLES = {"minilm": "MiniLM", "vit": "ViT-B/16", "resnet50": "ResNet-50"}
NOT_MEASURED = "not measured"

Row = dict[str, Any]
Records = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Target:
    """What is wanted, of the part that has it: `find` gives (value, whether it is enough), or None."""

    text: str
    part: str
    find: Callable[[Sequence[Row]], tuple[str, bool] | None]


def read(folders: Iterable[Path]) -> Records:
    """The records of each part in one, of every line the last; one at full size is not replaced by a short one."""
    found: Records = {}
    for folder in folders:
        for part in PARTS:
            path = folder / f"{part}.json"
            if path.exists():
                record = json.loads(path.read_text())
                if part in found and is_full(found[part]) and is_full(record):
                    found[part] = _merged(found[part], record)
                elif part not in found or not is_full(found[part]) or is_full(record):
                    found[part] = record
    return found


def _merged(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What was measured of a line is not replaced by its not having been measured."""
    lines = {entry["line"]: {"commit": before["machine"].get("commit", ""), **entry} for entry in before["lines"]}
    for entry in after["lines"]:
        if entry["rows"] or not lines.get(entry["line"], {}).get("rows"):
            lines[entry["line"]] = {"commit": after["machine"].get("commit", ""), **entry}
    return {**after, "lines": list(lines.values())}


def render(records: Records) -> str:
    """The page."""
    shows = [
        "# On a GPU",
        "",
        *_head(records),
        "",
        "## Targets",
        "",
        "| target | measured | reached |",
        "|---|---|---|",
    ]
    for target in targets():
        shows.append(f"| {target.text} | {' | '.join(_reached(records, target))} |")
    for part in PARTS:
        shows += [
            "",
            f"## {part}",
            "",
            *(_part(records[part]) if part in records else [f"{NOT_MEASURED.capitalize()}."]),
        ]
    return "\n".join(shows) + "\n"


def _head(records: Records) -> list[str]:
    if not any(is_full(record) for record in records.values()):
        return ["No GPU was at hand: nothing of this was measured on one. `docs/gpu.md` says how to."]
    return ["Made by `python -m benchmarks.gpu report`, from records of the parts; each says where it was made."]


def is_full(record: dict[str, Any]) -> bool:
    return record["device"] != "cpu" and not record["short"]


def _reached(records: Records, target: Target) -> tuple[str, str]:
    record = records.get(target.part)
    value = target.find(_rows(record)) if record is not None and is_full(record) else None
    return (NOT_MEASURED, "") if value is None else (value[0], "yes" if value[1] else "**no**")


def _rows(record: dict[str, Any]) -> list[Row]:
    return [
        {"line": entry["line"], "status": entry["status"], **row} for entry in record["lines"] for row in entry["rows"]
    ]


def targets() -> list[Target]:
    found = [Target("everything in `check` is right", "check", _all_right)]
    for model, title in _TITLES.items():
        found += [
            Target(
                f"{title}, 64 and more clients: at least .90 of the bare loop's best rate", "served", _of_bare(model)
            ),
            Target(
                f"{title}, 64 and more clients: the device busy for at least .95 of the time", "served", _busy(model)
            ),
            Target(f"{title}, one client: at most .3 ms above a bare call", "served", _one_client(model)),
            Target(f"{title}: at least 2 times the real Triton's python backend", "triton", _over_triton(model)),
        ]
    found.append(
        Target("a chain of three device steps over 4 MB: at least 2 times the same through the host", "check", _chain)
    )
    found.append(
        Target("the tiny model with 8 front-end processes: at least 5 times that with one", "served", _front_ends)
    )
    return found


def _all_right(rows: Sequence[Row]) -> tuple[str, bool] | None:
    judged = [row for row in rows if "right" in row]
    if not judged:
        return None
    wrong = [f"{row['line']}: {row['name']}" for row in judged if not row["right"]]
    failed = sorted({row["line"] for row in rows if row["status"] == "failed"})
    shown = f"{len(judged) - len(wrong)} of {len(judged)}"
    return shown + "".join(f"; {one}" for one in [*wrong, *failed]), not wrong and not failed


def _many(model: str, key: str, rows: Sequence[Row]) -> list[Row]:
    """Rows in 16 bits with 64 clients and more that have a figure."""
    return [
        row for row in rows
        if row.get("model") == model and row.get("precision") == "fp16" and row.get("clients", 0) >= 64 and key in row
    ]  # fmt: skip


def _of_bare(model: str) -> Callable[[Sequence[Row]], tuple[str, bool] | None]:
    def find(rows: Sequence[Row]) -> tuple[str, bool] | None:
        best = max(_many(model, "of bare", rows), key=lambda row: float(row["of bare"]), default=None)
        if best is None:
            return None
        cores = f"server {best.get('server cores', 0):.1f} and load {best.get('load cores', 0):.1f} cores"
        where = f"{best['protocol']}, {best['clients']} clients, {best['front_ends']} front-ends, {cores}"
        return f"{best['of bare']:.2f}, {best['rows/s']:,.0f} rows/s ({where})", best["of bare"] >= 0.9

    return find


def _busy(model: str) -> Callable[[Sequence[Row]], tuple[str, bool] | None]:
    def find(rows: Sequence[Row]) -> tuple[str, bool] | None:
        best = max((float(row["busy"]) for row in _many(model, "busy", rows)), default=None)
        return None if best is None else (f"{best:.3f} by events", best >= 0.95)

    return find


def _one_client(model: str) -> Callable[[Sequence[Row]], tuple[str, bool] | None]:
    def find(rows: Sequence[Row]) -> tuple[str, bool] | None:
        own = [row for row in rows if row.get("model") == model and row.get("precision") == "fp16"]
        found = {row["protocol"]: float(row["over bare ms"]) for row in own if "over bare ms" in row}
        shown = ", ".join(f"{protocol} {value:+.2f} ms" for protocol, value in found.items())
        return (shown, min(found.values()) <= 0.3) if found else None

    return find


def _over_triton(model: str) -> Callable[[Sequence[Row]], tuple[str, bool] | None]:
    def find(rows: Sequence[Row]) -> tuple[str, bool] | None:
        own = [row for row in rows if row.get("model") == model and "times" in row]
        shown = ", ".join(f"{row['times']:.2f} ({row['protocol']}, {row['clients']} clients)" for row in own)
        return (shown, all(row["times"] >= 2 for row in own)) if own else None

    return find


def _chain(rows: Sequence[Row]) -> tuple[str, bool] | None:
    times = [float(row["times"]) for row in rows if row.get("model") == "chain" and "times" in row]
    return (f"{times[0]:.2f} times", times[0] >= 2) if times else None


def _front_ends(rows: Sequence[Row]) -> tuple[str, bool] | None:
    own = [row for row in rows if row.get("model") == "tiny" and "requests/s" in row]
    rates = {(row["protocol"], row["front_ends"]): float(row["requests/s"]) for row in own}
    times = {
        protocol: rates[protocol, 8] / rates[protocol, 1]
        for protocol in ("http", "grpc")
        if (protocol, 8) in rates and (protocol, 1) in rates
    }
    shown = ", ".join(
        f"{protocol} {value:.1f} times ({rates[protocol, 8]:,.0f} /s)" for protocol, value in times.items()
    )
    return (shown, min(times.values()) >= 5) if times else None


def _part(record: dict[str, Any]) -> list[str]:
    short = " A short run: the figures mean nothing." if record["short"] else ""
    shows = [f"`{record['command']}`, {record['began']}, on {machine.sentence(record['machine'])}.{short}", ""]
    shows += ["| line | row | figures |", "|---|---|---|"]
    for entry in record["lines"]:
        commit = entry.get("commit", "")
        is_other = commit and commit != record["machine"].get("commit")
        notes = [f"at commit {commit}"] if is_other else []
        notes += [entry["note"]] if entry.get("note") else []
        shows += [f"| {entry['line']} | | {'; '.join(notes)} |"] if notes else []
        shows += [f"| {entry['line']} | {_cells(frame.shown(row))} |" for row in entry["rows"]]
        if entry["status"] != "measured":
            reason = entry["reason"].splitlines()[0] if entry["reason"] else ""
            shows.append(f"| {entry['line']} | {entry['status']} | {reason.replace('|', '/')[:300]} |")
    return shows


def _cells(shown: str) -> str:
    name, _, figures = shown.replace("|", "/").replace("\n", " ").partition(": ")
    return f"{name} | {figures}"
