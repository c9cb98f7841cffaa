"""What is given to people: all that the code reads, nothing else, and nothing of this folder is needed."""

import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.wheels import PLACES, ROOT, Installed

# Opens a file of its own by a path from its module's.
_OWN_FILE = re.compile(r"""Path\(__file__\)\.(?:with_name\("([^"]+)"\)|parent / "([^"]+)")""")
_DRIVE = """
import sys
import tutti
from tutti import ensembles, ray_app
from tutti.export import layout
from tutti.loadtest import names, payloads
inside = [module.__file__ for module in (tutti, ensembles, ray_app, layout, names)]
assert all(path.startswith(sys.prefix) for path in inside), inside
assert len(names.packaged()) >= 7
assert len(list(payloads.SAMPLES.iterdir())) >= 8
assert payloads.SENTENCES.is_file()
assert (layout.STEPS / "tokenizer.py").is_file()
"""


@pytest.fixture(scope="module")
def packed(installed: Installed) -> set[str]:
    """Names of the files in the wheel, without its own papers."""
    with zipfile.ZipFile(installed.wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_it_has_every_file_of_its_packages_and_no_other(packed: set[str]) -> None:
    files = {
        f"{place}/{path.relative_to(ROOT / folder)}"
        for folder, place in PLACES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not {"__pycache__", "reports"} & set(path.parts)
    }
    assert packed == files
    assert "tutti/py.typed" in packed


def test_it_has_what_the_code_reads_beside_itself(packed: set[str]) -> None:
    read = set()
    for name in packed:
        if name.endswith(".py") and "/steps/" not in name:  # those find what an export puts beside them
            folder = Path(name).parent
            read |= {str(folder / (a or b)) for a, b in _OWN_FILE.findall((ROOT / name).read_text(encoding="utf-8"))}
    assert len(read) >= 5
    for name in read:
        assert name in packed or any(other.startswith(f"{name}/") for other in packed), name


def test_it_works_from_an_empty_folder(installed: Installed, tmp_path: Path) -> None:
    for command in (["python", "-c", _DRIVE], ["tutti", "--version"], ["tutti", "loadtest", "--help"]):
        done = subprocess.run(
            [installed.bin / command[0], *command[1:]], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
