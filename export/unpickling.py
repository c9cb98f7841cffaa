"""Loads pickles of scikit-learn's, and says what is in the way. A pickle executes what is in it: give your own only."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tutti.export.errors import ExportError, first_line

_LIBRARY = "sklearn"


def unpickled(source: Path) -> Any:
    """Raises ExportError, and ModuleNotFoundError for a library that is not here."""
    import joblib

    try:
        with _importable(source.resolve().parent):
            return joblib.load(source)
    except Exception as error:
        if isinstance(error, AttributeError) and "__main__" in str(error):
            problem = f"what it names was in the program that made it: {first_line(error)}"
            raise ExportError(
                f"'{source.name}': {problem}; define it in a module, and import that where it is fitted"
            ) from None
        if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith(_LIBRARY + "."):
            raise
        if isinstance(error, ModuleNotFoundError | AttributeError) and _LIBRARY in str(error):
            problem = f"another version of scikit-learn than {_version(_LIBRARY)}, which is here, has made it"
            raise ExportError(f"'{source.name}': {problem}: {first_line(error)}") from None
        problem = f"joblib cannot load it ({type(error).__name__}: {first_line(error)})"
        raise ExportError(f"'{source.name}': expected a pickle of scikit-learn's: {problem}") from None


def modules_beside(source: Path) -> tuple[Path, ...]:
    """Files and packages beside a pickle that it was loaded with: one's own, which have to go where it goes."""
    folder = source.resolve().parent
    places = set()
    for module in list(sys.modules.values()):
        file = Path(getattr(module, "__file__", None) or "/")
        for place in (file, file.parent if file.name == "__init__.py" else file):
            if place.parent == folder and file.suffix == ".py":
                places.add(place)
    return tuple(sorted(places))


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Modules beside the pickle are found, as where it was made."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _version(library: str) -> str:
    return str(getattr(importlib.import_module(library), "__version__", ""))
