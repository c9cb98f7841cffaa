"""What is given to people: all that the code reads, nothing else, and nothing of this folder is needed."""

import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.wheels import PACKAGES, ROOT, Installed

# Opens a file of its own by a path from its module's.
_OWN_FILE = re.compile(r"""Path\(__file__\)\.(?:with_name\("([^"]+)"\)|parent / "([^"]+)")""")
_DRIVE = """
import sys
import ensembles, export.layout, loadtest.names, loadtest.payloads, ray_app, tutti
inside = [module.__file__ for module in (ensembles, export.layout, loadtest.names, ray_app, tutti)]
assert all(path.startswith(sys.prefix) for path in inside), inside
assert len(loadtest.names.packaged()) >= 7
assert len(list(loadtest.payloads.SAMPLES.iterdir())) >= 8
assert loadtest.payloads.SENTENCES.is_file()
assert (export.layout.STEPS / "tokenizer.py").is_file()
"""


@pytest.fixture(scope="module")
def packed(installed: Installed) -> set[str]:
    """Names of the files in the wheel, without its own papers."""
    with zipfile.ZipFile(installed.wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_it_has_every_file_of_its_packages_and_no_other(packed: set[str]) -> None:
    files = {path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()}
    assert packed == {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
    assert {f"{package}/py.typed" for package in PACKAGES} <= packed


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
