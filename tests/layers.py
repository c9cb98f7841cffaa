"""The house's floors and which file imports which, read from the sources."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

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

Imports = Mapping[str, set[str]]


def read(root: Path) -> dict[str, set[str]]:
    """Every module of the packages -> what it imports anywhere in its file: modules of ours, and others by name.

    A module of ours is called by its file's place, without regard to the links in tutti/.
    """
    paths = files(root)
    return {name: set(_imported(name, path, set(paths))) for name, path in sorted(paths.items())}


def files(root: Path) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if "steps" not in parts:  # model.py files, which run inside a server
                paths[".".join(parts).removesuffix(".__init__")] = path
    return paths


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
