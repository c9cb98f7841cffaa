"""Scenarios against a server of their own: start `tutti serve`, on Ray or not, load it, stop it.

python -m tutti.loadtest.run [--ray] SCENARIO [SCENARIO ...] [--output FOLDER]
"""

import argparse
import signal
import subprocess
import sys
from pathlib import Path

from tutti.loadtest import names
from tutti.loadtest.errors import ScenarioError
from tutti.loadtest.process import START_TIMEOUT_S, free_ports, stop, wait_until_ready
from tutti.loadtest.slo import Verdict

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Returns the worst exit status of the scenarios: see `tutti loadtest`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scenarios", nargs="+", help="files, or names of those in loadtest/scenarios")
    parser.add_argument("--repository", default=str(ROOT / "model_repository"))
    parser.add_argument("--ray", action="store_true", help="on a local Ray cluster, with pools as the work needs them")
    parser.add_argument("--output", type=Path, default=ROOT / "loadtest" / "reports", help="a folder for each scenario")
    options, rest = parser.parse_known_args()
    try:
        scenarios = [names.scenario(name).resolve() for name in options.scenarios]
    except ScenarioError as error:
        parser.error(str(error))
    options.output, repository = options.output.resolve(), Path(options.repository).resolve()
    http, grpc, metrics = free_ports(3)
    ports = ["--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
    options.output.mkdir(parents=True, exist_ok=True)
    if options.ray:
        pools = options.output / "pools.yaml"
        pools.write_text("pools: [{name: elastic, min_replicas: 0, max_replicas: 4}]\n")
        ports += ["--ray", "--placement", str(pools)]
    server = subprocess.Popen([sys.executable, "-m", "tutti.app.cli", "serve", str(repository), *ports])
    try:
        wait_until_ready(server, f"http://127.0.0.1:{http}/v2/health/ready")
        return max(_run(path, http, metrics, options.output, rest) for path in scenarios)
    except RuntimeError:  # it has said itself why, on this terminal
        print(f"tutti.loadtest.run: no scenario was run: {_ended(server.poll())}", file=sys.stderr)
        return int(Verdict.INVALID)
    except KeyboardInterrupt:
        print("tutti.loadtest.run: stopped by hand, and the server with it", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        stop(server)


def _ended(status: int | None) -> str:
    """What became of a server that did not come up."""
    if status is None:
        return f"the server was not ready within {START_TIMEOUT_S:g} s"
    if status < 0:
        return f"the server was ended by {signal.Signals(-status).name}"
    return f"the server ended with status {status}, and has said why above"


def _run(path: Path, http: int, metrics: int, output: Path, rest: list[str]) -> int:
    command = [sys.executable, "-m", "tutti.loadtest.cli", "run", str(path), "--url", f"127.0.0.1:{http}"]
    command += ["--metrics", f"127.0.0.1:{metrics}", "--output", str(output / path.stem), *rest]
    print(f"== {path.stem}", flush=True)
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
