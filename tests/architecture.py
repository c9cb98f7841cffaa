"""Draws the house from its code: docs/architecture.svg (who imports whom) and docs/modules.md (what each file is).

    python -m tests.architecture

Both are made of nothing but the sources, and test_architecture refuses them when they are no longer true.
"""

import ast
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

from tests.layers import FLOORS, ROOT, ROOTS, Imports, files, floor, read

PICTURE = ROOT / "docs" / "architecture.svg"
MODULES = ROOT / "docs" / "modules.md"
# As test_layers has them, and above them what is started.
ROWS = (*FLOORS, "roots")
_CELL = 22
_NAMES = 230
_MARGIN = 12
# Below the picture stand the names of the lowest columns.
_FOOT = 96
_INK, _PALE, _DOT, _SELF = "#1f2933", "#eef2f6", "#1f6feb", "#c3cfdb"


def folder_of(name: str) -> str:
    """The row that a module stands in; "" for the package's own file."""
    height = floor(name)
    return "" if height < 0 else ROWS[height]


def arrows(imports: Imports) -> set[tuple[str, str]]:
    """(a row, another of which some file of it imports some file)."""
    pairs = ((folder_of(name), folder_of(other)) for name, others in imports.items() for other in others & set(imports))
    return {(above, below) for above, below in pairs if above != below and above and below}


def picture(imports: Imports) -> str:
    """An SVG of 22 pixels a row: the folders from the ground up, and in each row a dot below whom it imports."""
    width = _MARGIN + _NAMES + _CELL * len(ROWS) + _MARGIN
    height = _MARGIN + _CELL * len(ROWS) + _FOOT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="14" fill="{_INK}" role="img" aria-label="Which folder imports which">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *(line for row in range(len(ROWS)) for line in _row(row)),
        *(_dot(above, below) for above, below in sorted(arrows(imports), key=lambda pair: [*map(ROWS.index, pair)])),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _row(row: int) -> Iterator[str]:
    name, y = ROWS[row], _y(row)
    yield f'<rect x="{_MARGIN}" y="{y + 1}" width="{_x(row) + _CELL - _MARGIN}" height="{_CELL - 2}" fill="{_PALE}"/>'
    yield f'<text x="{_MARGIN + 8}" y="{y + 16}">{escape(_path(name))}</text>'
    yield f'<rect x="{_x(row) + 4}" y="{y + 4}" width="{_CELL - 8}" height="{_CELL - 8}" fill="{_SELF}"/>'
    x, below = _x(row) + _CELL // 2 - 5, y + _CELL + 4
    label = escape(name.removeprefix("tutti.").removeprefix("frontends."))
    yield f'<text transform="translate({x} {below}) rotate(90)">{label}</text>'


def _dot(above: str, below: str) -> str:
    x, y = _x(ROWS.index(below)) + _CELL // 2, _y(ROWS.index(above)) + _CELL // 2
    title = escape(f"{_path(above)} imports {_path(below)}")
    return f'<circle cx="{x}" cy="{y}" r="5" fill="{_DOT}"><title>{title}</title></circle>'


def _x(row: int) -> int:
    return _MARGIN + _NAMES + _CELL * row


def _y(row: int) -> int:
    return _MARGIN + _CELL * (len(ROWS) - 1 - row)


def _path(name: str) -> str:
    return "what is started" if name == "roots" else name.replace(".", "/") + "/"


def modules(paths: Mapping[str, Path]) -> str:
    """Markdown: for each folder what it is, and for each of its files the first sentence that it says of itself."""
    lines = [
        "# Which file is what",
        "",
        "Made by `make architecture` from the first sentences of the files themselves.",
        "",
    ]
    lines += ["Folders from the ground up: a folder imports from those above it in this list only.", ""]
    for row in FLOORS:
        home = ROOT / row.replace(".", "/")
        lines += [f"## {_path(row)}", "", said(home / "__init__.py"), "", "| file | what it is |", "| --- | --- |"]
        for name, path in sorted(paths.items()):
            if _row_of(name) == row and path.name != "__init__.py":
                link = f"[{path.relative_to(home)}](../{path.relative_to(ROOT)})"
                lines.append(f"| {link} | {_cell(path)}{' Started; imported by nobody.' if name in ROOTS else ''} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _cell(path: Path) -> str:
    return said(path).replace("|", "\\|")


def _row_of(name: str) -> str:
    """The folder of a module, be it a root or not."""
    folder = name
    while folder and folder not in FLOORS:
        folder = folder.rpartition(".")[0]
    return folder


def said(path: Path) -> str:
    """The first paragraph of a file's docstring. Raises AssertionError for one that says nothing."""
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text, f"{path.relative_to(ROOT)} has no docstring"
    return " ".join(text.split("\n\n")[0].split())


def main() -> None:
    PICTURE.write_text(picture(read(ROOT)))
    MODULES.write_text(modules(files(ROOT)))
    print(f"{PICTURE.relative_to(ROOT)} and {MODULES.relative_to(ROOT)} are as the code is")


if __name__ == "__main__":
    main()
