"""Faults on a real local cluster of several nodes, under open-loop load over HTTP and gRPC.

    python -m benchmarks.chaos --minutes 15 --faults 50 --seed 0

The exit status is 0 when nothing was lost or wrong.
"""

import argparse
import contextlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.chaos_report import Fault, report
from benchmarks.machine import commit, hardware
from benchmarks.open_loop import DEADLINE_S, LoadProcess, write_model
from tutti.loadtest.process import free_ports, stop, wait_until_ready

NODES = 3
GATEWAYS = 2
# A replica may grow by so much before it is out of memory.
HOG_BYTES = 300_000_000


@dataclass
class Cluster:
    """A head and worker nodes, and `tutti serve --ray` on them."""

    folder: Path
    nodes: list[Any] = field(default_factory=list)
    cluster: Any = None
    process: Any = None
    http: str = ""
    grpc: str = ""
    _metrics_port: int = 0

    def start(self) -> None:
        from ray.cluster_utils import Cluster as RayCluster

        write_model(self.folder / "models")
        self.cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 2, "resources": {"head": 10}})
        for _ in range(NODES):
            self.add_node()
        http, grpc, metrics = free_ports(3)
        self._metrics_port = metrics
        self.http, self.grpc = f"127.0.0.1:{http}", f"127.0.0.1:{grpc}"
        command = [
            sys.executable, "-m", "tutti.app.cli", "serve", str(self.folder / "models"), "--ray",
            "--ray-address", self.cluster.address, "--gpu-replicas", str(NODES), "--cpu-replicas", "1",
            "--gateways", str(GATEWAYS),
            "--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics),
        ]  # fmt: skip
        log = self.folder / "tutti.log"
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file)
        wait_until_ready(self.process, f"http://{self.http}/v2/health/ready", log)

    def add_node(self) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=1, num_gpus=1))

    def stop(self) -> None:
        if self.process is not None:
            stop(self.process)
        if self.cluster is not None:
            self.cluster.shutdown()

    def replicas(self, pool: str) -> list[psutil.Process]:
        """Processes of a deployment's replicas, on whichever node."""
        return [one for one in self.processes() if f"ServeReplica:tutti:{pool}" in " ".join(_command(one))]

    def is_whole(self) -> bool:
        """Whether all processes are there, and every gateway hears of all replicas."""
        there = [len(self.replicas(pool)) for pool in ("gpu", "cpu", "gateway")]
        if there != [NODES, 1, GATEWAYS] or not any(_is_controller(one) for one in self.processes()):
            return False
        # Each gateway of a machine has a page of its own, on the first port that was free.
        heard = [_replicas_heard_of(self._metrics_port + number) for number in range(2 * GATEWAYS)]
        return heard.count({"gpu": NODES, "cpu": 1}) == GATEWAYS

    @staticmethod
    def processes() -> list[psutil.Process]:
        """All below this process. Other clusters of the machine are none of ours: nothing may befall them."""
        return list(psutil.Process().children(recursive=True))

    def node_to_lose(self) -> Any | None:
        """A worker node without Serve's controller, and that leaves a gateway."""
        # One gateway of two may go with its node.
        kept = {_raylet(process) for process in self.replicas("gateway")[:1]}
        kept |= {_raylet(one) for one in self.processes() if _is_controller(one)}
        for node in self.nodes:
            if int(node.all_processes["raylet"][0].process.pid) not in kept:
                return node
        return None


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def _is_controller(process: psutil.Process) -> bool:
    return "ServeController" in " ".join(_command(process))


def _replicas_heard_of(port: int) -> dict[str, int]:
    """By pool; of the gateway whose page is there, if one's is."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
            found = re.findall(r'^tutti_pool_replicas{pool="(.+)"} (\S+)', page.read().decode(), re.MULTILINE)
    except OSError:
        return {}
    return {pool: int(float(count)) for pool, count in found}


def _raylet(process: psutil.Process) -> int:
    try:
        return int(process.ppid())
    except psutil.Error:
        return 0


class Faults:
    """Does to the cluster what befalls clusters."""

    def __init__(self, cluster: Cluster, load: LoadProcess, seed: int) -> None:
        self.done: list[Fault] = []
        self._cluster = cluster
        self._load = load
        self._rng = random.Random(seed)
        self.kinds: dict[str, Callable[[], str]] = {
            "replica killed": self._kill_replica,
            "all gpu replicas killed": self._kill_gpus,
            "cpu replica killed": lambda: self._kill("cpu"),
            "replica hangs": self._hang,
            "replica slow (10x)": self._slow,
            "out of memory": self._run_out_of_memory,
            "poison request": self._load.poison,
            "controller killed": self._kill_controller,
            "gateway killed": lambda: self._kill("gateway"),
            "node lost": self._lose_node,
        }

    def run(self, seconds: float, count: int) -> None:
        """`count` faults at random times, every kind about equally often. Ray wants the main thread for some."""
        gap = (seconds - 2 * _QUIET_S) / count
        for number, name in enumerate(self._names(count)):
            at_s = _QUIET_S + (number + 0.5 * self._rng.random()) * gap
            time.sleep(max(0.0, at_s - self._load.now_s()))
            self._do(name)

    def run_when_whole(self, count: int) -> None:
        """The same, each once the cluster has got over the last one. Raises TimeoutError where it does not."""
        time.sleep(_SHORT_QUIET_S)
        for name in self._names(count):
            time.sleep(self._rng.random())
            self._do(name)
            self._wait_until_whole()
        time.sleep(_SHORT_QUIET_S)

    def _names(self, count: int) -> list[str]:
        names = [name for _ in range(-(-count // len(self.kinds))) for name in self.kinds][:count]
        self._rng.shuffle(names)
        return names

    def _do(self, name: str) -> None:
        fault = Fault(name, self._load.now_s())
        self.done.append(fault)
        fault.note = self.kinds[name]()
        print(f"{fault.at_s:7.1f} s  {name}  {fault.note}", flush=True)

    def _wait_until_whole(self) -> None:
        """For a while: what a fault has ended may be there for a moment still."""
        until, since = time.monotonic() + _RECOVERY_TIMEOUT_S, time.monotonic()
        while time.monotonic() < since + _WHOLE_S:
            time.sleep(0.1)
            if not self._cluster.is_whole():
                since = time.monotonic()
            if since > until:
                what = f"{self.done[-1].kind!r}, after {_RECOVERY_TIMEOUT_S:.0f} s"
                raise TimeoutError(f"the cluster has not got over {what}")

    def _kill(self, pool: str, count: int = 1) -> str:
        found = self._cluster.replicas(pool)
        chosen = self._rng.sample(found, min(count, len(found)))
        for process in chosen:
            process.send_signal(signal.SIGKILL)
        return f"{len(chosen)} of {len(found)}"

    def _kill_replica(self) -> str:
        return self._kill("gpu")

    def _kill_gpus(self) -> str:
        return self._kill("gpu", NODES)

    def _hang(self) -> str:
        found = self._cluster.replicas("gpu")
        if not found:
            return "none is there"
        process = self._rng.choice(found)
        process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        try:
            process.send_signal(signal.SIGCONT)
        except psutil.Error:
            return "was replaced meanwhile"
        return "4 s"

    def _slow(self) -> str:
        found = self._cluster.replicas("gpu")
        if not found:
            return "none is there"
        process = self._rng.choice(found)
        mark = self._cluster.folder / "models" / "double" / "1" / f"slow.{process.pid}"
        mark.touch()
        time.sleep(6)
        mark.unlink()
        return "6 s"

    def _run_out_of_memory(self) -> str:
        """A replica that takes more with each batch, until the kernel ends it; we do where it is not told a limit."""
        found = self._cluster.replicas("gpu")
        if not found:
            return "none is there"
        process = self._rng.choice(found)
        limit = process.memory_info().rss + HOG_BYTES
        group = _limit_memory(process.pid, limit)
        (self._cluster.folder / "models" / "double" / "1" / f"hog.{process.pid}").touch()
        until = time.monotonic() + 10
        try:
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < until:
                if group is None and process.memory_info().rss > limit:
                    process.send_signal(signal.SIGKILL)
                time.sleep(0.05)
        except psutil.Error:
            pass
        if group is not None:
            with contextlib.suppress(OSError):
                group.rmdir()
        return f"ended by {'the kernel' if group is not None else 'the harness'}"

    def _kill_controller(self) -> str:
        for process in self._cluster.processes():
            if _is_controller(process):
                process.send_signal(signal.SIGKILL)
                return ""
        return "none is there"

    def _lose_node(self) -> str:
        node = self._cluster.node_to_lose()
        if node is None:
            return "none to lose"
        self._cluster.nodes.remove(node)
        self._cluster.cluster.remove_node(node, allow_graceful=False)
        time.sleep(2)
        self._cluster.add_node()
        return "another came after 2 s"


def _limit_memory(pid: int, limit: int) -> Path | None:
    """A control group with a limit of memory and the process in it; None where none can be made."""
    for base, file in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(base) / f"tutti-chaos-{pid}"
        try:
            group.mkdir()
            (group / file).write_text(str(limit))
            (group / "cgroup.procs").write_text(str(pid))
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        return group
    return None


# No faults in the first and the last seconds: what is normal is seen there.
_QUIET_S = 8.0
# Where faults follow each other as soon as they can: the same; for how long the cluster is whole before the next one;
# and what it takes at most to be, on a machine that others keep busy.
_SHORT_QUIET_S = 3.0
_WHOLE_S = 1.5
_RECOVERY_TIMEOUT_S = 100.0


def _run(cluster: Cluster, options: argparse.Namespace) -> tuple[list[str], bool]:
    warm, _ = LoadProcess(cluster.http, cluster.grpc, [(4.0, 0.0)], clients=96).result(30)
    capacity = len([one for one in warm if 1 < one.done_s < 4]) / 3
    rate = options.share * capacity
    print(f"capacity {capacity:.0f} /s, load {rate:.0f} /s", flush=True)
    seconds = 60 * options.minutes
    load = LoadProcess(cluster.http, cluster.grpc, [(seconds, rate)], options.seed)
    faults = Faults(cluster, load, options.seed)
    faults.kinds = {kind: do for kind, do in faults.kinds.items() if not options.only or kind in options.only}
    try:
        if options.when_whole:
            faults.run_when_whole(options.faults)
            load.end()
            seconds = load.now_s()
        else:
            faults.run(seconds, options.faults)
        outcomes, retries = load.result(max(0.0, seconds - load.now_s()) + 4 * DEADLINE_S)
    except TimeoutError as error:
        return [str(error)], False
    if options.seconds_by:
        for second in range(int(seconds)):
            ms = sorted(1e3 * (one.done_s - one.due_s) for one in outcomes if second <= one.due_s < second + 1)
            print(
                f"{second:4} s: {len(ms)} due, p50 {ms[len(ms) // 2]:.0f}, p99 {ms[int(0.99 * (len(ms) - 1))]:.0f} ms"
            )
    return report(outcomes, retries, faults.done, rate, options.share, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument(
        "--when-whole",
        action="store_true",
        help="each fault once the cluster has got over the last one, and an end after them; --minutes is the most",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--share", type=float, default=0.6, help="of what is done without faults, as load (default: %(default)s)"
    )
    parser.add_argument("--only", action="append", help="a kind of fault; default: every kind")
    parser.add_argument("--seconds-by", action="store_true", help="show each second's latencies, too")
    parser.add_argument("--report", type=Path, help="write the report there, too")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="tutti-chaos-"))
    cluster = Cluster(folder)
    try:
        cluster.start()
        lines, is_well = _run(cluster, options)
    finally:
        cluster.stop()
    print("\n".join(lines))
    if options.report is not None:
        head = f"`{' '.join(['python -m benchmarks.chaos', *sys.argv[1:]])}`, commit {commit()}, on {hardware()}"
        options.report.write_text("\n".join(["# Faults on a cluster under load", "", head, "", *lines]) + "\n")
    if is_well:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"the server's log is in {folder}")
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
