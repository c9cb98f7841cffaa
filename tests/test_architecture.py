"""docs/architecture.md, its picture and docs/modules.md tell of the code as it is."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests import architecture
from tests.layers import FLOORS, ROOT, files, read
from tests.test_layers import house

PAGE = ROOT / "docs" / "architecture.md"


@pytest.mark.parametrize(
    ("path", "drawn"),
    [
        (architecture.PICTURE, architecture.picture(read(ROOT))),
        (architecture.MODULES, architecture.modules(files(ROOT))),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_what_is_drawn_is_the_code_as_it_is(path: Path, drawn: str) -> None:
    assert path.read_text() == drawn, f"{path.name} is older than the code: run make architecture"


def test_the_picture_has_a_dot_for_each_import_between_folders(tmp_path: Path) -> None:
    svg = ElementTree.fromstring(architecture.picture(house(tmp_path)))
    titles = {title.text for title in svg.iter("{http://www.w3.org/2000/svg}title")}
    assert titles == {"tutti/serving/ imports tutti/scheduling/", "tutti/scheduling/ imports tutti/core/"}
    labels = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {f"{floor.replace('.', '/')}/" for floor in FLOORS} <= set(labels)


def test_every_file_is_listed_with_what_it_says_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "rows.py"
    path.write_text('"""Joins rows | and\nsplits them.\n\nMore of it."""\n')
    assert architecture.said(path) == "Joins rows | and splits them."
    listed = re.findall(r"\]\(\.\./([\w/.]+)\)", architecture.MODULES.read_text())
    assert set(listed) == {
        str(path.relative_to(ROOT)) for path in files(ROOT).values() if path.name != "__init__.py"
    } - {"tutti/__main__.py"}


@pytest.mark.parametrize("page", [PAGE, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_pages_name_files_that_are_there(page: Path) -> None:
    named = {name for name in re.findall(r"`([\w/]+\.py)`", page.read_text()) if "NAME" not in name}
    assert len(named) > 15
    packaged = ROOT / "tests" / "recipes" / "backend"  # one recipe is a package of its own
    assert not {name for name in named if not (ROOT / name).is_file() and not (packaged / name).is_file()}
