"""How a model.py is imported: in a process that has no other, as Triton does it, or beside other models.

Knows nothing of what the file has in it.
"""

import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from tutti.backends.python import triton_python_backend_utils
from tutti.backends.python.pb_utils.folders import know_folder

_FOR_MODELS = Path(__file__).parent / "for_models"
_lock = threading.Lock()


def import_alone(folder: Path, version: int, filename: str) -> ModuleType:
    """Import the version's file into a process that is the model's own.

    As in Triton it is the module `model` of the package that is the version's folder, so that relative imports work,
    and the version's and the model's folders are searched, then and later. They come behind the standard library and
    before installed packages. Nothing compiled is kept: its age is told in seconds only.
    """
    sys.modules["triton_python_backend_utils"] = triton_python_backend_utils
    sys.dont_write_bytecode = True
    know_folder(str(folder / str(version)))
    installed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    position = sys.path.index(installed[0]) if installed else len(sys.path)
    sys.path[position:position] = [str(folder / str(version)), str(folder)]
    sys.path.append(str(_FOR_MODELS))
    path = folder / str(version) / filename
    if path.suffix == ".py" and path.stem.count(".") == 0 and path.parent == folder / str(version):
        return importlib.import_module(f"{version}.{path.stem}")
    return _import(path, "model")


def import_beside(path: Path, name: str) -> ModuleType:
    """Import the file into a process of several models, as the module `name`, which `forget` ends.

    What lies in its folder is imported anew with it and is its own: another model finds its own under the same name.
    That holds for imports at the file's beginning, not for those that its functions make later.
    """
    with _lock, _beside(path.parent, name):
        sys.modules.setdefault("triton_python_backend_utils", triton_python_backend_utils)
        know_folder(str(path.parent))
        return _import(path, name)


def forget(module: ModuleType) -> None:
    """The model is served no more."""
    if sys.modules.get(module.__name__) is module:
        del sys.modules[module.__name__]


def _import(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"'{path.name}' is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # what pickles one of its functions looks for it there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        forget(module)
        raise
    return module


@contextmanager
def _beside(folder: Path, name: str) -> Iterator[None]:
    """Let the file, which is to be the module `name`, import what lies beside it, and nobody else."""
    before = set(sys.modules)
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = writes_bytecode
        for other in set(sys.modules) - before - {name}:
            if _lies_in(sys.modules[other], folder):
                del sys.modules[other]


def _lies_in(module: ModuleType, folder: Path) -> bool:
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any(place is not None and Path(place).is_relative_to(folder) for place in places)
