"""Pictures of what was measured: latency against throughput, and the rates of several servers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.clients import Figures

_COLOURS = {"tutti": "#0b6e4f", "tritonserver": "#b5541c"}


def draw_lead(servers: Mapping[str, Figures], path: Path) -> None:
    """An SVG with a bar for each server, that reads at 400 pixels."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(6, 0.8 + 0.42 * len(servers)), layout="constrained")
    names = list(servers)[::-1]
    rates = [servers[name].rate for name in names]
    colours = [_COLOURS.get(name, "#9aa5a0") for name in names]
    bars = axes.barh(names, rates, color=colours, height=0.66)
    texts = [f"{servers[name].rate:,.0f} /s, half within {servers[name].p50_ms:,.1f} ms" for name in names]
    axes.bar_label(bars, texts, padding=4, fontsize=11)
    axes.set_xlim(0, max(rates) * 1.75)
    axes.tick_params(left=False, labelsize=12)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tutti"
    from matplotlib import pyplot

    return pyplot


def draw(curves: Mapping[str, Sequence[Figures]], path: Path) -> None:
    """An SVG. Curve names are "server, protocol"."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, points in curves.items():
        server, _, protocol = name.partition(", ")
        rates = [point.rate / 1000 for point in points]
        axes.plot(
            rates,
            [point.p50_ms for point in points],
            color=_COLOURS[server],
            linestyle="-" if protocol == "HTTP" else "--",
            marker="o",
            label=name,
        )
    axes.set(xlabel="thousand requests a second", ylabel="median latency, ms", yscale="log", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
