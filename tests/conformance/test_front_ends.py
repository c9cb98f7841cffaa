"""Several front-end processes: one server to its clients, statistics that add up, and deaths that are mended."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpc
import tritonclient.http as http
from tritonclient.utils import InferenceServerException

from tests.models import Repository
from tests.serving import Served, serving, wait_until

REQUESTS = 400


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    repository = Repository(tmp_path / "repository")
    repository.add_onnx()
    repository.add_slow()
    with serving(repository.root, tmp_path / "log", "--front-end-processes", "2") as served:
        yield served


def workers(server: Served) -> list[psutil.Process]:
    family = psutil.Process(server.process.pid).children(recursive=True)
    return [one for one in family if "tutti.frontends.worker" in " ".join(one.cmdline())]


def ask(client: Any, module: Any, model: str = "add_one", value: float = 1.0, **options: Any) -> Any:
    name, shape = ("x", [1, 4]) if model == "add_one" else ("s", [1, 1])
    tensor = module.InferInput(name, shape, "FP32")
    tensor.set_data_from_numpy(np.full(shape, value, np.float32))
    return client.infer(model, [tensor], **options)


def test_statistics_and_metrics_add_up(server: Served) -> None:
    assert len(workers(server)) == 2

    def one(number: int) -> None:  # a connection each: the kernel spreads them
        module, address = (http, server.http) if number % 2 else (grpc, server.grpc)
        with module.InferenceServerClient(address) as client:
            assert ask(client, module, value=number).as_numpy("y").tolist() == [[number + 1] * 4]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(REQUESTS)))
    used = [one.cpu_times().user for one in workers(server)]
    assert min(used) > 0.05 * max(used), "both have worked"
    with http.InferenceServerClient(server.http) as client:
        stats = client.get_inference_statistics("add_one")["model_stats"][0]
        assert stats["inference_stats"]["success"]["count"] == REQUESTS
    import urllib.request

    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=10) as response:
        text = response.read().decode()
    assert f'nv_inference_request_success{{model="add_one",version="1"}} {REQUESTS}' in text.replace(".0", "")


def test_one_that_dies_is_started_anew_and_the_other_serves_on(server: Served) -> None:
    victim = workers(server)[0]
    os.kill(victim.pid, signal.SIGKILL)

    def answers() -> bool:
        try:
            with http.InferenceServerClient(server.http) as client:
                return ask(client, http).as_numpy("y") is not None
        except (OSError, HTTPException, InferenceServerException):
            return False

    wait_until(answers)
    wait_until(lambda: len(workers(server)) == 2 and victim.pid not in [one.pid for one in workers(server)])
    for _ in range(20):
        assert answers()


def test_deadlines_and_cancels_reach_the_engine(server: Served) -> None:
    with http.InferenceServerClient(server.http) as client:
        for _ in range(2):
            ask(client, http, "slow", 0.3)
        busy = threading.Thread(target=lambda: ask(http.InferenceServerClient(server.http), http, "slow", 0.6))
        busy.start()
        wait_until(lambda: psutil.Process(server.process.pid).is_running())
        threading.Event().wait(0.1)
        with grpc.InferenceServerClient(server.grpc) as other, pytest.raises(InferenceServerException) as refused:
            ask(other, grpc, "slow", 0.0, client_timeout=0.05)
        assert "cannot finish in time" in str(refused.value) or "DEADLINE" in str(refused.value)
        busy.join()
        stats = client.get_inference_statistics("slow")["model_stats"][0]
        assert stats["inference_stats"]["success"]["count"] == 3
        assert stats["inference_stats"]["fail"]["count"] == 1


def test_a_connection_goes_on_whoever_answers(server: Served) -> None:
    connection = HTTPConnection(server.http, timeout=30)
    connection.connect()
    connection.auto_open = 0
    infer = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]'
    by_class = infer + b', "outputs": [{"name": "y", "parameters": {"classification": 1}}]}'
    many = b'{"name": "' + 5000 * b"long" + b'"}'
    for method, path, content, expected in (
        ("GET", "/v2", None, 200), ("HEAD", "/v2", None, 200), ("POST", "/v2/models/add_one/infer", infer + b"}", 200),
        ("POST", "/v2/models/add_one/infer", by_class, 200), ("GET", "/v2/models/add_one/config", None, 200),
        ("POST", "/v2/models/add_one/generate", b'{"x": [1, 2, 3, 4]}', 200), ("GET", "/v2/nowhere", None, 404),
        ("POST", "/v2/models/add_one/generate_stream", b'{"x": [1, 2, 3, 4]}', 200),
        ("GET", "/v2/health/live", None, 200),
        ("POST", "/v2/repository/index", many, 200), ("DELETE", "/v2", None, 405),
    ):  # fmt: skip
        connection.request(method, path, content)
        response = connection.getresponse()
        text = response.read()
        assert response.status == expected, (path, text)
        assert response.getheader("connection") is None
        assert bool(text) == (method != "HEAD" and path != "/v2/health/live")
    connection.request("GET", "/v2", headers={"Connection": "close"})
    response = connection.getresponse()
    assert response.getheader("connection") == "close"
    assert b"tutti" in response.read()
    connection.close()


def test_gates_are_where_calls_come_in(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "repository")
    repository.add_onnx()
    flags = ("--http-restricted-api=statistics,health:key=open", "--grpc-restricted-protocol=statistics:key=open")
    with (
        serving(repository.root, tmp_path / "log", "--front-end-processes", "2", *flags, is_guarded=True) as served,
        grpc.InferenceServerClient(served.grpc) as over_grpc,
        http.InferenceServerClient(served.http) as over_http,
    ):
        wait_until(lambda: "listening on" in (tmp_path / "log").read_text())
        for client, header in ((over_grpc, "triton-grpc-protocol-key"), (over_http, "key")):
            assert client.get_inference_statistics("add_one", headers={header: "open"})
            for wrong in ({}, {header: "shut"}):
                with pytest.raises(InferenceServerException, match="restricted"):
                    client.get_inference_statistics("add_one", headers=wrong)
        assert over_grpc.is_server_ready()
        assert not over_http.is_server_live()
        assert over_http.is_server_live(headers={"key": "open"})


def test_with_the_server_they_end(server: Served) -> None:
    own = workers(server)
    os.kill(server.process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(own, timeout=10)
    assert not alive
