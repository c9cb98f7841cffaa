"""Run the Locust suite against a server of its own: start `tutti serve`, load it, stop it."""

import argparse
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
START_TIMEOUT_S = 60.0


def main() -> int:
    """Returns Locust's exit status: 1 when a request failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", default=str(ROOT / "model_repository"))
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--html", default=str(ROOT / "loadtest" / "report.html"))
    options, rest = parser.parse_known_args()
    ports = ["--http-port", str(options.http_port), "--grpc-port", str(options.grpc_port), "--metrics-port", "0"]
    server = subprocess.Popen([sys.executable, "-m", "tutti.cli", "serve", options.repository, *ports])
    try:
        _wait_until_ready(server, options.http_port)
        locust = [
            sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py"), "--headless",
            "-u", str(options.users), "-r", str(options.users), "-t", f"{options.seconds}s", "--html", options.html,
            "--http-url", f"127.0.0.1:{options.http_port}", "--grpc-url", f"127.0.0.1:{options.grpc_port}", *rest,
        ]  # fmt: skip
        return subprocess.run(locust, check=False, cwd=ROOT).returncode
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def _wait_until_ready(server: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("the server did not become ready")


if __name__ == "__main__":
    sys.exit(main())
