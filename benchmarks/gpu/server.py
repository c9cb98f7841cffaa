"""Servers under test as processes: tutti's, what it can do by its own word, and what it says of the device's time."""

import contextlib
import functools
import importlib.util
import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.gpu import frame
from benchmarks.gpu.context import Array, NotThereYetError
from benchmarks.gpu.requests import Request, answer
from tutti.loadtest.process import free_ports

START_S = 150.0
_STOP_S = 15.0
_TAIL = 3000
_BUSY = re.compile(r"^tutti_device_busy_seconds_total(?:\{[^}]*\})? (\S+)", re.MULTILINE)


class StartError(Exception):
    """A server ended, or was not ready in time; the text is the end of its log."""


class RefusedError(Exception):
    """An answer that is not 200; `status` is what it was."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text[:500]}")
        self.status = status


@dataclass(frozen=True, slots=True)
class Server:
    """Addresses of a server that is ready."""

    http: str
    grpc: str
    metrics: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def infer(self, request: Request, timeout_s: float = 60.0) -> dict[str, Array]:
        """Raises RefusedError, and OSError when nobody answers."""
        head, body = request.http()
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:] if line)
        asked = urllib.request.Request(f"http://{self.http}/v2/models/{request.model}/infer", body, headers)
        try:
            with urllib.request.urlopen(asked, timeout=timeout_s) as response:
                text = response.read()
                told = response.headers["Inference-Header-Content-Length"]
                size = int(told) if told is not None else len(text)
        except urllib.error.HTTPError as error:
            raise RefusedError(error.code, error.read().decode(errors="replace")) from None
        return answer(json.loads(text[:size]), text[size:])

    def post(self, path: str, body: Mapping[str, Any] | None = None, timeout_s: float = 120.0) -> Any:
        """To one of Triton's routes. Raises RefusedError."""
        asked = urllib.request.Request(f"http://{self.http}/v2/{path}", json.dumps(body or {}).encode())
        try:
            with urllib.request.urlopen(asked, timeout=timeout_s) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            raise RefusedError(error.code, error.read().decode(errors="replace")) from None
        return json.loads(text) if text else {}

    def is_ready(self, model: str = "") -> bool:
        path = f"models/{model}/ready" if model else "health/ready"
        try:
            with urllib.request.urlopen(f"http://{self.http}/v2/{path}", timeout=5):
                return True
        except OSError:
            return False

    def page(self) -> str:
        """The metrics."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=10) as response:
            return str(response.read().decode())

    def busy_s(self) -> float | None:
        """How long devices executed so far, by the server's own events; None where it does not tell."""
        found = _BUSY.findall(self.page())
        return sum(map(float, found)) if found else None

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            one = psutil.Process(self.process.pid)
            return [one, *one.children(recursive=True)]
        return []

    def cpu_s(self) -> dict[int, float]:
        """Of each process so far."""
        found = {}
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                found[process.pid] = times.user + times.system
        return found


@contextlib.contextmanager
def running(command: list[str], ports: list[int], log: Path, **how: Any) -> Iterator[Server]:
    """A server until the block ends. Raises StartError."""
    http, grpc, metrics = (f"127.0.0.1:{port}" for port in ports)
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, **how)
    server = Server(http, grpc, metrics, process, log)
    try:
        _wait(server)
        yield server
    finally:
        _stop(server)


def _wait(server: Server) -> None:
    pause = threading.Event()
    until = time.monotonic() + START_S
    while time.monotonic() < until and server.process.poll() is None:
        if server.is_ready():
            return
        pause.wait(0.05)
    raise StartError(f"exit status {server.process.poll()}:\n{server.said()[-_TAIL:]}")


def _stop(server: Server) -> None:
    """In peace, and by force where the server does not end: a lost context may hold it."""
    started = server.processes()[1:]
    with contextlib.suppress(ProcessLookupError):
        server.process.send_signal(signal.SIGTERM)
    try:
        server.process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        server.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(_STOP_S)
    for process in started:
        with contextlib.suppress(psutil.Error):
            process.kill()


@contextlib.contextmanager
def tutti(repository: Path, log: Path, *flags: str, first_path: Path | None = None) -> Iterator[Server]:
    """`tutti serve`, from the sources here; `first_path` comes before all other folders of packages."""
    ports = free_ports(3)
    named = [f"--{name}-port={port}" for name, port in zip(("http", "grpc", "metrics"), ports, strict=True)]
    environment = frame.environment()
    if first_path is not None:
        environment["PYTHONPATH"] = f"{first_path}:{environment['PYTHONPATH']}"
        environment["LD_LIBRARY_PATH"] = ":".join([*_cuda_libraries(), environment.get("LD_LIBRARY_PATH", "")])
    command = [sys.executable, "-m", "tutti.app.cli", "serve", str(repository), *named, *flags]
    with running(command, ports, log, env=environment, cwd="/") as server:
        yield server


def _cuda_libraries() -> list[str]:
    """PyTorch's, for a library that would find them only once PyTorch was imported."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return []
    return sorted(str(path) for path in (Path(torch.origin).parents[1] / "nvidia").glob("*/lib"))


@functools.cache
def flags() -> str:
    """The help of `tutti serve`, which says what it can be asked for."""
    command = [sys.executable, "-m", "tutti.app.cli", "serve", "--help"]
    return subprocess.run(command, capture_output=True, text=True, env=frame.environment(), check=True).stdout


def flag(*parts: str) -> str:
    """The flag that has all `parts` in its name. Raises NotThereYetError where this server has none."""
    for name in re.findall(r"--[a-z0-9-]+", flags()):
        if all(part in name for part in parts):
            return str(name)
    raise NotThereYetError(f"`tutti serve` has no flag with {' and '.join(parts)} in its name")


@contextlib.contextmanager
def tutti_with(make: Callable[[str], Path], wishes: list[str], log: Path, *flags: str) -> Iterator[tuple[Server, str]]:
    """With the first of `wishes` (parts of a configuration) whose repository loads; and that wish."""
    with contextlib.ExitStack() as stack:
        for wish in wishes:
            try:
                started = stack.enter_context(tutti(make(wish), log, *flags))
                break
            except StartError:
                if wish == wishes[-1]:
                    raise
        yield started, wish


@dataclass(frozen=True, slots=True)
class _Batches:
    """A model's statistics: what is not of the time inside passes on the way there and back."""

    executions: int
    rows: int
    requests: int
    queued_ns: int
    inside_ns: int

    def since(self, before: "_Batches") -> dict[str, float]:
        executions, requests = self.executions - before.executions, self.requests - before.requests
        if not executions or not requests:
            return {}
        return {
            "rows a batch": (self.rows - before.rows) / executions,
            "queued ms": (self.queued_ns - before.queued_ns) / requests / 1e6,
            "inside ms": (self.inside_ns - before.inside_ns) / requests / 1e6,
        }


class Use:
    """What a server used while it was measured: cores, the share of the time that the device was busy, batches."""

    def __init__(self, server: Server, is_gpu: bool, model: str) -> None:
        self._server = server
        self._is_gpu = is_gpu
        self._model = model
        self.row: dict[str, Any] = {}

    def during(self, start_s: float, stop_s: float) -> None:
        """To be called as the load begins; waits until it measures, and until it has measured."""
        pause = threading.Event()
        pause.wait(max(0.0, start_s - time.monotonic()))
        before, busy, began = self._server.cpu_s(), self._busy(), time.monotonic()
        batches = self._batches()
        sampled = _Utilisation() if self._is_gpu and busy is None else None
        while time.monotonic() < stop_s - 0.05:
            pause.wait(min(0.1, max(0.0, stop_s - 0.05 - time.monotonic())))
            if sampled is not None:
                sampled.sample()
        after, seconds = self._server.cpu_s(), time.monotonic() - began
        used = sum(after[pid] - before.get(pid, 0.0) for pid in after)
        self.row = {"server cores": used / seconds}
        now, last = self._busy(), self._batches()
        if batches is not None and last is not None:
            self.row |= last.since(batches)
        if busy is not None and now is not None:
            self.row["busy"] = (now - busy) / seconds
        elif sampled is not None and sampled.values:
            self.row["NVML utilisation"] = sum(sampled.values) / len(sampled.values) / 100

    def _batches(self) -> "_Batches | None":
        """So far; None where the server has no statistics for us."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            with urllib.request.urlopen(f"http://{self._server.http}/v2/models/{self._model}/stats", timeout=10) as got:
                (stats,) = json.loads(got.read())["model_stats"]
            times = stats["inference_stats"]
            requests, inside_ns = times["success"]["count"], times["success"]["ns"]
            return _Batches(
                stats["execution_count"], stats["inference_count"], requests, times["queue"]["ns"], inside_ns
            )
        return None

    def _busy(self) -> float | None:
        with contextlib.suppress(OSError):
            return self._server.busy_s()
        return None


class _Utilisation:
    """NVML's, in percent: any kernel at all counts."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self._handle: Any = None
        with contextlib.suppress(Exception):
            import pynvml

            pynvml.nvmlInit()
            self._nvml: Any = pynvml
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(0)

    def sample(self) -> None:
        if self._handle is not None:
            with contextlib.suppress(Exception):
                self.values.append(float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu))
