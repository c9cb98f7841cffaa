"""The page about one export: what was verified and how far it was off, the worst inputs, latencies, checks."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from tutti.export.parity import Comparison
from tutti.export.pipeline import Outcome
from tutti.export.profiling import Measured, recommend
from tutti.loadtest.charts import Points, chart, plain
from tutti.loadtest.pages import Cell, head, table

# Of a comparison: columns.
_FIGURES = ("max abs", "p99 abs", "max rel", "p99 rel", "least cosine", "decisions")
# Lines in one figure.
_MOST_LINES = 6


def write(outcome: Outcome, path: Path) -> None:
    """One self-contained HTML page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(outcome), encoding="utf-8")


def page(outcome: Outcome) -> str:
    failures, names = outcome.failures, ", ".join(path.name for path in outcome.published)
    verdict = (
        f"<p class='verdict FAIL'>Nothing was published: {len(failures)} problem{'s' * (len(failures) > 1)}</p><ul>"
        + "".join(f"<li class=error>{escape(failure)}</li>" for failure in failures)
        + "</ul>"
        if failures
        else f"<p class='verdict PASS'>Verified, and published</p><p>{escape(names)}</p>"
    )
    parts = [
        f"<h1>{escape(outcome.name)}</h1>{verdict}",
        f"<p>From <code>{escape(outcome.source.given)}</code>; {escape(outcome.provenance)}. "
        f"Took {outcome.seconds:.1f} s.</p>",
    ]
    if outcome.accuracy is not None:
        parts.append(f"<p>Accuracy on held-out data: {outcome.accuracy:.3f}</p>")
    for result in outcome.results:
        parts.append(
            f"<h2>{escape(result.graph.name)}</h2><p>Compared with {escape(result.reference)}, on "
            f"{len(result.graph.cases)} cases.</p>"
        )
        parts.append(_comparisons(result.comparisons))
        for variant, why in result.left_out.items():
            parts.append(f"<p>{variant} was left out: {escape(why)}</p>")
        parts += [
            _worst(comparison)
            for comparison in result.comparisons
            if comparison.worst is not None and comparison.worst.error
        ]
        measured = outcome.measured.get(result.graph.name, [])
        if measured:
            parts.append(_profile(measured, outcome))
    parts.append(
        "<h2>Checks</h2>"
        + table(["what", "result", "why"], [[_text(c.what), _sign(c.is_well), _text(c.why)] for c in outcome.checks])
    )
    return f"{head(f'Export of {outcome.name}')}{''.join(parts)}</html>\n"


def _text(text: str) -> Cell:
    return Cell(escape(text) or "-", "text")


def _sign(is_well: bool) -> str:
    return "<span class=well>well</span>" if is_well else "<span class=error>wrong</span>"


def _comparisons(comparisons: Sequence[Comparison]) -> str:
    names = ["variant", "result", *_FIGURES, "precision", "note"]
    rows: list[list[str | Cell]] = []
    for comparison in comparisons:
        executed = comparison.cases and comparison.variant != "tensorrt"
        figures = [
            f"{comparison.max_abs:.1e}",
            f"{comparison.p99_abs:.1e}",
            f"{comparison.max_rel:.1e}",
            f"{comparison.p99_rel:.1e}",
        ]
        figures += [
            f"{comparison.cosine:.6f}",
            f"{comparison.top1:.1%} of {comparison.rows}" if comparison.rows else "-",
        ]
        shown = figures if executed else ["not executed here", *["-"] * (len(_FIGURES) - 1)]
        rows.append(
            [comparison.variant, _sign(comparison.is_well), *shown, _text(comparison.precision), _text(comparison.note)]
        )
    return table(names, rows)


def _worst(comparison: Comparison) -> str:
    assert comparison.worst is not None
    worst = comparison.worst

    def values(numbers: Sequence[float]) -> str:
        return ", ".join(f"{number:.6g}" for number in numbers)

    return (
        f"<details><summary>{comparison.variant}: worst where output <code>{escape(worst.output)}</code> is off by "
        f"{worst.error:.2e}, on {escape(worst.shapes)}</summary><p>inputs: <code>{escape(worst.inputs)}</code></p>"
        + table(
            ["", "values around"],
            [["expected", _text(values(worst.expected))], ["got", _text(values(worst.got))]],
        )
        + "</details>"
    )


def _profile(measured: Sequence[Measured], outcome: Outcome) -> str:
    options = outcome.options
    served = options.cpu if any(measurement.variant == options.cpu for measurement in measured) else "fp32"
    recommended = recommend(measured, served, options.goal_ms)
    names = ["variant", "length", "rows", "ms", "rows/s"]
    rows = [
        [f"{m.variant} on {m.device}", str(m.length), str(m.rows), f"{m.ms:.2f}", f"{m.rows / m.ms * 1e3:,.0f}"]
        for m in measured
    ]
    return (
        f"<h3>Latency</h3><p>For a goal of {options.goal_ms:g} ms with {served}: <code>max_batch_size: "
        f"{recommended.max_batch_size}</code>, preferred sizes {list(recommended.preferred)}, "
        f"<code>max_queue_delay_microseconds: {recommended.queue_delay_us}</code> (a batch forms while the one before "
        f"it is executed), {recommended.instances} instances. That is for rows of length "
        f"{recommended.usual_length}; a batch of as many of the longest takes {recommended.longest_ms:.1f} ms.</p>"
        f"<div class=charts>{_curves(measured, options.goal_ms)}</div>"
        f"<details><summary>all figures</summary>{table(names, rows)}</details>"
    )


def _curves(measured: Sequence[Measured], goal_ms: float) -> str:
    """Milliseconds over rows, both logarithmic, a line for each variant and length; many in a figure a variant."""
    lines: dict[str, dict[str, Points]] = {}
    for measurement in measured:
        name = f"length {measurement.length}" if measurement.length > 1 else measurement.variant
        curve = lines.setdefault(measurement.variant, {})
        curve[name] = [*curve.get(name, []), (math.log2(measurement.rows), measurement.ms)]
    if sum(map(len, lines.values())) <= _MOST_LINES:
        named = {
            name if name == variant else f"{variant}, {name}": points
            for variant, curve in lines.items()
            for name, points in curve.items()
        }
        lines = {"": named}
    return "".join(
        chart(
            f"Latency by rows{f' of {variant}' if variant else ''}", points, "rows in a batch", "ms",
            x_label=lambda x: f"{2**x:,.0f}", y_log=True, dots=True, goal=(f"goal: {plain(goal_ms)} ms", goal_ms),
        )
        for variant, points in lines.items()
    )  # fmt: skip
