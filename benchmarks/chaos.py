"""Faults on a real local cluster of several nodes, under open-loop load over HTTP and gRPC.

    python -m benchmarks.chaos --minutes 15 --faults 50 --seed 0

The exit status is 0 when nothing was lost or wrong.
"""

import argparse
import contextlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import commit, hardware
from benchmarks.open_loop import DEADLINE_S, LoadProcess, Outcome, write_model
from tutti.loadtest.process import free_ports, stop, wait_until_ready

NODES = 3
GATEWAYS = 2
# A replica may grow by so much before it is out of memory.
HOG_BYTES = 300_000_000


@dataclass(slots=True)
class Fault:
    """What was done, and when, in seconds since the start."""

    kind: str
    at_s: float
    note: str = ""


@dataclass
class Cluster:
    """A head and worker nodes, and `tutti serve --ray` on them."""

    folder: Path
    nodes: list[Any] = field(default_factory=list)
    cluster: Any = None
    process: Any = None
    http: str = ""
    grpc: str = ""
    _serial: int = 0

    def start(self) -> None:
        from ray.cluster_utils import Cluster as RayCluster

        write_model(self.folder / "models")
        self.cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 2, "resources": {"head": 10}})
        for _ in range(NODES):
            self.add_node()
        http, grpc, metrics = free_ports(3)
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

    @staticmethod
    def processes() -> list[psutil.Process]:
        """All below this process. Other clusters of the machine are none of ours: nothing may befall them."""
        return list(psutil.Process().children(recursive=True))

    def node_to_lose(self) -> Any | None:
        """A worker node without Serve's controller, and that leaves a gateway."""
        # One gateway of two may go with its node.
        kept = {_raylet(process) for process in self.replicas("gateway")[:1]}
        kept |= {_raylet(one) for one in self.processes() if "ServeController" in " ".join(_command(one))}
        for node in self.nodes:
            if int(node.all_processes["raylet"][0].process.pid) not in kept:
                return node
        return None


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


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
        names = [name for _ in range(-(-count // len(self.kinds))) for name in self.kinds][:count]
        self._rng.shuffle(names)
        for number, name in enumerate(names):
            at_s = _QUIET_S + (number + 0.5 * self._rng.random()) * gap
            time.sleep(max(0.0, at_s - self._load.now_s()))
            fault = Fault(name, self._load.now_s())
            self.done.append(fault)
            fault.note = self.kinds[name]()
            print(f"{fault.at_s:7.1f} s  {name}  {fault.note}", flush=True)

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
            if "ServeController" in " ".join(_command(process)):
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


def recovery_s(fault: Fault, following_s: float, outcomes: list[Outcome], normal_s: float) -> float:
    """From a fault to the end of the last second, before the next fault, in which much was slow.

    Much is more than one request in twenty; slow is four times the 99th percentile without faults.
    """
    due: Counter[int] = Counter()
    slow: Counter[int] = Counter()
    for one in outcomes:
        if fault.at_s <= one.due_s < following_s and one.kind != "poison":
            second = int(one.due_s - fault.at_s)
            due[second] += 1
            slow[second] += one.done_s - one.due_s > 4 * normal_s
    return max((second + 1.0 for second in due if slow[second] > 0.05 * due[second]), default=0.0)


def report(
    outcomes: list[Outcome], retries: int, faults: Faults, rate: float, share: float, seconds: float
) -> tuple[list[str], bool]:
    """Lines of the report, and whether all went well."""
    kinds = Counter("wrong" if one.kind == "ok" and one.version != 1 else one.kind for one in outcomes)
    quiet = sorted(one.done_s - one.due_s for one in outcomes if one.due_s < faults.done[0].at_s and one.kind == "ok")
    normal_s = quiet[int(0.99 * (len(quiet) - 1))]
    all_s = sorted(one.done_s - one.due_s for one in outcomes if one.kind == "ok")
    lines = [
        f"{len(outcomes):,} requests in {seconds:.0f} s at {rate:.0f} /s, {share:.0%} of what was done without faults: "
        f"{kinds['ok']:,} right, {kinds['wrong']} wrong, {kinds['failed']} failed "
        f"({kinds['failed'] / len(outcomes):.4%}), {kinds['poison']} poison; asked again by the client: {retries}",
        f"p99 {normal_s * 1e3:.0f} ms before the first fault, {all_s[int(0.99 * len(all_s))] * 1e3:.0f} ms over all; "
        f"answered by the cpu pool: {sum(one.pool == 'cpu' for one in outcomes) / len(outcomes):.1%}",
        "",
        "| fault | times | recovery s, median and most |",
        "|---|---|---|",
    ]
    ends = [fault.at_s for fault in faults.done[1:]] + [seconds]
    by_kind: dict[str, list[float]] = {}
    for fault, end_s in zip(faults.done, ends, strict=True):
        by_kind.setdefault(fault.kind, []).append(recovery_s(fault, end_s, outcomes, normal_s))
    for kind, took in sorted(by_kind.items()):
        lines.append(f"| {kind} | {len(took)} | {sorted(took)[len(took) // 2]:.1f}, {max(took):.1f} |")
    lines += [f"failed: {one.what}" for one in outcomes if one.kind == "failed"][:20]
    poisons = sum(fault.kind == "poison request" for fault in faults.done)
    is_well = not kinds["wrong"] and kinds["failed"] <= 0.001 * len(outcomes) and kinds["poison"] == poisons
    return lines, is_well


def _run(cluster: Cluster, options: argparse.Namespace) -> tuple[list[str], bool]:
    warm, _ = LoadProcess(cluster.http, cluster.grpc, [(4.0, 0.0)], clients=96).result(30)
    capacity = len([one for one in warm if 1 < one.done_s < 4]) / 3
    rate = options.share * capacity
    print(f"capacity {capacity:.0f} /s, load {rate:.0f} /s", flush=True)
    seconds = 60 * options.minutes
    load = LoadProcess(cluster.http, cluster.grpc, [(seconds, rate)], options.seed)
    faults = Faults(cluster, load, options.seed)
    faults.kinds = {kind: do for kind, do in faults.kinds.items() if not options.only or kind in options.only}
    faults.run(seconds, options.faults)
    try:
        outcomes, retries = load.result(max(0.0, seconds - load.now_s()) + 4 * DEADLINE_S)
    except TimeoutError as error:
        return [str(error)], False
    if options.seconds_by:
        for second in range(int(seconds)):
            ms = sorted(1e3 * (one.done_s - one.due_s) for one in outcomes if second <= one.due_s < second + 1)
            print(
                f"{second:4} s: {len(ms)} due, p50 {ms[len(ms) // 2]:.0f}, p99 {ms[int(0.99 * (len(ms) - 1))]:.0f} ms"
            )
    return report(outcomes, retries, faults, rate, options.share, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--faults", type=int, default=50)
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
