"""The house: a folder imports only from the floors below it, files in no circle, and heavy libraries where they belong.

All imports count alike: at a file's head, within a function, and those for types alone. A late import hides what a
file knows, and one for types is knowledge, too. A module named by a string (a command's, a backend's) does not count.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("tutti", "ensembles", "ray_app", "export", "loadtest", "demo", "benchmarks")
# Folders of the package tutti that stand beside tutti/: tutti.export is export/.
BESIDE = frozenset(["ensembles", "ray_app", "export", "loadtest"])

# From the ground up. A folder's row covers the folders within it that have none of their own.
FLOORS = (
    "tutti.core",
    "tutti.console",
    "tutti.observing",
    "tutti.repository",
    "tutti.scheduling",
    "tutti.devices",
    "tutti.backends",
    "tutti.serving",
    "tutti.frontends",
    "tutti.frontends.v2",
    "tutti.frontends.http",
    "tutti.frontends.grpc",
    "tutti.frontends.processes",
    "ensembles",
    "tutti.app",
    "loadtest",
    "export",
    "ray_app",
    "demo",
    "benchmarks",
)
# What is started: above all folders, and imported by nobody but each other.
ROOTS = {
    "tutti.__main__",
    "tutti.app.cli",
    "tutti.app.process",
    "tutti.frontends.processes.worker",
    "ensembles.cli",
    "ray_app.app",
    "ray_app.run",
    "ray_app.cli",
}
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
        "ray_app.simulation",
    },
    "torch": {
        "tutti.backends.pytorch",
        "tutti.backends.compiled",
        "tutti.backends.compiler_process",
        "tutti.backends.cuda_graphs",
        "tutti.backends.verification",
        "tutti.backends.tensorrt",
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

Imports = Mapping[str, set[str]]


def read(root: Path) -> dict[str, set[str]]:
    """Every module of the packages -> what it imports anywhere in its file: modules of ours, and others by name.

    A module of ours is called by its file's place, without regard to the links in tutti/.
    """
    files = _files(root)
    return {name: set(_imported(name, path, set(files))) for name, path in sorted(files.items())}


def _files(root: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if "steps" not in parts:  # model.py files, which run inside a server
                files[".".join(parts).removesuffix(".__init__")] = path
    return files


def _place(name: str) -> str:
    """Where a module's file is."""
    return name.removeprefix("tutti.") if name.removeprefix("tutti.").split(".")[0] in BESIDE else name


def _imported(name: str, path: Path, modules: set[str]) -> Iterator[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (_place(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                inside = _place(f"{source}.{alias.name}")
                yield inside if inside in modules else _place(source)


def floor(name: str) -> int:
    """Raises AssertionError for a file in a folder without a row."""
    if name in ROOTS:
        return len(FLOORS)
    if name == "tutti":  # its names and version
        return -1
    folder = name
    while folder not in FLOORS:
        folder, dot, _ = folder.rpartition(".")
        assert dot, f"{name}: its folder has no row in FLOORS"
    return FLOORS.index(folder)


def upward(imports: Imports) -> set[tuple[str, str]]:
    """Who imports from a floor above its own, and what."""
    ours = ((name, other) for name, others in imports.items() for other in others & set(imports))
    return {(name, other) for name, other in ours if floor(other) > floor(name)}


def circles(imports: Imports) -> list[list[str]]:
    """Files that import each other, be it by way of others: each group sorted. A file may import itself."""
    below = {name: _reached(name, imports) for name in imports}
    groups = {tuple(sorted({name} | {other for other in below[name] if name in below[other]})) for name in imports}
    return sorted(list(group) for group in groups if len(group) > 1)


def _reached(name: str, imports: Imports) -> set[str]:
    reached: set[str] = set()
    waiting = [name]
    while waiting:
        for other in imports[waiting.pop()] & set(imports):
            if other not in reached:
                reached.add(other)
                waiting.append(other)
    return reached


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
        "export.init": {"tutti.app.overview"},  # it speaks to a person
        "export.initial": {"tutti.backends.onnxruntime"},  # which tells what a graph takes
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


@pytest.mark.parametrize("path", [*_files(ROOT).values(), *(ROOT / "tests").rglob("*.py")], ids=lambda path: path.stem)
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
