"""Messages that grow beyond what the server may hold, and answers that nobody reads: whom the guard breaks with."""

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import grpc
import numpy as np
import pytest
from hpack import Encoder
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from tests.models import Repository
from tests.serving import engine_over, wait_until
from tutti.core.types import Call, InferResponse, Tensor
from tutti.frontends.grpc import memory_guard
from tutti.frontends.grpc.given_answers import GivenAnswers
from tutti.frontends.grpc.memory_guard import Watch, peer_name, received, taken
from tutti.frontends.grpc.native import GrpcFront
from tutti.frontends.grpc.unread_answers import Unread
from tutti.frontends.held_bytes import Holding
from tutti.frontends.size_limits import Limits
from tutti.frontends.v2.api import Api

MIB = 2**20
# Of a machine that is busy with much else.
LIMIT_S = 100


def test_the_largest_message_goes_when_all_are_too_much() -> None:
    watch = Watch(100 * MIB)
    assert watch.saw({"a": 900 * MIB, "b": 0}, 0) == "", "what came before it watched was taken"
    assert watch.saw({"a": 950 * MIB, "b": 40 * MIB}, 0) == ""
    assert watch.saw({"a": 950 * MIB, "b": 60 * MIB}, 0) == "b"
    assert watch.saw({"a": 950 * MIB, "b": 40 * MIB}, 20 * MIB) == "a", "what is held besides counts, too"


def test_what_calls_have_brought_is_not_under_way() -> None:
    watch = Watch(100 * MIB)
    watch.saw({"a": 0}, 0)
    for n in range(1, 50):
        watch.took("a", 50 * MIB)
        assert watch.saw({"a": n * 50 * MIB + 1000}, 0) == ""
        assert watch.is_calm
    watch.took("gone", 5)
    assert watch.saw({}, 500 * MIB) == ""


def test_what_came_on_streams_is_not_under_way() -> None:
    watch = Watch(100 * MIB)
    watch.saw({"a": 0, "b": 0}, 0)
    for n in range(1, 50):
        assert watch.saw({"a": n * 50 * MIB, "b": 10 * MIB}, 0, 50 * MIB + (n == 1) * 10 * MIB) == ""
        assert watch.is_calm
    assert watch.saw({"a": 49 * 50 * MIB, "b": 120 * MIB}, 0, 0) == "b"


def test_headers_of_small_calls_are_not_under_way() -> None:
    watch = Watch(100 * MIB)
    watch.saw({"a": 0}, 0)
    for n in range(1, 100_000):
        watch.took("a", 10)
        if not n % 1000:
            assert watch.saw({"a": n * (10 + 57)}, 0) == ""
            assert watch.is_calm


def test_a_connection_says_what_has_come() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, socket.create_connection(listener.getsockname()) as client:
        ours, address = listener.accept()
        with ours:
            client.sendall(bytes(5000))
            ours.recv(5000, socket.MSG_WAITALL)
            assert received(ours) == 5000
            assert peer_name(address) == f"ipv4:127.0.0.1:{client.getsockname()[1]}"


@pytest.fixture
def address(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(memory_guard, "GROWTH_BYTES", 0)
    repository.add_onnx()
    with engine_over(repository.root) as engine:
        front = GrpcFront(Api(engine, Limits(max_inflight_bytes=16 * MIB)), "127.0.0.1", 0)
        yield f"127.0.0.1:{front.start()}"
        front.stop()


def test_looking_at_connections_leaves_no_files_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_guard, "GROWTH_BYTES", 0)
    guard = memory_guard.Guard(MIB, Holding(MIB), lambda: 0)
    before = os.listdir("/proc/self/fd")
    guard._look(1.0)
    assert os.listdir("/proc/self/fd") == before
    guard.stop()


def test_sockets_of_others_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A default timeout, as any library may set one, is none of theirs: who waits goes on waiting."""
    monkeypatch.setattr(memory_guard, "GROWTH_BYTES", 0)
    ours, theirs = socket.socketpair()
    listener = socket.create_server(("127.0.0.1", 0))
    before = socket.getdefaulttimeout()
    guard = memory_guard.Guard(MIB, Holding(MIB), lambda: 0)
    guard._port = listener.getsockname()[1]
    with ours, theirs, listener:
        try:
            socket.setdefaulttimeout(5.0)
            guard._look(1.0)
        finally:
            socket.setdefaulttimeout(before)
        assert [os.get_blocking(one.fileno()) for one in (ours, theirs)] == [True] * 2
        assert memory_guard._port_of(listener.fileno()) == listener.getsockname()[1]
        assert memory_guard._port_of(ours.fileno()) == -1
    guard.stop()


def request(width: int) -> pb.ModelInferRequest:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, width])
    raw = [np.zeros(width, np.float32).tobytes()]
    return pb.ModelInferRequest(model_name="add_one", inputs=[tensor], raw_input_contents=raw)


def test_a_message_is_broken_off_while_it_comes(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        for _ in range(9):  # together more than the limit, one by one not
            with pytest.raises(grpc.RpcError) as caught:
                infer(request(MIB // 2), timeout=LIMIT_S)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as caught:
            infer(request(6 * MIB), timeout=LIMIT_S)
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
    with grpc.insecure_channel(address) as channel:
        assert service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request(4), timeout=LIMIT_S).model_name


def test_what_is_owed_is_paid_as_the_system_takes_it() -> None:
    unread = Unread()
    unread.gives("a", 100, 5000, 0.0)
    unread.gives("a", 50, 5000, 0.0)
    assert unread.saw("a", 5120, 1.0) == 120
    assert unread.left == 30
    assert unread.saw("a", 5200, 2.0) == 30, "headers are beside answers"
    assert not unread
    unread.gives("b", 10, 0, 0.0)
    assert unread.saw("b", None, 1.0) == 10, "it has gone"
    assert unread.saw("b", 10, 1.0) == 0


def test_a_trickle_is_a_stall() -> None:
    unread = Unread()
    unread.gives("slow", 10 * MIB, 0, 0.0)
    unread.gives("quick", 10 * MIB, 0, 0.0)
    for second in range(1, 20):
        unread.saw("slow", second * 100, float(second))
        unread.saw("quick", second * 100_000, float(second))
    assert unread.stalled(20.0, 5.0) == ["slow"]
    assert unread.waits("slow", 20.0) == 10 * MIB - 1900
    assert not unread.stalled(21.0, 5.0)


def test_answers_of_cancelled_calls_are_owed_no_more() -> None:
    unread = Unread()
    for at, peer in enumerate(("a", "b", "")):
        unread.gives(peer, 10, 0, float(at))
    assert unread.forgive(30) == 0
    assert unread.forgive(15) == 15
    assert unread.peers == ["b"] and unread.left == 15
    assert unread.forgive(0) == 15
    assert not unread


def test_a_connection_says_what_is_taken() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, socket.create_connection(listener.getsockname()) as client:
        ours, _ = listener.accept()
        with ours:
            before = taken(ours)
            ours.sendall(bytes(5000))
            assert taken(ours) - before == 5000
            client.recv(5000, socket.MSG_WAITALL)
            wait_until(lambda: taken(ours) - before == 5000)


class _Large:
    """An engine whose answers have a mebibyte."""

    size = MIB

    def __call__(self, calls: Sequence[Call]) -> None:
        for call in calls:
            call.finish(InferResponse("large", "1", [Tensor("y", "UINT8", (self.size,), bytes(self.size))]))


@dataclass
class Bounded:
    """A front that holds four of those answers."""

    api: Api
    front: GrpcFront
    port: int

    def asks(self, timeout: bytes = b"") -> socket.socket:
        """A client that asks for an answer and does not read it."""
        fields = [(":method", "POST"), (":scheme", "http"), (":path", "/inference.GRPCInferenceService/ModelInfer")]
        fields += [(":authority", "t"), ("content-type", "application/grpc"), ("te", "trailers")]
        fields += [("grpc-timeout", timeout.decode())] if timeout else []
        message = request(1).SerializeToString()
        data = b"\0" + len(message).to_bytes(4, "big") + message
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b""))
        connection.sendall(_frame(1, 4, 1, Encoder().encode(fields)) + _frame(0, 1, 1, data))
        return connection

    def infer(self, timeout: float | None = None) -> int:
        """Ask and read: the length of what comes."""
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            return len(stub.ModelInfer(request(1), timeout=timeout).raw_output_contents[0])

    def is_answered(self) -> bool:
        with contextlib.suppress(grpc.RpcError):
            return self.infer() == MIB
        return False


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


@pytest.fixture
def bounded() -> Iterator[Bounded]:
    api = Api(cast(Any, _Large()), Limits(max_inflight_bytes=5 * MIB))
    front = GrpcFront(api, "127.0.0.1", 0)
    yield Bounded(api, front, front.start())
    front.stop()


def test_answers_that_are_read_are_held_no_more(bounded: Bounded) -> None:
    for timeout in (None, 20.0):
        for _ in range(12):
            assert bounded.infer(timeout) == MIB
    wait_until(lambda: bounded.api.holding.held == 0)


def test_an_answer_to_nobody_knows_whom_may_be_large(bounded: Bounded, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is first of its kind has nobody's name."""
    monkeypatch.setattr(_Large, "size", 3 * MIB)
    assert bounded.infer(100.0) == 3 * MIB


def test_an_answer_that_can_never_be_held_is_told(bounded: Bounded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Large, "size", 6 * MIB)
    with pytest.raises(grpc.RpcError, match=r"at most 5242880 \(--max-inflight-bytes\)") as caught:
        bounded.infer()
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert bounded.api.holding.held == 0


class Metrics:
    """A native server's, as it tells them: calls that have begun, those that have ended, and bytes that were sent."""

    def __init__(self) -> None:
        self.started = self.ended = self.sent = 0

    def metrics(self) -> dict[str, object]:
        status = {"0": {"count": self.ended, "sent": {"sum": self.sent}}}
        return {"methods": {"/inference.GRPCInferenceService/ModelInfer": {"started": self.started, "status": status}}}


def test_what_was_answered_too_late_is_not_owed_for_ever() -> None:
    """The server says that it has such an answer, and no status tells of it. There is always a call under way."""
    told = Metrics()
    answers = GivenAnswers(told, Holding(100 * MIB), {})
    answers.largest = MIB
    for number in range(100):
        call = Call(None, None, number)  # type: ignore[arg-type]
        answers.open_calls = {number: (call, "")}
        told.started += 2
        told.ended += 1  # too late: nothing was sent
        answers.total += MIB
        assert answers.under_way() <= 20 * MIB, "what is lost goes, though calls are under way at each look"
        answers.open_calls = {}
        told.ended += 1
        told.sent += MIB
        answers.total += MIB
    for _ in range(20):
        left = answers.under_way()
    assert left == 0


def test_answers_that_nobody_reads_are_bounded(bounded: Bounded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_guard, "STALLED_S", 1000.0)
    with contextlib.ExitStack() as open_ones:
        for number in range(4):
            open_ones.enter_context(bounded.asks())
            wait_until(lambda n=number: bounded.api.holding.held >= (n + 1) * (MIB - 2**18))
        while bounded.is_answered():  # the window of each lets some of its answer go
            open_ones.enter_context(bounded.asks())
        with pytest.raises(grpc.RpcError, match="the server holds"):
            bounded.infer()
        assert bounded.api.holding.held <= 5 * MIB
        monkeypatch.setattr(memory_guard, "STALLED_S", -1.0)
        wait_until(bounded.is_answered)
    wait_until(lambda: bounded.api.holding.held == 0)


def test_clients_that_do_not_read_lose_their_connection(bounded: Bounded, monkeypatch: pytest.MonkeyPatch) -> None:
    with bounded.asks() as client:
        wait_until(lambda: bounded.api.holding.held > 0)
        monkeypatch.setattr(memory_guard, "WRITE_TIMEOUT_S", 0.05)
        wait_until(lambda: bounded.api.holding.held == 0)
        while client.recv(65536):
            pass


def test_an_answer_to_nobody_knows_whom_counts_as_long_as_it_is_there(bounded: Bounded) -> None:
    with bounded.asks(timeout=b"90S") as client:
        wait_until(lambda: bounded.api.holding.held >= MIB)
        client.sendall(_frame(3, 0, 1, (8).to_bytes(4, "big")))  # it is cancelled
        wait_until(lambda: bounded.api.holding.held == 0)
    for _ in range(3):  # at once: the answer may come too late to be one
        with bounded.asks(timeout=b"90S"):
            wait_until(lambda: bounded.api.holding.held > 0)
        wait_until(lambda: bounded.api.holding.held == 0)
