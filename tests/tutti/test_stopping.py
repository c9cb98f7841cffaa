"""Stopping a server in which something hangs: a grace, and then an end."""

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from threading import Thread

import pytest

from tests.models import IN_PROCESS, Repository
from tests.serving import wait_until
from tutti.loadtest.process import free_ports

CONFIG = 'backend: "python" max_batch_size: 0 input { name: "x" data_type: TYPE_FP32 dims: 1 } output { name: "y" '
CONFIG += "data_type: TYPE_FP32 dims: 1 }"
HANG = 'import pathlib, time; pathlib.Path("{}").touch(); time.sleep(600)'
LIMIT_S = 60


def start(root: Path, *flags: str) -> tuple["subprocess.Popen[bytes]", int]:
    ports = free_ports(3)
    named = [f"--{name}-port={port}" for name, port in zip(("http", "grpc", "metrics"), ports, strict=True)]
    return subprocess.Popen([sys.executable, "-m", "tutti.app.cli", "serve", str(root), *named, *flags]), ports[0]


def ask(port: int, answers: list[int]) -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}
    body = json.dumps({"inputs": [tensor]}).encode()
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/models/stuck/infer", body, timeout=LIMIT_S).close()
    except urllib.error.HTTPError as error:
        answers.append(error.code)
    except OSError:
        answers.append(0)  # the server ended with it


def is_live(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/live", timeout=5).close()
        return True
    except OSError:
        return False


@pytest.mark.parametrize("again", [False, True])
def test_a_stuck_execution_does_not_hold_the_server(repository: Repository, tmp_path: Path, again: bool) -> None:
    entered = tmp_path / "entered"
    hangs = HANG.format(entered)
    repository.add_python("stuck", CONFIG, hangs)
    process, port = start(repository.root, f"--exit-timeout-secs={600 if again else 7}")
    answers: list[int] = []
    try:
        wait_until(lambda: is_live(port), LIMIT_S)
        asking = Thread(target=ask, args=[port, answers], daemon=True)
        asking.start()
        wait_until(entered.exists)
        process.send_signal(signal.SIGTERM)
        if again:
            wait_until(lambda: not is_live(port))  # it has heard
            process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 1
        asking.join(LIMIT_S)
        assert answers == [0 if again else 503]
    finally:
        process.kill()


# It takes the port that was free when the server looked, too.
HOLDS = """
import socket, threading
from concurrent.futures import ThreadPoolExecutor
ThreadPoolExecutor(1).submit(threading.Event().wait)
socket.taken = socket.create_server(("127.0.0.1", {}))
"""


def test_threads_of_a_model_do_not_hold_a_server_that_cannot_listen(repository: Repository) -> None:
    """The interpreter would wait for them, and nobody has asked it to stop."""
    (port,) = free_ports(1)
    repository.add_python("holds", CONFIG + IN_PROCESS, "pass", HOLDS.format(port))
    process, _ = start(repository.root, f"--http-port={port}", "--exit-timeout-secs=1")
    try:
        assert process.wait(LIMIT_S) == 1
    finally:
        process.kill()


def test_a_model_that_hangs_as_it_is_loaded_does_not_hold_the_server(repository: Repository, tmp_path: Path) -> None:
    entered = tmp_path / "entered"
    repository.add_python("stuck", CONFIG, "pass", HANG.format(entered))
    process, _ = start(repository.root)
    try:
        wait_until(entered.exists, LIMIT_S)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 0
    finally:
        process.kill()
