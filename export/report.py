"""The page about one export: what was verified and how far it was off, the worst inputs, latencies, checks."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from export.parity import Comparison
from export.pipeline import Outcome
from export.profiling import Measured, recommend

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2733 }
table { border-collapse: collapse; margin: .6rem 0; display: block; overflow-x: auto }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #d8dee5; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
.well { color: #14713d } .bad { color: #b3261e } code { background: #f2f4f7; padding: 0 .25rem }
.verdict { font-size: 1.2rem; font-weight: 600 } svg { max-width: 100%; height: auto }
"""
_COLOURS = ("#2364aa", "#d1495b", "#2e933c", "#edae49")


def write(outcome: Outcome, path: Path) -> None:
    """One self-contained HTML page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(outcome), encoding="utf-8")


def page(outcome: Outcome) -> str:
    failures, names = outcome.failures, ", ".join(path.name for path in outcome.published)
    verdict = (
        f"<p class='verdict bad'>Nothing was published: {len(failures)} problems</p><ul>"
        + "".join(f"<li class=bad>{escape(one)}</li>" for one in failures)
        + "</ul>"
        if failures
        else f"<p class='verdict well'>Verified, and published: {escape(names)}</p>"
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
        parts += [_worst(one) for one in result.comparisons if one.worst is not None and one.worst.error]
        measured = outcome.measured.get(result.graph.name, [])
        if measured:
            parts.append(_profile(measured, outcome))
    parts.append(
        "<h2>Checks</h2>"
        + _table(["what", "", "why"], [[escape(c.what), _sign(c.is_well), escape(c.why)] for c in outcome.checks])
    )
    title = f"Export of {escape(outcome.name)}"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{title}</title><style>{_STYLE}</style>{''.join(parts)}</html>\n"
    )


def _sign(is_well: bool) -> str:
    return "<span class=well>well</span>" if is_well else "<span class=bad>wrong</span>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    shown = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{one}</th>' for one in head)}</tr>{shown}</table>"


def _comparisons(found: Sequence[Comparison]) -> str:
    head = ["variant", "", "max abs", "p99 abs", "max rel", "p99 rel", "least cosine", "decisions", "precision", "note"]
    rows = []
    for one in found:
        executed = one.cases and one.variant != "tensorrt"
        figures = [f"{one.max_abs:.1e}", f"{one.p99_abs:.1e}", f"{one.max_rel:.1e}", f"{one.p99_rel:.1e}"]
        figures += [f"{one.cosine:.6f}", f"{one.top1:.1%} of {one.rows}" if one.rows else ""]
        shown = figures if executed else ["not executed here", "", "", "", "", ""]
        rows.append([one.variant, _sign(one.is_well), *shown, escape(one.precision), escape(one.note)])
    return _table(head, rows)


def _worst(one: Comparison) -> str:
    assert one.worst is not None
    worst = one.worst

    def values(numbers: Sequence[float]) -> str:
        return ", ".join(f"{number:.6g}" for number in numbers)

    return (
        f"<details><summary>{one.variant}: worst where output <code>{escape(worst.output)}</code> is off by "
        f"{worst.error:.2e}, on {escape(worst.shapes)}</summary><p>inputs: <code>{escape(worst.inputs)}</code></p>"
        + _table(["", "values around"], [["expected", values(worst.expected)], ["got", values(worst.got)]])
        + "</details>"
    )


def _profile(measured: Sequence[Measured], outcome: Outcome) -> str:
    options = outcome.options
    served = options.cpu if any(one.variant == options.cpu for one in measured) else "fp32"
    found = recommend(measured, served, options.goal_ms)
    head = ["variant", "length", "rows", "ms", "rows/s"]
    rows = [
        [f"{m.variant} on {m.device}", str(m.length), str(m.rows), f"{m.ms:.2f}", f"{m.rows / m.ms * 1e3:,.0f}"]
        for m in measured
    ]
    return (
        f"<h3>Latency</h3><p>For a goal of {options.goal_ms:g} ms with {served}: <code>max_batch_size: "
        f"{found.max_batch_size}</code>, preferred sizes {list(found.preferred)}, "
        f"<code>max_queue_delay_microseconds: {found.queue_delay_us}</code> (a batch forms while the one before it is "
        f"executed), {found.instances} instances. That is for rows of length {found.usual_length}; a batch of as many "
        f"of the longest takes {found.longest_ms:.1f} ms.</p>{_curves(measured, options.goal_ms)}"
        f"<details><summary>all figures</summary>{_table(head, rows)}</details>"
    )


def _curves(measured: Sequence[Measured], goal_ms: float) -> str:
    """Milliseconds over rows, both logarithmic; a line for each variant and length."""
    from math import log2, log10

    groups: dict[tuple[str, int], list[Measured]] = {}
    for one in measured:
        groups.setdefault((one.variant, one.length), []).append(one)
    most_rows = max(one.rows for one in measured)
    low = min(min(one.ms for one in measured), goal_ms)
    high = max(max(one.ms for one in measured), goal_ms)
    span = max(log10(high / low), 0.1)

    def x(rows: int) -> float:
        return 60 + 620 * log2(rows) / max(1.0, log2(most_rows))

    def y(ms: float) -> float:
        return 270 - 240 * log10(ms / low) / span

    lines = [
        f"<line x1=60 x2=680 y1={y(goal_ms):.1f} y2={y(goal_ms):.1f} stroke=#888 stroke-dasharray=4 />"
        f"<text x=684 y={y(goal_ms) + 4:.1f}>goal</text>"
    ]
    variants = sorted({variant for variant, _ in groups})
    for (variant, length), own in groups.items():
        colour = _COLOURS[variants.index(variant) % len(_COLOURS)]
        points = " ".join(f"{x(one.rows):.1f},{y(one.ms):.1f}" for one in own)
        label = f"{variant}{f', length {length}' if length > 1 else ''}"
        lines.append(f"<polyline points='{points}' fill=none stroke={colour} stroke-width=2 />")
        lines.append(f"<text x=684 y={y(own[-1].ms) + 4:.1f} fill={colour}>{label}</text>")
    rows = 1
    while rows <= most_rows:
        lines.append(f"<text x={x(rows):.1f} y=290 text-anchor=middle>{rows}</text>")
        rows *= 2
    for ms in (low, (low * high) ** 0.5, high):
        lines.append(f"<text x=54 y={y(ms) + 4:.1f} text-anchor=end>{ms:.3g} ms</text>")
    drawn = "".join(lines)
    return f"<svg viewBox='0 0 820 300' width=820 font-size=11 role=img aria-label='latency over rows'>{drawn}</svg>"
