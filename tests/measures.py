"""How the code is shaped: the lengths of files and functions, lines that are repeated, and names that say nothing.

`python -m tests.measures` prints the figures of the packages, and where they come from.
"""

import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tutti", "ensembles", "export", "loadtest", "ray_app")

LONG_FILE, LONG_FUNCTION, REPEATED_LINES = 400, 40, 10
# Each may be anything: a noun says what it is.
EMPTY_NAMES = frozenset({"one", "found", "made", "at", "given", "own", "what"})


@dataclass
class Measures:
    """What is too much in some files: (lines, where) of files and functions, and where the names and repeats are."""

    files: list[tuple[int, str]] = field(default_factory=list)
    functions: list[tuple[int, str]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    repeats: list[str] = field(default_factory=list)


def sources(root: Path = ROOT, packages: tuple[str, ...] = PACKAGES) -> Iterator[Path]:
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            if not path.is_relative_to(root) or path.resolve() != path:  # a link leads to what is counted already
                continue
            yield path


def measures(paths: Iterator[Path], root: Path = ROOT) -> Measures:
    result = Measures()
    lines: dict[str, list[tuple[int, str]]] = {}
    for path in paths:
        name, text = str(path.relative_to(root)), path.read_text()
        tree = ast.parse(text)
        count = text.count("\n")
        if count > LONG_FILE:
            result.files.append((count, name))
        result.functions += [(size, f"{name}: {function}") for size, function in _long_functions(tree)]
        result.names += [f"{name}:{line} {bound}" for line, bound in _bindings(tree) if bound in EMPTY_NAMES]
        lines[name] = _code_lines(text, tree)
    result.repeats = _repeats(lines)
    return result


def _long_functions(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            if size > LONG_FUNCTION:
                yield size, node.name


def _bindings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Where names are bound: assigned, looped over, taken as arguments, imported as, or defined."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr.lstrip("_")
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.lineno, node.name


def _code_lines(text: str, tree: ast.Module) -> list[tuple[int, str]]:
    """(number, line) of all lines but empty ones, comments, imports, docstrings and data."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        is_data = isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        )
        if is_data or (isinstance(node, ast.Assign | ast.AnnAssign) and node in tree.body):
            skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    kept = []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped and not stripped.startswith("#") and number not in skipped:
            kept.append((number, stripped))
    return kept


def _repeats(files: dict[str, list[tuple[int, str]]]) -> list[str]:
    """Where so many lines stand that stand elsewhere, too."""
    places: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for name, lines in files.items():
        for start in range(len(lines) - REPEATED_LINES + 1):
            window = tuple(line for _, line in lines[start : start + REPEATED_LINES])
            if sum(map(len, window)) > 10 * REPEATED_LINES:
                places[window].append((name, lines[start][0]))
    shown = []
    reported: set[tuple[str, int]] = set()
    for where in places.values():
        if len(where) > 1:
            near = {(name, line - back) for name, line in where for back in range(1, 3 * REPEATED_LINES)}
            if not near & reported:
                shown.append(" = ".join(f"{name}:{line}" for name, line in where))
            reported.update(where)
    return shown


def main() -> None:
    result = measures(sources())
    print(f"files over {LONG_FILE} lines: {len(result.files)}")
    print("".join(f"  {size:5} {name}\n" for size, name in sorted(result.files, reverse=True)), end="")
    print(f"functions over {LONG_FUNCTION} lines: {len(result.functions)}")
    print("".join(f"  {size:5} {name}\n" for size, name in sorted(result.functions, reverse=True)), end="")
    counts = Counter(name.rpartition(" ")[2] for name in result.names)
    print(f"names that say nothing: {len(result.names)}, {dict(counts.most_common())}")
    by_file = Counter(name.partition(":")[0] for name in result.names)
    print("".join(f"  {count:5} {name}\n" for name, count in by_file.most_common(40)), end="")
    print(f"repeats of {REPEATED_LINES} lines: {len(result.repeats)}")
    print("".join(f"  {repeat}\n" for repeat in result.repeats), end="")
    if "--names" in sys.argv:
        print("\n".join(result.names))


if __name__ == "__main__":
    main()
