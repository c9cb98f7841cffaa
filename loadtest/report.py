"""What came of a load test as one page without scripts: the verdict on top, figures, time lines of both sides."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from tutti.loadtest.advice import said
from tutti.loadtest.charts import Points, chart, plain
from tutti.loadtest.pages import Cell, head, table
from tutti.loadtest.runner import Result, StageSeen, quantiles_ms
from tutti.loadtest.scenario import Scenario
from tutti.loadtest.search import Bounds, Difference
from tutti.loadtest.slo import Verdict

# At most this many lines in one figure.
_MOST_LINES = 5


@dataclass(frozen=True, slots=True)
class Source:
    """What a page's last line says: how it was made, and on what."""

    command: str = ""
    hardware: str = ""


def page(result: Result, source: Source | str = Source()) -> str:
    """The page of a run."""
    judgement, scenario = result.judgement, result.scenario
    body = [
        _figures(result),
        _stages(result.stages),
        f"<div class=charts>{''.join(_charts(result))}</div>",
        _errors(result.errors, result.reasons),
    ]
    return _page(scenario.name, judgement.verdict, judgement.reasons, body, _source(source), scenario.seed)


def refusal(scenario: Scenario, reasons: Sequence[str], source: Source | str = Source()) -> str:
    """The page of a run that could not be made."""
    body = [f"<p>Nothing was measured. The target was {_target(scenario)}.</p>"]
    return _page(scenario.name, Verdict.INVALID, reasons, body, _source(source), scenario.seed)


def unusable(name: str, why: str, source: Source | str = Source()) -> str:
    """The page of a scenario that cannot be run as it is written."""
    return _page(name, Verdict.INVALID, [why], ["<p>Nothing was measured.</p>"], _source(source), None)


def saturation(
    scenario: Scenario, verdict: Verdict, reasons: Sequence[str], bounds: Bounds, probes: Sequence[Result],
    source: Source | str = Source(),
) -> str:  # fmt: skip
    """Of the search for the highest rate; `probes` are the runs it has made, in their order."""
    rated = sorted((probe.stages[0].rate, probe) for probe in probes if probe.stages)
    goal = None if scenario.slo.p99_ms is None else (f"goal: p99 {plain(scenario.slo.p99_ms)} ms", scenario.slo.p99_ms)
    latencies = {
        name: [(rate, quantiles_ms(probe.histogram)[name]) for rate, probe in rated if probe.histogram.total]
        for name in ("p50", "p99")
    }
    shares = {"errors": [(rate, 100 * probe.seen.errors / max(1, probe.seen.requests)) for rate, probe in rated]}
    charts = [
        chart("Latency against rate", latencies, "requests /s", "ms", y_log=True, dots=True, goal=goal),
        chart("Errors against rate", shares, "requests /s", "%", dots=True),
    ]
    head = ["rate /s", "verdict", "seconds", "requests", "errors", "p50 ms", "p99 ms", "why"]
    body = [
        f"<p>{len(probes)} probes of {_target(scenario)}.</p>",
        f"<div class=charts>{''.join(charts)}</div>",
        table(head, [_probe(probe) for probe in probes]) if probes else "",
        _errors(*_all_errors(probes)),
    ]
    return _page(f"{scenario.name}: saturation", verdict, reasons, body, _source(source), scenario.seed)


def comparison(
    scenario: Scenario, verdict: Verdict, reasons: Sequence[str], medians: Sequence[Sequence[float]],
    difference: Difference | None, result: Result | None, source: Source | str = Source(),
) -> str:  # fmt: skip
    """Of two servers asked in turns: the medians of each, by round."""
    body = [f"<p>A and B are {_target(scenario)}.</p>"]
    rounds = list(zip(*medians, strict=True))
    lines: dict[str, Points] = {
        name: [(number + 1.0, medians_of_round[index]) for number, medians_of_round in enumerate(rounds)]
        for index, name in enumerate("AB")
    }
    body.append(f"<div class=charts>{chart('Median of each round', lines, 'round', 'ms', _integer, dots=True)}</div>")
    ratios = difference.rounds if difference is not None else [math.nan] * len(rounds)
    if rounds:
        rows = [
            [str(number + 1), plain(a), plain(b), plain(ratio)]
            for number, ((a, b), ratio) in enumerate(zip(rounds, ratios, strict=True))
        ]
        body.append(table(["round", "A ms", "B ms", "B / A"], rows))
    if result is not None:
        body += [_figures(result), _errors(result.errors, result.reasons)]
    return _page(f"{scenario.name}: comparison", verdict, reasons, body, _source(source), scenario.seed)


def _page(
    name: str, verdict: Verdict, reasons: Sequence[str], body: Iterable[str], source: Source, seed: int | None
) -> str:  # fmt: skip
    listed = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    of_seed = f"seed {seed}" if seed is not None else ""
    return (
        f"{head(f'{name}: {verdict.name}')}<h1>{escape(name)}</h1>"
        f"<p class='verdict {verdict.name}'>{verdict.name}</p><ul>{listed}</ul>{''.join(body)}"
        f"<p><small><code>{escape(source.command)}</code> {escape(source.hardware)} {of_seed}</small></p></html>\n"
    )


def _source(source: Source | str) -> Source:
    return Source(source) if isinstance(source, str) else source


def _target(scenario: Scenario) -> str:
    return f"<code>{escape(', '.join(scenario.target.urls))}</code> over {scenario.target.protocol}"


def _figures(result: Result) -> str:
    seen, figures = result.seen, quantiles_ms(result.histogram)
    errors = f"{seen.errors:,} error{'' if seen.errors == 1 else 's'}"
    said_of_all = [
        f"{seen.requests:,} requests in {seen.seconds:.0f} s to {_target(result.scenario)}, with "
        + (f"<span class=error>{errors}</span>" if seen.errors else "no error")
    ]
    if figures:
        said_of_all.append("Latency: " + ", ".join(f"{name} {plain(value)} ms" for name, value in figures.items()))
    elif seen.requests:
        said_of_all.append("No latency is known: nothing was answered without an error")
    late = result.lateness_ms.get("p99", 0.0)
    said_of_all.append(
        f"The generator was busy for at most {result.cpu:.0%} of a core and sent {plain(late)} ms late "
        "at the 99th percentile"
    )
    return f"<p>{'. '.join(said_of_all)}.</p>"


def _stages(stages: Sequence[StageSeen]) -> str:
    figures = list(
        quantiles_ms(next((stage.histogram for stage in stages if stage.histogram.total), stages[0].histogram))
    )
    head = ["stage", "s", "requests /s", "requests", "errors", *(f"{name} ms" for name in figures)]
    return table(head, [_stage(stage, figures) for stage in stages])


def _stage(stage: StageSeen, figures: Iterable[str]) -> list[str | Cell]:
    figures_ms = quantiles_ms(stage.histogram)
    errors = stage.errors + stage.lost
    return [
        escape(stage.name), f"{stage.seconds:.0f}", plain(stage.rate), f"{stage.requests:,}", _count(errors),
        *(plain(figures_ms[name]) if name in figures_ms else "-" for name in figures),
    ]  # fmt: skip


def _probe(probe: Result) -> list[str | Cell]:
    seen, figures, judgement = probe.seen, quantiles_ms(probe.histogram), probe.judgement
    rate = probe.scenario.stages[0].rate
    return [
        plain(rate), judgement.verdict.name, f"{seen.seconds:.0f}", f"{seen.requests:,}", _count(seen.errors),
        *(plain(figures[name]) if figures else "-" for name in ("p50", "p99")),
        Cell(escape(judgement.reasons[0]), "text"),
    ]  # fmt: skip


def _count(errors: int) -> str | Cell:
    return Cell(f"{errors:,}", "error") if errors else "0"


def _errors(errors: Counter[str], reasons: dict[str, str]) -> str:
    if not errors:
        return ""
    rows: list[list[str | Cell]] = [
        [escape(error), f"{count:,}", Cell(escape(said(reasons.get(error, ""))) or "-", "text")]
        for error, count in errors.most_common(20)
    ]
    return "<h2>Errors</h2>" + table(["what", "times", "as one of them says"], rows)


def _all_errors(probes: Sequence[Result]) -> tuple[Counter[str], dict[str, str]]:
    errors, reasons = Counter[str](), dict[str, str]()
    for probe in probes:
        errors.update(probe.errors)
        reasons |= probe.reasons
    return errors, reasons


def _charts(result: Result) -> list[str]:
    p99_ms, goodput = result.scenario.slo.p99_ms, result.scenario.slo.min_goodput
    goal = None if p99_ms is None else (f"goal: p99 {plain(p99_ms)} ms", p99_ms)
    charts = []
    by_rate = sorted((stage.rate, quantiles_ms(stage.histogram)) for stage in result.stages if stage.histogram.total)
    if len(by_rate) > 1:
        lines: dict[str, Points] = {
            name: [(rate, figures[name]) for rate, figures in by_rate] for name in ("p50", "p99")
        }
        title = "Latency against throughput"
        charts.append(chart(title, lines, "requests /s", "ms", y_log=True, dots=True, goal=goal))
    curves = {stage.name: _percentiles(stage.histogram) for stage in result.stages if stage.histogram.total}
    if curves:
        charts.append(chart("Latency by percentile", curves, "percentile", "ms", x_label=_nines, y_log=True, goal=goal))
    if seconds := result.seconds:
        wanted = (f"goal: {plain(goodput)} /s answered well", goodput) if goodput else None
        rates: dict[str, Points] = {
            name: [(row["second"], row[name]) for row in seconds] for name in ("due", "answered", "errors")
        }
        charts.append(chart("Requests a second", rates, "s", "/s", goal=wanted))
        took: dict[str, Points] = {
            name: [(row["second"], row[f"{name}_ms"]) for row in seconds] for name in ("p50", "p99")
        }
        charts.append(chart("Latency, by when requests were due", took, "s", "ms", y_log=True, goal=goal))
    charts += _server_charts(result)
    return charts


def _server_charts(result: Result) -> list[str]:
    rows = result.server
    if not rows:
        return []
    start = result.began_at or rows[0]["at_s"]

    def line(name: str) -> Points:
        return [(row["at_s"] - start, row[name]) for row in rows if name in row]

    charts = _by_model(rows, start) if len(_busiest(rows)) > 1 else _of_one(line)
    if line("fallback"):
        lines: dict[str, Points] = {}
        for pool in rows[-1]["replicas"]:
            for name in ("replicas", "wanted"):
                lines[f"{pool} {name}"] = [
                    (row["at_s"] - start, row[name].get(pool, 0.0)) for row in rows if name in row
                ]
        helped = [(x, 100 * share) for x, share in line("fallback")]
        charts.append(chart("Replicas", lines, "s", "replicas"))
        charts.append(chart("Answered by another pool", {"of all": helped}, "s", "%"))
    return charts


def _of_one(line: Any) -> list[str]:
    return [
        chart("Queue against compute", {"queue": line("queue_ms"), "compute": line("compute_ms")}, "s", "ms"),
        chart("Rows in a batch", {"batch": line("batch")}, "s", "rows"),
    ]


def _by_model(rows: Sequence[dict[str, Any]], start: float) -> list[str]:
    """Several models, or the steps of an ensemble: those in which most of the time goes."""
    busiest = _busiest(rows)
    shown, scope = busiest[:_MOST_LINES], "models and steps"
    if len(busiest) > _MOST_LINES:
        scope = f"the {_MOST_LINES} slowest of {len(busiest)} models and steps"
    charts = []
    for title, name, unit in (
        (f"Queue: {scope}", "queue_ms", "ms"),
        (f"Compute: {scope}", "compute_ms", "ms"),
        (f"Rows in a batch: {scope}", "batch", "rows"),
    ):
        lines: dict[str, Points] = {
            model: [
                (row["at_s"] - start, row["models"][model][name])
                for row in rows
                if name in row.get("models", {}).get(model, {})
            ]
            for model in shown
        }
        charts.append(chart(title, lines, "s", unit))
    return charts


def _busiest(rows: Sequence[dict[str, Any]]) -> list[str]:
    took: Counter[str] = Counter()
    for row in rows:
        for model, means in row.get("models", {}).items():
            took[model] += means.get("queue_ms", 0.0) + means.get("compute_ms", 0.0)
    return [model for model, _ in took.most_common()]


def _percentiles(histogram: Any) -> Points:
    """x counts nines of the percentile; the curve ends where the requests are too few to tell more."""
    least = 1 / max(histogram.total, 2)
    return [(-math.log10(1 - share), ms) for share, ms in histogram.points(120) if 1 - share >= 0.99 * least]


def _nines(x: float) -> str:
    return f"{100 * (1 - 10**-x):.5g}%"


def _integer(x: float) -> str:
    return f"{x:.0f}"
