"""Messages that grow beyond what the server may hold: which connection is broken with, and that it is."""

import os
import socket
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from tests.models import Repository
from tests.serving import engine_over
from tutti.frontends import grpc_guard
from tutti.frontends.api import Api
from tutti.frontends.grpc import GrpcFront
from tutti.frontends.grpc_guard import Watch, peer_name, received
from tutti.frontends.limits import Limits

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
    monkeypatch.setattr(grpc_guard, "GROWTH_BYTES", 0)
    repository.add_onnx()
    with engine_over(repository.root) as engine:
        front = GrpcFront(Api(engine, Limits(max_inflight_bytes=16 * MIB)), "127.0.0.1", 0)
        yield f"127.0.0.1:{front.start()}"
        front.stop()


def test_looking_at_connections_leaves_no_files_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_guard, "GROWTH_BYTES", 0)
    guard = grpc_guard.Guard(MIB, lambda: 0)
    before = os.listdir("/proc/self/fd")
    guard._look(1.0)
    assert os.listdir("/proc/self/fd") == before
    guard.stop()


def test_sockets_of_others_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A default timeout, as any library may set one, is none of theirs: who waits goes on waiting."""
    monkeypatch.setattr(grpc_guard, "GROWTH_BYTES", 0)
    ours, theirs = socket.socketpair()
    listener = socket.create_server(("127.0.0.1", 0))
    before = socket.getdefaulttimeout()
    guard = grpc_guard.Guard(MIB, lambda: 0)
    guard._port = listener.getsockname()[1]
    with ours, theirs, listener:
        try:
            socket.setdefaulttimeout(5.0)
            guard._look(1.0)
        finally:
            socket.setdefaulttimeout(before)
        assert [os.get_blocking(one.fileno()) for one in (ours, theirs)] == [True] * 2
        assert grpc_guard._port_of(listener.fileno()) == listener.getsockname()[1]
        assert grpc_guard._port_of(ours.fileno()) == -1
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
