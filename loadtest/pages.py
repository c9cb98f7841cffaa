"""What pages share: how they look from 400 pixels on, and their tables. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
:root { color-scheme: light } * { box-sizing: border-box }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 80rem; padding: 1rem; color: #1c2733 }
h1 { font-size: 1.5rem; margin: .2rem 0; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin: 1.4rem 0 .3rem }
.verdict { font-size: 1.3rem; font-weight: 700; padding: .6rem .9rem; border-radius: .4rem; color: #fff }
.PASS { background: #14713d } .FAIL { background: #b3261e } .INVALID { background: #6b3fa0 }
.INCONCLUSIVE { background: #8a6100 } .well { color: #14713d } code { background: #f2f4f7 }
table { border-collapse: collapse; max-width: 100%; margin: .8rem 0 }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #d8dee5; text-align: right; vertical-align: top }
td { white-space: nowrap } th:first-child, td:first-child, th.text, td.text { text-align: left }
td:first-child, td.text { overflow-wrap: anywhere; white-space: normal }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1.2rem }
figure { margin: 0; max-width: 34rem } figcaption { font-weight: 600 }
svg { width: 100%; height: auto; display: block }
.legend { font-size: 13px; display: flex; flex-wrap: wrap; gap: 0 .9rem; overflow-wrap: anywhere }
.legend i { display: inline-block; width: 1.2rem; margin-right: .3rem; vertical-align: middle }
code { overflow-wrap: anywhere } li, p { overflow-wrap: anywhere } .error { color: #c5221f; font-weight: 600 }
summary { cursor: pointer; overflow-wrap: anywhere }
@media (max-width: 44rem) {
  table, tbody, tr, td { display: block; width: 100% } tr.head { display: none }
  tr { border-bottom: 2px solid #d8dee5; padding: .3rem 0 }
  td, td:first-child, td.text { border: 0; padding: .05rem 0; display: flex; gap: .8rem }
  td { justify-content: space-between }
  td::before { content: attr(data-name); color: #55606c; font-weight: 400; flex: none } td.text { text-align: right }
}
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One that is text, or that stands for errors. Its text is HTML."""

    text: str
    kind: str


def head(title: str) -> str:
    """The beginning of a page."""
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    )


def table(names: Sequence[str], rows: Sequence[Sequence[str | Cell]]) -> str:
    """Beside a telephone's edge each row is a list, with the names of the columns before its cells."""
    cells = [[cell if isinstance(cell, Cell) else Cell(cell, "") for cell in row] for row in rows]
    kinds = [cell.kind if cell.kind == "text" else "" for cell in cells[0]] if cells else [""] * len(names)
    shown_names = "".join(f"<th class='{kind}'>{escape(name)}</th>" for name, kind in zip(names, kinds, strict=True))
    shown = "".join(
        "<tr>"
        + "".join(
            f"<td class='{cell.kind}' data-name='{escape(name)}'><span>{cell.text}</span></td>"
            for name, cell in zip(names, row, strict=True)
        )
        + "</tr>"
        for row in cells
    )
    return f"<table><tr class=head>{shown_names}</tr>{shown}</table>"
