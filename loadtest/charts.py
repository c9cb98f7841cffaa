"""Figures as SVG for telephones: round numbers on the axes, errors in red, the goal as a dashed line. Pure.

A figure is as wide as a telephone, so that it can be read there; wider windows have several beside each other.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]

RED = "#c5221f"
_GOAL = "#3c4650"
# None of them is red, which is for errors.
_COLOURS = ("#2364aa", "#b06c00", "#2e7d32", "#6a4c93", "#00798c", "#8d6e63")
_WIDTH, _HEIGHT = 400, 240
_RIGHT, _TOP, _BOTTOM = 372, 22, 196
# The width of a digit in the widest usual typeface.
_DIGIT = 7.7
# About how many marks an axis has.
_MARKS = 6
# An axis that may be logarithmic becomes so where its highest value is this many times its lowest.
_WIDE = 5.0


@dataclass(frozen=True, slots=True)
class Axis:
    """From the first mark to the last, or what is shown of them."""

    low: float
    high: float
    marks: Sequence[float]
    is_log: bool = False

    def part(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        if self.is_log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def plain(value: float) -> str:
    """A number as people write it: three digits, thousands apart, no powers of ten."""
    if not math.isfinite(value):
        return "-"
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{min(digits, 9)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def even(low: float, high: float) -> Axis:
    """Marks at 1, 2 or 5 times a power of ten, which hold both ends between them."""
    high = high if high > low else low + 1
    step = _round_step((high - low) / (_MARKS - 1))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    marks = [number * step for number in range(first, last + 1)]
    return Axis(marks[0], marks[-1], marks)


def logarithmic(low: float, high: float) -> Axis:
    """Marks at 1, 2 and 5 times powers of ten, or at the powers where there are many. `low` is above 0."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    steps = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
    marks = [step * 10.0**power for power in powers for step in steps]
    first = max(mark for mark in marks if mark <= low * (1 + 1e-9))
    last = min(mark for mark in marks if mark >= high * (1 - 1e-9) and mark > first)
    return Axis(first, last, [mark for mark in marks if first <= mark <= last], is_log=True)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= rough * (1 - 1e-9))


def chart(
    title: str,
    lines: Mapping[str, Points],
    x_name: str,
    y_name: str,
    x_label: Callable[[float], str] | None = None,
    y_log: bool = False,
    dots: bool = False,
    goal: tuple[str, float] | None = None,
) -> str:
    """A figure with a line for each name; those named errors are red. `goal` is a name and a height.

    With `x_label`, marks of x are at whole numbers and labelled by it. Nothing, where there is no point.
    """
    known = {name: [point for point in points if math.isfinite(point[1])] for name, points in lines.items()}
    ys = [y for points in known.values() for _, y in points]
    xs = [x for points in known.values() for x, _ in points]
    if not ys:
        return ""
    x_axis = _whole(min(xs), max(xs)) if x_label is not None else _inside(min(xs), max(xs))
    y_axis = _vertical([*ys, *([goal[1]] if goal is not None else [])], y_log)
    left = _left(y_axis)
    colours = _colours(known)
    drawn = [*_rows(y_axis, left), *_columns(x_axis, left, x_label or plain)]
    legend = [(colours[name], name, False) for name in known]
    if goal is not None:
        drawn.append(_goal_line(_y(y_axis, goal[1]), left))
        legend.append((_GOAL, goal[0], True))
    for name, points in known.items():
        places = [(_x(x_axis, x, left), _y(y_axis, y)) for x, y in points]
        drawn += _line(places, colours[name], dots or len(points) == 1)
    drawn.append(f"<text x={(left + _RIGHT) / 2:.0f} y=232 text-anchor=middle>{escape(x_name)}</text>")
    drawn.append(f"<text x=4 y=12>{escape(y_name)}</text>")
    return _figure(title, _legend(legend), drawn)


def _figure(title: str, legend: str, drawn: Sequence[str]) -> str:
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>{legend}"
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' font-size=12 role=img aria-label='{escape(title)}'>"
        f"{''.join(drawn)}</svg></figure>"
    )


def _colours(names: Iterable[str]) -> dict[str, str]:
    """Red for errors, and for them alone; the others take turns."""
    others = itertools.cycle(_COLOURS)
    return {name: RED if name.startswith("error") else next(others) for name in names}


def _x(axis: Axis, value: float, left: float) -> float:
    return left + (_RIGHT - left) * axis.part(value)


def _y(axis: Axis, value: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * axis.part(value)


def _goal_line(height: float, left: float) -> str:
    return (
        f"<line class=goal x1={left:.1f} x2={_RIGHT} y1={height:.1f} y2={height:.1f} stroke={_GOAL} "
        "stroke-width=1.5 stroke-dasharray='6 4' />"
    )


def _whole(low: float, high: float) -> Axis:
    return Axis(low, max(high, low + 1), [float(number) for number in range(math.ceil(low), math.floor(high) + 1)])


def _inside(low: float, high: float) -> Axis:
    """From one value to the other, or from 0 where that is not far, with round marks between."""
    low = 0.0 if 0 < low < 0.4 * high else low
    if high <= low:
        low, high = min(0.0, low), max(low, 1.0) if low <= 0 else 2 * low
    return Axis(low, high, [mark for mark in even(low, high).marks if low <= mark <= high])


def _vertical(values: Sequence[float], may_be_log: bool) -> Axis:
    positive = [value for value in values if value > 0]
    if may_be_log and positive and max(positive) > _WIDE * min(positive):
        return logarithmic(min(positive), max(positive))
    return even(min(0.0, min(values)), max(0.0, max(values)))


def _left(axis: Axis) -> float:
    """Where the axis is: beside its longest number."""
    return max(40.0, 10 + _DIGIT * max(len(plain(mark)) for mark in axis.marks))


def _rows(axis: Axis, left: float) -> list[str]:
    drawn = []
    for mark in axis.marks:
        height = _y(axis, mark)
        drawn.append(f"<line x1={left:.1f} x2={_RIGHT} y1={height:.1f} y2={height:.1f} stroke=#e3e8ee />")
        drawn.append(f"<text class=y x={left - 6:.1f} y={height + 4:.1f} text-anchor=end>{plain(mark)}</text>")
    return drawn


def _columns(axis: Axis, left: float, label: Callable[[float], str]) -> list[str]:
    drawn = []
    for mark in axis.marks:
        x = _x(axis, mark, left)
        drawn.append(f"<text class=x x={x:.1f} y=214 text-anchor=middle>{label(mark)}</text>")
    return drawn


def _line(points: Sequence[tuple[float, float]], colour: str, dots: bool) -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    drawn = [f"<polyline points='{path}' fill=none stroke={colour} stroke-width=1.8 />"]
    if dots:
        drawn += [f"<circle r=3 cx={x:.1f} cy={y:.1f} fill={colour} />" for x, y in points]
    return drawn


def _legend(entries: Sequence[tuple[str, str, bool]]) -> str:
    """Beside the picture, where it can take as many lines as it needs."""
    marks = (
        f"<span><i style='border-top:3px {'dashed' if is_dashed else 'solid'} {colour}'></i>{escape(name)}</span>"
        for colour, name, is_dashed in entries
    )
    return f"<div class=legend>{''.join(marks)}</div>"
