"""Compiles a model in a process of its own, which compiler_process.py is.

Compiling is minutes of Python, which would hold up whatever the server executes meanwhile, and a compiler, or what it
has made, may crash. What it has made has been compared with the model when `compile_apart` returns.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

AOT = "aot_inductor"
JIT = "torch_compile"
MODES = ("default", "max-autotune-no-cudagraphs")
# In the folder of what was compiled: AOTInductor's package, or what Inductor keeps for itself; and the same for the
# largest batch only.
PACKAGE = "model.pt2"
KEPT = "inductor"
LARGEST = "largest"
RESULT = "result.json"
# The kernel ends a process at once, unless a driver holds it.
_KILL_TIMEOUT_S = 30.0


class Uncompilable(Exception):
    """The model cannot be compiled here: the message says what is missing, or went wrong, in one line.

    `log` is what the compiling process has written, with the stack where it has crashed.
    """

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True, slots=True)
class Job:
    """`config` is the model's, as text, `path` an exported program's, `how` AOT or JIT, and `device` as PyTorch names
    it; a `tolerance` below 0 is the datatype's own. What is compiled is for batches of any size, or of `rows` only."""

    model: str
    config: str
    path: str
    how: str
    mode: str
    device: str
    tolerance: float
    timeout_s: float
    rows: int = 0


def compile_apart(job: Job, folder: Path) -> None:
    """Compile into the folder. Blocks for minutes, in which others may do what they like. Raises Uncompilable."""
    missing = missing_for(job.how, job.device, os.environ)
    if missing:
        raise Uncompilable(missing)
    with tempfile.TemporaryFile() as log, contextlib.ExitStack() as ends:
        ours, theirs = os.pipe()  # nothing is written to it: it closes when this process ends
        ends.callback(os.close, theirs)
        command = [sys.executable, "-m", "tutti.backends.compiler_process", str(folder), str(ours)]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=_environment(job, folder),
                pass_fds=(ours,),
                start_new_session=True,
            )
        finally:
            os.close(ours)
        try:
            process.communicate(json.dumps(asdict(job)).encode(), timeout=job.timeout_s)
        except subprocess.TimeoutExpired:
            raise Uncompilable(f"it took more than {job.timeout_s:g} s (parameters.tutti.compile.timeout_s)") from None
        finally:
            with contextlib.suppress(ProcessLookupError):  # with the compilers that it has started
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it
                process.wait(_KILL_TIMEOUT_S)
        log.seek(0)
        said = log.read().decode(errors="replace")
    failure = _failure(folder, process.returncode, said)
    if failure:
        raise Uncompilable(failure, said)
    (folder / RESULT).unlink()


def missing_for(how: str, device: str, environment: Mapping[str, str]) -> str:
    """What of the tools that compile is not on this machine, and how to get it; "" when all is there."""
    search = environment.get("PATH", os.defpath)
    is_cuda = device.startswith("cuda")
    if how == AOT or not is_cuda:
        compiler = environment.get("CXX", "g++")
        if shutil.which(compiler, path=search) is None:
            return f"there is no C++ compiler: '{compiler}' is not on PATH (install g++, or set CXX)"
    elif not any(shutil.which(name, path=search) for name in (environment.get("CC", ""), "gcc", "clang") if name):
        return "there is no C compiler: neither gcc nor clang is on PATH (install gcc, or set CC)"
    if how == JIT and not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return f"Python's headers are not in {sysconfig.get_path('include')} (install python3-dev)"
    if how == AOT and is_cuda and not any((folder / "cuda.h").is_file() for folder in _cuda_includes(environment)):
        return "there are no CUDA headers: cuda.h was not found (install the CUDA toolkit, or set CUDA_HOME)"
    return ""


def _cuda_includes(environment: Mapping[str, str]) -> list[Path]:
    """Where PyTorch looks for them."""
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    if not home:
        nvcc = shutil.which("nvcc", path=environment.get("PATH", os.defpath))
        home = str(Path(nvcc).parent.parent) if nvcc else "/usr/local/cuda"
    added = environment.get("CUDA_INC_PATH")
    return [Path(home) / "include", *([Path(added)] if added else [])]


def _environment(job: Job, folder: Path) -> dict[str, str]:
    """The process's: what Inductor writes goes into the folder, and AOTInductor sees the one GPU only.

    A package is for GPU 0 then, and may be loaded on any of its kind.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / KEPT)
    environment.pop("TRITON_CACHE_DIR", None)
    if job.how == AOT and job.device.startswith("cuda:"):
        index = int(job.device.partition(":")[2])
        visible = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        environment["CUDA_VISIBLE_DEVICES"] = visible[index] if index < len(visible) else str(index)
    return environment


def _failure(folder: Path, status: int, log: str) -> str:
    try:
        return str(json.loads((folder / RESULT).read_bytes()))
    except (OSError, ValueError):
        return f"the compiling process ended with status {status}: {_last_words(log)[:300]}"


def _last_words(log: str) -> str:
    """Where it crashed, as faulthandler tells; else the last line that it wrote."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if (crash := log.find("Fatal Python error: ")) >= 0:
        headline, *stack = log[crash:].splitlines()
        return " ".join([headline, *[line.strip() for line in stack if line.startswith("  File ")][:1]])
    return lines[-1] if lines else "it wrote nothing"


def one_line(error: BaseException) -> str:
    """The line of an error that says most: a compiler's first, where it has one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "fatal error:" in line or " error: " in line] or lines
    return f"{type(error).__name__}: {telling[0][:300]}" if telling else type(error).__name__
