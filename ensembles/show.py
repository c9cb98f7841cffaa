"""A graph for people: as a table, and as a picture in SVG. Pure."""

from collections.abc import Sequence
from html import escape

from ensembles.graph import Plan, Step

_CHAR, _BOLD_CHAR = 6.8, 7.8
_LINE = 16
_GAP_X, _GAP_Y, _MARGIN = 90, 26, 24
_MAX_CHARS = 44
# Fill and stroke of boxes.
_COLOURS = {"input": ("#e8f1fb", "#3b74b4"), "step": ("#ffffff", "#555555"), "output": ("#e9f6ec", "#3a8a4d")}


def waves(plan: Plan) -> list[list[Step]]:
    """Steps by how many must end one after the other before them."""
    depth: dict[int, int] = {}
    left = list(plan.steps)
    while left:
        for step in [step for step in left if step.needs <= depth.keys()]:
            depth[step.index] = max((depth[index] + 1 for index in step.needs), default=0)
            left.remove(step)
    return [[step for step in plan.steps if depth[step.index] == wave] for wave in range(max(depth.values()) + 1)]


def table(plan: Plan) -> str:
    """Inputs, the steps in waves, outputs."""
    lines = [f"ensemble {plan.name}: {len(plan.steps)} steps in {len(waves(plan))} waves"]
    if plan.deadline_ns:
        lines.append(f"  deadline  {plan.deadline_ns // 1_000_000} ms")
    for name, tensor in plan.tensors.items():
        if name not in plan.producer:
            optional = ", optional" if tensor.made != "always" or tensor.default is not None else ""
            lines.append(f"  input     {_typed(plan, name)}{optional}")
    for number, wave in enumerate(waves(plan)):
        lines.append(f"  wave {number}")
        for step in wave:
            lines.append(f"    {step.model_name}: {', '.join(step.read) or 'nothing'} -> {', '.join(_made(step))}")
            lines += [f"      {note}" for note in notes(plan, step)]
    for name in plan.outputs:
        default = plan.tensors[name].default
        is_sure = plan.tensors[name].made == "always"
        shown = f", {_value(default)} where not made" if default is not None else "" if is_sure else ", where made"
        lines.append(f"  output    {_typed(plan, name)}{shown}")
    return "\n".join(lines)


def notes(plan: Plan, step: Step) -> list[str]:
    """What a step does besides running for every row."""
    found = []
    if step.when is not None:
        found.append(f"when {step.when.text}")
    if step.unless is not None:
        found.append(f"unless decided: {step.unless.text}")
    if step.each is not None:
        count = f" ({step.each.count} a row)" if step.each.count else ""
        hows = ", ".join(f"{how} of {name}" for (_, name), how in zip(step.outputs, step.gathers, strict=True))
        found.append(f"for each of {', '.join(step.each.items)}{count}: {hows}")
    if step.is_decoupled:
        found.append("each of its answers goes on by itself")
    if step.is_optional:
        found.append("left out where time is short")
    for name in _made(step):
        if plan.tensors[name].default is not None:
            found.append(f"{name} else {_value(plan.tensors[name].default)}")
    return found


def draw(plan: Plan) -> str:
    """The graph as SVG, from left to right; conditional steps are dashed, those for each item are stacked."""
    inputs = [name for name in plan.tensors if name not in plan.producer]
    columns: list[list[_Box]] = [[_Box(name, [_type(plan, name)], "input", name=name) for name in inputs]]
    for wave in waves(plan):
        columns.append([_Box(step.model_name, _described(plan, step), "step", step) for step in wave])
    columns.append([_Box(name, [_type(plan, name)], "output", name=name) for name in plan.outputs])
    _place(columns)
    boxes = [box for column in columns for box in column]
    source = {box.name: box for box in columns[0]}
    source |= {name: box for box in boxes if box.step is not None for name in _made(box.step)}
    lines = []
    for box in boxes:
        read = list(box.step.read) if box.step is not None else [box.name] if box.kind == "output" else []
        for name in read:
            if name in source and source[name] is not box:
                lines.append(_edge(plan, source[name], box, name))
    width = max(box.x + box.width for box in boxes) + _MARGIN
    height = max(box.y + box.height for box in boxes) + _MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="sans-serif" font-size="11">',
            '<rect width="100%" height="100%" fill="white"/>',
            *lines,
            *[part for box in boxes for part in box.drawn()],
            "</svg>",
            "",
        ]
    )


class _Box:
    """A step, an input or an output in the picture."""

    def __init__(self, title: str, text: Sequence[str], kind: str, step: Step | None = None, name: str = "") -> None:
        self.title = title
        self.text = [line if len(line) <= _MAX_CHARS else line[: _MAX_CHARS - 1] + "…" for line in text]
        self.kind = kind
        self.step = step
        self.name = name
        self.width = max(len(title) * _BOLD_CHAR, *(len(line) * _CHAR for line in self.text), 0) + 20
        self.height = (1 + len(self.text)) * _LINE + 10
        self.x = self.y = 0.0

    def drawn(self) -> list[str]:
        fill, stroke = _COLOURS[self.kind]
        dash = ""
        lines = []
        if self.step is not None:
            if self.step.when is not None or self.step.unless is not None or self.step.is_optional:
                dash = ' stroke-dasharray="5 3"'
            for offset in (6, 3) if self.step.each is not None else ():
                lines.append(self._rect(fill, stroke, "", offset))
        lines.append(self._rect(fill, stroke, dash, 0))
        lines.append(
            f'<text x="{self.x + 10:.0f}" y="{self.y + 17:.0f}" font-weight="bold">{escape(self.title)}</text>'
        )
        for number, line in enumerate(self.text, 1):
            y = self.y + 17 + number * _LINE
            lines.append(f'<text x="{self.x + 10:.0f}" y="{y:.0f}" fill="#555555">{escape(line)}</text>')
        return lines

    def _rect(self, fill: str, stroke: str, dash: str, offset: int) -> str:
        return (
            f'<rect x="{self.x + offset:.0f}" y="{self.y + offset:.0f}" width="{self.width:.0f}" '
            f'height="{self.height:.0f}" rx="5" fill="{fill}" stroke="{stroke}"{dash}/>'
        )


def _place(columns: Sequence[Sequence[_Box]]) -> None:
    heights = [sum(box.height + _GAP_Y for box in column) - _GAP_Y for column in columns]
    x = float(_MARGIN)
    for column, height in zip(columns, heights, strict=True):
        y = _MARGIN + (max(heights) - height) / 2
        for box in column:
            box.x, box.y = x, y
            y += box.height + _GAP_Y
        x += max(box.width for box in column) + _GAP_X


def _edge(plan: Plan, start: _Box, end: _Box, name: str) -> str:
    x1, y1 = start.x + start.width, start.y + start.height / 2
    x2, y2 = end.x, end.y + end.height / 2
    middle = (x1 + x2) / 2
    shown = f"<title>{escape(name)} {escape(_type(plan, name))}</title>"
    return (
        f'<path d="M{x1:.0f},{y1:.0f} C{middle:.0f},{y1:.0f} {middle:.0f},{y2:.0f} {x2:.0f},{y2:.0f}" fill="none" '
        f'stroke="#999999">{shown}</path>'
    )


def _described(plan: Plan, step: Step) -> list[str]:
    lines = [f"→ {_typed(plan, name)}" for name in _made(step)]
    return lines + [note for note in notes(plan, step) if " else " not in note]


def _made(step: Step) -> list[str]:
    return [name for _, name in step.outputs]


def _type(plan: Plan, name: str) -> str:
    tensor = plan.tensors[name]
    return f"{tensor.datatype}{list(tensor.dims)}"


def _typed(plan: Plan, name: str) -> str:
    return f"{name} {_type(plan, name)}"


def _value(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
