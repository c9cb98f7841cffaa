"""What the README and docs/ say can be typed, and their examples, are true."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance.clients import LIBRARIES, public_methods
from tests.serving import serving

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", ROOT / "DESIGN.md", *(ROOT / "docs").glob("*.md")])
LINKS = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text())]


@pytest.mark.slow
def test_the_examples_run_against_a_server(sample_repository: Path, tmp_path: Path) -> None:
    skipped = "The train to the coast leaves at nine in the morning"
    texts = ["The farmers market opens at eight", "Act now and win a free phone", 'Tea, or "coffee"?', skipped] * 4
    with (tmp_path / "texts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    (first,), (sample, table) = examples("README.md"), examples("docs/sample.md")
    with serving(sample_repository, tmp_path / "log") as served:
        scores = printed(first, served.http, ROOT)
        all_of_it = printed(sample, served.http, ROOT)
        printed(table, served.http, tmp_path)
    assert len(re.findall(r"\d\.\d+(?:e-\d+)?", scores)) == 4, "a score for each label"
    assert len(re.findall(r"\[ ?\d+\.\d+ +\d+\.\d+ ?\]", all_of_it)) == 5, "five segments of speech"
    with (tmp_path / "moderated.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == texts
    assert [row["label"] for row in rows] == ["safe", "spam", "safe", "safe"] * 4
    assert rows[3]["safe"] == "0.000", "the gate has left out the encoder"
    assert "\nspam [" in all_of_it
    assert float(rows[1]["spam"]) > 0.5 > float(rows[0]["score"])


def examples(page: str) -> list[str]:
    """What a page shows in Python."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def printed(example: str, address: str, folder: Path) -> str:
    """What an example prints that is run in the folder."""
    code = example.replace("127.0.0.1:8000", address)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_make_target_named_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", README)) - {"are"}
    assert named <= targets


@pytest.mark.parametrize(("page", "link"), LINKS, ids=[f"{page.name}-{link}" for page, link in LINKS])
def test_links_lead_somewhere(page: Path, link: str) -> None:
    assert (page.parent / link).exists()


def test_flags_named_are_there() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "tutti.app.cli", "serve", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout
    for kind in ("text", "audio", "vision"):
        command = [sys.executable, "-m", "tutti.export.cli", kind, "--help"]
        shown += subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    for flag in set(re.findall(r"(--[a-z][a-z-]+)", README)):
        assert flag in shown, flag


@pytest.mark.parametrize("kind", LIBRARIES)
def test_the_table_names_every_method_of_the_clients(kind: str) -> None:
    page = (ROOT / "docs" / "features.md").read_text()
    table = page[page.index("## Every method of tritonclient") :]
    header = "| method | http | grpc | http.aio | grpc.aio |"
    assert header in table
    column = header.strip("| ").split(" | ").index(kind)
    answered = set()
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 5 and cells[column]:
            answered.update(re.findall(r"`([a-z_]+)`", cells[0]))
    assert public_methods(kind) <= answered


def test_every_test_that_a_page_names_is_there() -> None:
    page = (ROOT / "docs" / "newcomers.md").read_text()
    there = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    named = re.findall(r"`(test_\w+)`", page)
    assert len(named) > 60
    assert not set(named) - there
