"""The picture of the benchmarks: numbers as people write them, and type that can be read on a telephone."""

import random
import re
from pathlib import Path

from benchmarks.clients import Figures
from benchmarks.picture import draw, plain_marks


def test_marks_hold_all_values_and_are_round() -> None:
    rng = random.Random(0)
    for _ in range(300):
        values = [10 ** rng.uniform(-4, 4) for _ in range(rng.randint(1, 5))]
        marks = plain_marks(values)
        assert marks[0] <= min(values) <= max(values) <= marks[-1]
        assert all(f"{mark:.0e}"[0] in "125" for mark in marks)
        assert 2 <= len(marks) <= 27


def test_a_telephone_shows_plain_numbers(tmp_path: Path) -> None:
    curves = {
        f"{server}, {protocol}": [Figures(1_000 * n, 0.168 * n, 1.0) for n in (1, 5, 33)]
        for server in ("tutti", "tritonserver")
        for protocol in ("HTTP", "gRPC")
    }
    draw(curves, tmp_path / "latency.svg")
    svg = (tmp_path / "latency.svg").read_text()
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert {"0.1", "0.2", "0.5", "1", "2", "5", "10", "median latency, ms", "tutti, gRPC"} <= set(texts)
    assert not re.search("mathdefault|10\\^|\N{MULTIPLICATION SIGN}|[0-9]e[-+]?[0-9]", " ".join(texts))
    width = float(re.findall(r'viewBox="0 0 ([\d.]+)', svg)[0])
    sizes = [float(size) for size in re.findall(r"font(?:-size)?:\s*(?:[\w ]*?)([\d.]+)px", svg)]
    assert sizes
    assert min(sizes) * 392 / width >= 10
