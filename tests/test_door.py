"""The door that every protocol's calls go through, and that a protocol of somebody else's needs nothing but it."""

import asyncio
import http.client
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from tests.lines_door import DIALECT, LinesConnection
from tests.models import IN_PROCESS, Repository
from tests.serving import engine_over, wait_until
from tutti.core.errors import DeadlineExceeded, Internal, InvalidArgument, TooLate
from tutti.core.types import Call, InferRequest, InferResponse, Tensor, now_ns
from tutti.frontends.arrival import Arrival
from tutti.frontends.door import Access, Door, answer_of
from tutti.frontends.gate import Gate
from tutti.frontends.grpc.native import GrpcFront
from tutti.frontends.http import routes as http_api
from tutti.frontends.http.infer import HttpFront
from tutti.frontends.v2.api import Api
from tutti.observing.tracing import TraceConfig, Tracer
from tutti.serving.engine import Engine

SHAPES = """
backend: "python" max_batch_size: 8 dynamic_batching {}
input { name: "x" data_type: TYPE_FP32 dims: 1 }
output { name: "mates" data_type: TYPE_FP32 dims: 1 }
"""
# How many requests are executed together; it waits for whoever writes to the FIFO beside it if an x is negative.
COUNTS_MATES = """
import os
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        values = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy()[0, 0] for request in requests]
        if min(values) < 0:
            open(os.path.join(os.path.dirname(__file__), "gate")).close()
        mates = np.full((1, 1), len(requests), np.float32)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("mates", mates)]) for _ in requests]
"""


@dataclass
class Lines:
    """A server of lines, and the engine behind it."""

    port: int
    engine: Engine
    loop: asyncio.AbstractEventLoop
    gate: Path
    connections: list[LinesConnection]

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def ask(self, *requests: dict[str, Any]) -> list[dict[str, Any]]:
        """Send requests together; their answers, by their ids."""
        with self.connect() as connection:
            connection.sendall(b"".join(json.dumps(sent).encode() + b"\n" for sent in requests))
            with connection.makefile() as answers:
                return sorted((json.loads(answers.readline()) for _ in requests), key=lambda answer: answer["id"])

    def queued(self) -> int:
        served: Any = self.engine.model("mates")._served.infer
        return int(served.queued_rows())

    def is_busy(self) -> bool:
        served: Any = self.engine.model("mates")._served.infer
        return not served._instances.free

    def open_gate(self) -> None:
        os.close(os.open(self.gate, os.O_WRONLY))


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@pytest.fixture
def lines(repository: Repository, loop: asyncio.AbstractEventLoop) -> Iterator[Callable[..., Lines]]:
    """Serves lines, with an Access and a Tracer where a test wants them."""
    repository.add_onnx()
    repository.add("mates", SHAPES + IN_PROCESS, {"model.py": COUNTS_MATES})
    gate = repository.root / "mates" / "1" / "gate"
    os.mkfifo(gate)
    servers: list[asyncio.Server] = []
    with engine_over(repository.root) as engine:

        def serve(access: Access | None = None, tracer: Tracer | None = None) -> Lines:
            door = Door(DIALECT, engine, access, tracer)
            connections: list[LinesConnection] = []

            def accept() -> LinesConnection:
                connections.append(LinesConnection(door))
                return connections[-1]

            listening = loop.create_server(accept, "127.0.0.1", 0)
            servers.append(asyncio.run_coroutine_threadsafe(listening, loop).result(10))
            return Lines(servers[-1].sockets[0].getsockname()[1], engine, loop, gate, connections)

        yield serve
        os.close(os.open(gate, os.O_RDWR))  # whoever still waits there goes on
        for server in servers:
            loop.call_soon_threadsafe(server.close)


def line(number: int, value: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"id": number, "model": "mates", "inputs": {"x": [[value]]}, **more}


def test_lines_are_answered(lines: Callable[..., Lines]) -> None:
    first, second = lines().ask(
        {"id": 1, "model": "add_one", "inputs": {"x": [[1, 2, 3, 4]]}},
        {"id": 2, "model": "add_one", "inputs": {"x": [[5, 6, 7, 8]]}},
    )
    assert first == {"id": 1, "outputs": {"y": [[2.0, 3.0, 4.0, 5.0]]}}
    assert second == {"id": 2, "outputs": {"y": [[6.0, 7.0, 8.0, 9.0]]}}


@contextmanager
def v2_beside(served: Lines) -> Iterator[tuple[int, int]]:
    """The ports of HTTP and gRPC over the same engine."""
    api = Api(served.engine)

    async def listen() -> tuple[HttpFront, int]:
        front = HttpFront(http_api.make_app(api), api)
        return front, await front.start("127.0.0.1", 0)

    http_front, http_port = asyncio.run_coroutine_threadsafe(listen(), served.loop).result(10)
    grpc_front = GrpcFront(api, "127.0.0.1", 0)
    yield http_port, grpc_front.start()
    grpc_front.stop()
    asyncio.run_coroutine_threadsafe(http_front.stop(), served.loop).result(10)


def test_lines_are_executed_together_with_requests_of_v2(lines: Callable[..., Lines]) -> None:
    """One batch has a request over HTTP, one over gRPC, and two lines."""
    served = lines()
    with v2_beside(served) as (http_port, grpc_port), ThreadPoolExecutor(4) as pool:
        holding = pool.submit(served.ask, line(0, -1.0))
        wait_until(served.is_busy)
        over_http = pool.submit(ask_http, http_port)
        over_grpc = pool.submit(ask_grpc, grpc_port)
        over_lines = pool.submit(served.ask, line(1), line(2))
        wait_until(lambda: served.queued() == 4)
        served.open_gate()
        assert holding.result(20) == [{"id": 0, "outputs": {"mates": [[1.0]]}}]
        assert over_http.result(20) == over_grpc.result(20) == 4.0
        assert [answer["outputs"]["mates"] for answer in over_lines.result(20)] == [[[4.0]], [[4.0]]]
    assert served.engine.model("mates").statistics.counts.executions == 2


def ask_http(port: int) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    tensor = {"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1.0]}
    connection.request("POST", "/v2/models/mates/infer", json.dumps({"inputs": [tensor]}))
    answer = json.load(connection.getresponse())
    connection.close()
    return float(answer["outputs"][0]["data"][0])


def ask_grpc(port: int) -> float:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 1])
    raw = np.ones(1, np.float32).tobytes()
    request = pb.ModelInferRequest(model_name="mates", inputs=[tensor], raw_input_contents=[raw])
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=20)
    return float(np.frombuffer(answer.raw_output_contents[0], np.float32)[0])


@pytest.mark.parametrize(
    ("sent", "code", "says"),
    [
        ({"model": "nope", "inputs": {}}, 2, "unknown model: 'nope'"),
        ({"model": "nope"}, 2, "unknown model: 'nope'"),
        ({"model": "mates"}, 1, "no request: KeyError('inputs')"),
        ({"model": "mates", "inputs": {"y": 1}}, 1, "no request: KeyError('y')"),
        ({"model": "mates", "inputs": {"x": [["a"]]}}, 1, "could not convert string to float"),
        ({"model": "mates", "inputs": {"x": [[1, 2]]}}, 1, "Expected [-1,1], got [1,2]"),
    ],
)
def test_failures_are_told_in_the_protocols_own_codes(
    lines: Callable[..., Lines], sent: dict[str, Any], code: int, says: str
) -> None:
    served = lines()
    failed, answered = served.ask({"id": 1, **sent}, line(2))
    assert (failed["id"], failed["code"]) == (1, code)
    assert says in failed["error"]
    assert answered == {"id": 2, "outputs": {"mates": [[1.0]]}}


def test_a_deadline_is_kept_in_the_queue(lines: Callable[..., Lines]) -> None:
    served = lines()
    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(served.ask, line(0, -1.0))
        wait_until(served.is_busy)
        (late,) = served.ask(line(1, timeout_ms=50))
        assert late["code"] == 4
        served.open_gate()
        assert "outputs" in holding.result(20)[0]


def test_a_client_that_goes_has_its_calls_cancelled(lines: Callable[..., Lines]) -> None:
    served = lines()
    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(served.ask, line(0, -1.0))
        wait_until(served.is_busy)
        with served.connect() as connection:
            connection.sendall(json.dumps(line(1)).encode() + b"\n")
            wait_until(lambda: served.queued() == 1)
        wait_until(lambda: all(call.is_cancelled for call in served.connections[-1].open))
        served.open_gate()
        holding.result(20)
    wait_until(lambda: served.queued() == 0 and not served.is_busy())
    assert served.engine.model("mates").statistics.counts.executions == 1


def test_who_may_not_pass_is_told_so(lines: Callable[..., Lines]) -> None:
    served = lines(Access(Gate(api_keys=("secret",))))
    refused, passed = served.ask(line(1), line(2, headers={"authorization": "Bearer secret"}))
    assert refused == {"id": 1, "code": 6, "error": "a key is needed"}
    assert passed["outputs"]["mates"] == [[1.0]]


def test_a_line_is_traced_under_its_protocols_name(lines: Callable[..., Lines], tmp_path: Path) -> None:
    tracer = Tracer(TraceConfig(file=str(tmp_path / "trace"), levels=("TIMESTAMPS",), rate=1))
    lines(tracer=tracer).ask(line(1))
    tracer.close()
    assert "LINES_RECV_START" in (tmp_path / "trace").read_text()


class _Settled:
    """A sink that keeps what was settled."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def settle(self, calls: Sequence[Call]) -> None:
        self.calls += calls


def call(sink: Any = None) -> Call:
    """Of a request with a parameter."""
    return Call(InferRequest("m", {}, parameters={"x-mine": "kept"}), sink or _Settled())


def door(engine: Any = None, **more: Any) -> Door:
    return Door(DIALECT, engine, **more)


def test_begin_sets_the_deadline_only_where_there_is_one() -> None:
    waits, never = call(), call()
    before_ns = now_ns()
    door().begin(waits, None, 10**9)
    door().begin(never, None)
    assert before_ns + 10**9 <= waits.deadline_ns <= now_ns() + 10**9
    assert never.deadline_ns == 0


def test_headers_are_forwarded_where_the_pattern_says_so_and_replace_nothing() -> None:
    begun = call()
    access = Access(forward=re.compile("x-.*"))
    door(access=access).begin(begun, {"x-one": "1", "x-mine": "theirs", "other": "2"})
    assert begun.request.parameters == {"x-mine": "kept", "x-one": "1"}


def test_headers_are_not_read_where_nobody_wants_to_see_them() -> None:
    begun = call()
    door().begin(begun, object())  # no mapping: to read it would fail
    assert begun.request.parameters == {"x-mine": "kept"}
    assert begun.trace is None


class _Tracer:
    """Keeps what traces would begin with."""

    is_on = True

    def __init__(self) -> None:
        self.begun: list[tuple[object, ...]] = []

    def begin(self, _: Call, *arrival: object) -> None:
        self.begun.append(arrival)


def test_a_trace_is_part_of_the_one_that_its_headers_name() -> None:
    tracer = _Tracer()
    door(tracer=tracer).begin(call(), {"traceparent": "00-abc-def-01"}, received_ns=5)
    door(tracer=tracer).begin(call(), None)
    assert tracer.begun == [("00-abc-def-01", "LINES", 5), ("", "LINES", 0)]


def test_what_another_processs_door_has_taken_keeps_how_it_came() -> None:
    tracer, resumed = _Tracer(), call()
    door(tracer=tracer).resume(resumed, Arrival("00-abc-def-01", "HTTP", 3, 4, {}), left_ns=10**9)
    assert tracer.begun == [("00-abc-def-01", "HTTP", 3, 4)]
    assert resumed.deadline_ns > now_ns()
    assert resumed.request.parameters == {"x-mine": "kept"}


def test_an_engine_that_raises_leaves_no_call_unanswered(caplog: pytest.LogCaptureFixture) -> None:
    def fails(calls: Sequence[Call]) -> None:
        calls[0].finish(InferResponse("m", "1", []))
        raise RuntimeError("a fault")

    sink = _Settled()
    calls = [call(sink), call(sink), call(sink)]
    door(fails).submit(calls)
    assert sink.calls == calls
    assert [type(settled.answer) for settled in calls] == [InferResponse, Internal, Internal]
    assert "a burst of 3 calls was not taken" in caplog.text


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (InvalidArgument("no"), (1, "no")),
        (DeadlineExceeded("late"), (4, "late")),
        (TooLate("refused"), (3, "refused")),  # a subclass has the nearest code: it is an Unavailable
        (Internal("broken"), (99, "broken")),
    ],
)
def test_an_error_has_its_code_and_is_not_logged(
    error: Exception, failure: tuple[int, str], caplog: pytest.LogCaptureFixture
) -> None:
    assert DIALECT.failure(error, "something failed") == failure
    assert not caplog.records


def test_a_fault_is_internal_and_logged_with_where_it_was(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ZeroDivisionError("secret")
    except ZeroDivisionError as error:
        told = door().encode_failure(error, call())
    assert told == (99, "internal error: ZeroDivisionError")
    assert "a response of model 'm' could not be encoded" in caplog.text
    assert "test_door.py" in caplog.text


def test_a_fault_as_an_answer_tells_no_more_than_its_kind(caplog: pytest.LogCaptureFixture) -> None:
    answer = answer_of(RuntimeError("secret"), "%s was not read", "it")
    assert (type(answer), answer.message) == (Internal, "internal error: RuntimeError")
    assert "it was not read" in caplog.text
    refused = InvalidArgument("no")
    assert answer_of(refused, "it was not read") is refused


def test_an_error_that_was_told_keeps_no_tensors() -> None:
    """Its traceback leads to the call, which has the error: a cycle."""
    settled = call()
    settled.answer = InvalidArgument("no")
    with pytest.raises(InvalidArgument) as caught:
        door().response(settled)
    door().encode_failure(caught.value, settled)
    assert caught.value.__traceback__ is None


def test_a_response_is_the_calls_own() -> None:
    settled = call()
    settled.answer = response = InferResponse("m", "1", [Tensor.of("y", np.zeros(1, np.float32))])
    assert door().response(settled) is response


def test_a_request_of_a_model_that_is_not_there_is_not_found_first(lines: Callable[..., Lines]) -> None:
    door = Door(DIALECT, lines().engine)
    error = InvalidArgument("its shape is wrong")
    assert door.decode_failure(error, "mates") == (1, "its shape is wrong")
    assert door.decode_failure(error) == (1, "its shape is wrong")
    assert door.decode_failure(error, "nope")[0] == 2
    assert door.decode_failure(cast(Exception, RuntimeError()), "nope") == (99, "internal error: RuntimeError")
