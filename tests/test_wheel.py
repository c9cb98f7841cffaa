"""What is given to people: all that the code reads, nothing else, and nothing of this folder is needed."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import wheels
from tests.models import onnx_add_one
from tests.tutti.test_help import parsers
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


# Has every help printed, with the current folder before all others.
_HELP = """
import sys
from tutti.app import cli
assert sys.path[0] == ""
for arguments in %r:
    try:
        cli.main([*arguments, "--help"])
    except SystemExit as ended:
        assert not ended.code, arguments
"""
# Of somebody who uses tutti as a library; each line of it that is commented is an error.
_TYPED = """
from tutti.export.names import FILES
from tutti.loadtest.process import free_ports

name: int = FILES["fp32"]  # str
ports: str = free_ports(1)  # list[int]
"""


def files(wheel: Path) -> set[str]:
    """Names of the files in the wheel, without its own papers."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def packed(installed: Installed) -> set[str]:
    return files(installed.wheel)


def call(installed: Installed, folder: Path, program: str, *arguments: str) -> str:
    """What is printed by a program of the environment, in the folder."""
    command = [installed.bin / program, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    return done.stdout


@pytest.fixture
def strangers(tmp_path: Path) -> Path:
    """A folder with packages of its own that are named as parts of tutti are."""
    wheels.add_strangers(tmp_path)
    return tmp_path


def test_it_has_every_file_of_its_packages_and_no_other(packed: set[str]) -> None:
    wanted = {
        f"{place}/{path.relative_to(ROOT / folder)}"
        for folder, place in PLACES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not {"__pycache__", "reports"} & set(path.relative_to(ROOT).parts)
    }
    assert packed == wanted
    assert "tutti/py.typed" in packed


def test_an_sdist_makes_the_same_wheel(packed: set[str], tmp_path: Path) -> None:
    sdist = wheels.pack_sdist(wheels.copy(tmp_path / "source"), tmp_path)
    assert files(wheels.pack(sdist, tmp_path)) == packed


def test_one_package_is_installed(installed: Installed) -> None:
    """Beside the papers of the distribution and the command."""
    told = call(
        installed,
        installed.bin,
        "python",
        "-P",
        "-c",
        "import importlib.metadata as m; print(*m.files('tutti-serve'), sep='\\n')",
    )
    listed = told.split()
    assert "tutti/export/cli.py" in listed
    (metadata,) = (path for path in listed if path.endswith(".dist-info/METADATA"))
    inside = [path.partition("/")[0] for path in listed if not path.startswith("../")]
    assert set(inside) == {"tutti", metadata.partition("/")[0]}
    assert [path for path in listed if path.startswith("../")] == ["../../../bin/tutti"]


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
    call(installed, tmp_path, "python", "-c", _DRIVE)
    call(installed, tmp_path, "tutti", "--version")
    call(installed, tmp_path, "tutti", "loadtest", "--help")


def test_packages_of_the_same_names_are_left_alone(installed: Installed, strangers: Path) -> None:
    """Where a person stands; `python -m` searches there first."""
    names = [name.split() for name, _ in parsers()]
    assert call(installed, strangers, "python", "-c", _HELP % [[], *names]).count("usage: tutti ") >= len(names)
    (strangers / "one.onnx").write_bytes(onnx_add_one())
    assert "tutti serve models" in call(installed, strangers, "tutti", "init", "models", "one.onnx")
    call(installed, strangers, "tutti", "serve", "models", "--check")
    for own in ([], ["serve", "models", "--check"], ["ensemble", "check", "--repository", "models"]):
        call(installed, strangers, "python", "-m", "tutti", *own)


def test_pip_installs_an_extra_of_what_is_there(installed: Installed, tmp_path: Path) -> None:
    """As hints say it: the name is no request to an index, where it may be somebody else's."""
    told = call(installed, tmp_path, "python", "-c", "from tutti.core import extras; print(extras.install('loadtest'))")
    assert told.endswith(" install 'tutti-serve[loadtest]'\n")
    command = [sys.executable, "-m", "pip", "--python", installed.bin / "python", "install", "--no-index", "--no-deps"]
    done = subprocess.run([*command, "tutti-serve[loadtest]"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Requirement already satisfied: tutti-serve[loadtest]" in done.stdout


def test_its_types_are_seen(installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(_TYPED)
    command = [sys.executable, "-m", "mypy", "--python-executable", installed.bin / "python", "mine.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    wrong = [int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line]
    assert wrong == [number for number, line in enumerate(_TYPED.splitlines(), 1) if "#" in line], done.stdout
