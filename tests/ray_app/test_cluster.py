"""The application on a real local Ray cluster with logical GPUs: clients, faults, and nothing left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient

from demo.client import Client, load_items
from tests.models import Repository
from tests.serving import Served, serving, wait_until
from tutti.app.restarts import UNUSABLE
from tutti.loadtest.process import free_ports, stop

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(280)]

# Client threads may still hold sockets of a server that is gone.
IGNORE = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def small(tmp_path: Path) -> Repository:
    repository = Repository(tmp_path / "models")
    repository.add_onnx()
    return repository


class Load:
    """Closed-loop clients over both protocols: who answered, and what failed."""

    def __init__(self, served: Served) -> None:
        self.pools: Counter[str] = Counter()
        self.failures: list[str] = []
        self._served = served
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(kind,)) for kind in ("http", "grpc") * 2]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self, protocol: str) -> None:
        client = Client(protocol, self._served.http if protocol == "http" else self._served.grpc)
        x = np.full((1, 4), 2.0, np.float32)
        while not self._stop.is_set():
            try:
                answer, pool = client.infer("add_one", {"x": x})
                assert answer["y"].tolist() == [[3.0] * 4]
                self.pools[pool] += 1
            except Exception as error:
                self.failures.append(f"{protocol}: {type(error).__name__}: {error}")


def replicas(served: Served, pool: str, app: str = "tutti") -> list[psutil.Process]:
    children = psutil.Process(served.process.pid).children(recursive=True)
    return [child for child in children if f"ServeReplica:{app}:{pool}" in " ".join(_command(child))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


TIMING = r"queue;dur=\d+\.\d\d, compute;dur=\d+\.\d\d, total;dur=\d+\.\d\d"


def pool_headers(served: Served) -> set[str]:
    """What the header of answers in JSON and in binary says of the pool."""
    found = set()
    for is_binary in (False, True):
        tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
        body = {"inputs": [tensor], "parameters": {"binary_data_output": is_binary}}
        url = f"http://{served.http}/v2/models/add_one/infer"
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=10) as answer:
            assert (answer.headers["inference-header-content-length"] is not None) == is_binary
            found.add(answer.headers["tutti-pool"])
            assert re.fullmatch(TIMING, answer.headers["server-timing"])
            assert answer.headers["x-request-id"]
    return found


def metrics(served: Served) -> str:
    with urllib.request.urlopen(f"http://{served.metrics}/metrics", timeout=10) as page:
        return str(page.read().decode())


@IGNORE
def test_gpu_replicas_die_under_load_and_come_back(small: Repository, tmp_path: Path) -> None:
    """SIGKILL to the whole gpu pool: no request fails, the cpu pool answers and says so, the gpu pool takes over."""
    access = tmp_path / "access"
    logged = ("--access-log", str(access), "--log-format", "json")
    with serving(small.root, tmp_path / "log", "--ray", "--num-gpus", "2", *logged) as served:
        family = psutil.Process(served.process.pid).children(recursive=True)
        with Load(served) as load:
            wait_until(lambda: load.pools["gpu"] > 0)
            # Only what the log has told of is lost.
            both = re.compile(r"(?<! of )2 in gpu|pool 'gpu' has 2 replicas")
            wait_until(lambda: both.search((tmp_path / "log").read_text()) is not None)
            before = load.pools.copy()  # while they come, others answer
            wait_until(lambda: load.pools["gpu"] > before["gpu"] + 200)
            helped = load.pools["cpu"] - before["cpu"]
            assert helped < 0.1 * (load.pools["gpu"] - before["gpu"]), "no more than to help out"
            victims = replicas(served, "gpu")
            assert len(victims) == 2
            for victim in victims:
                os.kill(victim.pid, signal.SIGKILL)
            wait_until(lambda: load.pools["cpu"] > 50)
            again = load.pools["gpu"]
            wait_until(lambda: load.pools["gpu"] > again + 200, timeout_s=90)
        assert load.failures == []
        assert pool_headers(served) <= {"gpu", "cpu"}
        page = metrics(served)
        assert 'tutti_pool_replicas{pool="gpu"}' in page
        fallbacks = next(
            line for line in page.splitlines() if line.startswith('tutti_fallback_requests_total{pool="cpu"}')
        )
        assert float(fallbacks.split()[-1]) == load.pools["cpu"]
        assert {process.pid for process in replicas(served, "gpu")}.isdisjoint(v.pid for v in victims)
        wait_until(lambda: len(access.read_text().splitlines()) >= load.pools.total() + 2)
    lines = [json.loads(line) for line in access.read_text().splitlines()]
    asked = [line for line in lines if line["request"] == "infer"]
    assert {line["pool"] for line in asked} == {"gpu", "cpu"}
    assert {line["protocol"] for line in asked} == {"http", "grpc"}
    answered = {line.get("replica") for line in asked}
    assert {f"gpu-{victim.pid}" for victim in victims} <= answered, "which process it was"
    assert all(line["compute_ms"] > 0 and line["client"].startswith("127.0.0.1:") for line in asked)
    assert served.process.returncode == 0
    log = "\n".join([json.loads(line)["message"] for line in (tmp_path / "log").read_text().splitlines()])
    assert re.search(r"add_one +1 +onnxruntime +(2|\d of 2) in gpu( \(starting\))?, 1 in cpu +1 on ", log), (
        "those that are up so far"
    )
    assert f"try: curl -s http://{served.http}/v2/models/add_one/infer" in log
    assert "pool 'gpu' has 0 replicas, it had 2" in log or "pool 'gpu' has 1 replica, it had 2" in log
    assert log.rstrip().endswith("stopping: open requests may end"), "Ray has said nothing that alarms"
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive, "processes were left behind"


def test_a_repository_that_cannot_be_served_says_why(small: Repository, tmp_path: Path) -> None:
    (small.root / "add_one" / "1" / "model.onnx").write_bytes(b"not a graph")
    command = [sys.executable, "-m", "tutti.app.cli", "serve", str(small.root), "--ray", "--http-port", "0"]
    command += ["--grpc-port", "0", "--metrics-port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == UNUSABLE
    (line,) = [line for line in done.stderr.splitlines() if " I " not in line]
    assert "cannot serve on Ray: model 'add_one': onnxruntime cannot load model.onnx" in line
    assert "Traceback" not in line


@pytest.fixture(scope="module")
def serve_run(sample_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`serve run ray_app/serve.yaml`, as Ray's users start it, but on free ports; ready."""
    root, folder = sample_repository.parent, tmp_path_factory.mktemp("serve_run")
    log, config = folder / "log", folder / "serve.yaml"
    http, grpc, metrics = free_ports(3)
    text = (root / "ray_app" / "serve.yaml").read_text()
    for name, port in (("http_port: 8000", http), ("grpc_port: 8001", grpc), ("metrics_port: 8002", metrics)):
        assert name in text
        text = text.replace(name, f"{name.split(':')[0]}: {port}")
    config.write_text(text)
    serve = Path(sys.executable).with_name("serve")
    with log.open("wb") as file:
        process = subprocess.Popen([str(serve), "run", str(config)], cwd=root, stdout=file, stderr=file)
        children: list[psutil.Process] = []
        try:
            addresses = [f"127.0.0.1:{port}" for port in (http, grpc, metrics)]
            client = Client("http", addresses[0])

            def is_ready() -> bool:
                assert process.poll() is None, log.read_text()
                return client.is_ready()

            wait_until(is_ready, timeout_s=120)
            shown = f"try: curl -s http://{addresses[0]}/v2/models/"
            wait_until(lambda: shown in log.read_text(), timeout_s=60)  # the gateway's, in the driver's log
            assert re.search(r"text_encoder +1 +onnxruntime +1 in cpu +1 on cpu ", log.read_text())
            yield Served(*addresses, process)  # type: ignore[call-arg]
            children = psutil.Process(process.pid).children(recursive=True)
        finally:
            stop(process, signal.SIGINT)
            _, alive = psutil.wait_procs(children, timeout=20)
            for one in alive:
                one.kill()


@IGNORE
def test_serve_run_with_the_config_file(serve_run: Served) -> None:
    for protocol, url in (("http", serve_run.http), ("grpc", serve_run.grpc)):
        item = load_items()[1]
        answer, pool = Client(protocol, url).infer("content_intelligence", item.inputs())
        assert pool == "cpu"
        assert int(answer["IMAGE_SCORES"].argmax()) == item.digit


@IGNORE
def test_any_triton_client_of_the_gateway(serve_run: Served) -> None:
    """The sample ensemble, control calls and bad input through the gateway, without a GPU."""
    clients: list[tuple[Any, Any]] = [
        (httpclient, httpclient.InferenceServerClient(serve_run.http)),
        (grpcclient, grpcclient.InferenceServerClient(serve_run.grpc)),
    ]
    for _, client in clients:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("content_intelligence")
        assert client.get_model_config("text_encoder")
        assert client.get_model_metadata("content_intelligence")
        assert client.get_model_repository_index()
    item = load_items()[0]
    for protocol, url in (("http", serve_run.http), ("grpc", serve_run.grpc)):
        answer, pool = Client(protocol, url).infer("content_intelligence", item.inputs())
        assert pool == "cpu"
        assert int(answer["IMAGE_SCORES"].argmax()) == item.digit
        broken = {**item.inputs(), "IMAGE": np.array([[b"no picture"]], dtype=object)}
        with pytest.raises(Exception, match="in ensemble 'content_intelligence', step 'image_decoder'"):
            Client(protocol, url).infer("content_intelligence", broken)
