"""Several front-end processes: one server to its clients, statistics that add up, and deaths that are mended."""

import os
import re
import signal
import socket
import threading
import urllib.request
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

from tests.models import Repository, onnx_add_one
from tests.serving import Served, serving, wait_until

REQUESTS = 400


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    repository = Repository(tmp_path / "repository")
    repository.add_onnx()
    repository.add_slow(tmp_path / "began")
    with serving(repository.root, tmp_path / "log", "--front-end-processes", "2") as served:
        yield served


WIDE = 40_000


@pytest.fixture
def wide_server(tmp_path: Path) -> Iterator[Served]:
    """With a model whose inputs and outputs are large, and one that keeps a large input for a while."""
    repository = Repository(tmp_path / "repository")
    tensors = f'input {{ name: "x" data_type: TYPE_FP32 dims: {WIDE} }} '
    tensors += f'output {{ name: "y" data_type: TYPE_FP32 dims: {WIDE} }}'
    config = f'backend: "onnxruntime" max_batch_size: 8 {tensors} dynamic_batching {{}}'
    repository.add("add_one", config, {"model.onnx": onnx_add_one(WIDE)})
    wait = """
    import time
    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
    before = float(x[0, 0])
    time.sleep(before)
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", x + 0)])
    """
    repository.add_python("keeps", f'backend: "python" max_batch_size: 1 {tensors}', wait)
    with serving(repository.root, tmp_path / "log", "--front-end-processes", "2") as served:
        yield served


def ask_wide(module: Any, address: str, value: float, model: str = "add_one") -> Any:
    tensor = module.InferInput("x", [1, WIDE], "FP32")
    tensor.set_data_from_numpy(np.full((1, WIDE), value, np.float32))
    with module.InferenceServerClient(address) as client:
        return client.infer(model, [tensor]).as_numpy("y")


def engine_of(server: Served) -> psutil.Process:
    family = psutil.Process(server.process.pid).children()
    return next(one for one in family if "--engine-of" in command(one))


def holdings(server: Served) -> list[tuple[int, int]]:
    """How many files, and mappings of blocks, each process has; none while one has ended."""
    try:
        return [
            (one.num_fds(), Path(f"/proc/{one.pid}/maps").read_text().count("tutti-blocks"))
            for one in (engine_of(server), *workers(server))
        ]
    except (psutil.Error, OSError, StopIteration):
        return []


def touched_kib(process: psutil.Process) -> int:
    """How much of its own arena a front-end process has ever used."""
    mappings = re.findall(
        r"rw-s.*tutti-blocks(?s:.*?)Rss: +([0-9]+) kB", Path(f"/proc/{process.pid}/smaps").read_text()
    )
    return sum(map(int, mappings))


def workers(server: Served) -> list[psutil.Process]:
    return [
        one
        for one in psutil.Process(server.process.pid).children()
        if "tutti.frontends.processes.worker" in command(one)
    ]


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


def metrics(server: Served) -> str:
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=10) as response:
        return str(response.read().decode())


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
    text = metrics(server)
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


def test_deadlines_and_cancels_reach_the_engine(server: Served, tmp_path: Path) -> None:
    began = tmp_path / "began"
    with http.InferenceServerClient(server.http) as client:
        for _ in range(2):
            ask(client, http, "slow", 0.3)
        began.unlink()
        busy = threading.Thread(target=lambda: ask(http.InferenceServerClient(server.http), http, "slow", 0.6))
        busy.start()
        wait_until(began.exists)
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


def test_large_tensors_leave_nothing_behind(wide_server: Served) -> None:
    def several(start: int) -> None:
        module, address = (http, wide_server.http) if start % 2 else (grpc, wide_server.grpc)
        tensor = module.InferInput("x", [1, WIDE], "FP32")
        with module.InferenceServerClient(address) as client:
            for number in range(start, start + 50):
                tensor.set_data_from_numpy(np.full((1, WIDE), number, np.float32))
                assert (client.infer("add_one", [tensor]).as_numpy("y") == number + 1).all()

    def at_once(count: int) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(several, range(count)))

    def has_clients() -> bool:
        connections = [c.status for one in workers(wide_server) for c in one.net_connections("tcp")]
        return psutil.CONN_ESTABLISHED in connections

    at_once(8)
    wait_until(lambda: not has_clients())
    before = holdings(wide_server)
    # Both ways to both front-ends: the engine has four arenas mapped, each front-end two.
    assert [mappings for _, mappings in before] == [4, 2, 2]
    at_once(40)
    wait_until(lambda: holdings(wide_server) == before)


def test_a_front_end_killed_amid_large_tensors_takes_no_other_along(wide_server: Served) -> None:
    engine = engine_of(wide_server)
    ended = threading.Event()
    wrong: list[Any] = []

    def ask_on(number: int) -> None:
        while not ended.is_set():
            try:
                if not (ask_wide(http, wide_server.http, number) == number + 1).all():
                    wrong.append(number)
            except (OSError, HTTPException, InferenceServerException):
                continue  # it was the one that was killed

    threads = [threading.Thread(target=ask_on, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        victim = workers(wide_server)[0]
        victim.kill()
        wait_until(lambda gone=victim: len(workers(wide_server)) == 2 and gone not in workers(wide_server))
        wait_until(lambda: [mappings for _, mappings in holdings(wide_server)] == [4, 2, 2])
    ended.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert engine_of(wide_server).pid == engine.pid


def test_an_engine_killed_amid_large_tensors_is_followed_by_another(wide_server: Served) -> None:
    engine = engine_of(wide_server)
    with ThreadPoolExecutor(4) as pool:
        kept = [pool.submit(ask_wide, http, wide_server.http, 30.0, "keeps") for _ in range(4)]
        wait_until(lambda: 'nv_inference_pending_request_count{model="keeps",version="1"} 3' in metrics(wide_server))
        engine.kill()
        for one in kept:
            with pytest.raises(InferenceServerException, match="has ended"):
                one.result(30)

    def answers() -> bool:
        try:
            return bool((ask_wide(grpc, wide_server.grpc, 1.0) == 2.0).all())
        except InferenceServerException:
            return False

    wait_until(answers, timeout_s=60)
    wait_until(lambda: [mappings for _, mappings in holdings(wide_server)] == [4, 2, 2])


def test_a_client_that_leaves_amid_a_large_body_gives_its_block_back(wide_server: Served) -> None:
    head = f"POST /v2/models/add_one/infer HTTP/1.1\r\nHost: t\r\nContent-Length: {4 * WIDE}\r\n\r\n".encode()
    host, _, port = wide_server.http.partition(":")
    for _ in range(600):  # if they kept their blocks, that were all blocks of both front-ends
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head + bytes(100_000))
    assert (ask_wide(http, wide_server.http, 5.0) == 6.0).all()
    assert 0 < sum(map(touched_kib, workers(wide_server))) < 10_000
