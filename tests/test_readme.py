"""What the README says can be typed, and its example, are true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance.clients import LIBRARIES, public_methods
from tests.serving import serving

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_example_runs_against_a_server(sample_repository: Path, tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    with serving(sample_repository, tmp_path / "log") as served:
        code = example.replace("127.0.0.1:8000", served.http)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"\[ ?\d+\.\d+ +\d+\.\d+ ?\]", done.stdout)) == 5, "five segments of speech"


def test_every_make_target_named_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", README)) - {"are"}
    assert named <= targets


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_flags_named_are_there() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "tutti.cli", "serve", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout
    for kind in ("text", "audio", "vision"):
        command = [sys.executable, "-m", "export.cli", kind, "--help"]
        shown += subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    for flag in set(re.findall(r"(--[a-z][a-z-]+)", README)):
        assert flag in shown, flag


@pytest.mark.parametrize("kind", LIBRARIES)
def test_the_table_names_every_method_of_the_clients(kind: str) -> None:
    table = README[README.index("### Every method of tritonclient") : README.index("## Measured")]
    header = "| method | http | grpc | http.aio | grpc.aio |"
    assert header in table
    column = header.strip("| ").split(" | ").index(kind)
    answered = set()
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 5 and cells[column]:
            answered.update(re.findall(r"`([a-z_]+)`", cells[0]))
    assert public_methods(kind) <= answered
