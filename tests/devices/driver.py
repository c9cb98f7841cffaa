"""Which CUDA driver the processes of a test find: the machine's, or the one of libcuda.c."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("libcuda.c")


def need_bindings() -> None:
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        pytest.skip("cuda-bindings is not installed")


def has_gpu() -> bool:
    """Asked in a process of its own: tests start others, and what has begun to use CUDA is not to be forked."""
    code = "from cuda.bindings import driver as d; d.cuInit(0); exit(0 if d.cuDeviceGetCount()[1] else 1)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def need_gpu() -> None:
    need_bindings()
    if not has_gpu():
        pytest.skip("no GPU")


def build(folder: Path) -> dict[str, str]:
    """Compile libcuda.c; returns the environment in which it is the driver."""
    need_bindings()
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    target = folder / "libcuda.so.1"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(target), str(SOURCE), "-lpthread", "-lrt"]
    subprocess.run(command, check=True)
    return {"LD_LIBRARY_PATH": str(folder)}
