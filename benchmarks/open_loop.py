"""Open-loop load over HTTP and gRPC, every answer checked, from a process of its own; and the model that it is for.

A request fails when no answer came within its deadline; as clients of a load balancer do, ours asks again while time
remains when a connection breaks or the server says that it is not available. Latency counts from when it was due.
"""

import asyncio
import multiprocessing
import random
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import tritonclient.grpc.aio as grpcclient
import tritonclient.http.aio as httpclient
from tritonclient.utils import InferenceServerException

WIDTH = 8
DEADLINE_S = 10.0
POISON = 13.0
# Connections over gRPC: several gateways share them out.
CONNECTIONS = 8
# y = 2x + the version. A request with POISON in it ends its replica, in whose process the model is.
MODEL = """
    import os
    import time
    from pathlib import Path

    import triton_python_backend_utils as pb_utils

    HERE = Path(__file__).parent
    VERSION = int(HERE.name)


    class TritonPythonModel:
        hoard = []

        def execute(self, requests):
            given = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
            if any((x == 13.0).any() for x in given):
                os._exit(1)
            slow = 10 if (HERE / f"slow.{os.getpid()}").exists() else 1
            if (HERE / f"hog.{os.getpid()}").exists():
                self.hoard.append(bytearray(os.urandom(1024)) * 40_000)
            # As a model on an accelerator: it takes time, not the processor.
            time.sleep(slow * (FIXED_S + ROW_S * sum(len(x) for x in given)))
            return [pb_utils.InferenceResponse([pb_utils.Tensor("y", x * 2 + VERSION)]) for x in given]
"""
# Four replicas do some 500 rows a second.
FIXED_S, ROW_S = 0.016, 0.003
CONFIG = f"""
    backend: "python" max_batch_size: 16 dynamic_batching {{}}
    input {{ name: "x" data_type: TYPE_FP32 dims: {WIDTH} }} output {{ name: "y" data_type: TYPE_FP32 dims: {WIDTH} }}
    parameters {{ key: "tutti.isolate" value {{ string_value: "no" }} }}
"""


def write_model(repository: Path, version: int = 1, fixed_s: float = FIXED_S, row_s: float = ROW_S) -> Path:
    """The model "double" in a repository; returns the version's folder."""
    folder = repository / "double" / str(version)
    folder.mkdir(parents=True)
    source = textwrap.dedent(MODEL).lstrip().replace("FIXED_S", str(fixed_s)).replace("ROW_S", str(row_s))
    (folder / "model.py").write_text(source)
    (folder.parent / "config.pbtxt").write_text(CONFIG)
    return folder


@dataclass(slots=True)
class Outcome:
    """One request: when it was due and done, seconds since the start, and what became of it."""

    due_s: float
    done_s: float
    kind: str  # ok, wrong, failed, poison
    what: str = ""
    pool: str = ""
    version: int = 0


class Load:
    """Poisson arrivals over both protocols, half each."""

    def __init__(
        self, http: str, grpc: str, stages: Sequence[tuple[float, float]], seed: int, deadline_s: float = DEADLINE_S
    ) -> None:
        """`stages` are (seconds, requests a second)."""
        self.outcomes: list[Outcome] = []
        self.retries = 0
        self.start_s = 0.0
        self._addresses = http, grpc
        self._stages = stages
        self._deadline_s = deadline_s
        self._rng = random.Random(seed)
        self._numbers = np.random.default_rng(seed)
        self._running: set[asyncio.Task[None]] = set()
        self._is_ended = False

    def now_s(self) -> float:
        return time.monotonic() - self.start_s

    async def run(self) -> None:
        self.open()
        for due in self._arrivals():
            if due > self.now_s():
                await asyncio.sleep(due - self.now_s())
            if self._is_ended:
                break
            self._begin(due, "http" if self._rng.random() < 0.5 else "grpc", self._values())
        end = sum(seconds for seconds, _ in self._stages)
        while self._running or (self.now_s() < end and not self._is_ended):
            await asyncio.sleep(0.1)
        await self.close()

    def _arrivals(self) -> Iterator[float]:
        start = 0.0
        for seconds, rate in self._stages:
            due = start
            while rate and (due := due + self._rng.expovariate(rate)) < start + seconds:
                yield due
            start += seconds

    def _begin(self, due: float, protocol: str, x: Any, is_poison: bool = False) -> None:
        task = asyncio.create_task(self._ask(due, protocol, x, is_poison))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def open(self) -> None:
        self.start_s = time.monotonic()
        self._http = httpclient.InferenceServerClient(self._addresses[0], conn_limit=1000)
        own = [("grpc.use_local_subchannel_pool", 1)]  # connections of their own: gateways share them out
        address = self._addresses[1]
        self._grpc = [grpcclient.InferenceServerClient(address, channel_args=own) for _ in range(CONNECTIONS)]

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

    def poison(self) -> None:
        """Begin one request that ends the replica that executes it."""
        x = self._values()
        x[0, 0] = POISON
        self._begin(self.now_s(), "grpc", x, is_poison=True)

    def end(self) -> None:
        """Before its stages' end: begin no more requests."""
        self._is_ended = True

    def told(self, what: str) -> None:
        """Do what another process asks for."""
        {"poison": self.poison, "end": self.end}[what]()

    def _values(self) -> Any:
        return self._numbers.integers(100, 1000, (self._rng.choice([1, 1, 2, 4]), WIDTH)).astype(np.float32)

    async def _ask(self, due: float, protocol: str, x: Any, is_poison: bool = False) -> None:
        while True:
            left_s = due + self._deadline_s - self.now_s()
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
            versions = np.unique(y - 2 * x)  # one, in every row and column
            kind = "ok" if versions.size == 1 and y.shape == x.shape else "wrong"
            self.outcomes.append(Outcome(due, self.now_s(), kind, pool=pool, version=int(versions[0])))
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

    def __init__(
        self,
        http: str,
        grpc: str,
        stages: Sequence[tuple[float, float]],
        seed: int = 0,
        clients: int = 0,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        """With `clients` a closed loop of so many for the seconds of the stages."""
        spawn = multiprocessing.get_context("spawn")
        self._ours, theirs = spawn.Pipe()
        arguments = (theirs, http, grpc, stages, seed, clients, deadline_s)
        self._process = spawn.Process(target=_run_load, args=arguments, daemon=True)
        self._process.start()
        self._start_s = float(self._ours.recv())

    def now_s(self) -> float:
        return time.monotonic() - self._start_s

    def poison(self) -> str:
        self._ours.send("poison")
        return ""

    def end(self) -> None:
        """What has begun is still waited for."""
        self._ours.send("end")

    def result(self, timeout_s: float) -> tuple[list[Outcome], int]:
        """The outcomes, and how often clients asked again. Raises TimeoutError when the load does not end."""
        if not self._ours.poll(timeout_s):
            raise TimeoutError("the load does not end: requests were lost")
        outcomes, retries = self._ours.recv()
        self._process.join(10)
        return outcomes, retries


def _run_load(
    pipe: Any, http: str, grpc: str, stages: Sequence[tuple[float, float]], seed: int, clients: int, deadline_s: float
) -> None:
    load = Load(http, grpc, stages, seed, deadline_s)

    def listen() -> None:
        if pipe.poll():
            load.told(pipe.recv())

    async def run() -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(pipe.fileno(), listen)
        pipe.send(time.monotonic())
        seconds = sum(seconds for seconds, _ in stages)
        await (load.keep_asking(seconds, clients) if clients else load.run())
        loop.remove_reader(pipe.fileno())

    asyncio.run(run())
    pipe.send((load.outcomes, load.retries))
