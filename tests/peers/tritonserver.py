"""A real tritonserver, from the nvidia-pytriton wheel in an environment of its own (`make triton`).

It has no onnxruntime backend, so one written for its python backend stands in: the repository is served unchanged.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tutti.loadtest.process import free_ports, server_name, stop, wait_until_ready

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-triton"
_ONNX_BACKEND = Path(__file__).with_name("onnx_backend.py")


@dataclass(frozen=True)
class Running:
    """Addresses of a server that is ready."""

    http: str
    grpc: str
    pid: int


def require() -> None:
    """Skip the test where no tritonserver is installed; in CI that is a failure."""
    if (ENVIRONMENT / ".ready").exists():
        return
    message = "no tritonserver: run `make triton`"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def _site_packages() -> Path:
    return next((ENVIRONMENT / "lib").glob("python3.*/site-packages"))


def _backends(folder: Path) -> Path:
    """A backend folder: Triton's python backend with its stub, and our onnxruntime on top of it."""
    server = _site_packages() / "pytriton" / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copytree(server / "backends" / "python", folder / "python")
    stub = shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", folder / "python")
    os.chmod(stub, 0o755)
    (folder / "onnxruntime").mkdir()
    shutil.copy(_ONNX_BACKEND, folder / "onnxruntime" / "model.py")
    return folder


def _program() -> Path:
    return _site_packages() / "pytriton" / "tritonserver" / "bin" / "tritonserver"


def _environment() -> dict[str, str]:
    packages = _site_packages()
    libraries = [packages / "nvidia_pytriton.libs", Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, libraries)), "PYTHONPATH": str(packages)}


def usage() -> str:
    """What its --help prints; skips the test where none is installed."""
    require()
    command = [str(_program()), "--help"]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


@contextmanager
def running(repository: Path, scratch: Path, *flags: str) -> Iterator[Running]:
    """Serve `repository` until the block ends. Raises RuntimeError with the server's log if it does not start."""
    packages = _site_packages()
    http, grpc, metrics = free_ports(3)
    command = [
        str(_program()),
        f"--model-repository={repository}", f"--backend-directory={_backends(scratch / 'backends')}",
        f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}", "--http-address=127.0.0.1",
        "--grpc-address=127.0.0.1", "--disable-auto-complete-config",
        "--exit-timeout-secs=3", *flags,
    ]  # fmt: skip
    log_path = scratch / "tritonserver.log"
    with log_path.open("wb") as log:
        # The stub's interpreter searches its working directory first, and PYTHONPATH not in every build.
        server = subprocess.Popen(command, env=_environment(), stdout=log, stderr=log, cwd=packages)
        try:
            wait_until_ready(server, f"http://127.0.0.1:{http}/v2/health/ready", log_path)
            assert server_name(f"127.0.0.1:{http}") == "triton", "another server has taken the port"
            yield Running(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", server.pid)
        finally:
            stop(server)
