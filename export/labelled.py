"""A labelled file: tab-separated, with a label, a split and a text on each line. Knows no model."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from tutti.console.arguments import plain
from tutti.core import files, paths
from tutti.core.errors import reason
from tutti.export.errors import ExportError

_MIN_LABELLED = 20
_COLUMNS = ("label", "split", "text")


@dataclass(frozen=True, slots=True)
class Labelled:
    """A labelled file: tab-separated `label`, `split` (train or test) and `text`."""

    labels: tuple[str, ...]
    texts: dict[str, list[str]]
    targets: dict[str, list[int]]


def read(path: Path) -> Labelled:
    """Raises ExportError naming the line that is wrong. Labels keep the order of their first appearance."""
    labels: list[str] = []
    texts: dict[str, list[str]] = {"train": [], "test": []}
    targets: dict[str, list[int]] = {"train": [], "test": []}
    rows = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    try:
        if missing := [name for name in _COLUMNS if name not in (rows.fieldnames or ())]:
            expected = "tab-separated, a first line of label, split and text"
            raise ExportError(f"{plain(path)}: expected {expected}: there is no column '{missing[0]}'")
        for row in rows:
            if row["split"] not in texts or not row["label"] or not row["text"]:
                got = plain({name: row[name] for name in _COLUMNS})
                raise ExportError(
                    f"{plain(path)}:{rows.line_num}: expected label, split (train or test) and text, got {got}"
                )
            if row["label"] not in labels:
                labels.append(row["label"])
            texts[row["split"]].append(row["text"])
            targets[row["split"]].append(labels.index(row["label"]))
    except csv.Error as error:
        raise ExportError(f"{plain(path)}:{rows.line_num}: {error}") from None
    if len(labels) < 2 or min(len(texts["train"]), len(texts["test"])) < _MIN_LABELLED:
        raise ExportError(f"{plain(path)}: expected at least 2 labels and {_MIN_LABELLED} texts in each split")
    return Labelled(tuple(labels), texts, targets)


def _text(path: Path) -> str:
    try:
        return files.read_utf8(path)
    except OSError as error:
        raise ExportError(f"--labelled {plain(path)}: {reason(error)}{paths.meant(path)}") from None
