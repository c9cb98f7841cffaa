"""What the log of requests is told of gRPC calls: what their clients were, and nothing that is held for its sake."""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from pygrpc_native import EVENT_CALL
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from tests.serving import Noted, wait_until
from tutti.core.errors import NotFound
from tutti.core.types import Call, InferResponse, Tensor
from tutti.frontends.door import Access
from tutti.frontends.gate import Gate
from tutti.frontends.grpc import codec as grpc_codec
from tutti.frontends.grpc.aio import GrpcioFront
from tutti.frontends.grpc.native import GrpcFront
from tutti.frontends.size_limits import Limits
from tutti.frontends.v2.api import Api
from tutti.observing.request_log import Event

MIB = 2**20


class _Large:
    """An engine whose answers have a mebibyte."""

    size = MIB

    def __call__(self, calls: Sequence[Call]) -> None:
        for call in calls:
            call.finish(InferResponse("large", "1", [Tensor("y", "UINT8", (self.size,), bytes(self.size))]))


def request(size: int = 1, classes: int = 0) -> Any:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="UINT8", shape=[size])
    asked = pb.ModelInferRequest.InferRequestedOutputTensor(name="y")
    if classes:
        asked.parameters["classification"].int64_param = classes
    return pb.ModelInferRequest(
        model_name="large", id="r1", inputs=[tensor], outputs=[asked], raw_input_contents=[bytes(size)]
    )


@pytest.fixture
def api() -> Api:
    return Api(cast(Any, _Large()), Limits(max_inflight_bytes=5 * MIB), requests=Noted())


def noted(api: Api) -> Event:
    """The one call's line."""
    log = cast(Noted, api.requests)
    wait_until(lambda: log.events)
    (event,) = log.events
    return event


@pytest.fixture
def front(api: Api) -> Iterator[GrpcFront]:
    front = GrpcFront(api, "127.0.0.1", 0)
    front.start()
    yield front
    front.stop()


def fails(port: int, sent: Any) -> grpc.RpcError:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as caught:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(sent, timeout=20)
    return caught.value


def is_told(event: Event, error: grpc.RpcError) -> bool:
    told = event.model, event.id, event.status, event.error, event.bytes_out
    return told == ("large", "r1", error.code().name, error.details(), 0)


def test_an_answer_that_can_never_be_held_has_failed(
    api: Api, front: GrpcFront, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Large, "size", 6 * MIB)
    error = fails(front._front.bound_port, request())
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert is_told(noted(api), error)


def test_an_answer_for_which_there_is_no_room_has_failed(
    api: Api, front: GrpcFront, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert front._guard is not None
    monkeypatch.setattr(front._guard, "may_give", lambda *_: False)
    error = fails(front._front.bound_port, request())
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert is_told(noted(api), error)


def test_a_request_for_which_there_is_no_room_has_a_line(api: Api, front: GrpcFront) -> None:
    api.holding.change(5 * MIB)
    sent = request(MIB)
    error = fails(front._front.bound_port, sent)
    api.holding.give(5 * MIB)
    assert error.code() == grpc.StatusCode.UNAVAILABLE and "the server holds" in error.details()
    event = noted(api)
    assert is_told(event, error)
    assert event.bytes_in == sent.ByteSize()


class _Watched(bytes):
    """A message that says when it is let go."""

    gone = 0

    def __del__(self) -> None:
        _Watched.gone += 1


class _Elsewhere:
    """Another process, which answers later."""

    def __init__(self) -> None:
        self.answered: list[Any] = []

    def ask(self, path: str, payload: bytes, left_ns: int, answered: Any, came: Any) -> None:
        self.answered.append(answered)


@pytest.fixture
def behind() -> Iterator[tuple[Api, GrpcFront, _Elsewhere]]:
    """A front in a front-end process, that does not listen."""
    other = _Elsewhere()
    api = Api(cast(Any, _Large()), Limits(max_inflight_bytes=5 * MIB), is_front_end=True, requests=Noted())
    front = GrpcFront(api, "127.0.0.1", 0, raw=other.ask)
    native = front._front
    # Its callers are there: it takes each answer, and each error.
    taken = SimpleNamespace(respond=lambda *_: True, fail=lambda *_: True, metrics=native.metrics)
    front._front = front._answers.native = cast(Any, taken)
    yield api, front, other
    native.close()


def test_a_call_that_is_answered_elsewhere_is_not_held_for_its_line(
    behind: tuple[Api, GrpcFront, _Elsewhere], monkeypatch: pytest.MonkeyPatch
) -> None:
    api, front, other = behind
    message = request(MIB, classes=3).SerializeToString()
    monkeypatch.setattr(_Watched, "gone", 0)
    front._take([(EVENT_CALL, 1, 0, _Watched(message), "ipv4:127.0.0.1:5", None)])
    (answered,) = other.answered
    assert _Watched.gone == 1
    answered(0, b"answer", "")
    event = noted(api)
    assert (event.request, event.model, event.id, event.status, event.client) == (
        "infer", "large", "r1", "OK", "127.0.0.1:5",
    )  # fmt: skip
    assert (event.bytes_in, event.bytes_out) == (len(message), 6)


def test_an_answer_from_elsewhere_that_can_never_be_held_has_failed(
    behind: tuple[Api, GrpcFront, _Elsewhere],
) -> None:
    api, front, other = behind
    front._take([(EVENT_CALL, 1, 0, request(classes=3).SerializeToString(), "", None)])
    other.answered[0](0, bytes(6 * MIB), "")
    event = noted(api)
    assert (event.status, event.bytes_out) == ("RESOURCE_EXHAUSTED", 0)
    assert "(--max-inflight-bytes)" in event.error


def test_a_refused_message_is_read_only_where_its_line_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(grpc_codec, "named", lambda payload: read.append(len(payload)) or ("", "", ""))
    for from_ns, count in ((1, 0), (0, 1)):
        front = GrpcFront(Api(cast(Any, _Large()), requests=Noted(from_ns)), "127.0.0.1", 0)
        front._refuse(1, "/inference.GRPCInferenceService/ModelInfer", (8, "no room"), b"message", "")
        assert len(read) == count
        front._front.close()


@pytest.mark.parametrize("size", [0, 1, MIB])
def test_a_request_is_named_however_wrong_it_is(size: int) -> None:
    whole = request(size).SerializeToString()
    assert grpc_codec.named(whole) == ("large", "", "r1")
    assert grpc_codec.named(whole[:-1] if size else b"\xff") == ("", "", "")


@contextlib.asynccontextmanager
async def grpcio(api: Api) -> Any:
    """Another server's stub, on its own loop."""
    front = GrpcioFront(api, "127.0.0.1:0")
    port = await front.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)
    await front.stop()


@pytest.mark.parametrize("method", ["ModelInfer", "RepositoryIndex"])
def test_what_grpcio_refuses_has_a_line(method: str) -> None:
    restricted = {"inference": ("key", "k"), "model-repository": ("key", "k")}
    api = Api(cast(Any, _Large()), grpc=Access(Gate(restricted)), requests=Noted())

    async def ask() -> grpc.aio.AioRpcError:
        async with grpcio(api) as stub:
            sent = request() if method == "ModelInfer" else pb.RepositoryIndexRequest()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await getattr(stub, method)(sent, timeout=20)
            return caught.value

    error = asyncio.run(ask())
    event = noted(api)
    assert (event.status, event.error) == (error.code().name, error.details())
    assert (event.request, event.id) == (("infer", "r1") if method == "ModelInfer" else (method, ""))


def test_other_methods_of_grpcio_have_lines(api: Api) -> None:
    async def ask() -> None:
        async with grpcio(api) as stub:
            assert (await stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=20)).name == "tutti"
            await stub.ServerLive(pb.ServerLiveRequest(), timeout=20)

    asyncio.run(ask())
    event = noted(api)  # probes have none
    assert (event.request, event.status) == ("ServerMetadata", "OK")
    assert event.bytes_out > 0


@pytest.mark.parametrize("ends", ["true", "false"])
def test_a_request_that_fails_in_a_stream_has_a_line_also_where_it_ends_the_stream(ends: str) -> None:
    def fail(calls: Sequence[Call]) -> None:
        for call in calls:
            call.finish(NotFound("there is none"))

    api = Api(cast(Any, fail), requests=Noted())

    async def ask() -> None:
        async with grpcio(api) as stub:
            stream = stub.ModelStreamInfer(iter([request()]), timeout=20, metadata=(("triton_grpc_error", ends),))
            with pytest.raises(grpc.aio.AioRpcError) if ends == "true" else contextlib.nullcontext():
                assert [answer.error_message async for answer in stream] == ["there is none"]

    asyncio.run(ask())
    event = noted(api)
    assert (event.request, event.model, event.status, event.error) == ("stream", "large", "NOT_FOUND", "there is none")


def test_a_fault_at_one_request_of_a_stream_leaves_the_others(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = grpc_codec.decode

    def fails_once(*args: Any) -> Any:
        monkeypatch.setattr(grpc_codec, "decode", decode)
        raise MemoryError

    async def ask() -> list[tuple[str, str]]:
        async with grpcio(api) as stub:
            stream = stub.ModelStreamInfer(iter([request(), request()]), timeout=20)
            return [(answer.error_message, answer.infer_response.id) async for answer in stream]

    monkeypatch.setattr(grpc_codec, "decode", fails_once)
    assert asyncio.run(ask()) == [("internal error: MemoryError", "r1"), ("", "r1")]
