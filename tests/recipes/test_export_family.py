"""The recipe of CONTRIBUTING.md for an export family: one that nobody here has seen is exported by `tutti export`."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tutti.console.progress import Work
from tutti.export import cli, families, served
from tutti.export.families import Family
from tutti.export.graphs import Graph, Product
from tutti.export.sources import Source

if TYPE_CHECKING:
    import torch
else:
    torch = pytest.importorskip("torch")


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--scale", type=float, default=1.0, metavar="FACTOR", help="of the answers (default: 1)")


def mistakes(options: argparse.Namespace) -> Iterator[str]:
    if not options.scale:
        yield "--scale: expected another number than 0"


def build(options: argparse.Namespace, source: Source, ensemble: str, work: Path, progress: Work) -> Product:
    """A matrix of numbers in a text file, as a layer."""
    weight = np.loadtxt(options.source, dtype=np.float32, ndmin=2) * options.scale
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False).eval()
    module.load_state_dict({"weight": torch.from_numpy(weight)})
    rows = np.random.default_rng(0).normal(size=(5, weight.shape[1])).astype(np.float32)
    graph = Graph(
        options.name,
        module,
        {"input": torch.from_numpy(rows[:2])},
        ("output",),
        {"input": {0: "batch"}},
        [{"input": rows}],
        {"input": ((1, weight.shape[1]), (8, weight.shape[1]), (32, weight.shape[1]))},
    )
    return Product([graph], provenance=f"the matrix of {options.source}")


@pytest.fixture
def matrices() -> Iterator[None]:
    examples = ("tutti export matrix weights.txt --scale 2",)
    family = Family("matrix", "layers from matrices of numbers", "layer", examples, build, add_arguments, mistakes)
    families.register(family)
    yield
    families.unregister("matrix")


@pytest.mark.usefixtures("matrices")
def test_a_family_of_ones_own_is_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, repository = tmp_path / "weights.txt", tmp_path / "models"
    weights.write_text("1 2 3\n4 5 6\n")
    places = ["--repository", str(repository), "--report", str(tmp_path / "report.html"), "--ensemble", ""]
    assert cli.main(["matrix", str(weights), "--name", "layer", "--scale", "2", *places]) == 0
    assert "published in" in capsys.readouterr().out
    with served.staged(repository) as models:
        answer = models.ask("layer", {"input": np.ones((1, 3), np.float32)})
    assert answer["output"].tolist() == [[12, 30]]


@pytest.mark.usefixtures("matrices")
def test_its_flags_are_told_and_its_mistakes_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["matrix", "--help"])
    told = capsys.readouterr().out
    assert "--scale FACTOR" in told
    assert "tutti export matrix weights.txt --scale 2" in told
    (tmp_path / "w.txt").write_text("1")
    assert cli.main(["matrix", str(tmp_path / "w.txt"), "--scale", "0", "--repository", str(tmp_path / "m")]) == 2
    assert capsys.readouterr().err == "tutti export: --scale: expected another number than 0\n"


@pytest.mark.usefixtures("matrices")
def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="there is a family 'matrix' already"):
        families.register(families.registered()["matrix"])
