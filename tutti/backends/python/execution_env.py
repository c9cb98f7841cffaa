"""Interpreters with packages of their own: Triton's parameter `EXECUTION_ENV_PATH`, a folder or an archive of one.

An archive is what conda-pack makes, or a tar of a virtual environment; it is unpacked once for each state of the file,
and stays for as long as this process lives.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutti.backends.python.interpreter import Command
from tutti.core import temporary_folders
from tutti.core.errors import ConfigError
from tutti.repository.model_config import ModelConfig

PARAMETER = "EXECUTION_ENV_PATH"
_MODEL_FOLDER = "$$TRITON_MODEL_DIRECTORY"
_CHECK_TIMEOUT_S = 60.0
_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
_lock = threading.Lock()
_unpacked: dict[str, temporary_folders.Folder] = {}


def command(config: ModelConfig, folder: Path) -> Command:
    """How the model's process is started. Raises ConfigError for an environment that cannot be used."""
    return _command(config.name, config.parameters.get(PARAMETER, ""), folder)


def command_of(proto: Any, folder: Path) -> Command:
    """The same of a configuration that is not complete yet."""
    archive = proto.parameters[PARAMETER].string_value if PARAMETER in proto.parameters else ""
    return _command(proto.name, archive, folder)


def _command(model: str, archive: str, folder: Path) -> Command:
    if not archive:
        return Command()
    path = Path(archive.replace(_MODEL_FOLDER, str(folder.resolve())))
    try:
        root = path if path.is_dir() else _unpack(path)
        return _within(root)
    except (OSError, ValueError, tarfile.TarError, EOFError, subprocess.SubprocessError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"model '{model}': parameters.{PARAMETER}: '{archive}': {reason}") from None


def _within(root: Path) -> Command:
    """The interpreter of an environment. Raises ValueError for one of another version."""
    executable = root / "bin" / "python"
    if not executable.exists():
        raise ValueError(f"expected an environment with bin/python, got {sorted(os.listdir(root))[:8]}")
    environment = _environment(root)
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    ran = subprocess.run(
        [executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=_CHECK_TIMEOUT_S,
        stdin=subprocess.DEVNULL,
    )
    if ran.returncode:
        raise ValueError(f"its interpreter does not start: {ran.stderr.strip()[-300:]}")
    if ran.stdout.strip() != _VERSION:
        raise ValueError(f"expected Python {_VERSION}, as the server's, got {ran.stdout.strip()}")
    return Command(str(executable), environment)


def _environment(root: Path) -> Mapping[str, str]:
    """What `bin/activate` would set."""
    search = os.pathsep.join([str(root / "bin"), os.environ.get("PATH", os.defpath)])
    libraries = os.pathsep.join(filter(None, [str(root / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]))
    is_conda = (root / "conda-meta").is_dir()
    kind = {"CONDA_PREFIX": str(root), "LD_LIBRARY_PATH": libraries} if is_conda else {"VIRTUAL_ENV": str(root)}
    return {"PATH": search, "PYTHONHOME": "", "PYTHONNOUSERSITE": "1", **kind}


def _unpack(archive: Path) -> Path:
    """The environment in the archive, unpacked for as long as this process lives. Raises OSError and TarError."""
    if not archive.is_file():
        raise FileNotFoundError("no such folder or archive")
    stat = archive.stat()
    text = f"{archive.resolve()} {stat.st_mtime_ns} {stat.st_size}"
    key = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
    with _lock:
        if key not in _unpacked:
            folder = temporary_folders.Folder("environment")
            try:
                _extract(archive, folder.path)
            except BaseException:
                folder.cleanup()
                raise
            _unpacked[key] = folder
        return _top(_unpacked[key].path)


def _extract(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="tar")
    unpack = _top(folder) / "bin" / "conda-unpack"
    if unpack.exists():
        python = _top(folder) / "bin" / "python"
        subprocess.run([python, unpack], check=True, capture_output=True, timeout=600, stdin=subprocess.DEVNULL)


def _top(folder: Path) -> Path:
    """The environment's folder: the archive's own, or the only one in it."""
    inside = list(folder.iterdir())
    return inside[0] if len(inside) == 1 and not (folder / "bin").is_dir() and inside[0].is_dir() else folder
