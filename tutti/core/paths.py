"""Paths as people give them: which one was meant, and whether something can be written there. Knows no model."""

import difflib
import os
from pathlib import Path

from tutti.core.errors import ConfigError, sayable

_MAX_ENTRIES = 1000


def near(path: Path) -> str:
    """The path of a file beside one that is not there, and of almost its name; "" for none."""
    try:
        names = sorted(entry.name for entry in path.parent.iterdir())[:_MAX_ENTRIES]
    except (OSError, ValueError):
        return ""
    nearest = difflib.get_close_matches(path.name, names, 1)
    return sayable(path.parent / nearest[0]) if nearest else ""


def meant(path: Path) -> str:
    """The same as a question to add to what is said of a missing file; "" where it is there, or none is near."""
    hint = "" if os.path.lexists(path) else near(path)
    return f" (did you mean '{hint}'?)" if hint else ""


def check_writable(folder: Path) -> None:
    """Raises ConfigError for what is no folder to write to, and cannot be made one."""
    place = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), Path())
    fault = ""
    if not place.is_dir():
        fault = "a file" if place.is_file() else "no folder"
    elif not os.access(place, os.W_OK | os.X_OK):
        fault = "not writable"
    if fault:
        where = "it is" if place == folder else f"'{sayable(place)}' is"
        raise ConfigError(f"cannot write to '{sayable(folder)}': {where} {fault}; expected a folder")
