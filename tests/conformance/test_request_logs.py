"""The log of requests of real servers: a line for every request over either protocol, whatever process answers it."""

import json
import re
import socket
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpc
import tritonclient.http as http
from tritonclient.utils import InferenceServerException

from tests.models import IN_PROCESS, Repository
from tests.serving import Served, serving, wait_until
from tutti.app.restarts import UNUSABLE

pytestmark = pytest.mark.slow

X = np.ones((1, 4), np.float32)
CLIENT = re.compile(r"127\.0\.0\.1:\d+")


def ask(module: Any, address: str, model: str, request_id: str, wide: int = 4) -> None:
    tensor = module.InferInput("x", [1, wide], "FP32")
    tensor.set_data_from_numpy(np.ones((1, wide), np.float32))
    with module.InferenceServerClient(address) as client:
        try:
            client.infer(model, [tensor], request_id=request_id)
        except InferenceServerException:
            assert model != "add_one" or wide != 4


def post(server: Served, path: str, body: bytes, request_id: str) -> tuple[int, dict[str, str]]:
    """Status and headers. Nobody can say that he is another."""
    headers = {"x-request-id": request_id, "tutti-client": "somebody"}
    request = urllib.request.Request(f"http://{server.http}{path}", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers)


def stream(server: Served, request_id: str) -> None:
    tensor = grpc.InferInput("x", [1, 4], "FP32")
    tensor.set_data_from_numpy(X)
    with grpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: None)
        client.async_stream_infer("add_one", [tensor], request_id=request_id)
        client.stop_stream()


@pytest.mark.parametrize("flags", [(), ("--front-end-processes", "2")], ids=["one process", "front ends"])
def test_every_request_has_a_line(tmp_path: Path, flags: tuple[str, ...]) -> None:
    repository = Repository(tmp_path / "repository")
    repository.add_onnx()
    log, access = tmp_path / "log", tmp_path / "access"
    given = ("--access-log", str(access), "--log-format", "json", "--log-slow-ms", "0.000001", *flags)
    with serving(repository.root, log, *given) as server:
        for module, address in ((http, server.http), (grpc, server.grpc)):
            name = module.__name__.split(".")[1]
            ask(module, address, "add_one", f"{name} fine")
            ask(module, address, "add_one", f"{name}-fine")
            ask(module, address, "add_one", f"{name}-narrow", wide=3)
            ask(module, address, "nothing", f"{name}-unknown")
        stream(server, "stream")
        for what, path, body in (
            ("generate", "/v2/models/add_one/generate", b'{"x": [1, 2, 3, 4]}'),
            ("generate_stream", "/v2/models/add_one/generate_stream", b'{"x": [1, 2, 3, 4]}'),
            ("broken", "/v2/models/add_one/generate", b"{"),
            ("infer", "/v2/models/add_one/infer", b"{"),
        ):
            _, headers = post(server, path, body, what)
            assert headers["x-request-id"] == what
            assert "total;dur=" in headers["server-timing"]
        wanted = {
            "http-fine": 200, "http-narrow": 400, "http-unknown": 404, "grpc-fine": "OK", "grpc fine": "OK",
            "grpc-narrow": "INVALID_ARGUMENT", "grpc-unknown": "NOT_FOUND", "stream": "OK", "generate": 200,
            "generate_stream": 200, "broken": 400, "infer": 400,
        }  # fmt: skip
        seen: dict[str, Any] = {}

        def has_all() -> bool:
            seen.update((one.get("id", ""), one) for one in map(json.loads, access.read_text().splitlines()))
            return set(wanted) <= set(seen)

        wait_until(has_all)
    for name, status in wanted.items():
        one = seen[name]
        assert (one["status"], one["model"]) == (status, "nothing" if "unknown" in name else "add_one")
        assert one["bytes_in"] > 0
        assert name == "stream" or CLIENT.fullmatch(one["client"])
        if status in (200, "OK"):
            assert one["batch_rows"] == 1
            assert one["total_ms"] + 0.03 >= one["queue_ms"] + one["compute_ms"] > 0
            assert one["bytes_out"] > 0
        else:
            assert one["error"]
    said = [json.loads(one) for one in log.read_text().splitlines()]  # the server's own lines, too
    slow = {one["id"]: one for one in said if one["logger"] == "tutti.requests" and one["level"] == "WARNING"}
    assert slow["http-fine"]["message"].startswith("slow: http infer of model 'add_one' (id http-fine) took ")
    assert {"http-fine", "grpc-fine", "generate", "stream"} <= set(slow)


def test_the_access_log_may_go_to_standard_output(tmp_path: Path) -> None:
    """Of the server, though its front-ends have another; logs stay where they were."""
    repository = Repository(tmp_path / "repository")
    repository.add_onnx()
    with serving(repository.root, tmp_path / "log", "--access-log", "-", "--front-end-processes", "2") as server:
        ask(http, server.http, "add_one", "here")
        wait_until(lambda: " id=here " in (tmp_path / "log").read_text())


def test_a_log_that_cannot_be_written_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    Repository(tmp_path / "repository").add_onnx()
    command = ["tutti", "serve", str(tmp_path / "repository"), "--access-log", str(tmp_path / "no" / "log")]
    command += ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    ended = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=60, cwd="/")
    assert ended.returncode == UNUSABLE
    assert f"--access-log {tmp_path}/no/log: No such file or directory" in ended.stderr
    assert "loaded model" not in ended.stderr


LARGE = np.arange(40_000, dtype=np.float32).reshape(1, -1)  # more than is written in one piece
_SAME = """
    y = pb_utils.Tensor("y", pb_utils.get_input_tensor_by_name(request, "x").as_numpy())
    return pb_utils.InferenceResponse([y])
"""
_TENSORS = 'input { name: "x" data_type: TYPE_FP32 dims: -1 } output { name: "y" data_type: TYPE_FP32 dims: -1 }'


@pytest.mark.parametrize("flags", [(), ("--front-end-processes", "1")], ids=["one process", "front end"])
def test_large_answers_come_and_have_their_lines(tmp_path: Path, flags: tuple[str, ...]) -> None:
    repository = Repository(tmp_path / "repository")
    for name, config in (
        ("batched", "max_batch_size: 8 dynamic_batching {}"),
        ("unbatched", ""),
        ("cached", "max_batch_size: 8 response_cache { enable: true }"),
    ):
        repository.add_python(name, f'backend: "python" {config} {_TENSORS} {IN_PROCESS}', _SAME)
    access = tmp_path / "access"
    given = ("--access-log", str(access), "--log-format", "json", "--cache-config", "local,size=10000000", *flags)
    wanted: dict[str, int | str] = {}
    with serving(repository.root, tmp_path / "log", *given) as server:
        for model in ("batched", "unbatched", "cached", "cached"):
            for module, address in ((http, server.http), (grpc, server.grpc)):
                for way in ("binary", "json", "") if module is http else ("binary",):
                    name = f"{module.__name__}-{model}-{way}-{len(wanted)}" if way else ""
                    got = ask_for_large(module, address, model, name, is_binary=way != "json")
                    np.testing.assert_array_equal(got, LARGE if model != "unbatched" else LARGE[0])
                    wanted |= {name: 200 if module is http else "OK"} if name else {}

        def seen() -> list[dict[str, Any]]:
            lines = map(json.loads, access.read_text().splitlines())
            return [one for one in lines if one["request"] == "infer"]

        wait_until(lambda: len(seen()) >= 16)
    assert wanted.items() <= {one["id"]: one["status"] for one in seen()}.items()
    assert all(one["bytes_out"] > LARGE.nbytes for one in seen())
    assert "Traceback" not in (tmp_path / "log").read_text()


def ask_for_large(module: Any, address: str, model: str, request_id: str, is_binary: bool) -> Any:
    data = LARGE[0] if model == "unbatched" else LARGE
    tensor = module.InferInput("x", list(data.shape), "FP32")
    tensor.set_data_from_numpy(data)
    asked = [http.InferRequestedOutput("y", binary_data=is_binary)] if module is http else None
    with module.InferenceServerClient(address) as client:
        return client.infer(model, [tensor], request_id=request_id, outputs=asked).as_numpy("y")


# Says in a folder that it has begun, and waits there until it may go on.
_WAIT = """
    import pathlib, threading
    folder, name = pathlib.Path(FOLDER), request.request_id()
    (folder / f"{name} begun").touch()
    while not (folder / f"{name} may end").exists():
        threading.Event().wait(0.005)
    y = pb_utils.Tensor("y", pb_utils.get_input_tensor_by_name(request, "x").as_numpy())
    return pb_utils.InferenceResponse([y])
"""
WAITING_S = 1.0


def tensor_of(module: Any) -> Any:
    made = module.InferInput("x", [1, 4], "FP32")
    made.set_data_from_numpy(X)
    return made


def lines_of(access: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in access.read_text().splitlines()] if access.exists() else []


def ids_of(access: Path) -> set[str]:
    return {line.get("id", "") for line in lines_of(access)}


def waiting_model(folder: Path) -> Repository:
    """A repository with one that waits in a folder beside it."""
    repository = Repository(folder / "repository")
    (folder / "waits").mkdir()
    config = f'backend: "python" max_batch_size: 1 instance_group {{ count: 3 }} {_TENSORS} {IN_PROCESS}'
    repository.add_python("waits", config, _WAIT.replace("FOLDER", repr(str(folder / "waits"))))
    return repository


class Leaving:
    """Clients that ask a model that waits, and leave."""

    def __init__(self, server: Served, folder: Path) -> None:
        self._server = server
        self._folder = folder

    def begun(self, name: str) -> None:
        wait_until((self._folder / f"{name} begun").exists)

    def end(self, name: str) -> None:
        (self._folder / f"{name} may end").touch()

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """Whoever leaves inside it has been noticed after it."""
        before = self._descriptors()
        yield
        wait_until(lambda: self._descriptors() <= before)

    def over_http(self, name: str, path: str, body: dict[str, Any]) -> None:
        connection = socket.create_connection(self._server.http.split(":"), timeout=30)  # type: ignore[arg-type]
        content = json.dumps({"id": name, **body}).encode()
        head = f"POST /v2/models/waits/{path} HTTP/1.1\r\nhost: t\r\ncontent-length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        self.begun(name)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    def _descriptors(self) -> int:
        """How many the processes have that clients may reach: one for each connection."""
        own = psutil.Process(self._server.process.pid)
        return sum(one.num_fds() for one in [own, *own.children()])

    def in_time(self, name: str, **more: Any) -> None:
        """Its own time passes."""
        with (
            grpc.InferenceServerClient(self._server.grpc) as client,
            pytest.raises(InferenceServerException, match="Deadline"),
        ):
            client.infer("waits", [tensor_of(grpc)], request_id=name, client_timeout=WAITING_S, **more)
        self.begun(name)

    def cancelled(self, name: str, **more: Any) -> None:
        ended = threading.Event()
        with grpc.InferenceServerClient(self._server.grpc) as client:
            asked = client.async_infer("waits", [tensor_of(grpc)], lambda **_: ended.set(), request_id=name, **more)
            self.begun(name)
            asked.cancel()
            assert ended.wait(30)

    def streamed(self, name: str) -> None:
        with grpc.InferenceServerClient(self._server.grpc) as client:
            client.start_stream(lambda **_: None)
            client.async_stream_infer("waits", [tensor_of(grpc)], request_id=name)
            self.begun(name)
            client.stop_stream(cancel_requests=True)


@pytest.mark.parametrize(
    "flags",
    [(), ("--grpc-server", "grpcio"), ("--front-end-processes", "2")],
    ids=["one process", "grpcio", "front ends"],
)
def test_the_log_says_what_clients_were_told_that_left(tmp_path: Path, flags: tuple[str, ...]) -> None:
    repository, access = waiting_model(tmp_path), tmp_path / "access"
    data: dict[str, Any] = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}
    by_class = [grpc.InferRequestedOutput("y", class_count=1)]
    wanted = {
        "http": 499, "generate": 499, "late": "DEADLINE_EXCEEDED", "late-classes": "DEADLINE_EXCEEDED",
        "cancelled": "CANCELLED", "cancelled-classes": "CANCELLED", "stream": "CANCELLED",
    }  # fmt: skip
    with serving(
        repository.root, tmp_path / "log", "--access-log", str(access), "--log-format", "json", *flags
    ) as server:
        leaving = Leaving(server, tmp_path / "waits")
        for name, leave in (
            ("http", lambda name: leaving.over_http(name, "infer", {"inputs": [data]})),
            ("generate", lambda name: leaving.over_http(name, "generate", {"x": [1, 2, 3, 4]})),
            ("cancelled", leaving.cancelled),
            ("cancelled-classes", lambda name: leaving.cancelled(name, outputs=by_class)),
            ("late", leaving.in_time),
            ("late-classes", lambda name: leaving.in_time(name, outputs=by_class)),
        ):
            with leaving.noticed():
                leave(name)
            leaving.end(name)
        leaving.streamed("stream")
        wait_until(lambda: "stream" in ids_of(access))
        leaving.end("stream")
        wait_until(lambda: set(wanted) <= ids_of(access))
    lines = [line for line in lines_of(access) if line.get("id") in wanted]
    assert sorted((line["id"], line["status"]) for line in lines) == sorted(wanted.items())
    assert all("the client had gone" in line["error"] and line["bytes_out"] == 0 for line in lines)


@pytest.mark.parametrize("flags", [(), ("--front-end-processes", "2")], ids=["one process", "front ends"])
def test_what_is_open_when_the_server_stops_is_answered_and_noted(tmp_path: Path, flags: tuple[str, ...]) -> None:
    repository, access = waiting_model(tmp_path), tmp_path / "access"
    by_class = [grpc.InferRequestedOutput("y", class_count=1)]

    def listens(server: Served) -> bool:
        try:
            with socket.create_connection(server.http.split(":"), timeout=30):  # type: ignore[arg-type]
                return True
        except OSError:
            return False

    with (
        serving(
            repository.root, tmp_path / "log", "--access-log", str(access), "--log-format", "json", *flags
        ) as server,
        ThreadPoolExecutor(3) as pool,
        grpc.InferenceServerClient(server.grpc) as over_grpc,
        http.InferenceServerClient(server.http) as over_http,
    ):
        waits = Leaving(server, tmp_path / "waits")
        asked = [
            pool.submit(over_http.infer, "waits", [tensor_of(http)], request_id="http"),
            pool.submit(over_grpc.infer, "waits", [tensor_of(grpc)], request_id="grpc"),
            pool.submit(over_grpc.infer, "waits", [tensor_of(grpc)], request_id="classes", outputs=by_class),
        ]
        for name in ("http", "grpc", "classes"):
            waits.begun(name)
        server.process.terminate()
        wait_until(lambda: not listens(server))
        for name in ("http", "grpc", "classes"):
            waits.end(name)
        for answer in asked:
            assert answer.result(30).as_numpy("y") is not None
        assert server.process.wait(30) == 0
    noted = {line["id"]: line["status"] for line in lines_of(access)}
    assert {"http": 200, "grpc": "OK", "classes": "OK"}.items() <= noted.items()
