"""Servers as processes of their own: free ports, waiting until they are ready, and stopping them.

For load tests, the demo, benchmarks and tests; knows only a server's command line and its health route.
"""

import contextlib
import json
import random
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable
from pathlib import Path

# Long, since a cluster on a busy machine may need more than one try.
START_TIMEOUT_S = 200.0
STOP_TIMEOUT_S = 60.0
_LOG_TAIL = 20_000
# Ports that were given out: a server that is just starting does not listen on its own yet.
_given: deque[int] = deque(maxlen=500)
_lock = threading.Lock()


def free_ports(count: int) -> list[int]:
    """Different ports that are free now and were not given out shortly before by this process.

    Neither the system nor Ray gives out ports of this range: a cluster takes dozens before our servers take theirs.
    """
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))
            with _lock:
                if port not in _given:
                    _given.append(port)
                    ports.append(port)
    return ports


def wait_until_ready(
    process: "subprocess.Popen[bytes]", url: str, log: Path | None = None, look: Callable[[], None] = lambda: None
) -> None:
    """Poll `url` until it answers 200, and `look` meanwhile.

    Raises RuntimeError with the end of the log if that does not come to pass.
    """
    pause = threading.Event()
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            look()
            pause.wait(0.05)
    tail = log.read_text(errors="replace")[-_LOG_TAIL:] if log is not None else ""
    raise RuntimeError(f"the server did not start (exit status {process.poll()}):\n{tail}")


def server_name(address: str) -> str:
    """Who answers at an HTTP address, by its server metadata."""
    with urllib.request.urlopen(f"http://{address}/v2", timeout=5) as response:
        return str(json.load(response)["name"])


def stop(
    process: "subprocess.Popen[bytes]", how: signal.Signals = signal.SIGTERM, timeout_s: float = STOP_TIMEOUT_S
) -> bool:
    """Ask the process to end and wait; kill it when it does not. Returns whether it ended by itself."""
    process.send_signal(how)
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    return True
