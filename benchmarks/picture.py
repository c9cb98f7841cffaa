"""Latency against throughput, drawn: one curve for each server and protocol, a point for each number of clients."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.clients import Figures

_COLOURS = {"tutti": "#0b6e4f", "tritonserver": "#b5541c"}


def draw(curves: Mapping[str, Sequence[Figures]], path: Path) -> None:
    """An SVG. Curve names are "server, protocol"."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tutti"
    from matplotlib import pyplot

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
