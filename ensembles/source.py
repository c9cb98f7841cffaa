"""The Python file that a graph is written in: what it makes, or a line that says where it is wrong."""

import inspect
import re
import traceback
import types
from pathlib import Path
from typing import Any

from tutti.core import files
from tutti.core.errors import ConfigError, reason
from tutti.ensembles.builder import Graph, Step
from tutti.ensembles.places import MistakeAt
from tutti.ensembles.spelling import near
from tutti.repository import unserved

# What Python says of a keyword that one of the graph's methods does not have.
_KEYWORD = re.compile(r"^Graph\.(?P<method>\w+)\(\) got an unexpected keyword argument '(?P<given>\w+)'")
_EXPECTED = "expected a function build(repository) -> Graph (docs/ensembles.md)"


def graph_of(file: Path, root: Path) -> Graph:
    """What the file's `build` makes of the repository `root`. Raises ConfigError, which names the file and the line."""
    build = getattr(_module(file), "build", None)
    if not callable(build):
        raise ConfigError(f"{file}: {_EXPECTED}, {'there is none' if build is None else f'got {build!r:.40}'}")
    try:
        graph = build(root)
    except BaseException as error:
        raise _wrong(file, error) from None
    if not isinstance(graph, Graph):
        raise ConfigError(f"{file}: build returned {graph!r:.40}: expected a Graph")
    try:
        graph.config()
    except BaseException as error:
        raise _wrong(file, error) from None
    return graph


def _module(file: Path) -> Any:
    if not file.is_file() or file.suffix != ".py":
        meant = unserved.near(file) if not file.exists() else ""
        got = "a folder" if file.is_dir() else "no such file" if not file.exists() else f"a file '{file.name}'"
        raise ConfigError(f"{file}: expected a Python file, got {got}{f'; did you mean {meant!r}?' if meant else ''}")
    module = types.ModuleType(f"tutti_graph_{file.stem}")
    module.__file__ = str(file.absolute())
    try:  # unlike an import this leaves no compiled file beside it
        exec(compile(files.read_bytes(file, files.MAX_TEXT_BYTES), file.absolute(), "exec"), vars(module))
    except BaseException as error:
        raise _wrong(file, error) from None
    return module


def _wrong(file: Path, error: BaseException) -> BaseException:
    """A ConfigError with the place in the file where it came to be; what a person has stopped is left as it is."""
    if isinstance(error, KeyboardInterrupt):
        return error
    if isinstance(error, SyntaxError) and error.filename == str(file.absolute()):
        line = f": {' '.join((error.text or '').split())[:80]}" if error.text else ""
        return ConfigError(f"{file}:{error.lineno or 1}:{error.offset or 1}: {error.msg}{line}")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file.absolute())]
    lines = [line for name, line in error.place if name == str(file.absolute())] if isinstance(error, MistakeAt) else []
    lines += [frame.lineno or 1 for frame in reversed(frames)]
    where = f"{file}:{lines[0]}" if lines else str(file)
    if isinstance(error, ConfigError):
        return ConfigError(f"{where}: {error}")
    said = reason(error).partition("\n")[0]
    advice = _meant(error) if frames or not isinstance(error, TypeError) else f"; {_EXPECTED}"
    return ConfigError(f"{where}: {type(error).__name__}{f': {said}' if said else ''}{advice}")


def _meant(error: BaseException) -> str:
    """What an unknown module, or attribute or keyword of the builder's own objects, may have been meant for."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if (missing or "").partition(".")[0] == "ensembles":  # before 0.2 it was a package of its own
        return "; it is tutti.ensembles"
    if isinstance(error, TypeError) and (match := _KEYWORD.search(str(error))):
        return near(match["given"], inspect.signature(getattr(Graph, match["method"])).parameters)
    if not isinstance(error, AttributeError) or not type(error.obj).__module__.startswith("tutti.ensembles."):
        return ""
    known = [name for name in dir(error.obj) if not name.startswith("_")]
    return near(error.name or "", known) or (f"; it is {error.obj!r}" if isinstance(error.obj, Step) else "")
