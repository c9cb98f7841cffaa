"""HTTP/1.1 under those who mean ill or are slow: smuggling shapes, slow readers and writers, half-closed and idle ones.

The shapes are the known families: two lengths that disagree, disguised Transfer-Encoding, odd chunk sizes and ends,
odd header lines. Each carries a second request that a careless server would answer.
"""

import asyncio
import contextlib
import json
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpc

from tests.models import Repository
from tests.serving import Served, serving, wait_until

SMUGGLED = b"GET /v2/smuggled HTTP/1.1\r\nHost: t\r\n\r\n"
POST = b"POST /v2/models/add_one/infer HTTP/1.1\r\nHost: t\r\n"
CHUNKED_END = b"0\r\n\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root: Path = tmp_path_factory.mktemp("robustness") / "repository"
    repository = Repository(root)
    repository.add_onnx()
    repository.add_slow()
    with serving(root, root.parent / "log", "--http-max-input-size", str(8 * 2**20)) as served:
        yield served


def connect(server: Served) -> socket.socket:
    host, _, port = server.http.partition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes, or says no more."""
    connection.settimeout(1.0)
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except (TimeoutError, ConnectionResetError):
        pass
    return received


def is_alive(server: Served) -> bool:
    with connect(server) as connection:
        connection.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n")
        return read_all(connection).startswith(b"HTTP/1.1 200")


def shapes() -> dict[str, bytes]:
    """Requests of which no reading may take SMUGGLED for a request of its own."""
    length = b"Content-Length: %d\r\n" % len(CHUNKED_END + SMUGGLED)
    te = b"Transfer-Encoding: chunked\r\n"
    found = {
        "CL.TE": POST + length + te + b"\r\n" + CHUNKED_END + SMUGGLED,
        "TE.CL": POST + te + b"Content-Length: 4\r\n\r\n" + CHUNKED_END + SMUGGLED,
        "CL.CL": POST + b"Content-Length: 0\r\n" + length + b"\r\n" + SMUGGLED,
        "CL list": POST + b"Content-Length: 0, %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
        "TE twice": POST + te + b"Transfer-Encoding: identity\r\n" + length + b"\r\n" + CHUNKED_END + SMUGGLED,
        "TE then HTTP/1.0": POST.replace(b"1.1", b"1.0") + te + length + b"\r\n" + CHUNKED_END + SMUGGLED,
        "obs-fold": POST + b"Content-Length:\r\n 0\r\nX: a\r\n b\r\n" + te + length + b"\r\n" + SMUGGLED,
        "CL in a trailer": POST + te + b"\r\n0\r\nContent-Length: 9\r\nTransfer-Encoding: x\r\n\r\nx" + SMUGGLED,
        "two hosts": POST + b"Host: other\r\n" + te + length + b"\r\n" + CHUNKED_END + SMUGGLED,
        "bare LF head": POST.replace(b"\r\n", b"\n") + te + length.replace(b"\r\n", b"\n") + b"\n" + SMUGGLED,
        "CR in a value": POST + b"X: a\rTransfer-Encoding: chunked\r\n" + length + b"\r\n" + SMUGGLED,
        "NUL in a value": POST + b"X: a\0b\r\n" + te + length + b"\r\n" + SMUGGLED,
        "method with a space": b" " + POST + te + length + b"\r\n" + SMUGGLED,
        "version 1.2": POST.replace(b"HTTP/1.1", b"HTTP/1.2") + te + length + b"\r\n" + SMUGGLED,
        "no version": b"POST /v2/health/live\r\n" + te + length + b"\r\n" + SMUGGLED,
    }
    for value in (b"+5", b"-5", b"0x5", b"5 5", b"5a", b" ", b"99999999999999999999", b"5;", b"\x0b5", b"1_0", b"5,5"):
        found[f"CL {value!r}"] = POST + b"Content-Length: " + value + b"\r\n\r\n" + b"hello" + SMUGGLED
    for line in (
        b"Transfer-Encoding: xchunked", b"Transfer-Encoding: chunked, identity", b"Transfer-Encoding: identity, x",
        b"Transfer-Encoding : chunked", b" Transfer-Encoding: chunked", b"Transfer-Encoding\t: chunked",
        b"Transfer-Encoding: \x0bchunked", b"Transfer_Encoding: chunked\r\nTransfer-Encoding: cow",
        b"X: x\nTransfer-Encoding: chunked", b"Transfer-Encoding: \"chunked\"", b"Transfer-Encoding: chunked\0",
        b"Transfer-Encoding: 'chunked'", b"Transfer-Encoding: chunked;q=1", b"Transfer\xad-Encoding: chunked",
    ):  # fmt: skip
        found[f"TE {line!r}"] = POST + line + b"\r\n" + length + b"\r\n" + CHUNKED_END + SMUGGLED
    for chunk in (
        b"0x5\r\nhello\r\n", b"-1\r\n", b"+5\r\nhello\r\n", b"5 \nhello\r\n", b"5\nhello\n", b"5\r\nhelloX\r\n",
        b"fffffffffffffffff\r\nhello\r\n", b"5;\nx\r\nhello\r\n", b"g\r\n", b"\r\n", b"5\rhello\r\n",
        b" 5\r\nhello\r\n",
        b"5\r\nhello\n0\n\n", b"0\n\n", b"0\r\r\n",
    ):  # fmt: skip
        found[f"chunk {chunk!r}"] = POST + te + b"\r\n" + chunk + CHUNKED_END + SMUGGLED
    return found


SHAPES = shapes()


@pytest.mark.parametrize("name", SHAPES)
def test_nothing_is_smuggled(server: Served, name: str) -> None:
    with connect(server) as connection:
        connection.sendall(SHAPES[name])
        received = read_all(connection)
    statuses = [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:]]
    assert b"smuggled" not in received, received
    assert len(statuses) == 1, received
    assert 400 <= statuses[0] < 500, "an ambiguous request is refused"
    assert b"connection: close" in received.lower(), "and nothing after it is read"
    assert is_alive(server)


def test_a_chunk_without_end_is_never_more_than_one_request(server: Served) -> None:
    head = POST + b"Transfer-Encoding: chunked\r\n\r\n"
    with connect(server) as connection:
        connection.sendall(head + b"ffffffffffffffff\r\nhello\r\n" + CHUNKED_END + SMUGGLED)
        assert read_all(connection) == b""
        connection.settimeout(10)
        with contextlib.suppress(OSError):  # refused before all was sent
            connection.sendall(b"x" * (9 * 2**20))
        assert read_all(connection).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("split", [1, 7, 40, 90])
def test_nothing_is_smuggled_in_pieces_either(server: Served, split: int) -> None:
    """Heads that were read before take another way through the server: first teach it the head, then send it so."""
    for name in ("CL.TE", "CL.CL", "TE 'xchunked'"):
        data = SHAPES.get(name, SHAPES["TE.CL"])
        with connect(server) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(data[:split])
            time.sleep(0.01)
            connection.sendall(data[split:])
            received = read_all(connection)
        assert received.count(b"HTTP/1.1 ") == 1
        assert b" 400 " in received.split(b"\r\n")[0]


def infer_request(values: list[float], close: bool = False) -> bytes:
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": values}
    body = json.dumps({"inputs": [tensor]}).encode()
    ending = b"Connection: close\r\n" if close else b""
    return POST + ending + b"Content-Length: %d\r\n\r\n" % len(body) + body


def test_a_client_that_sends_no_more_gets_its_answers(server: Served) -> None:
    with connect(server) as connection:
        connection.sendall(infer_request([1, 2, 3, 4]) * 3)
        connection.shutdown(socket.SHUT_WR)
        received = read_all(connection)
    assert received.count(b"HTTP/1.1 200") == 3
    assert received.count(b"[2.0,3.0,4.0,5.0]") == 3


def test_one_that_closes_within_a_request_is_forgotten(server: Served) -> None:
    process = psutil.Process(server.process.pid)
    before = process.num_fds()
    for at in (5, 60, 100):
        with connect(server) as connection:
            connection.sendall(infer_request([1, 2, 3, 4])[:at])
            connection.shutdown(socket.SHUT_WR)
            assert read_all(connection) == b""
    assert process.num_fds() <= before


def test_slow_writers_do_not_hold_up_others(server: Served) -> None:
    slow = [connect(server) for _ in range(50)]
    request = infer_request([1, 2, 3, 4], close=True)
    try:
        for at in range(0, len(request), 40):
            for connection in slow:
                connection.sendall(request[at : at + 40])
            started = time.monotonic()
            assert is_alive(server)
            assert time.monotonic() - started < 5
        for connection in slow:
            assert b"[2.0,3.0,4.0,5.0]" in read_all(connection)
    finally:
        for connection in slow:
            connection.close()


def test_large_bodies_in_pieces_and_interleaved(server: Served) -> None:
    """Bodies that are received where they stay, of several connections at a time, with a small request after each."""
    rows = 8
    data = np.arange(rows * 4, dtype=np.float32)
    padding = " " * 200_000  # a large body of a small tensor: its JSON is mostly space
    header = {"inputs": [{"name": "x", "shape": [rows, 4], "datatype": "FP32",
                          "parameters": {"binary_data_size": data.nbytes}}]}  # fmt: skip
    text = (json.dumps(header) + padding).encode()
    lengths = b"Inference-Header-Content-Length: %d\r\nContent-Length: %d\r\n\r\n" % (
        len(text),
        len(text) + data.nbytes,
    )
    request = POST + lengths + text + data.tobytes()
    small = infer_request([1, 2, 3, 4], close=True)
    for _ in range(2):  # the second time the head is known
        connections = [connect(server) for _ in range(4)]
        for at in range(0, len(request), 50_001):
            for connection in connections:
                connection.sendall(request[at : at + 50_001])
        for connection in connections:
            connection.sendall(small)
            received = read_all(connection)
            connection.close()
            assert received.count(b"HTTP/1.1 200") == 2, received[:300]
            assert json.dumps((data + 1).tolist()).replace(" ", "").encode() in received
            assert b"[2.0,3.0,4.0,5.0]" in received


def test_a_large_body_that_never_comes_takes_no_memory(server: Served) -> None:
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    waiting = [connect(server) for _ in range(200)]
    for connection in waiting:
        connection.sendall(POST + b"Content-Length: %d\r\n\r\n{" % (8 * 2**20))
    assert is_alive(server)
    assert process.memory_info().rss - before < 100 * 2**20, "1.6 GB were announced"
    for connection in waiting:
        connection.close()
    assert is_alive(server)


def test_ten_thousand_idle_connections(server: Served) -> None:
    """They cost little memory, and others are served as before; when they go, their descriptors go."""
    count = 10_000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count + 2000:
        pytest.skip(f"only {hard} open files are allowed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count + 1000), hard))
    psutil.Process(server.process.pid).rlimit(psutil.RLIMIT_NOFILE, (count + 1000, hard))
    process = psutil.Process(server.process.pid)
    fds, rss = process.num_fds(), process.memory_info().rss
    idle = []
    host, _, port = server.http.partition(":")
    try:
        for _ in range(count):
            idle.append(socket.create_connection((host, int(port)), timeout=20))
        assert is_alive(server)
        with connect(server) as connection:
            connection.sendall(infer_request([1, 2, 3, 4], close=True))
            assert b"[2.0,3.0,4.0,5.0]" in read_all(connection)
        used = process.memory_info().rss - rss
        assert process.num_fds() >= fds + count
        assert used / count < 16 * 1024, f"{used / count:.0f} bytes each"
        for connection in idle[:: count // 10]:  # any of them may wake
            connection.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: t\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    finally:
        for connection in idle:
            connection.close()
    wait_until(lambda: process.num_fds() <= fds + 10)


def test_grpc_half_closed_slow_and_idle_connections(server: Served) -> None:
    """The gRPC server beside: bytes that come one by one, ends in the middle, and a thousand that say nothing."""
    host, _, port = server.grpc.partition(":")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")
    idle = [socket.create_connection((host, int(port)), timeout=10) for _ in range(1000)]
    slow = socket.create_connection((host, int(port)), timeout=10)
    try:
        for at in range(len(preface)):
            slow.sendall(preface[at : at + 1])
        for one in idle[:50]:
            one.sendall(preface[:20])
            one.shutdown(socket.SHUT_WR)
        for one in idle[50:100]:
            one.sendall(b"\xff" * 100)
        with grpc.InferenceServerClient(server.grpc) as client:
            assert client.is_model_ready("add_one")
            tensor = grpc.InferInput("x", [1, 4], "FP32")
            tensor.set_data_from_numpy(np.zeros((1, 4), np.float32))
            assert client.infer("add_one", [tensor]).as_numpy("y").tolist() == [[1, 1, 1, 1]]
    finally:
        for one in (*idle, slow):
            one.close()


def test_grpc_calls_that_are_abandoned_leave_nothing(server: Served) -> None:
    process = psutil.Process(server.process.pid)

    async def abandon() -> None:
        import grpc as grpcio

        async with grpcio.aio.insecure_channel(server.grpc) as channel:
            call = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
            for _ in range(200):
                call(b"").cancel()

    asyncio.run(abandon())
    before = process.num_fds()
    asyncio.run(abandon())
    wait_until(lambda: process.num_fds() <= before + 5)
    assert is_alive(server)
