"""The duties of an HTTP/1.1 server, tried with plain sockets and literal bytes."""

import asyncio
import gc
import json
import re
import socket
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import uvloop

from tests.models import Repository
from tests.serving import Noted, engine_over, wait_until
from tutti.core.errors import Unavailable
from tutti.core.types import Call, Columns, InferRequest, InferResponse, Tensor
from tutti.frontends.http import connection as http
from tutti.frontends.http import infer as front
from tutti.frontends.http import request_reader
from tutti.frontends.http import routes as http_api
from tutti.frontends.http import server as listening
from tutti.frontends.http.exchange import Exchange
from tutti.frontends.http.infer import HttpFront
from tutti.frontends.http.infer_answers import Mates
from tutti.frontends.size_limits import Limits
from tutti.frontends.v2.api import Api
from tutti.frontends.v2.json_request import BINARY_REPLY
from tutti.serving.engine import Engine

MAX_BODY = 10_000


@dataclass
class Running:
    """A front in a loop's thread."""

    port: int
    engine: Engine
    front: HttpFront
    loop: asyncio.AbstractEventLoop

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)


@pytest.fixture
def server(repository: Repository) -> Iterator[Running]:
    repository.add_onnx()
    repository.add_slow()
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start(engine: Engine) -> tuple[HttpFront, int]:
        front = HttpFront(http_api.make_app(api := Api(engine, Limits(max_input_size=MAX_BODY))), api)
        return front, await front.start("127.0.0.1", 0)

    with engine_over(repository.root) as engine:
        front, port = asyncio.run_coroutine_threadsafe(start(engine), loop).result(10)
        yield Running(port, engine, front, loop)
        asyncio.run_coroutine_threadsafe(front.stop(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def infer_request(model: str = "add_one", value: float = 1.0, extra: bytes = b"", request_id: str = "") -> bytes:
    name = "x" if model == "add_one" else "s"
    width = 4 if model == "add_one" else 1
    tensor = {"name": name, "shape": [1, width], "datatype": "FP32", "data": [value] * width}
    body = json.dumps({"id": request_id, "inputs": [tensor]}).encode()
    return (
        b"POST /v2/models/%s/infer HTTP/1.1\r\nhost: t\r\n%scontent-length: %d\r\n\r\n"
        % (
            model.encode(),
            extra,
            len(body),
        )
        + body
    )


def read_response(connection: socket.socket, buffer: bytearray) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the next response; raises EOFError when the server has closed."""
    while b"\r\n\r\n" not in buffer:
        _fill(connection, buffer)
    head, _, _ = bytes(buffer).partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    length = int(headers.get("content-length", 0))
    while len(buffer) < len(head) + 4 + length:
        _fill(connection, buffer)
    body = bytes(buffer[len(head) + 4 : len(head) + 4 + length])
    del buffer[: len(head) + 4 + length]
    return int(lines[0].split()[1]), headers, body


def _fill(connection: socket.socket, buffer: bytearray) -> None:
    data = connection.recv(65536)
    if not data:
        raise EOFError
    buffer += data


def exchange(server: Running, data: bytes) -> tuple[int, dict[str, str], bytes]:
    with server.connect() as connection:
        connection.sendall(data)
        return read_response(connection, bytearray())


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_pipelined_requests_are_answered_in_order(server: Running) -> None:
    """The first one is slow, so that the later answers are ready before it."""
    with server.connect() as connection:
        requests = [infer_request("slow", 0.2, request_id="0")]
        requests += [infer_request(request_id=str(n), value=n) for n in range(1, 30)]
        connection.sendall(b"".join(requests) + b"GET /v2/health/live HTTP/1.1\r\nhost: t\r\n\r\n")
        buffer = bytearray()
        ids = [json.loads(read_response(connection, buffer)[2])["id"] for _ in range(30)]
        assert ids == [str(n) for n in range(30)]
        assert read_response(connection, buffer)[0] == 200


def test_a_request_may_arrive_byte_by_byte(server: Running) -> None:
    with server.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in infer_request():
            connection.sendall(bytes([byte]))
        assert read_response(connection, bytearray())[0] == 200


def test_chunked_bodies(server: Running) -> None:
    head, _, body = infer_request().partition(b"\r\n\r\n")
    head = head.split(b"content-length")[0] + b"transfer-encoding: chunked"
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:7], body[7:])) + b"0\r\n\r\n"
    assert exchange(server, head + b"\r\n\r\n" + chunks)[0] == 200


def test_binary_tensors(server: Running) -> None:
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    body = head + np.float32([1, 2, 3, 4]).tobytes()
    lines = b"inference-header-content-length: %d\r\ncontent-length: %d" % (len(head), len(body))
    status, headers, got = exchange(
        server, b"POST /v2/models/add_one/infer HTTP/1.1\r\nhost: t\r\n" + lines + b"\r\n\r\n" + body
    )
    assert status == 200
    at = int(headers["inference-header-content-length"])
    assert np.frombuffer(got[at:], np.float32).tolist() == [2, 3, 4, 5]


def test_expect_100_continue(server: Running) -> None:
    request = infer_request(extra=b"expect: 100-continue\r\n")
    head, separator, body = request.partition(b"\r\n\r\n")
    with server.connect() as connection:
        connection.sendall(head + separator)
        buffer = bytearray()
        assert read_response(connection, buffer)[0] == 100
        connection.sendall(body)
        assert read_response(connection, buffer)[0] == 200


def test_connection_close_and_http_1_0(server: Running) -> None:
    for request in (infer_request(extra=b"connection: close\r\n"), infer_request().replace(b"HTTP/1.1", b"HTTP/1.0")):
        with server.connect() as connection:
            connection.sendall(request)
            status, headers, _ = read_response(connection, bytearray())
            assert status == 200
            assert headers["connection"] == "close"
            assert is_closed(connection)


def test_keep_alive_serves_many_requests(server: Running) -> None:
    with server.connect() as connection:
        buffer = bytearray()
        for value in range(20):
            connection.sendall(infer_request(value=value))
            assert json.loads(read_response(connection, buffer)[2])["outputs"][0]["data"] == [value + 1] * 4


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"NONSENSE\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nbroken header\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd", 400),
        (b"POST /v2 HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\ncontent-length: -3\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\ncontent-length: 3x\r\n\r\nabc", 400),
        (b"POST /v2 HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\ntransfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\nhost: t\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\nx: " + b"a" * request_reader.MAX_HEADER_BYTES + b"\r\n\r\n", 431),
        (b"GET /" + b"a" * request_reader.MAX_HEADER_BYTES + b" HTTP/1.1\r\n\r\n", 431),
        (b"POST /v2/models/add_one/infer HTTP/1.1\r\ncontent-length: 10001\r\n\r\n", 413),
        (b"POST /v2 HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n2711\r\n" + b"a" * 10001 + b"\r\n0\r\n\r\n", 413),
    ],
)
def test_malformed_ambiguous_and_oversized_requests_end_the_connection(
    server: Running, data: bytes, status: int
) -> None:
    with server.connect() as connection:
        connection.sendall(data)
        got, _, body = read_response(connection, bytearray())
        assert got == status
        assert json.loads(body)["error"]
        assert is_closed(connection)
    assert exchange(server, infer_request())[0] == 200


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /v2/models/add_one/infer HTTP/1.1\r\nhost: t\r\n\r\n", 405),
        (b"GET /v2/nothing HTTP/1.1\r\nhost: t\r\n\r\n", 404),
        (b"DELETE /v2 HTTP/1.1\r\nhost: t\r\n\r\n", 405),
        (b"GET /v2/models/none HTTP/1.1\r\nhost: t\r\n\r\n", 404),
        (b"GET /v2/models/add_one/versions/7 HTTP/1.1\r\nhost: t\r\n\r\n", 404),
        (b"POST /v2/models/none/infer HTTP/1.1\r\nhost: t\r\ncontent-length: 2\r\n\r\n{}", 404),
        (b"POST /v2/models/none/infer HTTP/1.1\r\nhost: t\r\ncontent-length: 2\r\n\r\n{,", 404),
        (b"POST /v2/models/none/generate HTTP/1.1\r\nhost: t\r\ncontent-length: 2\r\n\r\n{,", 404),
        (b"POST /v2/models/add_one/infer HTTP/1.1\r\nhost: t\r\ncontent-length: 2\r\n\r\n{,", 400),
        (b"POST /v2/models/add_one/infer HTTP/1.1\r\nhost: t\r\ncontent-length: 1\r\n\r\n{", 400),
        (b"POST /v2/models/add_one/infer HTTP/1.1\r\nhost: t\r\n\r\n", 400),
        (infer_request(extra=b"inference-header-content-length: -1\r\n"), 400),
        (infer_request(extra=b"inference-header-content-length: 999999\r\n"), 400),
        (infer_request(extra=b"inference-header-content-length: abc\r\n"), 400),
        (infer_request(extra=b"content-encoding: gzip\r\n"), 400),
        (infer_request(extra=b"content-encoding: br\r\n"), 501),
    ],
)
def test_wrong_requests_get_a_json_error_and_keep_the_connection(server: Running, request_: bytes, status: int) -> None:
    with server.connect() as connection:
        buffer = bytearray()
        connection.sendall(request_)
        got, _, body = read_response(connection, buffer)
        assert (got, "error" in json.loads(body)) == (status, True)
        connection.sendall(infer_request())
        assert read_response(connection, buffer)[0] == 200


def test_routes(server: Running) -> None:
    def get(path: str) -> tuple[int, bytes]:
        status, _, body = exchange(server, b"GET %s HTTP/1.1\r\nhost: t\r\n\r\n" % path.encode())
        return status, body

    assert get("/-/healthz")[0] == get("/v2/health/live")[0] == get("/v2/health/ready")[0] == 200
    assert json.loads(get("/v2")[1])["name"] == "tutti"
    metadata = json.loads(get("/v2/models/add_one")[1])
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert get("/v2/models/add_one/ready")[0] == 200
    assert get("/v2/models/add_one/versions/1/ready")[0] == 200
    assert json.loads(get("/v2/models/add_one/config")[1])["max_batch_size"] == 8
    assert json.loads(get("/v2/models/stats")[1])["model_stats"][0]["name"] == "add_one"
    assert get("/v2/models/add_one%2F..%2Fslow")[0] == 404


def test_a_client_that_leaves_cancels_its_queued_calls(server: Running) -> None:
    """One slow call runs; those queued behind it are dropped when their client goes."""
    with server.connect() as first:
        first.sendall(infer_request("slow", 0.5))
        slow = server.engine.model("slow")
        wait_until(lambda: not slow._served.infer._instances.free)  # type: ignore[attr-defined]
        with server.connect() as second:
            second.sendall(b"".join(infer_request("slow", 5.0) for _ in range(3)))
            wait_until(lambda: slow._served.infer.queued_rows() == 3)  # type: ignore[attr-defined]
        assert read_response(first, bytearray())[0] == 200
        wait_until(lambda: slow.statistics.counts.fail.count == 3)
        assert slow.statistics.counts.executions == 1


def test_a_client_that_does_not_read_is_not_read_from(server: Running) -> None:
    """Answers that nobody takes pause the connection instead of filling memory."""
    with server.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(2)
        request = b"GET /v2/models/add_one/config HTTP/1.1\r\nhost: t\r\n\r\n"
        assert _send_until_stuck(connection, request * 1000)
        (stuck,) = server.front.connections
        assert len(stuck.pending) <= http.MAX_PIPELINED + 1000
    assert exchange(server, infer_request())[0] == 200


def _send_until_stuck(connection: socket.socket, data: bytes) -> bool:
    """False when the server took half a gigabyte, and so would have taken anything."""
    sent = 0
    while sent < 500_000_000:
        try:
            sent += connection.send(data)
        except TimeoutError:
            return True
    return False


def test_idle_connections_are_closed_and_slow_requests_refused(server: Running) -> None:
    with server.connect() as idle, server.connect() as slow:
        slow.sendall(infer_request()[:40])
        wait_until(lambda: sum(c._is_reading for c in server.front.connections) == 1)

        def sweep() -> None:
            later = server.loop.time() + http.IDLE_TIMEOUT_S + 1
            for connection in list(server.front.connections):
                connection.close_if_idle(later)

        server.loop.call_soon_threadsafe(sweep)
        assert is_closed(idle)
        assert read_response(slow, bytearray())[0] == 408


def test_a_stream_is_chunked_but_for_http_1_0(server: Running) -> None:
    body = b'{"x": [1, 2, 3, 4]}'
    for version, is_chunked in ((b"1.1", True), (b"1.0", False)):
        head = b"POST /v2/models/add_one/generate_stream HTTP/%b\r\nhost: t\r\ncontent-length: %d\r\n\r\n"
        with server.connect() as connection:
            connection.sendall(head % (version, len(body)) + body)
            got = b""
            while b"data: " not in got or not got.endswith(b"\n\n" if not is_chunked else b"0\r\n\r\n"):
                part = connection.recv(65536)
                assert part, got
                got += part
        assert (b"transfer-encoding: chunked" in got) == is_chunked
        assert b'"y":[2.0,3.0,4.0,5.0]' in got


def test_a_head_that_was_read_before_is_read_the_same(server: Running) -> None:
    body = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}).encode()
    padded = body + b"\r\n\r\n" + b" " * (500 - len(body))  # a blank line in the body ends no head
    head = b"POST /v2/models/add_one/infer HTTP/1.1\r\nhost: t\r\ncontent-length: %d\r\n\r\n" % len(padded)
    whole = head + padded
    with server.connect() as connection:
        buffer = bytearray()
        for _ in range(3):  # in one piece, cut anywhere, and several at once
            connection.sendall(whole)
            assert read_response(connection, buffer)[0] == 200
        assert len(server.front.heads) == 1
        for cut in (1, len(head) - 2, len(head), len(head) + 5, len(whole) - 1):
            connection.sendall(whole[:cut])
            threading.Event().wait(0.02)
            connection.sendall(whole[cut:])
            assert read_response(connection, buffer)[0] == 200
        connection.sendall(whole * 5)
        assert [read_response(connection, buffer)[0] for _ in range(5)] == [200] * 5
        # The same head with another length is another head.
        connection.sendall(head.replace(b": %d" % len(padded), b": %d" % len(body)) + body)
        assert read_response(connection, buffer)[0] == 200
        assert len(server.front.heads) == 2


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\n", b"\n\r\n"])
def test_a_head_that_ends_oddly_is_not_kept(server: Running, end: bytes) -> None:
    body = b"{}" + b"\r\n\r\n" + b" " * 20
    data = b"POST /v2/models/add_one/infer HTTP/1.1\r\nhost: t\r\ncontent-length: %d" % len(body) + end + body
    with server.connect() as connection:
        connection.sendall(data)
        read_response(connection, bytearray())
    assert server.front.heads == {}


@pytest.mark.parametrize(
    ("pool", "header"), [("gpu", b"tutti-pool: gpu\r\n"), ("a\r\nset-cookie: b", b""), ("", b""), (7, b"")]
)
def test_the_pool_that_answered_is_a_header_if_it_can_be(pool: object, header: bytes) -> None:
    head, plain = (head_of(parameters) for parameters in ({"tutti_pool": pool}, dict[str, str]()))
    before, after = plain.split(b"server-timing")
    assert head == before + header + b"server-timing" + after


def head_of(parameters: Any) -> bytes:
    """What precedes the id of an answer that has these parameters."""
    exchange = Exchange(None, b"POST", b"/", True)  # type: ignore[arg-type]
    exchange.request_id, exchange.reply = b"mine", BINARY_REPLY
    call = Call(InferRequest("m", {}), None, exchange)  # type: ignore[arg-type]
    columns = Columns([Tensor.of("y", np.zeros((2, 1), np.float32))])
    response = InferResponse.of_part("m", "1", columns, 0, 1)
    response.parameters = parameters
    mates = Mates(1)
    assert mates.have(call, response, exchange)
    length = len(mates.header)
    response.parameters = {}
    return mates.head.replace(b"%d" % length, b"LENGTH").replace(b"%d" % (length + 4), b"LENGTH")


def raw_infer(body: bytes) -> bytes:
    return b"POST /v2/models/add_one/infer HTTP/1.1\r\nhost: t\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def ask(server: Running, *requests: bytes) -> list[tuple[int, bytes]]:
    """Statuses and bodies of the answers to requests that are sent together."""
    with server.connect() as connection:
        buffer = bytearray()
        connection.sendall(b"".join(requests))
        answers = [read_response(connection, buffer) for _ in requests]
        return [(status, body) for status, _, body in answers]


def one_input(name: str, data: str = "[1, 2, 3, 4]", parameters: str = "{}") -> bytes:
    tensor = f'{{"name": "{name}", "shape": [1, 4], "datatype": "FP32", "data": {data}}}'
    return f'{{"parameters": {parameters}, "inputs": [{tensor}]}}'.encode()


def test_a_text_that_no_encoding_carries_is_its_own_requests_error(server: Running) -> None:
    bad = raw_infer(one_input("\\ud800", "[NaN, 2, 3, 4]"))
    # Both are of one turn of the loop: the second one's answer must not be lost with the first one's.
    (status, body), (other, _) = ask(server, bad, raw_infer(one_input("x")))
    assert status == 400 and "surrogate" in json.loads(body)["error"]
    assert other == 200


def test_whatever_one_request_meets_the_others_of_its_turn_are_answered(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = front.http_codec.decode

    def fails_once(*args: object) -> object:
        monkeypatch.setattr(front.http_codec, "decode", decode)
        raise MemoryError

    monkeypatch.setattr(front.http_codec, "decode", fails_once)
    good = raw_infer(one_input("x"))
    assert [status for status, _ in ask(server, good, good)] == [500, 200]


@pytest.mark.parametrize("value", ["NaN", "-Infinity", str(2**70), str(-(2**70)), "[]", "null"])
@pytest.mark.parametrize("name", ["priority", "timeout", "x", "sequence_id"])
def test_a_parameter_that_is_no_number_of_64_bits_is_refused(server: Running, name: str, value: str) -> None:
    [(status, body)] = ask(server, raw_infer(one_input("x", parameters=f'{{"{name}": {value}}}')))
    assert status == 400 and name in json.loads(body)["error"]


def test_large_floats_are_parameters(server: Running) -> None:
    assert ask(server, raw_infer(one_input("x", parameters='{"scale": 1e30}')))[0][0] == 200


WRONG = ("[]", "{}", "null", "NaN", "1.5", "true", "false", '"\\ud800"', '"x"', str(2**70), "[[]]", '[{"a": NaN}]')


@pytest.mark.parametrize(
    ("path", "member"),
    [
        ("/v2/logging", "log_format"),
        ("/v2/logging", "log_info"),
        ("/v2/logging", "log_verbose_level"),
        ("/v2/logging", "nope"),
        ("/v2/trace/setting", "trace_level"),
        ("/v2/trace/setting", "trace_rate"),
        ("/v2/trace/setting", "trace_count"),
        ("/v2/trace/setting", "log_frequency"),
        ("/v2/trace/setting", "nope"),
        ("/v2/repository/index", "ready"),
        ("/v2/repository/models/add_one/unload", "parameters"),
        ("/v2/repository/models/add_one/load", "parameters"),
        ("/v2/models/add_one/generate", "x"),
        ("/v2/models/add_one/generate", "parameters"),
        ("/v2/models/add_one/generate", "id"),
        ("/v2/systemsharedmemory/region/r/register", "key"),
        ("/v2/systemsharedmemory/region/r/register", "byte_size"),
        ("/v2/cudasharedmemory/region/r/register", "raw_handle"),
    ],
)
def test_settings_of_wrong_types_are_the_clients_errors(server: Running, path: str, member: str) -> None:
    head = b"POST %b HTTP/1.1\r\nhost: t\r\ncontent-length: %d\r\n\r\n"
    bodies = [f'{{"{member}": {value}}}'.encode() for value in WRONG]
    answers = ask(server, *[head % (path.encode(), len(body)) + body for body in bodies])
    for value, (status, answer) in zip(WRONG, answers, strict=True):
        assert status != 500, (value, answer)


def test_bodies_beyond_what_all_may_hold_are_refused_while_they_come(server: Running) -> None:
    server.front.limits = Limits(max_input_size=64 * 2**20)
    server.front.holding.limit = 2**20
    log = noted_by(server)
    head = b"POST /v2/models/add_one/infer HTTP/1.1\r\nhost: t\r\nx-request-id: mine\r\n%b\r\n\r\n"
    length = 900_000
    with server.connect() as first, server.connect() as second, server.connect() as third:
        first.sendall(head % b"content-length: %d" % length + bytes(length - 1))
        wait_until(lambda: server.front.holding.held == length - 1)
        second.sendall(head % b"content-length: %d" % length + bytes(length))
        status, headers, body = read_response(second, bytearray())
        assert status == 503 and "at most 1048576" in json.loads(body)["error"] and headers["retry-after"]
        assert headers["x-request-id"] == "mine"
        (event,) = log.events
        assert (event.id, event.model, event.bytes_in, event.status) == ("mine", "add_one", length, 503)
        third.sendall(head % b"transfer-encoding: chunked" + b"dbba0\r\n" + bytes(length))
        assert read_response(third, bytearray())[0] == 503
        assert server.front.holding.held == length - 1
        assert ask(server, raw_infer(one_input("x")))[0][0] == 200, "small requests go on"
        first.sendall(b"x")
        assert read_response(first, bytearray())[0] == 400
    wait_until(lambda: server.front.holding.held == 0)
    [(status, body)] = ask(server, head % b"content-length: 1048577")
    assert status == 413 and "1048577" in json.loads(body)["error"]


def test_a_refusal_within_a_body_has_its_own_requests_id(server: Running) -> None:
    """Not that of the one before it, whose head the parser has read last."""
    server.front.limits = Limits(max_input_size=64 * 2**20)
    head = b"POST /v2/models/add_one/infer HTTP/1.1\r\nx-request-id: %b\r\ncontent-length: 900000\r\n\r\n"
    known = head % b"known" + b"{" + bytes(899_999)
    with server.connect() as first, server.connect() as second:
        buffer = bytearray()
        first.sendall(known)
        assert read_response(first, buffer)[0] == 400
        second.sendall(head % b"other" + b"{" + bytes(899_999))
        assert read_response(second, bytearray())[1]["x-request-id"] == "other"
        server.front.holding.limit = 900_001
        assert server.front.holding.take(1000)
        second.sendall(known)
        status, headers, _ = read_response(second, buffer)
        server.front.holding.give(1000)
    assert (status, headers["x-request-id"]) == (503, "known")


def test_answers_that_nobody_reads_make_room_for_those_that_somebody_does(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "STALLED_S", -1.0)
    server.front.holding.limit = 60 * 2**20
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 33554432\r\n\r\n", bytes(32 * 2**20)
    monkeypatch.setattr(server.front, "_encode", lambda *_: list(answer))
    with server.connect() as silent:
        silent.sendall(raw_infer(one_input("x")))
        wait_until(lambda: server.front.holding.held)
        assert ask(server, raw_infer(one_input("x")))[0][0] == 200
        wait_until(lambda: not server.front.stalled)
    wait_until(lambda: server.front.holding.held == 0)


@pytest.fixture
def bodies(server: Running) -> list[weakref.ref[object]]:
    """The memory of the large bodies that the server has received."""
    server.front.limits = Limits(max_input_size=64 * 2**20)
    bodies: list[weakref.ref[object]] = []

    def memory(size: int) -> memoryview:
        array = np.empty(size, np.uint8)
        bodies.append(weakref.ref(array))
        return memoryview(array)  # type: ignore[arg-type]

    server.front.memory = memory
    return bodies


@pytest.fixture
def no_collector() -> Iterator[None]:
    """A serving process collects garbage seldom: what is in a cycle stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_an_idle_connection_keeps_nothing_of_its_last_large_request(
    server: Running, bodies: list[weakref.ref[object]]
) -> None:
    with server.connect() as connection:
        connection.sendall(raw_infer(one_input("x") + b" " * 200_000))
        assert read_response(connection, bytearray())[0] == 200
        wait_until(lambda: bodies and bodies[0]() is None)


@pytest.mark.parametrize("path", ["infer", "generate"])
@pytest.mark.parametrize("text", [b"{", b"[" + b"[]," * 2**20 + b"[]]"], ids=["broken", "too many values"])
@pytest.mark.usefixtures("no_collector")
def test_a_large_request_that_is_refused_leaves_nothing(
    server: Running, bodies: list[weakref.ref[object]], path: str, text: bytes
) -> None:
    body = text + b" " * 300_000
    head = f"POST /v2/models/add_one/{path} HTTP/1.1\r\nhost: t\r\ncontent-length: {len(body)}\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(head.encode() + body)
        assert read_response(connection, bytearray())[0] == 400
        wait_until(lambda: bodies and bodies[0]() is None)


def binary_infer(extra: bytes = b"") -> bytes:
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}}
    header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return (
        b"POST /v2/models/add_one/infer HTTP/1.1\r\nhost: t\r\n%binference-header-content-length: %d\r\n"
        b"content-length: %d\r\n\r\n%b%b" % (extra, len(header), len(header) + 16, header, bytes(16))
    )


TIMING = re.compile(r"(?:queue;dur=(\d+\.\d\d), compute;dur=(\d+\.\d\d), )?total;dur=(\d+\.\d\d)")


def phases(headers: dict[str, str]) -> tuple[float, float, float]:
    """Milliseconds in the queue, of computing, and of all."""
    match = TIMING.fullmatch(headers["server-timing"])
    assert match is not None, headers
    return float(match[1]), float(match[2]), float(match[3])


@pytest.mark.parametrize("ask", [infer_request, binary_infer])
def test_answers_say_where_the_time_went_and_have_ids_of_their_own(server: Running, ask: Callable[[], bytes]) -> None:
    """Those that come together share a batch, and all but their ids."""
    with server.connect() as connection:
        buffer = bytearray()
        seen = []
        for _ in range(3):
            connection.sendall(ask() * 20)
            seen += [read_response(connection, buffer) for _ in range(20)]
    assert {status for status, _, _ in seen} == {200}
    for _, headers, _ in seen:
        queue, compute, total = phases(headers)
        assert queue + compute <= total + 0.02  # each is rounded down
    ids = {headers["x-request-id"] for _, headers, _ in seen}
    assert len(ids) == len(seen)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (infer_request(extra=b"X-Request-ID: mine-1\r\n"), 200),
        (binary_infer(b"x-request-id: mine-1\r\n"), 200),
        (infer_request(request_id="mine-1"), 200),
        (infer_request("nothing", extra=b"x-request-id: mine-1\r\n"), 404),
        (b"POST /v2/models/add_one/infer HTTP/1.1\r\nx-request-id: mine-1\r\ncontent-length: 1\r\n\r\n{", 400),
        (b"POST /v2/models/add_one/generate HTTP/1.1\r\nx-request-id: mine-1\r\ncontent-length: 2\r\n\r\n{}", 400),
        (b"POST /v2/models/add_one/generate HTTP/1.1\r\nx-request-id: mine-1\r\ncontent-length: 1\r\n\r\n{", 400),
        (b"GET /v2/models/add_one/infer HTTP/1.1\r\nx-request-id: mine-1\r\n\r\n", 405),
        (b"GET /v2/nothing HTTP/1.1\r\nx-request-id: mine-1\r\n\r\n", 404),
        (b"GET /v2 HTTP/1.1\r\nx-request-id: mine-1\r\n\r\n", 200),
    ],
)
def test_a_clients_id_comes_back_with_every_answer(server: Running, request_: bytes, status: int) -> None:
    with server.connect() as connection:
        for _ in range(2):  # as it is read the first time, and as it is known
            connection.sendall(request_)
            got, headers, _ = read_response(connection, bytearray())
            assert (got, headers["x-request-id"]) == (status, "mine-1")
            assert TIMING.fullmatch(headers["server-timing"]), headers


@pytest.mark.parametrize("sent", [b"two words", b"x" * 200, b"\xff", b""])
def test_an_id_that_may_not_come_back_is_replaced(server: Running, sent: bytes) -> None:
    _, headers, _ = exchange(server, infer_request(extra=b"x-request-id: %b\r\n" % sent))
    assert re.fullmatch(r"[0-9a-f]+-[0-9a-f]+-[0-9a-f]+", headers["x-request-id"])


def test_what_is_malformed_has_an_id_too(server: Running) -> None:
    with server.connect() as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        status, headers, _ = read_response(connection, bytearray())
    assert (status, bool(headers["x-request-id"])) == (400, True)
    assert TIMING.fullmatch(headers["server-timing"])


def test_a_request_that_waited_for_another_says_so(server: Running) -> None:
    """The model takes one at a time, and as long as it is told."""
    with server.connect() as connection:
        connection.sendall(infer_request("slow", 0.2) + infer_request("slow", 0.01))
        buffer = bytearray()
        first, second = (phases(read_response(connection, buffer)[1]) for _ in range(2))
    assert first[1] >= 200
    assert second[0] >= 150  # both came together, and it has waited for the first to end
    assert second[2] >= second[0] + second[1] - 0.02


@pytest.mark.parametrize("is_app", [False, True], ids=["infer", "app"])
def test_a_large_answer_for_which_there_is_no_room_is_noted_as_refused(
    server: Running, monkeypatch: pytest.MonkeyPatch, is_app: bool
) -> None:
    log = server.front._api.requests = Noted()
    large = b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n", bytes(100_000)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": large[1]})

    monkeypatch.setattr(server.front, "_encode", lambda *_: list(large))
    monkeypatch.setattr(server.front, "_app", app)
    sent = b"GET /large HTTP/1.1\r\nhost: t\r\n\r\n" if is_app else raw_infer(one_input("x"))
    for limit, status in ((2**20, 200), (10_000, 503)):
        server.front.holding.limit = limit
        (got, body), *_ = ask(server, sent)
        wait_until(lambda: log.events)
        event = log.events.pop()
        assert got == event.status == status
        assert event.bytes_out == len(body)
        assert event.error == (json.loads(body)["error"] if status == 503 else "")


def break_off(connection: socket.socket) -> None:
    """Leave so that the server hears of it at once."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def noted_by(server: Running) -> Noted:
    log = server.front._api.requests = Noted()
    return log


def test_a_client_that_left_before_its_answer_is_noted_so(server: Running) -> None:
    log, slow = noted_by(server), server.engine.model("slow")
    with server.connect() as first, server.connect() as second:
        first.sendall(infer_request("slow", 0.2, request_id="first"))
        wait_until(lambda: not slow._served.infer._instances.free)  # type: ignore[attr-defined]
        second.sendall(infer_request("slow", 0.0, request_id="second"))
        wait_until(lambda: slow._served.infer.queued_rows() == 1)  # type: ignore[attr-defined]
        break_off(second)
        assert read_response(first, bytearray())[0] == 200
    wait_until(lambda: len(log.events) == 2)
    first_one, second_one = sorted(log.events, key=lambda event: event.id)
    assert (first_one.status, first_one.error) == (200, "")
    assert (second_one.status, second_one.bytes_out) == (499, 0)
    assert "the client had gone" in second_one.error


@pytest.mark.parametrize(("is_begun", "status"), [(False, 499), (True, 200)])
def test_a_client_that_left_an_apps_answer_is_noted_so(
    server: Running, monkeypatch: pytest.MonkeyPatch, is_begun: bool, status: int
) -> None:
    begun = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if is_begun:
            await send({"type": "http.response.body", "body": b"part", "more_body": True})
        begun.set()
        await asyncio.Event().wait()

    log = noted_by(server)
    monkeypatch.setattr(server.front, "_app", app)
    with server.connect() as connection:
        connection.sendall(b"GET /endless HTTP/1.1\r\nhost: t\r\n\r\n")
        assert begun.wait(20)
        break_off(connection)
    wait_until(lambda: log.events)
    (event,) = log.events
    assert (event.status, event.bytes_out) == (status, 4 if is_begun else 0)
    assert "the client had gone" in event.error


@pytest.mark.parametrize("has_answered", [False, True])
def test_an_app_that_fails_is_noted_once(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has_answered: bool
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 418, "headers": []})
        if has_answered:
            await send({"type": "http.response.body", "body": b"sorry"})
        raise RuntimeError

    log = noted_by(server)
    monkeypatch.setattr(server.front, "_app", app)
    for count in (1, 2):
        got, _, _ = exchange(server, b"GET /broken HTTP/1.1\r\nhost: t\r\n\r\n")
        assert got == (418 if has_answered else 500)
        wait_until(lambda count=count: len(log.events) >= count)  # type: ignore[misc]
    assert [event.status for event in log.events] == [got, got]


def test_what_a_server_that_stops_refuses_is_noted_once(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    log, slow, settled = noted_by(server), server.engine.model("slow"), threading.Event()
    settle = server.front.settle

    def seen(calls: Any) -> None:
        settle(calls)
        settled.set()

    monkeypatch.setattr(server.front, "settle", seen)
    with server.connect() as connection:
        connection.sendall(infer_request("slow", 0.2))
        wait_until(lambda: not slow._served.infer._instances.free)  # type: ignore[attr-defined]
        stopping = server.front.stop(0.0, 0.0, Unavailable("the server stops"))
        asyncio.run_coroutine_threadsafe(stopping, server.loop).result(20)
        assert read_response(connection, bytearray())[0] == 503
        assert settled.wait(20)
    assert [(event.status, event.error) for event in log.events] == [(503, "the server stops")]
