"""How often a large payload is copied on its way to the model, counted by the memory that is allocated for it."""

import asyncio
import socket
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc
import tritonclient.http as http
import uvloop
from onnx import TensorProto, helper

from tests.models import Repository, _serialized
from tests.serving import engine_over
from tutti.frontends.grpc.native import GrpcFront
from tutti.frontends.http import routes as http_api
from tutti.frontends.http.infer import HttpFront
from tutti.frontends.v2.api import Api

SIZE = 2_000_000
PAYLOAD = SIZE * 4


def onnx_mean() -> bytes:
    """y = the mean of x, [batch, SIZE] -> [batch, 1] FP32."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", SIZE])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1])
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    return _serialized(helper.make_graph([helper.make_node("ReduceMean", ["x", "axes"], ["y"])], "m", [x], [y], [axes]))


@dataclass
class Running:
    http: str
    grpc: str


@pytest.fixture
def server(repository: Repository) -> Iterator[Running]:
    """Both front-ends in this process, whose allocations can be counted."""
    config = f"""
    backend: "onnxruntime" max_batch_size: 4
    input {{ name: "x" data_type: TYPE_FP32 dims: {SIZE} }}
    output {{ name: "y" data_type: TYPE_FP32 dims: 1 }}
    dynamic_batching {{ }}
    """
    repository.add("mean", config, {"model.onnx": onnx_mean()})
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    with engine_over(repository.root) as engine:
        api = Api(engine)

        async def start() -> tuple[HttpFront, int]:
            front = HttpFront(http_api.make_app(api), api)
            return front, await front.start("127.0.0.1", 0)

        front, port = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
        native = GrpcFront(api, "127.0.0.1", 0)
        yield Running(f"127.0.0.1:{port}", f"127.0.0.1:{native.start()}")
        native.stop()
        asyncio.run_coroutine_threadsafe(front.stop(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def over_http(server: Running) -> tuple[Callable[[], Any], Callable[[], None]]:
    """A plain socket: what a client's library allocates would count too."""
    body, length = http.InferenceServerClient.generate_request_body([tensor(http)])
    head = (
        f"POST /v2/models/mean/infer HTTP/1.1\r\nHost: t\r\nInference-Header-Content-Length: {length}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    host, _, port = server.http.partition(":")
    connection = socket.create_connection((host, int(port)), timeout=20)

    def send() -> None:
        connection.sendall(head)
        connection.sendall(body)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")

    return send, connection.close


def over_grpc(server: Running, request_id: str) -> tuple[Callable[[], Any], Callable[[], None]]:
    import grpc as grpcio

    message = grpc.service_pb2.ModelInferRequest(model_name="mean", id=request_id)
    message.inputs.add(name="x", datatype="FP32", shape=[1, SIZE])
    message.raw_input_contents.append(np.ones(SIZE, np.float32).tobytes())
    data = message.SerializeToString()
    channel = grpcio.insecure_channel(server.grpc, options=[("grpc.max_send_message_length", -1)])
    call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    return lambda: call(data), channel.close


def tensor(module: Any) -> Any:
    made = module.InferInput("x", [1, SIZE], "FP32")
    made.set_data_from_numpy(np.ones((1, SIZE), np.float32))
    return made


@pytest.mark.parametrize("way", ["HTTP", "gRPC", "gRPC with an id"])
def test_a_large_tensor_is_allocated_once(server: Running, way: str) -> None:
    """HTTP is received into the buffer that the model reads; gRPC's message is copied once, out of the library."""
    if way == "HTTP":
        send, close = over_http(server)
    else:
        send, close = over_grpc(server, "7" if "id" in way else "")
    for _ in range(3):
        send()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        send()
        allocated = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
        close()
    assert 0.9 * PAYLOAD < allocated < 1.2 * PAYLOAD, f"{allocated / PAYLOAD:.2f} payloads"
