"""A graph as a picture in SVG that is as wide as a telephone: its boxes stand below one another, in waves.

No line crosses a box: tensors go down in lanes, which have the picture's left to themselves. Each goes into a box, and
leaves it, beside the line of text that names it. Pure.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import accumulate

from tutti.ensembles.graph import Plan, Step
from tutti.ensembles.show import made_by, notes, read_by, type_of, value_of, waves

# Pixels. Telephones are 400 wide, pages for them a bit less.
WIDTH = 392
_MARGIN, _PADDING, _LINE, _GAP = 8, 8, 17, 12
_SIZE = 12
# Room between the last lane and the boxes, for a corner and an arrow.
_BESIDE = 16
# The width of a lane: where there are few, and where there are many. With many the picture gets wider.
_PITCH, _LEAST_PITCH = 9, 3
_LEAST_BOX = 190
# Sheets behind a step that runs for each item.
_SHEETS = (6, 3)
# Widths of letters as parts of the font size: no common sans-serif font is wider.
_NARROW, _PLAIN, _CAPITAL, _BROAD = 0.42, 0.66, 0.79, 1.04
_BOLD = 1.12

# Fill and stroke of boxes.
_BOXES = {"input": ("#e8f1fb", "#3b74b4"), "step": ("#ffffff", "#59636e")}
# Colours of text.
_INK = {"title": "#1c2733", "read": "#4a5560", "note": "#7a5200", "made": "#4a5560", "output": "#1d6b33"}
_LANES = ("#2364aa", "#b06c00", "#2e7d32", "#6a4c93", "#00798c", "#a3453a", "#6d7b00", "#8d4f7e")


@dataclass(frozen=True, slots=True)
class Text:
    """One line, at its base line's left end."""

    x: float
    y: float
    text: str
    kind: str

    @property
    def width(self) -> float:
        """An upper bound of its width in the usual fonts."""
        return _text_width(self.text, self.kind)


@dataclass(slots=True)
class Box:
    """An input or a step. `ports` has the heights at which tensors are read and made, by (side, name)."""

    kind: str
    x: float = 0.0
    y: float = 0.0
    width: float = 0.0
    height: float = 0.0
    is_dashed: bool = False
    is_stacked: bool = False
    texts: list[Text] = field(default_factory=list)
    ports: dict[tuple[str, str], float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Edge:
    """A tensor's way from where it is made to one who reads it: corners, in lines that are level or upright."""

    name: str
    told: str
    colour: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Picture:
    """Where everything is. Heights grow downwards."""

    width: float
    height: float
    boxes: Sequence[Box]
    edges: Sequence[Edge]
    # Text beside the boxes: their waves.
    headings: Sequence[Text]


@dataclass(frozen=True, slots=True)
class _Entry:
    """The lines of a box: (kind, text, tensor). The first is its title."""

    kind: str
    lines: Sequence[tuple[str, str, str]]
    heading: str = ""
    step: Step | None = None

    def names(self, side: str) -> list[str]:
        kinds = ("read",) if side == "read" else ("made", "output")
        return [name for kind, _, name in self.lines if kind in kinds]


def draw(plan: Plan) -> str:
    """The graph as SVG; conditional and optional steps are dashed, those for each item are stacked."""
    picture = layout(plan)
    whole = {edge.name: edge for edge in picture.edges}  # the longest, of which the others are branches
    size = f'width="{picture.width:.0f}" height="{picture.height:.0f}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {picture.width:.0f} {picture.height:.0f}" '
        f'font-family="system-ui, sans-serif" font-size="{_SIZE}" role="img" aria-label="{escape(plan.name)}">',
        # Its own background: on dark pages it stays as it is.
        f'<rect {size} rx="6" fill="#fbfcfd"/>',
        *(_svg_of_edge(edge, is_whole=edge is whole[edge.name]) for edge in picture.edges),
        *(part for box in picture.boxes for part in _svg_of_box(box)),
        *(_svg_of_text(text) for text in picture.headings),
        "</svg>",
    ]
    return "\n".join([*parts, ""])


def layout(plan: Plan) -> Picture:
    """Where boxes, lines and text of a graph are. It is WIDTH wide, or wider where more than fifty tensors wait."""
    entries = _entries(plan)
    lanes = _lanes(entries)
    count = max(lanes.values(), default=-1) + 1
    pitch = min(_PITCH, max(_LEAST_PITCH, (WIDTH - 2 * _MARGIN - _BESIDE - _SHEETS[0] - _LEAST_BOX) / max(1, count)))
    left = _MARGIN + count * pitch + _BESIDE
    width = max(_LEAST_BOX, WIDTH - left - _MARGIN - _SHEETS[0])
    boxes, headings, y = [], [], float(_MARGIN)
    for entry in entries:
        if entry.heading:
            headings.append(Text(left, y + 12, entry.heading, "heading"))
            y += _LINE + 2
        box = _box(entry, left, y, width)
        boxes.append(box)
        y += box.height + _GAP + (_SHEETS[0] if box.is_stacked else 0)
    edges = _edges(plan, boxes, {name: left - _BESIDE - lane * pitch for name, lane in lanes.items()}, left)
    return Picture(left + width + _SHEETS[0] + _MARGIN, y - _GAP + _MARGIN, boxes, edges, headings)


def _entries(plan: Plan) -> list[_Entry]:
    """Boxes in their order, from above."""
    entries = []
    for name, tensor in plan.tensors.items():
        if name not in plan.producer:
            is_optional = tensor.made != "always" or tensor.default is not None
            told = [type_of(plan, name), *(["optional"] if is_optional else [])]
            if tensor.default is not None:
                told.append(f"else {value_of(tensor.default)}")
            entries.append(_Entry("input", [("title", name, ""), ("made", ", ".join(told), name)]))
    for number, wave in enumerate(waves(plan)):
        for position, step in enumerate(wave):
            heading = "" if position else f"wave {number}" + (f": {len(wave)} at once" if len(wave) > 1 else "")
            entries.append(_Entry("step", _told(plan, step), heading, step))
    return entries


def _told(plan: Plan, step: Step) -> list[tuple[str, str, str]]:
    read = [("read", f"← {name}", name) for name in read_by(step)]
    said = [("note", note, "") for note in notes(plan, step) if " else " not in note]
    return [("title", step.model_name, ""), *read, *said, *(_made(plan, name) for name in made_by(step))]


def _made(plan: Plan, name: str) -> tuple[str, str, str]:
    tensor = plan.tensors[name]
    told = [f"→ {name} {type_of(plan, name)}"]
    if tensor.default is not None:
        told.append(f"else {value_of(tensor.default)}")
    if name in plan.outputs:
        told.append("output")
    return "output" if name in plan.outputs else "made", ", ".join(told), name


def _lanes(entries: Sequence[_Entry]) -> dict[str, int]:
    """A lane for each tensor that is read, counted from the boxes: near ones for short ways, none for two at once."""
    made_at = {name: row for row, entry in enumerate(entries) for name in entry.names("made")}
    last = {name: row for row, entry in enumerate(entries) for name in entry.names("read") if name in made_at}
    ways = sorted(
        ((row - made_at[name], made_at[name], row, name) for name, row in last.items()), key=lambda way: way[:3]
    )
    taken: list[list[tuple[int, int]]] = []
    lanes = {}
    for _, first, end, name in ways:
        is_free = (all(end < a or b < first for a, b in ways_in_lane) for ways_in_lane in taken)
        lane = next((number for number, free in enumerate(is_free) if free), len(taken))
        if lane == len(taken):
            taken.append([])
        taken[lane].append((first, end))
        lanes[name] = lane
    return lanes


def _box(entry: _Entry, x: float, y: float, width: float) -> Box:
    box = Box(entry.kind, x, y, width)
    step = entry.step
    if step is not None:
        box.is_dashed = step.when is not None or step.unless is not None or step.is_optional
        box.is_stacked = step.each is not None
    bottom = y + _PADDING - 3
    for kind, text, name in entry.lines:
        if name:
            box.ports["read" if kind == "read" else "made", name] = bottom + _LINE / 2
        for number, part in enumerate(_wrapped(text, kind, width - 2 * _PADDING)):
            bottom += _LINE
            box.texts.append(Text(x + _PADDING + (_PADDING if number else 0), bottom - 4, part, kind))
    box.height = bottom + _PADDING - 3 - y
    return box


def _edges(plan: Plan, boxes: Sequence[Box], lanes: Mapping[str, float], left: float) -> list[Edge]:
    heights = {name: y for box in boxes for (side, name), y in box.ports.items() if side == "made"}
    colours = {
        name: _LANES[number % len(_LANES)] for number, name in enumerate(name for name in heights if name in lanes)
    }
    return [
        Edge(
            name,
            f"{name} {type_of(plan, name)}",
            colours[name],
            [(left, heights[name]), (lanes[name], heights[name]), (lanes[name], y), (left, y)],
        )
        for box in boxes
        for (side, name), y in box.ports.items()
        if side == "read" and name in lanes
    ]


def _wrapped(text: str, kind: str, width: float) -> list[str]:
    """Lines of text that fit, but for the first all a bit narrower; broken at spaces and signs, not within dims."""
    lines: list[str] = []
    rest = re.sub(r"\[[^]]*\]", lambda dims: dims[0].replace(" ", "\u00a0"), text)
    while (most := _fitting(rest, kind, width - (_PADDING if lines else 0))) < len(rest):
        end = next((n for n in range(most, most // 2, -1) if _is_break(rest[n - 1 : n + 1])), most)
        lines.append(rest[:end].rstrip(" "))
        rest = rest[end:].lstrip(" ")
    return [line.replace("\u00a0", " ") for line in (*lines, rest)]


def _fitting(text: str, kind: str, room: float) -> int:
    """How many of the letters fit; at least one."""
    widths = accumulate(_text_width(letter, kind) for letter in text)
    return max(1, sum(width <= room for width in widths))


def _is_break(around: str) -> bool:
    return around[1] == " " or (around[0] in "._/" and around[1].isalpha())


def _text_width(text: str, kind: str) -> float:
    return sum(map(_letter_width, text)) * _SIZE * (_BOLD if kind == "title" else 1)


def _letter_width(letter: str) -> float:
    if letter in "ijltfrI.,:;|!'()[]/- ":
        return _NARROW
    if letter in "mwMWQ@%→←" or not letter.isascii():
        return _BROAD
    return _CAPITAL if letter.isupper() or letter in "<>=+&~#" else _PLAIN


def _svg_of_edge(edge: Edge, is_whole: bool) -> str:
    (x1, y1), (x2, _), (_, y3), (x4, _) = edge.points
    turn = 4.0
    trunk = f"M{x1:.1f},{y1:.1f} H{x2 + turn:.1f} Q{x2:.1f},{y1:.1f} {x2:.1f},{y1 + turn:.1f} V{y3 - turn:.1f}"
    start = trunk if is_whole else f"M{x2:.1f},{y3 - turn:.1f}"
    path = f"{start} Q{x2:.1f},{y3:.1f} {x2 + turn:.1f},{y3:.1f} H{x4 - 2:.1f}"
    return (
        f'<g stroke="{edge.colour}" fill="none" stroke-width="1.4"><title>{escape(edge.told)}</title>'
        f'<path d="{path}"/>'
        f'<path d="M{x4 - 6:.1f},{y3 - 3:.1f} L{x4 - 1:.1f},{y3:.1f} L{x4 - 6:.1f},{y3 + 3:.1f} Z" '
        f'fill="{edge.colour}" stroke="none"/></g>'
    )


def _svg_of_box(box: Box) -> Iterable[str]:
    fill, stroke = _BOXES[box.kind]
    for offset in _SHEETS if box.is_stacked else ():
        yield _rect(box, fill, stroke, offset)
    yield _rect(box, fill, stroke, 0, ' stroke-dasharray="5 3"' if box.is_dashed else "")
    yield from (_svg_of_text(text) for text in box.texts)


def _rect(box: Box, fill: str, stroke: str, offset: int, more: str = "") -> str:
    return (
        f'<rect x="{box.x + offset:.1f}" y="{box.y + offset:.1f}" width="{box.width:.1f}" '
        f'height="{box.height:.1f}" rx="5" fill="{fill}" stroke="{stroke}"{more}/>'
    )


def _svg_of_text(text: Text) -> str:
    weight = ' font-weight="bold"' if text.kind == "title" else ""
    fill = _INK.get(text.kind, "#6b7681")
    return f'<text x="{text.x:.1f}" y="{text.y:.1f}" fill="{fill}"{weight}>{escape(text.text)}</text>'
