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
    """From a copy of what a wheel is made of: builds leave files behind, and take up those of earlier ones."""
    source = folder / "source"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    _run("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, source)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Installed:
    """Into an environment of its own, without network: the other libraries are found where the tests have them."""
    _run("-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    _run("-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", "--no-compile", wheel)
    (own,) = folder.glob("lib/python*/site-packages")
    # Folders that a .pth file names are searched last, and .pth files in them, as an editable install's, are not read.
    (own / "libraries.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))
    return Installed(wheel, folder / "bin")


def _run(*arguments: object) -> None:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
