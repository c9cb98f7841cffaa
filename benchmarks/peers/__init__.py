"""Other servers with the tiny model, at the best settings found, in an environment of their own (`make peers`).

Each takes one item of 384 FP32 a request, and batches up to 64. Each has the leanest body it takes: raw bytes where
it does, else JSON. None of them parses an inference protocol, checks shapes, or keeps statistics by model.
"""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from benchmarks.models import MLP
from tutti.loadtest.process import free_ports, wait_until_ready

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-peers"
_FOLDER = Path(__file__).parent
_ITEM = np.full(MLP.shape, 0.5, np.float32)


@dataclass(frozen=True, slots=True)
class Peer:
    """How a server is started on a port, where it is asked, and with which body."""

    name: str
    command: Callable[[int], Sequence[str]]
    path: str
    ready: str
    body: bytes
    content_type: str


PEERS = [
    Peer(
        "mosec",
        lambda port: ["python", str(_FOLDER / "mosec_server.py"), "--port", str(port), "--address", "127.0.0.1"],
        "/inference",
        "/",
        _ITEM.tobytes(),
        "application/octet-stream",
    ),
    Peer(
        "LitServe",
        lambda port: ["python", str(_FOLDER / "litserve_server.py"), str(port)],
        "/predict",
        "/health",
        json.dumps({"x": _ITEM.tobytes().hex()}).encode(),
        "application/json",
    ),
    Peer(
        "BentoML",
        lambda port: ["bentoml", "serve", "bentoml_server:Mlp", "--port", str(port), "--host", "127.0.0.1"],
        "/run",
        "/readyz",
        json.dumps({"x": [_ITEM.tolist()]}).encode(),
        "application/json",
    ),
]


def require() -> None:
    """Raises SystemExit where the environment is not there."""
    if not (ENVIRONMENT / ".ready").exists():
        raise SystemExit("the other servers are not installed: make peers")


@contextmanager
def running(peer: Peer, model: Path, log: Path) -> Iterator[str]:
    """The server over an ONNX file, with one thread of its own; gives the URL to ask."""
    (port,) = free_ports(1)
    tools = ENVIRONMENT / "bin"
    program, *arguments = peer.command(port)
    settings = {"MODEL": str(model), "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "BENTOML_DO_NOT_TRACK": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(tools / program), *arguments],
            stdout=file,
            stderr=file,
            cwd=_FOLDER,
            env={**os.environ, **settings},
            start_new_session=True,
        )
        try:
            wait_until_ready(process, f"http://127.0.0.1:{port}{peer.ready}", log)
            yield f"http://127.0.0.1:{port}{peer.path}"
        finally:
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, alive = psutil.wait_procs([*family, psutil.Process(process.pid)], timeout=10)
    for one in alive:
        one.kill()
    process.wait()
