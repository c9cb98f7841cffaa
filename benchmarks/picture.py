"""Pictures of what was measured: latency against throughput, and the rates of several servers.

As wide as a telephone: wider windows show it in its own size.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.clients import Figures

_COLOURS = {"tutti": "#0b6e4f", "tritonserver": "#b5541c"}
# Inches of 72 points, which browsers show as 96 pixels.
_SIZE = (5.2, 4.2)


def draw_lead(servers: Mapping[str, Figures], path: Path) -> None:
    """An SVG with a bar for each server, that reads at 400 pixels."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(_SIZE[0], 0.8 + 0.42 * len(servers)), layout="constrained")
    names = list(servers)[::-1]
    rates = [servers[name].rate for name in names]
    colours = [_COLOURS.get(name, "#9aa5a0") for name in names]
    bars = axes.barh(names, rates, color=colours, height=0.66)
    texts = [f"{servers[name].rate:,.0f} /s, half within {servers[name].p50_ms:,.1f} ms" for name in names]
    axes.bar_label(bars, texts, padding=4, fontsize=11)
    axes.set_xlim(0, max(rates) * 2.6)
    axes.tick_params(left=False)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    # Text stays text, in a type that is wide enough everywhere.
    matplotlib.rcParams.update({"svg.hashsalt": "tutti", "svg.fonttype": "none", "font.size": 11})
    from matplotlib import pyplot

    return pyplot


def draw(curves: Mapping[str, Sequence[Figures]], path: Path) -> None:
    """An SVG. Curve names are "server, protocol"."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=_SIZE, layout="constrained")
    for name, points in curves.items():
        server, _, protocol = name.partition(", ")
        axes.plot(
            [point.rate / 1000 for point in points],
            [point.p50_ms for point in points],
            color=_COLOURS[server],
            linestyle="-" if protocol == "HTTP" else "--",
            marker="o",
            label=name,
        )
    marks = plain_marks([point.p50_ms for points in curves.values() for point in points])
    axes.set(xlabel="thousand requests a second", yscale="log", xlim=(0, None), ylim=(marks[0], marks[-1]))
    axes.set_title("median latency, ms", loc="left", fontsize=11)
    axes.set_yticks(marks, [f"{mark:,.10g}" for mark in marks])
    axes.set_yticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def plain_marks(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 times powers of ten, from below all values to above them. They are above 0."""
    powers = range(math.floor(math.log10(min(values))) - 1, math.ceil(math.log10(max(values))) + 2)
    marks = [float(f"{step}e{power}") for power in powers for step in (1, 2, 5)]
    first = max(mark for mark in marks if mark <= min(values))
    last = min(mark for mark in marks if mark >= max(values) and mark > first)
    return [mark for mark in marks if first <= mark <= last]
