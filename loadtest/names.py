"""Which file a person means: a path, or a scenario that comes along; and near names for what is not there.

Light: for help and usage, without YAML or anything else to install.
"""

import difflib
import stat
from collections.abc import Collection, Iterable
from pathlib import Path

from tutti.loadtest.errors import ScenarioError

PACKAGED = Path(__file__).with_name("scenarios")


def packaged() -> dict[str, str]:
    """The scenarios that come along, by name, with the sentence that each begins with."""
    paths = sorted(PACKAGED.glob("*.yaml"))
    return {path.stem: path.read_text(encoding="utf-8").split("\n")[0].lstrip("# ") for path in paths}


def listing() -> str:
    """The scenarios that come along, a line each."""
    known = packaged()
    width = max(map(len, known), default=0)
    return "\n".join(f"  {name:{width}}  {sentence}" for name, sentence in known.items())


def near(name: str, known: Iterable[str]) -> str:
    """What to add to a message about a name that is unknown: nothing, when no known one is like it."""
    similar = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean '{similar[0]}'?" if similar else ""


def scenario(name: str) -> Path:
    """The file of a scenario, by its path or its name. Raises ScenarioError."""
    if name in packaged() and not Path(name).exists():
        return PACKAGED / f"{name}.yaml"
    return file(name, "a scenario in YAML", (".yaml", ".yml"), packaged())


def file(name: str, expected: str, suffixes: tuple[str, ...], more: Collection[str] = ()) -> Path:
    """A file that can be read. Raises ScenarioError naming it, and one like it: of those beside it, or of `more`.

    `expected` says what it should be, as in "a scenario in YAML"; `suffixes` are those of such files.
    """
    if not name:
        raise ScenarioError(f"an empty name: expected {expected}")
    path = Path(name)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        known = {*_beside(path.parent, suffixes), *more}
        hint = _nearest(path.name, known) or (f", or one of {', '.join(more)}" if more else "")
        raise ScenarioError(f"{name}: no such file: expected {expected}{hint}") from None
    except (OSError, ValueError) as error:
        raise ScenarioError(f"{name}: {getattr(error, 'strerror', None) or error}: expected {expected}") from None
    if stat.S_ISDIR(mode):
        inside = sorted(_beside(path, suffixes))[:3]
        raise ScenarioError(
            f"{name}: a folder: expected {expected}{', as ' + ', '.join(inside) + ' in it' if inside else ''}"
        )
    if not stat.S_ISREG(mode):
        raise ScenarioError(f"{name}: not a regular file: expected {expected}")
    try:
        path.open("rb").close()
    except OSError as error:
        raise ScenarioError(f"{name}: cannot be read ({error.strerror}): expected {expected}") from None
    return path


def _beside(folder: Path, suffixes: tuple[str, ...]) -> set[str]:
    try:
        return {path.name for path in folder.iterdir() if path.suffix in suffixes}
    except OSError:
        return set()


def _nearest(name: str, known: Iterable[str]) -> str:
    """By the names, or by what stands before their suffix."""
    stems = {Path(file_name).stem: file_name for file_name in known}
    similar = difflib.get_close_matches(name, [*known], 1) or difflib.get_close_matches(Path(name).stem, [*stems], 1)
    return f"; did you mean '{stems.get(Path(similar[0]).stem, similar[0])}'?" if similar else ""
