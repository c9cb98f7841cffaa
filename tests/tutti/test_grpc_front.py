"""The gRPC front with a real channel: answers, statuses, limits, cancellation."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from tests.models import Repository
from tests.serving import engine_over, wait_until
from tutti.frontends.grpc import native as grpc_front
from tutti.frontends.grpc.native import GrpcFront
from tutti.frontends.size_limits import Limits
from tutti.frontends.v2.api import Api
from tutti.serving.engine import Engine

LIMIT = 100_000


@dataclass
class Running:
    stub: Any
    channel: grpc.Channel
    engine: Engine


@pytest.fixture
def server(repository: Repository) -> Iterator[Running]:
    repository.add_onnx()
    repository.add_slow()
    with engine_over(repository.root) as engine:
        front = GrpcFront(Api(engine, Limits(max_grpc_message_size=LIMIT)), "127.0.0.1", 0)
        port = front.start()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Running(service_pb2_grpc.GRPCInferenceServiceStub(channel), channel, engine)
        front.stop()


def request(value: float = 1.0, width: int = 4, model: str = "add_one", name: str = "x") -> Any:
    tensor = pb.ModelInferRequest.InferInputTensor(name=name, datatype="FP32", shape=[1, width])
    raw = np.full(width, value, np.float32).tobytes()
    return pb.ModelInferRequest(model_name=model, inputs=[tensor], raw_input_contents=[raw])


def wrong_size(model: str) -> Any:
    sent = request(model=model)
    sent.raw_input_contents[0] = b"\0" * 4
    return sent


def test_many_calls_in_flight_each_get_their_own_answer(server: Running) -> None:
    futures = [server.stub.ModelInfer.future(request(n), timeout=20) for n in range(300)]
    for n, future in enumerate(futures):
        assert np.frombuffer(future.result().raw_output_contents[0], np.float32).tolist() == [n + 1] * 4
    counts = server.engine.model("add_one").statistics.counts
    assert counts.success.count == 300
    assert counts.executions < 300


@pytest.mark.parametrize(
    ("sent", "code", "says"),
    [
        (request(model="nope"), grpc.StatusCode.NOT_FOUND, "nope"),
        (wrong_size("nope"), grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'nope' is not found"),
        (wrong_size("add_one"), grpc.StatusCode.INVALID_ARGUMENT, "Expected 16, got 4"),
        (request(width=5), grpc.StatusCode.INVALID_ARGUMENT, "Expected [-1,4], got [1,5]"),
        (request(width=LIMIT // 4 + 1), grpc.StatusCode.RESOURCE_EXHAUSTED, f"at most {LIMIT} pass"),
    ],
)
def test_errors_carry_status_and_reason(server: Running, sent: Any, code: grpc.StatusCode, says: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        server.stub.ModelInfer(sent, timeout=20)
    assert caught.value.code() == code
    assert says in caught.value.details()
    assert server.stub.ModelInfer(request(), timeout=20).model_name == "add_one"


def test_bytes_that_are_no_message(server: Running) -> None:
    for method in ("ModelInfer", "ModelMetadata"):
        call = server.channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"\xff\xff\xff", timeout=20)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_method_that_is_not_offered(server: Running) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        server.channel.unary_unary("/inference.GRPCInferenceService/Nope")(b"", timeout=20)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_control_methods(server: Running) -> None:
    stub = server.stub
    assert stub.ServerLive(pb.ServerLiveRequest()).live
    assert stub.ServerReady(pb.ServerReadyRequest()).ready
    assert stub.ModelReady(pb.ModelReadyRequest(name="add_one", version="1")).ready
    assert stub.ServerMetadata(pb.ServerMetadataRequest()).name == "tutti"
    assert list(stub.ModelMetadata(pb.ModelMetadataRequest(name="add_one")).inputs[0].shape) == [-1, 4]
    assert stub.ModelConfig(pb.ModelConfigRequest(name="add_one")).config.max_batch_size == 8
    names = [model.name for model in stub.RepositoryIndex(pb.RepositoryIndexRequest()).models]
    assert names == ["add_one", "slow"]
    assert len(stub.ModelStatistics(pb.ModelStatisticsRequest()).model_stats) == 2
    check = server.channel.unary_unary("/grpc.health.v1.Health/Check")
    assert check(b"", timeout=20) == b"\x08\x01"


def test_a_cancelled_call_is_not_executed(server: Running) -> None:
    waiting: Any = server.engine.model("slow")._served.infer
    running = server.stub.ModelInfer.future(request(0.5, 1, "slow", "s"), timeout=20)
    wait_until(lambda: not waiting._instances.free)
    queued = [server.stub.ModelInfer.future(request(5.0, 1, "slow", "s"), timeout=20) for _ in range(3)]
    wait_until(lambda: waiting.queued_rows() == 3)
    for future in queued:
        future.cancel()
    running.result()
    last = server.stub.ModelInfer(request(0.0, 1, "slow", "s"), timeout=20)
    assert last.model_name == "slow"
    assert server.engine.model("slow").statistics.counts.executions == 2


def test_many_cancels_at_once_end_nobody_elses_call(server: Running) -> None:
    stub = server.stub
    running = stub.ModelInfer.future(request(0.5, 1, "slow", "s"), timeout=20)
    for count in (100, 500):
        queued = [stub.ModelInfer.future(request(5.0, 1, "slow", "s"), timeout=20) for _ in range(count)]
        others = [stub.ModelInfer.future(request(n), timeout=20) for n in range(20)]
        others[-1].result()  # it came last: the server has all of them
        others += [stub.ModelInfer.future(request(n), timeout=20) for n in range(20)]
        for future in queued:
            future.cancel()
        for n, future in enumerate(others):
            assert np.frombuffer(future.result().raw_output_contents[0], np.float32)[0] == n % 20 + 1
    assert running.result().model_name == "slow"


def test_a_front_that_ends_answers_what_is_inside_and_refuses_what_comes(repository: Repository) -> None:
    repository.add_onnx()
    repository.add_slow()
    with engine_over(repository.root) as engine:
        front = GrpcFront(Api(engine, Limits()), "127.0.0.1", 0)
        port = front.start()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            inside = stub.ModelInfer.future(request(0.5, 1, "slow", "s"), timeout=20)
            wait_until(lambda: front._open)

            async def end() -> grpc.RpcError:
                ending = asyncio.create_task(front.finish(0.0, 20.0))
                await asyncio.sleep(0)
                with pytest.raises(grpc.RpcError) as refused:
                    await asyncio.to_thread(stub.ModelInfer, request(), timeout=20)
                assert not front._open, "who is refused earlier asks the same server again"
                await ending
                return refused.value

            error = asyncio.run(end())
            front.stop()
            assert inside.result().model_name == "slow"
            assert error.code() == grpc.StatusCode.UNAVAILABLE and "is shutting down" in error.details()


def test_who_comes_while_the_last_answers_go_out_is_refused_too(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = GrpcFront(Api(server.engine), "127.0.0.1", 0)
    came = []
    with grpc.insecure_channel(f"127.0.0.1:{front.start()}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

        async def sleep(_: float) -> None:
            came.append(stub.ModelInfer.future(request(), timeout=20))
            wait_until(lambda: front._late)

        monkeypatch.setattr(grpc_front, "asyncio", SimpleNamespace(sleep=sleep))
        asyncio.run(front.finish(0.0, 0.0))
        assert not front._late
        (late,) = came
        assert late.code() == grpc.StatusCode.UNAVAILABLE and "is shutting down" in late.details()
        front.stop()


def test_who_asks_again_while_a_front_ends_is_answered_by_the_next(repository: Repository) -> None:
    """However long what is inside takes: the attempts of this policy are used up within 0.15 s."""
    repository.add_onnx()
    repository.add_slow()
    again = """{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 5, "initialBackoff": "0.01s",
    "maxBackoff": "0.1s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"]}}]}"""
    with engine_over(repository.root) as engine:
        first = GrpcFront(Api(engine, Limits()), "127.0.0.1", 0, shares_port=True)
        port = first.start()
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.service_config", again)]) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            inside = stub.ModelInfer.future(request(1.0, 1, "slow", "s"), timeout=20)
            wait_until(lambda: first._open)
            second = GrpcFront(Api(engine, Limits()), "127.0.0.1", port, shares_port=True)
            second.start()

            async def end() -> pb.ModelInferResponse:
                ending = asyncio.create_task(first.finish(0.0, 20.0))
                await asyncio.sleep(0)
                late = asyncio.create_task(asyncio.to_thread(stub.ModelInfer, request(3.0), timeout=20))
                await ending
                first.stop()
                return await late

            answer = asyncio.run(end())
            second.stop()
            assert inside.result().model_name == "slow"
            assert np.frombuffer(answer.raw_output_contents[0], np.float32)[0] == 4.0
