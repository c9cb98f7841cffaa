"""A run as one page, without scripts: the verdict, latencies by stage, time lines of both sides. SVG is drawn here."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from loadtest.runner import Result, quantiles_ms

_COLOURS = ("#2364aa", "#d1495b", "#2e933c", "#b8860b", "#6a4c93", "#00798c")
_STYLE = """
:root { color-scheme: light } * { box-sizing: border-box }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1rem; color: #1c2733 }
h1 { font-size: 1.5rem; margin: .2rem 0 } h2 { font-size: 1.1rem; margin: 1.4rem 0 .3rem }
.verdict { font-size: 1.3rem; font-weight: 700; padding: .6rem .9rem; border-radius: .4rem; color: #fff }
.PASS { background: #14713d } .FAIL { background: #b3261e } .INVALID { background: #6b3fa0 }
.INCONCLUSIVE { background: #8a6100 }
table { border-collapse: collapse; display: block; overflow-x: auto; max-width: 100% }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #d8dee5; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem }
figure { margin: 0 } figcaption { font-weight: 600 } svg { width: 100%; height: auto; display: block }
code { overflow-wrap: anywhere } li { overflow-wrap: anywhere }
"""

Points = Sequence[tuple[float, float]]


def page(result: Result, command: str = "", hardware: str = "") -> str:
    """The whole page."""
    judgement, histogram = result.judgement, result.histogram
    seen = result.seen
    said = "".join(f"<li>{escape(one)}</li>" for one in judgement.reasons)
    figures = quantiles_ms(histogram)
    parts = [
        f"<h1>{escape(result.scenario.name)}</h1>",
        f"<p class='verdict {judgement.verdict.name}'>{judgement.verdict.name}</p><ul>{said}</ul>",
        f"<p>{seen.requests:,} requests in {seen.seconds:.0f} s over {result.scenario.target.protocol} to "
        f"<code>{escape(', '.join(result.scenario.target.urls))}</code>: {seen.errors:,} errors; "
        + ", ".join(f"{name} {value:.3g} ms" for name, value in figures.items())
        + f". The generator was busy for at most {result.cpu:.0%} of a core and sent "
        f"{result.lateness_ms.get('p99', 0.0):.2f} ms late at the 99th percentile.</p>",
        _table(
            ["stage", "s", "requests /s", "requests", "errors", *figures],
            [_stage_row(stage, figures) for stage in result.stages],
        ),
        f"<div class=charts>{''.join(_charts(result))}</div>",
    ]
    if result.errors:
        rows = [
            [escape(what), f"{count:,}", escape(result.reasons.get(what, ""))]
            for what, count in result.errors.most_common(20)
        ]
        parts.append("<h2>Errors</h2>" + _table(["what", "times", "as one of them says"], rows))
    parts.append(f"<p><small><code>{escape(command)}</code> {escape(hardware)} seed {result.scenario.seed}</small></p>")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{escape(result.scenario.name)}: {judgement.verdict.name}</title><style>{_STYLE}</style>"
        f"{''.join(parts)}</html>\n"
    )


def _stage_row(stage: Any, figures: Iterable[str]) -> list[str]:
    own = quantiles_ms(stage.histogram)
    cells = [escape(stage.name), f"{stage.seconds:.0f}", f"{stage.rate:,.1f}", f"{stage.requests:,}"]
    cells.append(f"{stage.errors + stage.lost:,}")
    return cells + [f"{own[name]:.3g}" if name in own else "" for name in figures]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    shown = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{one}</th>' for one in head)}</tr>{shown}</table>"


def _charts(result: Result) -> list[str]:
    charts = []
    by_rate = sorted((stage.rate, quantiles_ms(stage.histogram)) for stage in result.stages if stage.histogram.total)
    if len(by_rate) > 1:
        lines = {name: [(rate, own[name]) for rate, own in by_rate] for name in ("p50", "p99")}
        charts.append(chart("Latency against throughput", lines, "requests /s", "ms", dots=True))
    curves = {stage.name: _percentiles(stage.histogram) for stage in result.stages if stage.histogram.total}
    if curves:
        charts.append(chart("Latency by percentile", curves, "percentile", "ms", x_label=_nines, y_log=True))
    seconds = result.seconds
    if seconds:
        rates = {name: [(row["second"], row[name]) for row in seconds] for name in ("due", "answered", "errors")}
        charts.append(chart("Requests a second", rates, "s", ""))
        took = {
            name: [(row["second"], row[f"{name}_ms"]) for row in seconds if not math.isnan(row[f"{name}_ms"])]
            for name in ("p50", "p99")
        }
        charts.append(chart("Latency, by when requests were due", took, "s", "ms", y_log=True))
    charts += _server_charts(result)
    return charts


def _server_charts(result: Result) -> list[str]:
    rows = result.server
    if not rows:
        return []
    start = rows[0]["at_s"]

    def line(name: str) -> Points:
        return [(row["at_s"] - start, row[name]) for row in rows if name in row]

    charts = []
    if line("queue_ms"):
        charts.append(
            chart("Queue against compute", {"queue": line("queue_ms"), "compute": line("compute_ms")}, "s", "ms")
        )
    if line("batch"):
        charts.append(chart("Rows in a batch", {"batch": line("batch")}, "s", ""))
    if line("fallback"):
        lines: dict[str, Points] = {}
        for pool in rows[-1]["replicas"]:
            for name in ("replicas", "wanted"):
                lines[f"{pool} {name}"] = [
                    (row["at_s"] - start, row[name].get(pool, 0.0)) for row in rows if name in row
                ]
        charts.append(chart("Replicas", lines, "s", ""))
        charts.append(chart("Fallback share", {"by other pools": line("fallback")}, "s", ""))
    return charts


def _percentiles(histogram: Any) -> Points:
    """x is how many nines."""
    return [(-math.log10(max(1 - share, 1e-5)), ms) for share, ms in histogram.points(120)]


def _nines(x: float) -> str:
    return f"{100 * (1 - 10**-x):.5g}%"


def chart(
    title: str,
    lines: Mapping[str, Points],
    x_name: str,
    y_name: str,
    x_label: Callable[[float], str] | None = None,
    y_log: bool = False,
    dots: bool = False,
) -> str:
    """A figure with a line for each name. A logarithmic axis begins at the least value that is there."""
    points = [point for own in lines.values() for point in own if math.isfinite(point[1])]
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    left, right = min(xs), max(max(xs), min(xs) + 1e-9)
    positive = [y for y in ys if y > 0] or [1.0]
    y_log = y_log and max(positive) > 3 * min(positive)
    low, high = (min(positive), max(positive)) if y_log else (min(0.0, min(ys)), max(max(ys), 1e-9))

    def at(x: float, y: float) -> str:
        part = math.log(max(y, low) / low) / math.log(high / low) if y_log else (y - low) / (high - low)
        return f"{62 + 520 * (x - left) / (right - left):.1f},{222 - 200 * part:.1f}"

    drawn = []
    for step in range(5):
        part = step / 4
        y = low * (high / low) ** part if y_log else low + (high - low) * part
        height = 222 - 200 * part
        drawn.append(f"<line x1=62 x2=582 y1={height:.0f} y2={height:.0f} stroke=#e3e8ee />")
        drawn.append(f"<text x=56 y={height + 4:.0f} text-anchor=end>{y:.3g}</text>")
    # A scale of its own has its marks at whole numbers.
    marks = [left + (right - left) * step / 4 for step in range(5)]
    for x in [float(one) for one in range(math.ceil(left), math.floor(right) + 1)] if x_label is not None else marks:
        label = x_label(x) if x_label is not None else f"{x:.4g}"
        anchor = "end" if x == right else "middle"
        drawn.append(f"<text x={62 + 520 * (x - left) / (right - left):.0f} y=240 text-anchor={anchor}>{label}</text>")
    legend = []
    for number, (name, own) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        known = [(x, y) for x, y in own if math.isfinite(y)]
        path = " ".join(at(x, y) for x, y in known)
        drawn.append(f"<polyline points='{path}' fill=none stroke={colour} stroke-width=1.8 />")
        if dots or len(known) == 1:
            drawn += [f"<circle r=3 cx={at(x, y).replace(',', ' cy=')} fill={colour} />" for x, y in known]
        legend.append(f"<tspan fill={colour}>\N{BLACK SQUARE} {escape(name)}  </tspan>")
    drawn.append(f"<text x=62 y=14 xml:space=preserve>{''.join(legend)}</text>")
    drawn.append(f"<text x=322 y=256 text-anchor=middle>{escape(x_name)}</text>")
    drawn.append(f"<text x=4 y=14>{escape(y_name)}</text>")
    return (
        f"<figure><figcaption>{escape(title)}</figcaption><svg viewBox='0 0 600 260' font-size=12 role=img "
        f"aria-label='{escape(title)}'>{''.join(drawn)}</svg></figure>"
    )
