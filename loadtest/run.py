"""Run the Locust suite against a server of its own: start `tutti serve`, load it, stop it."""

import argparse
import subprocess
import sys
from pathlib import Path

from loadtest.process import stop, wait_until_ready

ROOT = Path(__file__).parents[1]


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
        wait_until_ready(server, f"http://127.0.0.1:{options.http_port}/v2/health/ready")
        locust = [
            sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py"), "--headless",
            "-u", str(options.users), "-r", str(options.users), "-t", f"{options.seconds}s", "--html", options.html,
            "--http-url", f"127.0.0.1:{options.http_port}", "--grpc-url", f"127.0.0.1:{options.grpc_port}", *rest,
        ]  # fmt: skip
        return subprocess.run(locust, check=False, cwd=ROOT).returncode
    finally:
        stop(server)


if __name__ == "__main__":
    sys.exit(main())
