"""What published vulnerabilities of this protocol's servers teach, tried on `tutti serve`, class by class.

After each attack the server still answers, and has not grown.
"""

import base64
import contextlib
import gzip
import http.client
import json
import os
import socket
import struct
import threading
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from tritonclient.grpc import service_pb2 as pb

from tests.models import Repository
from tests.serving import Served, serving, wait_until
from tutti.observing.logs import Logs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]

LIMIT = 2_000_000
INFER = "/v2/models/add_one/infer"
GOOD = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}).encode()
LENGTH = "Inference-Header-Content-Length"
SERVICE = "/inference.GRPCInferenceService/"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("attacks")


@pytest.fixture(scope="module")
def served(scratch: Path) -> Iterator[Served]:
    repository = Repository(scratch / "models")
    repository.add_onnx()
    (scratch / "secret").mkdir()
    (scratch / "secret" / "config.pbtxt").write_text("a secret")
    repository.add_slow()
    flags = ("--model-control-mode", "explicit", "--load-model", "*", "--http-max-input-size", str(LIMIT))
    with serving(repository.root, scratch / "log", *flags, "--allow-client-shm", "--log-verbose", "1") as made:
        yield made


@pytest.fixture(autouse=True)
def _still_serves(request: pytest.FixtureRequest) -> Iterator[None]:
    if "served" not in request.fixturenames:
        yield
        return
    served: Served = request.getfixturevalue("served")
    process = psutil.Process(served.process.pid)
    before = process.memory_info().rss
    yield
    assert ask(served, "POST", INFER, GOOD)[0] == 200
    assert process.memory_info().rss - before < 150 * 2**20


def ask(
    served: Served, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, str]:
    connection = http.client.HTTPConnection(served.http, timeout=20)
    try:
        connection.request(method, path, body=body, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read().decode("utf-8", "replace")
    finally:
        connection.close()


def talk(served: Served, data: bytes) -> bytes:
    """Raw bytes to the HTTP port; what comes back until the server closes, or says nothing more."""
    host, port = served.http.split(":")
    got = b""
    with socket.create_connection((host, int(port)), timeout=0.5) as connection, contextlib.suppress(OSError):
        connection.sendall(data)
        while part := connection.recv(65536):
            got += part
    return got


TRAVERSALS = [
    "..", "../secret", "..%2fsecret", "%2e%2e%2fsecret", "..%5csecret", "add_one/../../secret", "%00", "add_one%00",
    "....//secret", "~root", "/etc", "%2fetc", "add_one%0d%0aX-Injected:%20yes", ".",
]  # fmt: skip


@pytest.mark.parametrize("name", TRAVERSALS)
def test_names_lead_nowhere(served: Served, name: str) -> None:
    for method, path in (
        ("GET", f"/v2/models/{name}"), ("GET", f"/v2/models/{name}/config"),
        ("POST", f"/v2/repository/models/{name}/load"), ("POST", f"/v2/models/{name}/infer"),
        ("GET", f"/v2/models/add_one/versions/{name}/config"),
    ):  # fmt: skip
        status, said = ask(served, method, path, b"{}" if method == "POST" else None)
        assert status in (400, 404, 405, 500)
        assert "a secret" not in said
    channel = grpc.insecure_channel(served.grpc)
    for request, method in (
        (pb.RepositoryModelLoadRequest(model_name=name), "RepositoryModelLoad"),
        (pb.ModelConfigRequest(name=name), "ModelConfig"),
        (pb.ModelConfigRequest(name="add_one", version=name), "ModelConfig"),
    ):
        with pytest.raises(grpc.RpcError):
            channel.unary_unary(SERVICE + method)(request.SerializeToString(), timeout=20)
    channel.close()


@pytest.mark.parametrize(
    "path", ["../secret/x", "1/../../secret/x", "/tmp/x", "1/./../../x", "1/..\\x", "1/%2e%2e/x", "1/a\x00b", "C:/x"]
)
def test_files_are_written_nowhere_else(served: Served, scratch: Path, path: str) -> None:
    before = sorted(scratch.rglob("*"))
    parameters = {"config": "{}", f"file:{path}": base64.b64encode(b"evil").decode()}
    body = json.dumps({"parameters": parameters}).encode()
    status, said = ask(served, "POST", "/v2/repository/models/new/load", body)
    assert status == 500
    assert "VERSION/FILE" in said
    assert sorted(scratch.rglob("*")) == before


def test_a_configuration_cannot_name_files_outside(served: Served) -> None:
    floats = {"data_type": "TYPE_FP32", "dims": [4]}
    for config in (
        {"default_model_filename": "../../../secret/config.pbtxt"},
        {"default_model_filename": "/etc/passwd"},
        {"output": [{"name": "y", **floats, "label_filename": "../../secret/config.pbtxt"}]},
        {"model_warmup": [{"name": "w", "inputs": {"x": {**floats, "input_data_file": "../../secret/config.pbtxt"}}}]},
    ):
        whole = {"backend": "onnxruntime", "max_batch_size": 8, **config}
        body = json.dumps({"parameters": {"config": json.dumps(whole)}}).encode()
        status, said = ask(served, "POST", "/v2/repository/models/add_one/load", body)
        assert status == 500, config
        assert "a secret" not in said


@pytest.mark.parametrize(("path", "setting"), [("/v2/logging", "log_file"), ("/v2/trace/setting", "trace_file")])
def test_clients_do_not_choose_where_the_server_writes(served: Served, scratch: Path, path: str, setting: str) -> None:
    target = scratch / "planted"
    assert ask(served, "POST", path, json.dumps({setting: str(target)}).encode())[0] == 501
    ask(served, "POST", INFER, GOOD)
    assert not target.exists()


def test_clients_cannot_forge_log_lines(served: Served, scratch: Path) -> None:
    forged = "2026-01-01 00:00:00,000 I tutti: all is well"
    name = f"x\n{forged}\r\x1b[2J"
    body = json.dumps({"id": name, "inputs": [{"name": name}]}).encode()
    ask(served, "POST", "/v2/models/add_one/infer", body)
    ask(
        served, "POST", "/v2/repository/models/x%0A2026-01-01%2000:00:00,000%20I%20tutti:%20all%20is%20well/load", b"{}"
    )
    lines = (scratch / "log").read_text().splitlines()
    assert forged not in lines


def test_log_lines_keep_to_themselves(tmp_path: Path) -> None:
    import logging

    logs = Logs(file=str(tmp_path / "log"))
    logs._apply()
    record = logging.LogRecord(
        "tutti", logging.INFO, "f", 1, "a model called %s", ("x\nI tutti: forged\r\x1b[0m\x00",), None
    )
    logs._handler.emit(record)
    logs._handler.close()
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.endswith(r"a model called x\nI tutti: forged\r\x1b[0m\x00")


class Segment:
    """A POSIX shared memory segment of the test's own."""

    def __init__(self, size: int) -> None:
        import _posixshmem

        self.key = f"/tutti_attack_{uuid.uuid4().hex[:10]}"
        self.descriptor = _posixshmem.shm_open(self.key, os.O_CREAT | os.O_RDWR, mode=0o600)
        os.ftruncate(self.descriptor, size)

    def remove(self) -> None:
        import _posixshmem

        _posixshmem.shm_unlink(self.key)
        os.close(self.descriptor)


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment(4096)
    yield made
    made.remove()


def register(served: Served, name: str, key: str, size: int, offset: int = 0) -> int:
    body = json.dumps({"key": key, "byte_size": size, "offset": offset}).encode()
    return ask(served, "POST", f"/v2/systemsharedmemory/region/{name}/register", body)[0]


def infer_shared(served: Served, name: str, size: int, offset: int = 0, where: str = "input") -> int:
    region = {"shared_memory_region": name, "shared_memory_byte_size": size, "shared_memory_offset": offset}
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32"}
    request: dict[str, object] = {"inputs": [{**tensor, "parameters": region}]}
    if where == "output":
        request = {"inputs": [{**tensor, "data": [1, 2, 3, 4]}], "outputs": [{"name": "y", "parameters": region}]}
    return ask(served, "POST", INFER, json.dumps(request).encode())[0]


def test_shared_memory_out_of_bounds(served: Served, segment: Segment) -> None:
    for size, offset in ((4097, 0), (4096, 1), (1, 4096), (2**63, 0), (2**62, 2**62), (0, 0), (-1, 0), (16, -16)):
        assert register(served, "r", segment.key, size, offset) == 400
    assert register(served, "r", segment.key, 4096) == 200
    for where in ("input", "output"):
        for size, offset in ((16, 4096), (16, 4081), (2**62, 0), (16, 2**62), (-16, 0), (16, -16), (2**64, 0)):
            assert infer_shared(served, "r", size, offset, where) == 400
        assert infer_shared(served, "r", 16, 4080, where) == 200
    ask(served, "POST", "/v2/systemsharedmemory/region/r/unregister")


def test_shared_memory_after_unregister_and_after_truncation(served: Served, segment: Segment) -> None:
    assert register(served, "r", segment.key, 4096) == 200
    os.ftruncate(segment.descriptor, 0)  # a mapping of it would now kill the process
    for where in ("input", "output"):
        assert infer_shared(served, "r", 16, 0, where) == 400
    ask(served, "POST", "/v2/systemsharedmemory/region/r/unregister")
    assert infer_shared(served, "r", 16) == 404


@pytest.mark.parametrize(
    "key",
    [
        "/triton_python_backend_shm_region_1", "/../etc/passwd", "/a/b", "", "/", "/psm_0", "/plasma0", "/sem.x",
        "/a\x00b", "x" * 300,
    ],
)  # fmt: skip
def test_reserved_shared_memory_names(served: Served, key: str) -> None:
    assert register(served, "r", key, 16) == 400


def test_shared_memory_is_off_by_default(tmp_path: Path, segment: Segment) -> None:
    repository = Repository(tmp_path / "models")
    repository.add_onnx()
    with serving(repository.root, tmp_path / "log") as closed:
        assert register(closed, "r", segment.key, 4096) == 501
        assert infer_shared(closed, "r", 16) == 501
        for name in ("load", "unload"):  # and so is control of the models
            assert ask(closed, "POST", f"/v2/repository/models/add_one/{name}", b"{}")[0] == 503


def test_bodies_that_are_too_large(served: Served) -> None:
    assert ask(served, "POST", INFER, b" " * (LIMIT + 1))[0] == 413
    head = b"POST %s HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n" % INFER.encode()
    chunk = b"%x\r\n%b\r\n" % (65536, b" " * 65536)
    assert b" 413 " in talk(served, head + chunk * 40)
    for size in (b"FFFFFFFFFFFFFFFF", b"ffffffffffffffffffffff", b"-1", b"0x10", b"zz"):
        assert b" 200 " not in talk(served, head + size + b"\r\nabc\r\n0\r\n\r\n")
    for length in (b"18446744073709551616", b"99999999999999999999999", b"-1", b"1e3", b"0x10"):
        got = talk(served, b"POST %s HTTP/1.1\r\nhost: h\r\ncontent-length: %b\r\n\r\nabc" % (INFER.encode(), length))
        assert b" 200 " not in got


def test_numbers_that_overflow(served: Served) -> None:
    for shape in ([2**32, 2**32], [2**63, 2], [2**31, 2**31, 4], [-1, 4], [2**64], [0, 2**62], [1] * 100):
        for more in ({"data": []}, {"parameters": {"binary_data_size": 16}}):
            header = json.dumps({"inputs": [{"name": "x", "shape": shape, "datatype": "FP32", **more}]}).encode()
            status, _ = ask(served, "POST", INFER, header + bytes(16), {LENGTH: str(len(header))})
            assert status == 400, shape
    for length in (str(2**63), str(2**64), str(2**64 + len(GOOD)), "-1", "1" * 40, "٣", " 5", "+5", "5;6"):
        status, _ = ask(served, "POST", INFER, GOOD, {LENGTH: length.encode("utf-8").decode("latin-1")})
        assert status == 400, length
    for size in (2**63, 2**64, -1, 1.5, "16", 2**64 + 16, [16], None):
        tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": size}}
        header = json.dumps({"inputs": [tensor]}).encode()
        assert ask(served, "POST", INFER, header + bytes(16), {LENGTH: str(len(header))})[0] == 400, size


def test_numbers_that_overflow_over_grpc(served: Served) -> None:
    channel = grpc.insecure_channel(served.grpc)
    for shape in ((2**32, 2**32), (2**62, 4), (-1, 4), (1,) * 100):
        request = pb.ModelInferRequest(model_name="add_one", raw_input_contents=[bytes(16)])
        request.inputs.add(name="x", datatype="FP32", shape=shape)
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(SERVICE + "ModelInfer")(request.SerializeToString(), timeout=20)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    channel.close()


@pytest.mark.parametrize("path", [INFER, "/v2/models/add_one/generate", "/v2/repository/index", "/v2/logging"])
@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_json_that_is_nested_deep(served: Served, path: str, opening: bytes, closing: bytes) -> None:
    for depth in (1000, 100_000):
        nested = opening * depth + b"1" + closing * depth
        for body in (nested, b'{"inputs": ' + nested + b"}", b'{"parameters": {"p": ' + nested + b"}}"):
            assert ask(served, "POST", path, body)[0] in (200, 400, 413), "no crash, no 500"


@pytest.mark.parametrize(("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_decompression_bombs(served: Served, coding: str, pack: object) -> None:
    bomb = pack(b" " * 500_000_000 + GOOD) if coding == "deflate" else gzip.compress(b" " * 500_000_000, 1)  # type: ignore[operator]
    for path in (INFER, "/v2/models/add_one/generate"):
        status, said = ask(served, "POST", path, bomb[: LIMIT - 1], {"Content-Encoding": coding})
        assert status == 400
        assert "larger than" in said


@pytest.mark.parametrize("server", ["grpcio", "native"])
def test_decompression_bombs_over_grpc(tmp_path: Path, server: str) -> None:
    """grpcio stops at the limit. The native server would read on: it must not for a caller without a key."""
    repository = Repository(tmp_path / "models")
    repository.add_onnx()
    (tmp_path / "keys").write_text("key\n")
    flags = ("--grpc-server", server, "--grpc-max-message-size", str(LIMIT))
    message = pb.ModelInferRequest(model_name="add_one", raw_input_contents=[bytes(400_000_000)])
    flags += (  # type: ignore[assignment]
        ("--grpc-restricted-protocol", "trace:a=b")
        if server == "grpcio"
        else ("--api-key-file", str(tmp_path / "keys"))
    )
    with serving(repository.root, tmp_path / "log", *flags, is_guarded=True) as served:
        process = psutil.Process(served.process.pid)
        peak = before = process.memory_info().rss
        with grpc.insecure_channel(served.grpc, options=[("grpc.max_send_message_length", -1)]) as channel:
            bomb = channel.unary_unary(SERVICE + "ModelInfer").future(
                message.SerializeToString(), compression=grpc.Compression.Gzip, timeout=60
            )
            while not bomb.done():
                peak = max(peak, process.memory_info().rss)
                threading.Event().wait(0.005)
            assert bomb.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAUTHENTICATED)
        assert peak - before < 100 * 2**20


def test_a_thousand_outputs(served: Served) -> None:
    request = json.loads(GOOD)
    for names in (["y"] * 100_000, [f"y{n}" for n in range(20_000)]):
        body = json.dumps({**request, "outputs": [{"name": name} for name in names]}).encode()
        assert ask(served, "POST", INFER, body)[0] in (400, 413)
    message = pb.ModelInferRequest(model_name="add_one", raw_input_contents=[bytes(16)])
    message.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    for _ in range(5000):
        message.outputs.add(name="y")
    channel = grpc.insecure_channel(served.grpc)
    with pytest.raises(grpc.RpcError, match="at most 1024 outputs"):
        channel.unary_unary(SERVICE + "ModelInfer")(message.SerializeToString(), timeout=20)
    channel.close()


def test_malformed_headers(served: Served) -> None:
    line = b"POST %s HTTP/1.1\r\nhost: h\r\n" % INFER.encode()
    tail = b"content-length: %d\r\n\r\n%b" % (len(GOOD), GOOD)
    for header in (
        b"a b: c\r\n", b": empty\r\n", b"x" * 100_000 + b": y\r\n", b"x: " + b"y" * 100_000 + b"\r\n", b"x\x00y: z\r\n",
        b"content-length: 5\r\n", b"transfer-encoding: chunked\r\n", b"transfer-encoding: identity, chunked\r\n",
        b"transfer-encoding : chunked\r\n", b"content-length: 5, 6\r\n", b" folded: x\r\n", b"x: a\rb: c\r\n",
    ):  # fmt: skip
        got = talk(served, line + header + tail)
        assert b" 200 OK" not in got, header[:40]
    many = b"".join(b"h%d: v\r\n" % n for n in range(10_000))
    assert b" 200 OK" not in talk(served, line + many + tail)
    assert b" 200 OK" in talk(served, line + tail)


def test_callers_that_leave_at_any_moment(served: Served) -> None:
    """Cancel races: in the queue, while it is executed, while it is answered; over both protocols."""
    tensor = {"name": "s", "shape": [1, 1], "datatype": "FP32", "data": [0.02]}
    body = json.dumps({"inputs": [tensor]}).encode()
    head = b"POST /v2/models/slow/infer HTTP/1.1\r\nhost: h\r\ncontent-length: %d\r\n\r\n" % len(body)
    message = pb.ModelInferRequest(model_name="slow", raw_input_contents=[struct.pack("<f", 0.02)])
    message.inputs.add(name="s", datatype="FP32", shape=[1, 1])
    payload = message.SerializeToString()
    host, port = served.http.split(":")
    rng = np.random.default_rng(3)

    def leave_http(after_s: float) -> None:
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(head + body)
            threading.Event().wait(after_s)

    channel = grpc.insecure_channel(served.grpc)

    def leave_grpc(after_s: float) -> None:
        call = channel.unary_unary(SERVICE + "ModelInfer").future(payload)
        threading.Event().wait(after_s)
        call.cancel()

    threads = [
        threading.Thread(target=rng.choice([leave_http, leave_grpc]), args=(float(after),))
        for after in rng.uniform(0, 0.3, 120)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    channel.close()
    process = psutil.Process(served.process.pid)
    wait_until(lambda: len([c for c in process.net_connections() if c.status == "ESTABLISHED"]) <= 2)

    def pending() -> float:
        page = http.client.HTTPConnection(served.metrics, timeout=20)
        page.request("GET", "/metrics")
        text = page.getresponse().read().decode()
        page.close()
        start = 'nv_inference_pending_request_count{model="slow",version="1"} '
        return next(float(line.removeprefix(start)) for line in text.splitlines() if line.startswith(start))

    wait_until(lambda: pending() == 0)
