"""Front-end processes are one server to whoever looks at it: settings, traces, logs, and what each answer says."""

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpc
import tritonclient.http as http

from tests.conformance.test_access import Collector
from tests.conformance.test_front_ends import workers
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
