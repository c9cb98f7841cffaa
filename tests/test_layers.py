"""The house: a folder imports only from the floors below it, files in no circle, and heavy libraries where they belong.

All imports count alike: at a file's head, within a function, and those for types alone. A late import hides what a
file knows, and one for types is knowledge, too. A module named by a string (a command's, a backend's) does not count.
"""

import ast
from pathlib import Path

import pytest

from tests.layers import BESIDE, FLOORS, ROOT, ROOTS, circles, files, floor, read, upward

# Heavy library -> the files that may import it. export/ may import what it exports with.
HEAVY = {
    "ray": {
        "ray_app.app",
        "ray_app.run",
        "ray_app.starting",
        "ray_app.replica",
        "ray_app.routing",
        "ray_app.gateway",
        "ray_app.journal",
        "ray_app.simulated_controller",
    },
    "torch": {
        "tutti.backends.pytorch",
        "tutti.backends.aot_packages",
        "tutti.backends.compiled",
        "tutti.backends.compiler_process",
        "tutti.backends.cuda_graphs",
        "tutti.backends.verification",
        "tutti.backends.tensorrt",
        "tutti.backends.torch_modules",
        "tutti.backends.capturing",
        "tutti.devices.cuda",
    },
    "transformers": set(),
    "tensorrt": {"tutti.backends.tensorrt"},
    "onnxruntime": {"tutti.backends.onnxruntime"},
    "psutil": {"ray_app.processes"},
    "pynvml": {"tutti.devices.nvml"},
    "cuda": {"tutti.devices.ipc"},
}

IMPORTS = read(ROOT)
SERVER = [name for name in IMPORTS if name.split(".")[0] in ("tutti", "ensembles", "ray_app")]


def test_a_folder_imports_from_below_only() -> None:
    assert not upward(IMPORTS)


def test_no_files_import_each_other_in_a_circle() -> None:
    assert not circles(IMPORTS)


@pytest.mark.parametrize("name", IMPORTS)
def test_nobody_imports_a_root(name: str) -> None:
    if name not in ROOTS:
        assert not IMPORTS[name] & ROOTS


def test_every_row_has_files() -> None:
    assert {floor(name) for name in IMPORTS} == {-1, *range(len(FLOORS) + 1)}
    assert set(IMPORTS) >= ROOTS


@pytest.mark.parametrize("name", [name for name in IMPORTS if name.startswith("export")])
def test_export_imports_only_the_lower_floors_of_the_server(name: str) -> None:
    server = {other for other in IMPORTS[name] & set(IMPORTS) if other.split(".")[0] == "tutti"}
    server -= {
        # What was staged is served before it is seen.
        "export.served": {"tutti.serving.engine", "tutti.serving.local", "tutti.serving.model"},
        "export.onnx_files": {"tutti.backends.onnxruntime"},  # which tells what a graph takes
    }.get(name, set())
    assert all(floor(other) <= FLOORS.index("tutti.repository") for other in server)


@pytest.mark.parametrize("name", [name for name in IMPORTS if name.startswith("loadtest")])
def test_loadtest_imports_no_server_code(name: str) -> None:
    # How its libraries are installed, how progress is told, and how a key is read and what is wrong with it.
    may = {"tutti.core.extras", "tutti.console.progress", "tutti.frontends.api_keys", "tutti.core.errors"}
    own = IMPORTS[name] - may
    assert not {other for other in own if other.split(".")[0] in ("tutti", "ensembles", "ray_app", "export")}


@pytest.mark.parametrize("name", SERVER)
def test_heavy_libraries_stay_where_they_belong(name: str) -> None:
    used = {other.split(".")[0] for other in IMPORTS[name]} & set(HEAVY)
    assert all(name in HEAVY[library] for library in used)


@pytest.mark.parametrize("path", [*files(ROOT).values(), *(ROOT / "tests").rglob("*.py")], ids=lambda path: path.stem)
def test_nobody_imports_a_folder_by_its_own_name(path: Path) -> None:
    """From the checkout it would be found, as a second copy of the module; of a wheel it would be a stranger's."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.partition(".")[0] for alias in node.names} & BESIDE
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            assert node.module.partition(".")[0] not in BESIDE


# The checks themselves: each finds what is planted in a house of four files.

_HEAD = "{}\n"
_LATE = "def load():\n    {}\n"
_TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {}\n"
_TRIED = "try:\n    {}\nexcept ImportError:\n    pass\n"
_PLACES = [_HEAD, _LATE, _TYPES, _TRIED]


def house(root: Path, **files: str) -> dict[str, set[str]]:
    """Files by their names with "__" for "/"; the others have no imports but one downward."""
    plain = {
        "tutti__core__rows": "",
        "tutti__core__types": "",
        "tutti__scheduling__batching": "from tutti.core import rows",
        "tutti__serving__engine": "from tutti.scheduling.batching import Batch",
    }
    for name, text in {**plain, **files}.items():
        path = root / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read(root)


def test_a_sound_house_passes(tmp_path: Path) -> None:
    imports = house(tmp_path)
    assert imports["tutti.serving.engine"] == {"tutti.scheduling.batching"}
    assert not upward(imports)
    assert not circles(imports)


@pytest.mark.parametrize("place", _PLACES)
@pytest.mark.parametrize(
    "line",
    [
        "from tutti.serving import engine",
        "from tutti.serving.engine import Engine",
        "import tutti.serving.engine",
        "from ..serving import engine",
        "from ..serving.engine import Engine",
    ],
)
def test_a_planted_import_of_a_floor_above_is_found(tmp_path: Path, line: str, place: str) -> None:
    imports = house(tmp_path, tutti__core__rows=place.format(line))
    assert upward(imports) == {("tutti.core.rows", "tutti.serving.engine")}


@pytest.mark.parametrize("place", _PLACES)
@pytest.mark.parametrize("line", ["from tutti.core import types", "import tutti.core.types", "from . import types"])
def test_a_planted_circle_within_a_folder_is_found(tmp_path: Path, line: str, place: str) -> None:
    imports = house(tmp_path, tutti__core__rows=place.format(line), tutti__core__types="from tutti.core import rows")
    assert not upward(imports)
    assert circles(imports) == [["tutti.core.rows", "tutti.core.types"]]


def test_a_planted_circle_of_several_files_is_found_whole(tmp_path: Path) -> None:
    imports = house(
        tmp_path,
        tutti__core__rows="from tutti.core import wire",
        tutti__core__wire="from tutti.core import types",
        tutti__core__types="from tutti.core import rows",
    )
    assert circles(imports) == [["tutti.core.rows", "tutti.core.types", "tutti.core.wire"]]


def test_what_is_beside_a_circle_is_not_of_it(tmp_path: Path) -> None:
    imports = house(
        tmp_path,
        tutti__core__rows="from tutti.core import types, errors",
        tutti__core__types="from tutti.core import rows",
        tutti__core__errors="",
    )
    assert circles(imports) == [["tutti.core.rows", "tutti.core.types"]]


@pytest.mark.parametrize("line", ["import tutti.export.cli", "from tutti.export import cli", "from export import cli"])
def test_a_folder_beside_tutti_is_the_same_by_both_names(tmp_path: Path, line: str) -> None:
    imports = house(tmp_path, tutti__core__rows=line, export__cli="from tutti.core import types")
    assert upward(imports) == {("tutti.core.rows", "export.cli")}


def test_a_folder_without_a_row_is_refused(tmp_path: Path) -> None:
    imports = house(tmp_path, tutti__cellar__wine="from tutti.core import rows")
    with pytest.raises(AssertionError, match=r"tutti\.cellar\.wine: its folder has no row"):
        upward(imports)
