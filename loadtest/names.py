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
    found = sorted(PACKAGED.glob("*.yaml"))
    return {path.stem: path.read_text(encoding="utf-8").split("\n")[0].lstrip("# ") for path in found}


def listing() -> str:
    """The scenarios that come along, a line each."""
    known = packaged()
    width = max(map(len, known), default=0)
    return "\n".join(f"  {name:{width}}  {what}" for name, what in known.items())


def near(name: str, known: Iterable[str]) -> str:
    """What to add to a message about a name that is unknown: nothing, when no known one is like it."""
    found = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean '{found[0]}'?" if found else ""


def scenario(given: str) -> Path:
    """The file of a scenario, by its path or its name. Raises ScenarioError."""
    if given in packaged() and not Path(given).exists():
        return PACKAGED / f"{given}.yaml"
    return file(given, "a scenario in YAML", (".yaml", ".yml"), packaged())


def file(given: str, what: str, suffixes: tuple[str, ...], more: Collection[str] = ()) -> Path:
    """A file that can be read. Raises ScenarioError naming it, and one like it: of those beside it, or of `more`.

    `what` says what it should be, as in "a scenario in YAML"; `suffixes` are those of such files.
    """
    if not given:
        raise ScenarioError(f"an empty name: expected {what}")
    path = Path(given)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        known = {*_beside(path.parent, suffixes), *more}
        hint = _nearest(path.name, known) or (f", or one of {', '.join(more)}" if more else "")
        raise ScenarioError(f"{given}: no such file: expected {what}{hint}") from None
    except (OSError, ValueError) as error:
        raise ScenarioError(f"{given}: {getattr(error, 'strerror', None) or error}: expected {what}") from None
    if stat.S_ISDIR(mode):
        own = sorted(_beside(path, suffixes))[:3]
        raise ScenarioError(f"{given}: a folder: expected {what}{', as ' + ', '.join(own) + ' in it' if own else ''}")
    if not stat.S_ISREG(mode):
        raise ScenarioError(f"{given}: not a regular file: expected {what}")
    try:
        path.open("rb").close()
    except OSError as error:
        raise ScenarioError(f"{given}: cannot be read ({error.strerror}): expected {what}") from None
    return path


def _beside(folder: Path, suffixes: tuple[str, ...]) -> set[str]:
    try:
        return {path.name for path in folder.iterdir() if path.suffix in suffixes}
    except OSError:
        return set()


def _nearest(name: str, known: Iterable[str]) -> str:
    """By the names, or by what stands before their suffix."""
    stems = {Path(one).stem: one for one in known}
    found = difflib.get_close_matches(name, [*known], 1) or difflib.get_close_matches(Path(name).stem, [*stems], 1)
    return f"; did you mean '{stems.get(Path(found[0]).stem, found[0])}'?" if found else ""
