"""Faults on a real local cluster of several nodes, under open-loop load over HTTP and gRPC.

    python -m benchmarks.chaos --minutes 15 --faults 50 --seed 0

Every answer is checked. A request fails when no answer came within its deadline; as clients of a load balancer do,
ours asks again while time remains when a connection breaks or the server says that it is not available. Latency counts
from when a request was due. The exit status is 0 when nothing was lost or wrong.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import tritonclient.grpc.aio as grpcclient
import tritonclient.http.aio as httpclient
from tritonclient.utils import InferenceServerException

from benchmarks.machine import commit, hardware
from loadtest.process import free_ports, stop, wait_until_ready

WIDTH = 8
DEADLINE_S = 10.0
POISON = 13.0
NODES = 3
GATEWAYS = 2
# A replica may grow by so much before it is out of memory.
HOG_BYTES = 300_000_000
MODEL = """
    import os
    import time
    from pathlib import Path

    import triton_python_backend_utils as pb_utils

    HERE = Path(__file__).parent


    class TritonPythonModel:
        hoard = []

        def execute(self, requests):
            given = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
            if any((x == 13.0).any() for x in given):
                os._exit(1)
            slow = 10 if (HERE / f"slow.{os.getpid()}").exists() else 1
            if (HERE / f"hog.{os.getpid()}").exists():
                self.hoard.append(bytearray(os.urandom(1024)) * 40_000)
            # As a model on an accelerator: it takes time, not the processor. Four replicas do some 500 rows a second.
            time.sleep(slow * (0.016 + 0.003 * sum(len(x) for x in given)))
            return [pb_utils.InferenceResponse([pb_utils.Tensor("y", x * 2 + 1)]) for x in given]
"""
CONFIG = f"""
    backend: "python" max_batch_size: 16 dynamic_batching {{}}
    input {{ name: "x" data_type: TYPE_FP32 dims: {WIDTH} }} output {{ name: "y" data_type: TYPE_FP32 dims: {WIDTH} }}
"""


@dataclass(slots=True)
class Outcome:
    """One request: when it was due and done, seconds since the start, and what became of it."""

    due_s: float
    done_s: float
    kind: str  # ok, wrong, failed, poison
    what: str = ""
    pool: str = ""


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

        repository = self.folder / "models" / "double" / "1"
        repository.mkdir(parents=True)
        (repository / "model.py").write_text(textwrap.dedent(MODEL).lstrip())
        (repository.parent / "config.pbtxt").write_text(CONFIG)
        self.cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 2, "resources": {"head": 10}})
        for _ in range(NODES):
            self.add_node()
        http, grpc, metrics = free_ports(3)
        self.http, self.grpc = f"127.0.0.1:{http}", f"127.0.0.1:{grpc}"
        command = [
            sys.executable, "-m", "tutti.cli", "serve", str(self.folder / "models"), "--ray",
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
        """Processes of a deployment's replicas, wherever they are."""
        found = []
        for process in psutil.process_iter():
            try:
                if f"ServeReplica:tutti:{pool}" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def node_to_lose(self) -> Any | None:
        """A worker node without Serve's controller, and that leaves a gateway."""
        # One gateway of two may go with its node.
        kept = {_raylet(process) for process in self.replicas("gateway")[:1]}
        kept |= {_raylet(one) for one in psutil.process_iter() if "ServeController" in " ".join(_command(one))}
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


class Load:
    """Poisson arrivals over both protocols, half each."""

    def __init__(self, http: str, grpc: str, rate: float, seed: int) -> None:
        self.outcomes: list[Outcome] = []
        self.retries = 0
        self.start_s = 0.0
        self._addresses = http, grpc
        self._rate = rate
        self._rng = random.Random(seed)
        self._numbers = np.random.default_rng(seed)
        self._running: set[asyncio.Task[None]] = set()

    def now_s(self) -> float:
        return time.monotonic() - self.start_s

    async def run(self, seconds: float) -> None:
        self.open()
        due = 0.0
        while due < seconds:
            if due > self.now_s():
                await asyncio.sleep(due - self.now_s())
            task = asyncio.create_task(self._ask(due, "http" if self._rng.random() < 0.5 else "grpc", self._values()))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            due += self._rng.expovariate(self._rate)
        while self._running:
            await asyncio.sleep(0.1)
        await self.close()

    def open(self) -> None:
        self.start_s = time.monotonic()
        self._http = httpclient.InferenceServerClient(self._addresses[0], conn_limit=1000)
        own = [("grpc.use_local_subchannel_pool", 1)]  # connections of their own: gateways share them out
        address = self._addresses[1]
        self._grpc = [grpcclient.InferenceServerClient(address, channel_args=own) for _ in range(4 * GATEWAYS)]

    async def close(self) -> None:
        await asyncio.gather(self._http.close(), *(client.close() for client in self._grpc))

    async def keep_asking(self, seconds: float, clients: int) -> None:
        """A closed loop."""
        self.open()

        async def one(protocol: str) -> None:
            while self.now_s() < seconds:
                await self._ask(self.now_s(), protocol, self._values())

        await asyncio.gather(*(one("http" if number % 2 else "grpc") for number in range(clients)))
        await self.close()

    def poison(self) -> bool:
        """Begin one request that ends the replica that executes it."""
        x = self._values()
        x[0, 0] = POISON
        task = asyncio.create_task(self._ask(self.now_s(), "grpc", x, is_poison=True))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return True

    def _values(self) -> Any:
        return self._numbers.integers(100, 1000, (self._rng.choice([1, 1, 2, 4]), WIDTH)).astype(np.float32)

    async def _ask(self, due: float, protocol: str, x: Any, is_poison: bool = False) -> None:
        while True:
            left_s = due + DEADLINE_S - self.now_s()
            if left_s <= 0:
                self.outcomes.append(Outcome(due, self.now_s(), "failed", "no answer within the deadline"))
                return
            try:
                y, pool = await asyncio.wait_for(self._infer(protocol, x), left_s)
            except (InferenceServerException, aiohttp.ClientError, OSError, TimeoutError) as error:
                what = str(error)
                if is_poison and "replicas were lost" in what:
                    self.outcomes.append(Outcome(due, self.now_s(), "poison"))
                    return
                if not _may_ask_again(error):
                    self.outcomes.append(Outcome(due, self.now_s(), "failed", f"{protocol}: {what[:300]}"))
                    return
                self.retries += 1
                await asyncio.sleep(0.05)
                continue
            kind = "ok" if np.array_equal(y, x * 2 + 1) else "wrong"
            self.outcomes.append(Outcome(due, self.now_s(), kind, pool=pool))
            return

    async def _infer(self, protocol: str, x: Any) -> tuple[Any, str]:
        library: Any = httpclient if protocol == "http" else grpcclient
        client: Any = self._http if protocol == "http" else self._rng.choice(self._grpc)
        tensor = library.InferInput("x", list(x.shape), "FP32")
        tensor.set_data_from_numpy(x)
        result = await client.infer("double", [tensor])
        response = result.get_response()
        parameters = response["parameters"] if protocol == "http" else response.parameters
        pool = parameters["tutti_pool"]
        return result.as_numpy("y"), pool if protocol == "http" else pool.string_param


def _may_ask_again(error: BaseException) -> bool:
    """A broken connection, or a server that says to try again."""
    if isinstance(error, OSError | TimeoutError | aiohttp.ClientError):
        return True
    status = error.status() if isinstance(error, InferenceServerException) else None
    return status is None or "UNAVAILABLE" in str(status) or str(status) in ("502", "503")


class LoadProcess:
    """The load in a process of its own: a cluster's nodes are forked from this one, which must not have threads."""

    def __init__(self, cluster: Cluster, rate: float, seed: int, seconds: float, clients: int = 0) -> None:
        """With `clients` a closed loop of so many."""
        spawn = multiprocessing.get_context("spawn")
        self._ours, theirs = spawn.Pipe()
        arguments = (theirs, cluster.http, cluster.grpc, rate, seed, seconds, clients)
        self._process = spawn.Process(target=_run_load, args=arguments, daemon=True)
        self._process.start()
        self._start_s = float(self._ours.recv())

    def now_s(self) -> float:
        return time.monotonic() - self._start_s

    def poison(self) -> str:
        self._ours.send("poison")
        return ""

    def result(self, timeout_s: float) -> tuple[list[Outcome], int]:
        """The outcomes, and how often clients asked again. Raises TimeoutError when the load does not end."""
        if not self._ours.poll(timeout_s):
            raise TimeoutError("the load does not end: requests were lost")
        outcomes, retries = self._ours.recv()
        self._process.join(10)
        return outcomes, retries


def _run_load(pipe: Any, http: str, grpc: str, rate: float, seed: int, seconds: float, clients: int) -> None:
    load = Load(http, grpc, rate, seed)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(pipe.fileno(), lambda: pipe.poll() and pipe.recv() and load.poison())
        pipe.send(time.monotonic())
        await (load.keep_asking(seconds, clients) if clients else load.run(seconds))
        loop.remove_reader(pipe.fileno())

    asyncio.run(run())
    pipe.send((load.outcomes, load.retries))


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
        for process in psutil.process_iter():
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
    outcomes: list[Outcome], retries: int, faults: Faults, rate: float, seconds: float
) -> tuple[list[str], bool]:
    """Lines of the report, and whether all went well."""
    kinds = Counter(one.kind for one in outcomes)
    quiet = sorted(one.done_s - one.due_s for one in outcomes if one.due_s < faults.done[0].at_s and one.kind == "ok")
    normal_s = quiet[int(0.99 * (len(quiet) - 1))]
    all_s = sorted(one.done_s - one.due_s for one in outcomes if one.kind == "ok")
    lines = [
        f"{len(outcomes):,} requests in {seconds:.0f} s at {rate:.0f} /s, 60% of what was done without faults: "
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
    warm, _ = LoadProcess(cluster, 1.0, 0, 4.0, clients=96).result(30)
    capacity = len([one for one in warm if 1 < one.done_s < 4]) / 3
    rate = 0.6 * capacity
    print(f"capacity {capacity:.0f} /s, load {rate:.0f} /s", flush=True)
    seconds = 60 * options.minutes
    load = LoadProcess(cluster, rate, options.seed, seconds)
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
    return report(outcomes, retries, faults, rate, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
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
