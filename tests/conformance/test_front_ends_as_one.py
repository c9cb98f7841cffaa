"""Front-end processes are one server to whoever looks at it: settings, traces, logs, and what each answer says."""

import gzip
import json
import os
import re
import signal
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpc
import tritonclient.http as http

from tests.conformance.test_access import Collector
from tests.conformance.test_front_ends import engine_of, workers
from tests.models import Repository
from tests.serving import Served, serving, wait_until

pytestmark = pytest.mark.slow

X = np.ones((1, 4), np.float32)
FRONT_ENDS = ("--front-end-processes", "2")
# So many connections that one process cannot have got all of them by chance.
CONNECTIONS = 24


@pytest.fixture
def models(tmp_path: Path) -> Repository:
    repository = Repository(tmp_path / "repository")
    repository.add_onnx()
    return repository


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def tensor(module: Any) -> Any:
    made = module.InferInput("x", [1, 4], "FP32")
    made.set_data_from_numpy(X)
    return made


def ask(served: Served, module: Any, request_id: str, headers: Any = None, **more: Any) -> None:
    with module.InferenceServerClient(served.http if module is http else served.grpc) as client:
        client.infer("add_one", [tensor(module)], request_id=request_id, headers=dict(headers or {}), **more)


def ask_all(served: Served, name: str) -> set[str]:
    """A request on each of many connections; returns their ids."""
    ids = [f"{name}-{number}" for number in range(CONNECTIONS)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: ask(served, (http, grpc)[number % 2], ids[number]), range(CONNECTIONS)))
    return set(ids)


def ids_in(text: str) -> set[str]:
    """Of the lines of requests in a server's log, in text or JSON."""
    return {word.split("=")[1] for word in text.replace('"id": "', " id=").replace('"', " ").split() if "id=" in word}


def listens(process: psutil.Process) -> bool:
    """At both ports."""
    return [one.status for one in process.net_connections("tcp")].count(psutil.CONN_LISTEN) == 2


def test_log_settings_reach_every_process(models: Repository, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving(models.root, log, *FRONT_ENDS) as served, http.InferenceServerClient(served.http) as client:
        unseen = ask_all(served, "before")
        client.update_log_settings({"log_verbose_level": 1})
        seen = ask_all(served, "verbose")
        wait_until(lambda: seen <= ids_in(log.read_text()))
        with grpc.InferenceServerClient(served.grpc) as over_grpc:
            over_grpc.update_log_settings({"log_verbose_level": 0})
        unseen |= ask_all(served, "quiet")
        client.update_log_settings({"log_verbose_level": 1, "log_format": "json"})
        seen |= ask_all(served, "again")
        wait_until(lambda: seen <= ids_in(log.read_text()))
        assert not ids_in(log.read_text()) & unseen
        victim, other = workers(served)
        os.kill(victim.pid, signal.SIGKILL)
        wait_until(lambda: len({one.pid for one in workers(served)} - {victim.pid, other.pid}) == 1)
        (said,) = (line for line in log.read_text().splitlines() if "a front-end process ended with status" in line)
        assert json.loads(said)["level"] == "ERROR", "the supervisor follows, too"
        wait_until(lambda: all(map(listens, workers(served))))
        late = ask_all(served, "late")
        wait_until(lambda: late <= ids_in(log.read_text()))


TRACED = ("--trace-config", "level=TIMESTAMPS", "--trace-config", "rate=1")
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def ask_in_every_way(served: Served) -> int:
    """Requests of each kind that an engine's process takes in a way of its own; returns how many, each with an id."""
    headers = {"traceparent": PARENT}
    ask(served, http, "binary", headers=headers)
    ask(served, http, "json", headers=headers, outputs=[http.InferRequestedOutput("y", binary_data=False)])
    ask(served, http, "classes", headers=headers, outputs=[http.InferRequestedOutput("y", class_count=1)])
    ask(served, http, "deflated", headers=headers, request_compression_algorithm="deflate")
    ask(served, grpc, "message", headers=headers)
    ask(served, grpc, "message classes", headers=headers, outputs=[grpc.InferRequestedOutput("y", class_count=1)])
    for path in ("generate", "generate_stream"):
        body = {"id": path, "x": [1, 2, 3, 4]}
        with http.InferenceServerClient(served.http) as client:
            assert client._post(f"v2/models/add_one/{path}", json.dumps(body), dict(headers), None).status_code == 200
    with grpc.InferenceServerClient(served.grpc) as client:
        client.start_stream(lambda result, error: None, headers=headers)
        client.async_stream_infer("add_one", [tensor(grpc)], request_id="stream")
        client.stop_stream()
    return 9


def traces_in(file: Path) -> dict[str, Any]:
    """Request id -> (its answer's id, the names of its activities in their order), of the file so far."""
    try:
        entries = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    times = {entry["id"]: [one["name"] for one in entry["timestamps"]] for entry in entries if "timestamps" in entry}
    return {
        entry["request_id"]: (entry.get("answer_id"), times[entry["id"]]) for entry in entries if "model_name" in entry
    }


def traced(models: Repository, folder: Path, *flags: str) -> dict[str, Any]:
    file = folder / "trace.json"
    folder.mkdir()
    with serving(models.root, folder / "log", *TRACED, "--trace-config", f"triton,file={file}", *flags) as served:
        count = ask_in_every_way(served)
        wait_until(lambda: len(traces_in(file)) == count)
        with http.InferenceServerClient(served.http) as client:
            client.update_trace_settings(settings={"trace_level": ["OFF"]})
            ask_all(served, "off")
            client.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"]})
        on = ask_all(served, "on")
        wait_until(lambda: on <= set(traces_in(file)))
    return traces_in(file)


def test_traces_are_those_of_one_process(models: Repository, tmp_path: Path) -> None:
    alone = traced(models, tmp_path / "one")
    assert not [name for name in alone if name.startswith("off")]
    assert alone["on-0"][1][0] == "HTTP_RECV_START"
    assert traced(models, tmp_path / "several", *FRONT_ENDS) == alone


def test_traces_are_part_of_the_clients(models: Repository, tmp_path: Path, collector: Collector) -> None:
    where = ("--trace-config", "mode=opentelemetry", "--trace-config", f"opentelemetry,url={collector.url}")
    with serving(models.root, tmp_path / "log", *TRACED, *where, *FRONT_ENDS) as served:
        count = ask_in_every_way(served)
        wait_until(lambda: len(requests_of(collector)) == count)
    for span in requests_of(collector):
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == tuple(PARENT.split("-")[1:3]), span


def requests_of(collector: Collector) -> list[Any]:
    return [span for span in list(collector.spans) if span.name == "InferRequest"]


TIMING = re.compile(r"(?:queue;dur=[0-9.]+, compute;dur=[0-9.]+, |cache;desc=hit, )?total;dur=[0-9.]+")
DATA = [1, 2, 3, 4]
INPUT = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": DATA}
INFER, GENERATE = "/v2/models/add_one/infer", "/v2/models/add_one/generate"


def infer_body(**more: Any) -> bytes:
    return json.dumps({"inputs": [INPUT], **more}).encode()


# name -> (method, path, headers, body, status). What is executed says for how long.
EXECUTED: dict[str, tuple[str, str, dict[str, str], bytes, int]] = {
    "json": ("POST", INFER, {}, infer_body(), 200),
    "binary": ("POST", INFER, {}, infer_body(parameters={"binary_data_output": True}), 200),
    "raw": ("POST", INFER, {"inference-header-content-length": "0"}, X[0].tobytes(), 200),
    "coded": ("POST", INFER, {"content-encoding": "deflate"}, zlib.compress(infer_body()), 200),
    "coded answer": ("POST", INFER, {"accept-encoding": "gzip"}, infer_body(), 200),
    "coded both": (
        "POST", INFER, {"content-encoding": "gzip", "accept-encoding": "gzip"}, gzip.compress(infer_body()), 200,
    ),
    "closing": ("POST", INFER, {"connection": "close"}, infer_body(), 200),
    "classes": (
        "POST", INFER, {}, infer_body(outputs=[{"name": "y", "parameters": {"classification": 2}}]), 200,
    ),
    "generate": ("POST", GENERATE, {}, json.dumps({"x": DATA}).encode(), 200),
    "generate_stream": ("POST", GENERATE + "_stream", {}, json.dumps({"x": DATA}).encode(), 200),
}  # fmt: skip
OTHERS: dict[str, tuple[str, str, dict[str, str], bytes, int]] = {
    "no region": (
        "POST", INFER, {},
        json.dumps({"inputs": [{**INPUT, "data": [], "parameters": {
            "shared_memory_region": "none", "shared_memory_byte_size": 16, "shared_memory_offset": 0,
        }}]}).encode(), 400,
    ),
    "no model": ("POST", "/v2/models/none/infer", {}, infer_body(), 404),
    "no model, coded": ("POST", "/v2/models/none/infer", {"content-encoding": "gzip"}, gzip.compress(b"{}"), 404),
    "no json": ("POST", INFER, {}, b"{", 400),
    "not coded": ("POST", INFER, {"content-encoding": "gzip"}, b"{", 400),
    "bad header": ("POST", INFER, {"inference-header-content-length": "many"}, infer_body(), 400),
    "too large": ("POST", INFER, {"content-length": str(2**40)}, b"", 413),
    "no infer": ("GET", INFER, {}, b"", 405),
    "no generate": ("GET", GENERATE, {}, b"", 405),
    "generate without": ("POST", GENERATE, {}, b"{}", 400),
    "generate none": ("POST", "/v2/models/none/generate_stream", {}, b"{}", 404),
    "server": ("GET", "/v2", {}, b"", 200),
    "head": ("HEAD", "/v2", {}, b"", 200),
    "live": ("GET", "/v2/health/live", {}, b"", 200),
    "ready": ("GET", "/v2/health/ready", {}, b"", 200),
    "config": ("GET", "/v2/models/add_one/config", {}, b"", 200),
    "statistics": ("GET", "/v2/models/add_one/stats", {}, b"", 200),
    "index": ("POST", "/v2/repository/index", {}, b"", 200),
    "restricted": ("GET", "/v2/logging", {}, b"", 403),
    "bad setting": ("POST", "/v2/trace/setting", {}, b'{"trace_rate": 7}', 400),
    "nowhere": ("GET", "/v2/nowhere", {}, b"", 404),
    "other verb": ("DELETE", "/v2", {}, b"", 405),
}  # fmt: skip


@pytest.mark.parametrize("flags", [(), FRONT_ENDS], ids=["one process", "front ends"])
def test_every_answer_says_its_id_and_where_its_time_went(
    models: Repository, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    restricted = ("--http-restricted-api", "logging:key=open")
    with serving(models.root, tmp_path / "log", *restricted, *flags) as served:
        for name, (method, path, headers, body, status) in {**EXECUTED, **OTHERS}.items():
            for sent in (name.replace(" ", "-"), ""):
                with closing(HTTPConnection(served.http, timeout=30)) as connection:
                    more = {**headers, "x-request-id": sent} if sent else headers
                    connection.request(method, path, body or None, more)
                    answer = connection.getresponse()
                    answer.read()
                assert answer.status == status, name
                said = answer.headers.get_all("x-request-id"), answer.headers.get_all("server-timing")
                assert [len(values or []) for values in said] == [1, 1], name
                (known_as,), (timing,) = said  # type: ignore[misc]
                assert known_as == (sent or known_as) != "", name
                assert TIMING.fullmatch(timing), (name, timing)
                assert ("compute;dur" in timing) == (name in EXECUTED), (name, timing)


def test_without_an_engine_answers_say_so_much_too(models: Repository, tmp_path: Path) -> None:
    with serving(models.root, tmp_path / "log", *FRONT_ENDS) as served:
        engine_of(served).kill()
        refused: dict[str, Any] = {}

        def is_refused() -> bool:
            with closing(HTTPConnection(served.http, timeout=30)) as connection:
                for path in (INFER, GENERATE, "/v2/repository/index"):
                    connection.request("POST", path, infer_body(), {"x-request-id": "mine"})
                    answer = connection.getresponse()
                    answer.read()
                    if answer.status == 503:
                        refused[path] = answer.headers
            return len(refused) == 3

        wait_until(is_refused)
    for headers in refused.values():
        assert headers["x-request-id"] == "mine"
        assert TIMING.fullmatch(headers["server-timing"])
