"""What a cluster promises, each promise by itself, on a real local one.

    python -m benchmarks.cluster --report benchmarks/cluster.md

All GPU replicas killed; a replica ten times slower; load in steps and none at all; a model updated under load; one, two
and four replicas behind one gateway. `benchmarks.chaos` does all kinds of faults at once, and for longer.
"""

import contextlib
import itertools
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import tritonclient.grpc as grpcclient

from benchmarks import clients
from benchmarks.machine import run_parts
from benchmarks.open_loop import WIDTH, LoadProcess, Outcome, write_model
from tutti.loadtest.process import free_ports, stop, wait_until_ready

Part = Callable[[Path], list[str]]


@dataclass(frozen=True)
class Server:
    """`tutti serve --ray`, ready."""

    http: str
    grpc: str
    metrics: str
    process: "subprocess.Popen[bytes]"

    def gauge(self, name: str, pool: str) -> float:
        try:
            with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=10) as page:
                found = re.search(rf'^{name}{{pool="{pool}"}} (\S+)', page.read().decode(), re.MULTILINE)
        except OSError:
            return 0.0
        return float(found[1]) if found else 0.0

    def replicas(self, pool: str) -> list[psutil.Process]:
        """Processes of a deployment's replicas."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if f"ServeReplica:tutti:{pool}" in " ".join(child.cmdline()):
                    found.append(child)
        return found


@contextlib.contextmanager
def serving(folder: Path, *flags: str) -> Iterator[Server]:
    """A server for the models in a folder."""
    http, grpc, metrics = free_ports(3)
    command = [sys.executable, "-m", "tutti.app.cli", "serve", str(folder / "models"), "--ray", *flags]
    command += ["--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
    log = folder / "tutti.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        wait_until_ready(process, f"http://127.0.0.1:{http}/v2/health/ready", log)
        yield Server(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", f"127.0.0.1:{metrics}", process)
    finally:
        stop(process)


def p99_ms(outcomes: list[Outcome], start_s: float, end_s: float) -> float:
    """Of the requests that were due in between."""
    took = [one.done_s - one.due_s for one in outcomes if start_s <= one.due_s < end_s]
    return float(np.quantile(took, 0.99)) * 1e3 if took else 0.0


def counted(outcomes: list[Outcome], retries: int) -> str:
    kinds = Counter(one.kind for one in outcomes)
    what = f"{kinds['wrong']} wrong, {kinds['failed']} failed, asked again by the client {retries}"
    return f"{len(outcomes):,} requests: {what}"


def gpus_killed(folder: Path) -> list[str]:
    """Both GPU replicas are killed three times, under load."""
    write_model(folder / "models")
    kills, back = [10.0, 40.0, 70.0], []
    with serving(folder, "--num-gpus", "2") as server:
        load = LoadProcess(server.http, server.grpc, [(100.0, 60.0)])
        for at_s in kills:
            time.sleep(max(0.0, at_s - load.now_s()))
            for process in server.replicas("gpu"):
                process.send_signal(signal.SIGKILL)
            while server.gauge("tutti_pool_replicas", "gpu") and load.now_s() < at_s + 5:
                time.sleep(0.02)
            while not server.gauge("tutti_pool_replicas", "gpu") and load.now_s() < at_s + 28:
                time.sleep(0.02)
            back.append(load.now_s())
        outcomes, retries = load.result(60)
    lines = [counted(outcomes, retries), "", "| killed at s | first answer of the cpu pool, ms | worst answer, ms "]
    lines[-1] += "| first replica ready again after, s | from then until 9 of 10 are its own, s |"
    lines.append("|---|---|---|---|---|")
    for at_s, ready_s in zip(kills, back, strict=True):
        after = [one for one in outcomes if at_s - 0.5 < one.due_s < at_s + 5]
        first = min(one.done_s for one in after if one.pool == "cpu" and one.done_s > at_s) - at_s
        worst = max(one.done_s - one.due_s for one in after)
        preferred = next(
            second
            for second in np.arange(0.0, 20.0, 0.1)
            if _share(outcomes, "gpu", ready_s + second, ready_s + second + 1) > 0.9
        )
        lines.append(f"| {at_s:.0f} | {first * 1e3:.0f} | {worst * 1e3:.0f} | {ready_s - at_s:.1f} | {preferred:.1f} |")
    return lines


def _share(outcomes: list[Outcome], pool: str, start_s: float, end_s: float) -> float:
    due = [one.pool == pool for one in outcomes if start_s <= one.due_s < end_s]
    return sum(due) / max(1, len(due))


def slow_replica(folder: Path) -> list[str]:
    """One of three GPU replicas takes ten times as long, three times for eight seconds."""
    version = write_model(folder / "models")
    times = [20.0, 45.0, 70.0]
    with serving(folder, "--num-gpus", "3", "--cpu-replicas", "1") as server:
        load = LoadProcess(server.http, server.grpc, [(90.0, 120.0)], seed=1)
        for at_s in times:
            time.sleep(max(0.0, at_s - load.now_s()))
            mark = version / f"slow.{server.replicas('gpu')[0].pid}"
            mark.touch()
            time.sleep(8)
            mark.unlink()
        outcomes, retries = load.result(60)
    normal_ms = p99_ms(outcomes, 5, times[0])
    lines = [counted(outcomes, retries), f"p99 before: {normal_ms:.0f} ms", ""]
    lines += ["| slow from s | p99 in the seconds after it, ms | below twice the normal from second |", "|---|---|---|"]
    for at_s in times:
        seconds = [p99_ms(outcomes, at_s + second, at_s + second + 1) for second in range(8)]
        well = max((second + 1 for second, ms in enumerate(seconds) if ms > 2 * normal_ms), default=0)
        lines.append(f"| {at_s:.0f} | {', '.join(f'{ms:.0f}' for ms in seconds)} | {well} |")
    return lines


def load_steps(folder: Path) -> list[str]:
    """From none to one replica's work, eight times that, and none; then from none again."""
    write_model(folder / "models", fixed_s=0.02, row_s=0.02)  # 47 rows a second
    placement = folder / "placement.yaml"
    placement.write_text("pools: [{name: elastic, min_replicas: 0, max_replicas: 8}]\n")
    stages = [(5.0, 0.0), (30.0, 12.0), (60.0, 96.0), (45.0, 0.0), (15.0, 12.0)]
    starts = list(itertools.accumulate([0.0, *(seconds for seconds, _ in stages)]))
    seen: list[tuple[float, float, float]] = []
    with serving(folder, "--placement", str(placement)) as server:
        load = LoadProcess(server.http, server.grpc, stages, deadline_s=60.0)
        while load.now_s() < starts[-1]:
            wanted = server.gauge("tutti_pool_wanted_replicas", "elastic")
            seen.append((load.now_s(), wanted, server.gauge("tutti_pool_replicas", "elastic")))
            time.sleep(0.2)
        outcomes, retries = load.result(120)
    decided = next(second for second, wanted, _ in seen if second > starts[2] and wanted > 4) - starts[2]
    lines = [counted(outcomes, retries), f"deadline 60 s; the step to 8x was decided on {decided:.1f} s after it", ""]
    lines += ["| rate /s | replicas up at its end | most | p50, p99 ms |", "|---|---|---|---|"]
    for (_, rate), start_s, end_s in zip(stages, starts, starts[1:], strict=False):
        up = [count for second, _, count in seen if start_s <= second < end_s]
        took = [one.done_s - one.due_s for one in outcomes if start_s <= one.due_s < end_s]
        shown = f"{statistics.median(took) * 1e3:.0f}, {p99_ms(outcomes, start_s, end_s):.0f}" if took else ""
        lines.append(f"| {rate:.0f} | {up[-1]:.0f} | {max(up):.0f} | {shown} |")
    counts = [count for count, _ in itertools.groupby(up for _, _, up in seen)]
    lines += ["", f"replicas up, each change: {', '.join(f'{count:.0f}' for count in counts)}"]
    return lines


def updated(folder: Path) -> list[str]:
    """A model's next version, twice, through either of two gateways, under load."""
    write_model(folder / "models")
    flags = ("--num-gpus", "0", "--cpu-replicas", "3", "--gateways", "2")
    with serving(folder, *flags, "--model-control-mode", "explicit", "--load-model", "*") as server:
        load = LoadProcess(server.http, server.grpc, [(40.0, 100.0)], seed=2)
        took = []
        for number, at_s in ((2, 10.0), (3, 25.0)):
            time.sleep(max(0.0, at_s - load.now_s()))
            write_model(folder / "models", number)
            own = [("grpc.use_local_subchannel_pool", 1)]
            with grpcclient.InferenceServerClient(server.grpc, channel_args=own) as client:
                client.load_model("double")
            took.append(load.now_s() - at_s)
        outcomes, retries = load.result(60)
    by = Counter(one.version for one in outcomes if one.kind == "ok")
    late = {number: max(one.due_s for one in outcomes if one.version == number) for number in (1, 2)}
    return [
        counted(outcomes, retries),
        f"answers by version: {dict(sorted(by.items()))}; a wrong one would be of two versions at once",
        f"loads took {', '.join(f'{one:.1f}' for one in took)} s; the last request answered by the version before was "
        f"due {late[1] - 10:.1f} and {late[2] - 25:.1f} s after the load began",
    ]


def scaling(folder: Path) -> list[str]:
    """One, two and four replicas of an emulated accelerator behind one gateway; three interleaved rounds."""
    clients.require_tools()
    write_model(folder / "models", fixed_s=0.02, row_s=0.0005)
    capacity = 16 / (0.02 + 16 * 0.0005)
    item = np.full((1, WIDTH), 100.0, np.float32).tobytes()
    header = (
        f'{{"inputs":[{{"name":"x","shape":[1,{WIDTH}],"datatype":"FP32","parameters":{{"binary_data_size":{len(item)}}}}}],'
        '"outputs":[{"name":"y","parameters":{"binary_data":true}}]}'
    ).encode()
    script = clients.http_script(folder / "request.lua", header + item, len(header))
    rates: dict[int, list[float]] = {1: [], 2: [], 4: []}
    busy: dict[int, list[float]] = {1: [], 2: [], 4: []}
    for _, count in itertools.product(range(3), rates):
        with serving(folder, "--num-gpus", "0", "--cpu-replicas", str(count)) as server:
            url = f"http://{server.http}/v2/models/double/infer"
            clients.wrk(url, script, 256, 4)
            (gateway,) = server.replicas("gateway")
            before, start = gateway.cpu_times(), time.monotonic()
            rates[count].append(clients.wrk(url, script, 256, 8).rate)
            after = gateway.cpu_times()
            busy[count].append((after.user + after.system - before.user - before.system) / (time.monotonic() - start))
    one = statistics.median(rates[1])
    lines = [f"one replica can do {capacity:.0f} rows a second in full batches of 16; 256 HTTP clients", ""]
    lines += [
        "| replicas | requests /s | of one | of what they can do | gateway's share of a core |",
        "|---|---|---|---|---|",
    ]
    for count, found in rates.items():
        rate = statistics.median(found)
        lines.append(
            f"| {count} | {rate:,.0f} ({min(found):,.0f} to {max(found):,.0f}) | {rate / one:.2f} "
            f"| {rate / capacity / count:.0%} | {statistics.median(busy[count]):.0%} |"
        )
    return lines


PARTS: dict[str, Part] = {
    "gpus-killed": gpus_killed,
    "slow-replica": slow_replica,
    "load-steps": load_steps,
    "updated": updated,
    "scaling": scaling,
}


if __name__ == "__main__":
    sys.exit(run_parts("cluster", "Promises of a cluster", __doc__, PARTS))
