"""What the simulation says of ten minutes of load on an autoscaled pool, and what then happens on a real cluster.

    python -m benchmarks.simulated --report benchmarks/simulated.md

First a minute of calibration: the way to a replica and back, and how long one takes to start. Then the load, a Poisson
process along two waves, a ramp and a lull, once in simulated time and once against `tutti serve --ray`. And a day of
ten thousand replicas, simulated.
"""

import argparse
import asyncio
import itertools
import random
import re
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
from pathlib import Path

import numpy as np
import tritonclient.grpc.aio as grpcclient

from benchmarks.machine import commit, hardware
from tutti.loadtest.process import free_ports, wait_until_ready
from tutti.ray_app import fluid_simulation, simulation
from tutti.ray_app.scenario import Scenario, SimulatedPool, Stretch

FIXED_MS, ROW_MS, MOST_ROWS, MOST_REPLICAS = 40.0, 8.0, 8, 4
POOL = "pool"
CONFIG = f"""
    backend: "python" max_batch_size: {MOST_ROWS} dynamic_batching {{}}
    input {{ name: "x" data_type: TYPE_FP32 dims: 1 }} output {{ name: "y" data_type: TYPE_FP32 dims: 1 }}
"""
MODEL = f"""
    import time
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def execute(self, requests):
            given = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
            time.sleep({FIXED_MS / 1e3} + {ROW_MS / 1e3} * sum(len(x) for x in given))
            return [pb_utils.InferenceResponse([pb_utils.Tensor("y", x * 2)]) for x in given]
"""
ROWS = [1, 1, 2, 4]


def scenario(seconds: float, hop_ms: float, start_s: float, seed: int) -> Scenario:
    """The load, `seconds` long."""
    part = seconds / 600
    return Scenario(
        max_batch_size=MOST_ROWS,
        pools=[
            SimulatedPool(
                name=POOL, min_replicas=1, max_replicas=MOST_REPLICAS,
                fixed_ms=FIXED_MS, row_ms=ROW_MS, hop_ms=hop_ms, start_s=start_s,
            )
        ],
        trace=[
            # Without a step up: what waits for replicas to start would be about one request in a hundred, so that the
            # 99th percentile would be one thing or another by chance.
            Stretch(kind="wave", seconds=240 * part, rate=10, to=90),
            Stretch(kind="ramp", seconds=60 * part, rate=10, to=45),
            Stretch(seconds=90 * part, rate=45),
            Stretch(kind="wave", seconds=150 * part, rate=45, to=85),
            Stretch(seconds=60 * part, rate=15),
        ],
        rows=ROWS,
        merges=False,
        seed=seed,
    )  # fmt: skip


def a_day() -> Scenario:
    """A day with a peak that ten thousand replicas serve, and bursts on it."""
    pool = SimulatedPool(name=POOL, min_replicas=100, max_replicas=10_000, fixed_ms=5, row_ms=1, hop_ms=3, start_s=60)
    return Scenario(
        max_batch_size=32,
        pools=[pool],
        trace=[Stretch(kind="wave", seconds=86_400, rate=400_000, to=6_100_000)],
        bursts={"every_s": 1800, "seconds": 30, "factor": 1.2},  # type: ignore[arg-type]
    )


class Server:
    """`tutti serve --ray` with the pool, asked over gRPC."""

    def __init__(self, folder: Path) -> None:
        version = folder / "models" / "model" / "1"
        version.mkdir(parents=True)
        (version / "model.py").write_text(textwrap.dedent(MODEL).lstrip())
        (version.parent / "config.pbtxt").write_text(CONFIG)
        placement = folder / "placement.yaml"
        placement.write_text(f"pools: [{{name: {POOL}, min_replicas: 1, max_replicas: {MOST_REPLICAS}}}]\n")
        http, grpc, self._metrics = free_ports(3)
        self.address = f"127.0.0.1:{grpc}"
        command = [sys.executable, "-m", "tutti.app.cli", "serve", str(folder / "models"), "--ray"]
        command += ["--placement", str(placement), "--http-port", str(http), "--grpc-port", str(grpc)]
        log = folder / "tutti.log"
        with log.open("wb") as file:
            self.process = subprocess.Popen([*command, "--metrics-port", str(self._metrics)], stdout=file, stderr=file)
        wait_until_ready(self.process, f"http://127.0.0.1:{http}/v2/health/ready", log)

    def gauge(self, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics}/metrics", timeout=10) as page:
            found = re.search(rf'^{name}{{pool="{POOL}"}} (\S+)', page.read().decode(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    async def load(self, due_s: list[float], rows: list[int]) -> list[float]:
        """Ask when it is due, open loop; how long each took, seconds, from when it was due."""
        client = grpcclient.InferenceServerClient(self.address)
        start = time.monotonic() + 0.1
        took: list[float] = []

        async def ask(due: float, count: int) -> None:
            tensor = grpcclient.InferInput("x", [count, 1], "FP32")
            tensor.set_data_from_numpy(np.ones((count, 1), np.float32))
            await client.infer("model", [tensor])
            took.append(time.monotonic() - start - due)

        tasks = []
        for due, count in zip(due_s, rows, strict=True):
            await asyncio.sleep(max(0.0, start + due - time.monotonic()))
            tasks.append(asyncio.create_task(ask(due, count)))
        await asyncio.gather(*tasks)
        await client.close()
        return took

    async def watched(
        self, due_s: list[float], rows: list[int]
    ) -> tuple[list[float], list[tuple[float, float, float]]]:
        """The same, and (second, replicas wanted, replicas up) meanwhile."""
        seen: list[tuple[float, float, float]] = []
        start = time.monotonic() + 0.1

        async def watch() -> None:
            while True:
                wanted = await asyncio.to_thread(self.gauge, "tutti_pool_wanted_replicas")
                up = await asyncio.to_thread(self.gauge, "tutti_pool_replicas")
                seen.append((time.monotonic() - start, wanted, up))
                await asyncio.sleep(0.25)

        watching = asyncio.create_task(watch())
        took = await self.load(due_s, rows)
        watching.cancel()
        return took, seen


def calibrate(server: Server) -> tuple[float, float]:
    """(hop_ms, start_s)."""
    steady = [second / 5 for second in range(50)]
    took = asyncio.run(server.load(steady, [1] * len(steady)))
    hop_ms = max(0.0, statistics.median(took) * 1e3 - FIXED_MS - ROW_MS)
    starts = []
    for rate in (45, 80):
        count = 12 * rate
        _, seen = asyncio.run(server.watched([number / rate for number in range(count)], [2] * count))
        goal = max(up for _, _, up in seen)
        asked = next(second for second, wanted, _ in seen if wanted > goal - 1)
        starts.append(next(second for second, _, up in seen if up == goal) - asked)
        until = time.monotonic() + 40
        while server.gauge("tutti_pool_replicas") > 1 and time.monotonic() < until:
            time.sleep(0.5)
    return hop_ms, statistics.mean(starts)


def compare(seconds: float, seed: int) -> tuple[list[str], dict[str, float]]:
    """Lines for people, and the errors, as shares."""
    with tempfile.TemporaryDirectory(prefix="tutti-simulated-") as folder:
        server = Server(Path(folder))
        try:
            hop_ms, start_s = calibrate(server)
            given = scenario(seconds, hop_ms, start_s, seed)
            rng = random.Random(seed + 1)
            due = list(given.load().arrivals(rng))
            took, seen = asyncio.run(server.watched(due, [rng.choice(ROWS) for _ in due]))
        finally:
            server.process.terminate()
            server.process.wait(60)
    up_s = sum(up * (later[0] - second) for (second, _, up), later in itertools.pairwise(seen) if second < seconds)
    real = {f"p{q} ms": float(np.quantile(took, q / 100)) * 1e3 for q in (50, 95, 99)}
    real["replica-hours"] = up_s / 3600
    tables = {"real": real}
    for name, simulate in (("simulated", simulation.simulate), ("by half seconds", fluid_simulation.simulate_fluid)):
        begun = time.monotonic()
        found = simulate(given)
        tables[name] = {f"p{q} ms": found.latencies.quantile(q / 100) * 1e3 for q in (50, 95, 99)}
        tables[name]["replica-hours"] = found.replica_s[POOL] / 3600
        tables[name]["took s"] = time.monotonic() - begun
    errors = {what: tables["simulated"][what] / value - 1 for what, value in real.items()}
    lines = [
        f"{len(took):,} requests in {seconds:.0f} s; calibrated: hop {hop_ms:.1f} ms, start {start_s:.1f} s",
        "",
        "| | real | simulated | error | by half seconds | error |",
        "|---|---|---|---|---|---|",
    ]
    for what, value in real.items():
        exact, fluid = tables["simulated"][what], tables["by half seconds"][what]
        digits = 3 if what == "replica-hours" else 0
        lines.append(
            f"| {what} | {value:.{digits}f} | {exact:.{digits}f} | {exact / value - 1:+.0%} | {fluid:.{digits}f} "
            f"| {fluid / value - 1:+.0%} |"
        )
    return lines, errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="write the report there, too")
    options = parser.parse_args()
    lines, errors = compare(60 * options.minutes, options.seed)
    begun = time.monotonic()
    day = fluid_simulation.simulate_fluid(a_day())
    lines += ["", f"A day of up to 10,000 replicas, simulated in {time.monotonic() - begun:.0f} s:", "", *day.lines()]
    print("\n".join(lines))
    if options.report is not None:
        head = f"`python -m benchmarks.simulated`, commit {commit()}, on {hardware()}"
        options.report.write_text("\n".join(["# Simulated and real", "", head, "", *lines]) + "\n")
    is_well = abs(errors["p99 ms"]) < 0.15 and abs(errors["replica-hours"]) < 0.15
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
