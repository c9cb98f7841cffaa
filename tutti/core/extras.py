"""What is installed of what tutti can use, and the command that installs the rest.

On the package index the name `tutti` is somebody else's: this project is the distribution `tutti-serve`, and comes as a
checkout or a wheel. A command that is told to a person installs into the environment that runs this, and from there.
"""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import tutti

DISTRIBUTION = "tutti-serve"
# Both wheels install the module onnxruntime.
SWAP_ONNXRUNTIME = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
TWO_ONNXRUNTIMES = (
    "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
    f"{SWAP_ONNXRUNTIME} (or onnxruntime, to serve on the processor)"
)
# The distributions that each extra is for, with those that come by way of others and are imported by name.
NEEDED = {
    "ray": ("ray", "psutil", "pyyaml"),
    "export": ("torch", "transformers", "onnx", "onnxscript", "scikit-learn", "safetensors"),
    "pytorch": ("torch",),
    "sklearn": ("scikit-learn", "skl2onnx"),
    "gpu": ("nvidia-ml-py", "cuda-bindings"),
    "audio": ("soundfile", "soxr"),
    "loadtest": ("locust", "hpack", "geventhttpclient", "pyarrow", "pydantic", "pyyaml"),
    "tracing": ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"),
}
# Where a checkout has its pyproject.toml; of a wheel it is site-packages.
_ROOT = Path(tutti.__file__).parents[1]
_NAME = re.compile(r"[\w.-]+")
_EXTRA = re.compile(r"""extra == ["']([\w-]+)["']""")


def version(distribution: str) -> str:
    """Of what is installed under this name; "" for none."""
    import importlib.metadata as metadata  # costs more than most starts need

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def folder(distribution: str) -> str:
    """Where it is installed; "" where it is not."""
    import importlib.metadata as metadata

    try:
        return str(metadata.distribution(distribution).locate_file(""))
    except metadata.PackageNotFoundError:
        return ""


def requirements(extra: str) -> list[str]:
    """Of an extra of this project, as in its metadata; none where that is not installed."""
    import importlib.metadata as metadata

    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    split = [line.partition(";") for line in lines]
    return [text.strip() for text, _, marker in split if extra in _EXTRA.findall(marker)]


def missing(extra: str) -> list[str]:
    """Those of its requirements that are not installed."""
    return [text for text in requirements(extra) if not version(_NAME.findall(text)[0])]


def absent(extra: str) -> list[str]:
    """Those distributions of an extra that are not installed."""
    return [name for name in NEEDED[extra] if not version(name)]


def install(extra: str = "") -> str:
    """A command for a shell that installs an extra, or what tutti itself needs; to be typed in the current folder.

    pip takes what is installed for the distribution that it names, and asks no index for that.
    """
    brackets = f"[{extra}]" if extra else ""
    if _is_checkout():
        return f"{_pip()} install -e {shlex.quote(f'{_near(_ROOT)}{brackets}')}"
    if version(DISTRIBUTION):
        return f"{_pip()} install {shlex.quote(f'{DISTRIBUTION}{brackets}')}"
    return f"{_pip()} install {shlex.quote(f'./tutti_serve-{tutti.__version__}-py3-none-any.whl{brackets}')}"


def _is_checkout() -> bool:
    """That its sources run. A file of the name in site-packages is somebody else's."""
    try:
        return f'name = "{DISTRIBUTION}"' in (_ROOT / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return False


def _pip() -> str:
    """That of the environment that runs this, as a shell in the current folder finds it."""
    pip = Path(sys.executable).with_name("pip")
    if not pip.is_file():
        return f"{shlex.quote(_near(Path(sys.executable)))} -m pip"
    is_first = shutil.which("pip") == str(pip)
    return "pip" if is_first else shlex.quote(_near(pip))


def _near(path: Path) -> str:
    """Relative where it lies in the current folder."""
    try:
        return str(path.relative_to(os.getcwd()))
    except (ValueError, OSError):  # it lies elsewhere; the folder has been deleted
        return str(path)


def has_two_onnxruntimes() -> bool:
    """That both wheels of ONNX Runtime are in one folder: neither is whole then."""
    return "" != folder("onnxruntime") == folder("onnxruntime-gpu")
