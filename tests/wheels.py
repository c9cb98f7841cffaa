"""The wheel as somebody would be given it, and an environment that has it and nothing of the checkout."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("tutti", "ensembles", "ray_app", "export", "loadtest")
# Where each of these folders is in what is installed.
PLACES = {name: name if name == "tutti" else f"tutti/{name}" for name in PACKAGES}


@dataclass(frozen=True)
class Installed:
    """`bin` has python and the command; the libraries are those of the tests."""

    wheel: Path
    bin: Path


def build(folder: Path) -> Path:
    """The wheel of a clone."""
    return pack(copy(folder / "source"), folder)


def copy(source: Path) -> Path:
    """What a distribution is made of, links as links: builds leave files behind, and take up those of earlier ones."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    return source


def pack(source: Path, folder: Path) -> Path:
    """The wheel of a folder, or of an sdist."""
    _run("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, source)
    (wheel,) = folder.glob("*.whl")
    return wheel


def pack_sdist(source: Path, folder: Path) -> Path:
    _run("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})", cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    return sdist


def install(wheel: Path, folder: Path) -> Installed:
    """Into an environment of its own, without network: the other libraries are found where the tests have them."""
    _run("-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    _run("-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", "--no-compile", wheel)
    (own,) = folder.glob("lib/python*/site-packages")
    # Folders that a .pth file names are searched last, and .pth files in them, as an editable install's, are not read.
    (own / "libraries.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))
    return Installed(wheel, folder / "bin")


def add_strangers(folder: Path) -> None:
    """Packages named as parts of tutti are, which nobody may import."""
    for name in set(PACKAGES) - {"tutti"}:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f'raise RuntimeError("this {name} is somebody else\'s")\n')


def _run(*arguments: object, cwd: Path | None = None) -> None:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
