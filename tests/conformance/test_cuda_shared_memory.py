"""CUDA shared memory through NVIDIA's clients, over HTTP and gRPC, each way to serve.

Most tests have the server open handles on a machine in memory; those at the end have a server process open what another
process has allocated, over a driver of our own and, where there is a GPU, over the real one.
"""

import asyncio
import base64
import http.client
import json
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException

from tests.conformance.clients import LIBRARIES, AnyClient, connected
from tests.devices import driver
from tests.devices.exporter import exporting
from tests.devices.machine import Allocation, Machine, Process
from tests.models import Repository
from tests.serving import engine_over, serving
from tutti.app import cli
from tutti.app.front_end_server import Addresses, Server
from tutti.core.errors import Internal
from tutti.frontends.processes.pool import FrontEnds
from tutti.frontends.v2.api import Api
from tutti.frontends.v2.shared_memory import SharedMemory

pytestmark = [
    # The client libraries leave sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SERVERS: dict[str, dict[str, Any]] = {
    "native": {},
    "grpcio": {"grpc_server": "grpcio"},
    "front-ends": {},
}
X = np.array([[1, 2, 3, 4]], np.float32)
SIZE = X.nbytes
ROOM = 4 * SIZE


@dataclass
class Running:
    http: str
    grpc: str
    machine: Machine
    process: Process


@contextmanager
def listening(api: Api, options: dict[str, Any]) -> Iterator[Addresses]:
    """The server's front-ends over an Api of this process, on a loop of their own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    server = Server(api, Addresses(http_port=0, grpc_port=0, metrics_port=None, **options))
    try:
        yield run(server.start())
    finally:
        run(server.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()


@contextmanager
def listening_in_processes(api: Api) -> Iterator[Addresses]:
    """The same behind two front-end processes."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    async def begin(sockets: Path) -> tuple[Server, FrontEnds, Addresses]:
        front_ends = FrontEnds(2)
        ports = [front_ends.reserve("127.0.0.1", 0) for _ in range(2)]
        taken = Addresses(http_port=ports[0], grpc_port=ports[1], metrics_port=None, behind=sockets / "engine")
        server = Server(api, taken)
        (sockets / "engine").mkdir()
        front_ends.start(server.write_task(sockets))
        await server.start()
        await front_ends.open(sockets / "engine")
        return server, front_ends, taken

    async def end(server: Server, front_ends: FrontEnds) -> None:
        await front_ends.stop()
        await server.stop()

    with tempfile.TemporaryDirectory(prefix="tutti-test-") as folder:
        server, front_ends, taken = run(begin(Path(folder)))
        try:
            yield taken
        finally:
            run(end(server, front_ends))
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    repository = Repository(tmp_path_factory.mktemp("cuda_shm") / "models")
    repository.add_onnx()
    machine = Machine()
    process = machine.process()
    with engine_over(repository.root) as engine:
        api = Api(engine, shared_memory=SharedMemory(True, process))
        are_processes = request.param == "front-ends"
        with listening_in_processes(api) if are_processes else listening(api, SERVERS[request.param]) as taken:
            yield Running(f"127.0.0.1:{taken.http_port}", f"127.0.0.1:{taken.grpc_port}", machine, process)


@pytest.fixture(params=LIBRARIES)
def client(request: pytest.FixtureRequest, server: Running) -> Iterator[AnyClient]:
    with connected(request.param, getattr(server, request.param.split(".")[0]), set()) as made:
        yield made
        made.unregister_cuda_shared_memory()
        assert all(not +one.openings and one.is_intact() for one in server.machine.allocations.values())


@pytest.fixture
def memory(server: Running) -> Allocation:
    """Another process's, with X at its start."""
    made = server.machine.process().allocate(ROOM, device=1)
    made.set(X.tobytes())
    return made


def register(client: AnyClient, name: str, handle: bytes, device: int = 1, size: int = ROOM) -> None:
    client.register_cuda_shared_memory(name, base64.b64encode(handle), device, size)


def inputs(client: AnyClient, name: str, size: int = SIZE, offset: int = 0) -> list[Any]:
    (made,) = client.inputs({"x": X})
    made.set_shared_memory(name, size, offset=offset)
    return [made]


def outputs(client: AnyClient, name: str, size: int = SIZE, offset: int = 0) -> list[Any]:
    made = client.output("y")
    made.set_shared_memory(name, size, offset=offset)
    return [made]


def floats(allocation: Allocation, offset: int) -> list[float]:
    return np.frombuffer(allocation.get(offset, SIZE), np.float32).tolist()


def test_inputs_and_outputs_in_a_region(client: AnyClient, memory: Allocation) -> None:
    register(client, "r", memory.handle)
    result = client.infer("add_one", inputs(client, "r"), outputs=outputs(client, "r", offset=2 * SIZE))
    assert result.get_output("y") is not None
    assert floats(memory, 2 * SIZE) == [2, 3, 4, 5]
    assert memory.get(SIZE, SIZE) == memory.get(3 * SIZE, SIZE) == bytes(SIZE), "and nowhere else"
    client.infer("add_one", inputs(client, "r", offset=2 * SIZE), outputs=outputs(client, "r", 2 * SIZE, SIZE))
    assert floats(memory, SIZE) == [3, 4, 5, 6]
    assert floats(memory, 2 * SIZE) == [2, 3, 4, 5], "a larger place keeps its rest"


def test_input_and_output_may_overlap(client: AnyClient, memory: Allocation) -> None:
    register(client, "r", memory.handle)
    client.infer("add_one", inputs(client, "r"), outputs=outputs(client, "r"))
    assert floats(memory, 0) == [2, 3, 4, 5]
    client.infer("add_one", inputs(client, "r"), outputs=outputs(client, "r", offset=4))
    assert floats(memory, 4) == [3, 4, 5, 6]
    assert floats(memory, 0)[0] == 2


def test_requests_read_what_is_there_now(client: AnyClient, memory: Allocation) -> None:
    """Equal requests, which the codecs know by their bytes, with unequal regions."""
    register(client, "r", memory.handle)
    for n in range(5):
        memory.set((X * n).tobytes())
        assert client.infer("add_one", inputs(client, "r")).as_numpy("y").tolist() == (X * n + 1).tolist()


def test_status_has_the_shape_that_clients_expect(client: AnyClient, memory: Allocation) -> None:
    assert not client.as_json("get_cuda_shared_memory_status")
    register(client, "b", memory.handle, device=0, size=ROOM - 1)
    register(client, "a", memory.handle)
    every, b = (client.as_json("get_cuda_shared_memory_status", *name) for name in ((), ("b",)))
    if client.protocol == "http":
        assert every == [{"name": "a", "device_id": 1, "byte_size": ROOM}, *b]
        assert b == [{"name": "b", "device_id": 0, "byte_size": ROOM - 1}]
    else:
        assert every["regions"]["a"] == {"name": "a", "device_id": "1", "byte_size": str(ROOM)}
        assert list(b["regions"].values()) == [{"name": "b", "byte_size": str(ROOM - 1)}]  # zeros are left out
    with pytest.raises(InferenceServerException, match="Unable to find cuda shared memory region: 'x'"):
        client.get_cuda_shared_memory_status("x")
    with pytest.raises(InferenceServerException, match="'a' is registered as CUDA shared memory"):
        client.get_system_shared_memory_status("a")
    assert not client.as_json("get_system_shared_memory_status")
    assert "cuda_shared_memory" in client.as_json("get_server_metadata")["extensions"]


def status_of(error: InferenceServerException) -> str:
    return str(error.status()).removeprefix("StatusCode.")


def test_what_cannot_be_registered(client: AnyClient, server: Running, memory: Allocation) -> None:
    invalid = "400" if client.protocol == "http" else "INVALID_ARGUMENT"
    cases = {
        "expected 64 bytes, got 63": (memory.handle[:-1], 1, ROOM),
        "expected 64 bytes, got 65": (memory.handle + b"x", 1, ROOM),
        "expected 64 bytes, got 0": (b"", 1, ROOM),
        "byte_size of 1 or more, got 0": (memory.handle, 1, 0),
        f"byte_size {ROOM + 1} is more than its allocation has, which is {ROOM}": (memory.handle, 1, ROOM + 1),
        f"byte_size {2**63} is more than": (memory.handle, 1, 2**63),
        "device_id -1: expected 0 to 1": (memory.handle, -1, ROOM),
        "device_id 2: expected 0 to 1": (memory.handle, 2, ROOM),
        "the handle cannot be opened on cuda:1": (bytes(64), 1, ROOM),
        "the handle cannot be opened on cuda:0": (server.process.allocate(8).handle, 0, 8),
    }
    for message, (handle, device, size) in cases.items():
        with pytest.raises(InferenceServerException) as caught:
            register(client, "r", handle, device, size)
        assert message in str(caught.value)
        assert "'r'" in str(caught.value)
        assert status_of(caught.value) == invalid
    register(client, "r", memory.handle)
    with pytest.raises(InferenceServerException, match="'r' already in manager") as caught:
        register(client, "r", memory.handle)
    assert status_of(caught.value) == ("400" if client.protocol == "http" else "ALREADY_EXISTS")


def test_what_is_no_base64_or_no_number(server: Running) -> None:
    handle = {"b64": base64.b64encode(bytes(64)).decode()}
    fields = {"raw_handle": handle, "device_id": 0, "byte_size": 8}
    for change, message in (
        ({"raw_handle": {"b64": "!"}}, "'raw_handle' must be a valid base64 encoded cudaIpcMemHandle_t"),
        ({"raw_handle": {"b64": "ü"}}, "'raw_handle' must be a valid base64 encoded cudaIpcMemHandle_t"),
        ({"raw_handle": "AAAA"}, "register needs 'raw_handle'"),
        ({"raw_handle": {}}, "register needs 'raw_handle'"),
        ({"raw_handle": None}, "register needs 'raw_handle'"),
        ({"device_id": "0"}, "register needs 'device_id' as a whole number"),
        ({"device_id": None}, "register needs 'device_id' as a whole number"),
        ({"byte_size": 1.5}, "register needs 'byte_size' as a whole number"),
        ({"byte_size": True}, "register needs 'byte_size' as a whole number"),
    ):
        status, answer = ask(server.http, "/v2/cudasharedmemory/region/r/register", {**fields, **change})
        assert (status, message in answer["error"]) == (400, True), answer


def ask(address: str, path: str, body: Any) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(address, timeout=20)
    try:
        connection.request("POST", path, json.dumps(body))
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"{}")
    finally:
        connection.close()


def test_stretches_that_are_not_there(client: AnyClient, memory: Allocation) -> None:
    register(client, "r", memory.handle, size=2 * SIZE)  # less than there is
    for size, offset in ((SIZE, SIZE + 1), (SIZE, 2 * SIZE), (SIZE, 2**61), (2**61, SIZE)):
        with pytest.raises(InferenceServerException, match=r"Invalid offset .* region: 'r'"):
            client.infer("add_one", inputs(client, "r", size, offset))
        with pytest.raises(InferenceServerException, match=r"Invalid offset .* region: 'r'"):
            client.infer("add_one", client.inputs({"x": X}), outputs=outputs(client, "r", size, offset))
    for size in (SIZE - 1, SIZE + 1):
        with pytest.raises(InferenceServerException, match=f"Expected {SIZE}, got {size}: expected {SIZE} bytes"):
            client.infer("add_one", inputs(client, "r", size))
    for use in ({"inputs": inputs(client, "x")}, {"outputs": outputs(client, "x")}):
        with pytest.raises(InferenceServerException, match="Unable to find shared memory region: 'x'"):
            client.infer("add_one", **{"inputs": client.inputs({"x": X}), **use})


def test_an_output_larger_than_its_place(client: AnyClient, memory: Allocation) -> None:
    register(client, "r", memory.handle)
    with pytest.raises(InferenceServerException) as caught:
        client.infer("add_one", client.inputs({"x": X}), outputs=outputs(client, "r", SIZE - 1))
    for part in ("'add_one'", "output 'y'", "region 'r'", f"({SIZE - 1} bytes)", f"at least {SIZE} bytes"):
        assert part in str(caught.value)
    assert floats(memory, 0) == X[0].tolist()


def test_after_unregistering(client: AnyClient, memory: Allocation) -> None:
    for name in ("q", "r", "s"):
        register(client, name, memory.handle)
    client.unregister_cuda_shared_memory("q")
    client.unregister_cuda_shared_memory("q")
    client.unregister_system_shared_memory()  # not of this kind
    with pytest.raises(InferenceServerException, match="Unable to find shared memory region: 'q'"):
        client.infer("add_one", inputs(client, "q"))
    assert client.infer("add_one", inputs(client, "r")).as_numpy("y").tolist() == [[2, 3, 4, 5]]
    client.unregister_cuda_shared_memory()
    for name in ("r", "s"):
        with pytest.raises(InferenceServerException, match=f"Unable to find shared memory region: '{name}'"):
            client.infer("add_one", client.inputs({"x": X}), outputs=outputs(client, name))
    memory.free()


def test_a_device_that_fails(client: AnyClient, server: Running, memory: Allocation) -> None:
    register(client, "r", memory.handle)

    def fail() -> None:
        raise Internal("cuda:1: cuMemcpyDtoHAsync: CUDA_ERROR_ILLEGAL_ADDRESS (700)")

    server.process.before_copy = fail
    try:
        for use in ({"inputs": inputs(client, "r")}, {"outputs": outputs(client, "r")}):
            with pytest.raises(InferenceServerException, match=r"region 'r': cuda:1: .*ILLEGAL_ADDRESS") as caught:
                client.infer("add_one", **{"inputs": client.inputs({"x": X}), **use})
            assert status_of(caught.value) in ("500", "INTERNAL")
    finally:
        server.process.before_copy = lambda: None


NUMBERS = (0, 1, -1, SIZE - 1, SIZE, SIZE + 1, ROOM - SIZE, ROOM - SIZE + 1, ROOM - 1, ROOM, 2**31, 2**32, 2**62)
FAR = (2**63 - 1, 2**63, 2**63 + 1, 2**64 - SIZE, 2**64 - 1, 2**64, 2**80, -(2**63), -(2**64))


def stretches(count: int, seed: int) -> Iterator[tuple[int, int, bool]]:
    """(offset, size, whether one SIZE large fits there), also of numbers that overflow when they are added."""
    rng = random.Random(seed)
    for _ in range(count):
        offset = rng.choice(NUMBERS + FAR) if rng.random() < 0.5 else rng.randrange(ROOM)
        size = rng.choice(NUMBERS + FAR) if rng.random() < 0.4 else SIZE
        yield offset, size, size == SIZE and 0 <= offset <= ROOM - SIZE


def region(offset: int, size: int) -> dict[str, Any]:
    return {"shared_memory_region": "fuzz", "shared_memory_byte_size": size, "shared_memory_offset": offset}


class HttpAsker:
    """Infer over one HTTP connection: whether it was done, and the error. JSON has any number."""

    numbers = range(-(2**100), 2**100)

    def __init__(self, server: Running) -> None:
        self._connection = http.client.HTTPConnection(server.http, timeout=20)

    def ask(self, offset: int, size: int, where: str) -> tuple[bool, str]:
        tensor: dict[str, Any] = {"name": "x", "shape": [1, 4], "datatype": "FP32"}
        request = {"inputs": [{**tensor, "parameters": region(offset, size)}]}
        if where == "output":
            wanted = [{"name": "y", "parameters": region(offset, size)}]
            request = {"inputs": [{**tensor, "data": [4, 5, 6, 7]}], "outputs": wanted}
        self._connection.request("POST", "/v2/models/add_one/infer", json.dumps(request))
        response = self._connection.getresponse()
        body = response.read()
        assert response.status in (200, 400), body
        return response.status == 200, body.decode()

    def close(self) -> None:
        self._connection.close()


class GrpcAsker:
    """The same over gRPC, whose integers have 64 bits, with a sign or without."""

    numbers = range(-(2**63), 2**64)

    def __init__(self, server: Running) -> None:
        self._channel = grpc.insecure_channel(server.grpc)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def ask(self, offset: int, size: int, where: str) -> tuple[bool, str]:
        tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 4])
        request = pb.ModelInferRequest(model_name="add_one", inputs=[tensor])
        if where == "output":
            request.outputs.add(name="y")
            request.raw_input_contents.append(np.array([4, 5, 6, 7], np.float32).tobytes())
        parameters = (request.outputs if where == "output" else request.inputs)[0].parameters
        for key, value in region(offset, size).items():
            if isinstance(value, str):
                parameters[key].string_param = value
            elif value < 2**63:
                parameters[key].int64_param = value
            else:
                parameters[key].uint64_param = value
        answer = self._stub.ModelInfer.future(request, timeout=20)
        assert answer.code() in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT), answer
        return answer.code() == grpc.StatusCode.OK, answer.details()

    def close(self) -> None:
        self._channel.close()


@pytest.mark.parametrize("protocol", [HttpAsker, GrpcAsker])
def test_no_offset_and_size_reach_outside(server: Running, protocol: type[HttpAsker | GrpcAsker]) -> None:
    """Thousands of seeded stretches: each is used exactly as asked, or refused; the machine watches its bounds."""
    memory = server.machine.process().allocate(ROOM + 64)
    pattern = np.arange(ROOM + 64, dtype=np.uint8).tobytes()
    memory.set(pattern)
    with connected("http", server.http, set()) as client:
        register(client, "fuzz", memory.handle, 0, ROOM)
    asker = protocol(server)
    accepted = 0
    try:
        for offset, size, fits in stretches(1000, 23):
            if offset not in asker.numbers or size not in asker.numbers:
                continue
            for where in ("input", "output"):
                server.process.reads.clear()
                is_done, said = asker.ask(offset, size, where)
                may_be_larger = where == "output" and size >= SIZE and offset >= 0 and offset + size <= ROOM
                assert is_done == (fits or may_be_larger), (offset, size, where, said)
                accepted += is_done
                if where == "input":
                    assert not is_done or server.process.reads == [(offset, size)]
                    assert memory.get() == pattern
                    continue
                written = np.array([5, 6, 7, 8], np.float32).tobytes()
                expected = pattern[:offset] + written + pattern[offset + SIZE :] if is_done else pattern
                assert memory.get() == expected
                memory.set(pattern)
    finally:
        asker.close()
        with connected("http", server.http, set()) as client:
            client.unregister_cuda_shared_memory("fuzz")
    assert 300 < accepted < 1700
    assert memory.is_intact()


def test_cuda_memory_is_off_unless_allowed(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "models")
    repository.add_onnx()
    with engine_over(repository.root) as engine, listening(Api(engine, shared_memory=SharedMemory(True)), {}) as taken:
        for kind, port in (("http", taken.http_port), ("grpc", taken.grpc_port)):
            with connected(kind, f"127.0.0.1:{port}", set()) as client:
                with pytest.raises(
                    InferenceServerException, match="start the server with --allow-client-cuda-shm"
                ) as e:
                    register(client, "r", bytes(64))
                assert status_of(e.value) in ("501", "UNIMPLEMENTED")
                assert not client.as_json("get_cuda_shared_memory_status")
                assert "cuda_shared_memory" not in client.as_json("get_server_metadata")["extensions"]
                client.unregister_cuda_shared_memory("r")


PROCESSES = {"one": (), "front-ends": ("--front-end-processes", "2")}
FLAG = "--allow-client-cuda-shm"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    repository = Repository(tmp_path / "models")
    repository.add_onnx()
    return repository.root


@pytest.fixture(params=["ours", pytest.param("real", marks=pytest.mark.gpu)])
def any_driver(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What processes that start from now on find as their CUDA driver."""
    if request.param == "real":
        driver.need_gpu()
        return
    for name, value in driver.build(tmp_path).items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
@pytest.mark.parametrize("flags", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.usefixtures("any_driver")
def test_a_server_process_opens_what_another_one_has(models: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    with serving(models, tmp_path / "log", FLAG, *flags) as served, exporting() as exporter:
        for kind in LIBRARIES:
            handle = exporter.allocate(X.tobytes() + bytes(ROOM - SIZE))
            with connected(kind, getattr(served, kind.split(".")[0]), set()) as client:
                register(client, "r", handle, device=0)
                with pytest.raises(InferenceServerException, match="the handle cannot be opened on cuda:0"):
                    register(client, "other", bytes(64), device=0)
                client.infer("add_one", inputs(client, "r"), outputs=outputs(client, "r", offset=2 * SIZE))
                client.infer("add_one", inputs(client, "r", offset=2 * SIZE), outputs=outputs(client, "r", offset=SIZE))
                got = np.frombuffer(exporter.get(handle, ROOM), np.float32).reshape(4, 4)
                assert got.tolist() == [[1, 2, 3, 4], [3, 4, 5, 6], [2, 3, 4, 5], [0] * 4]
                client.unregister_cuda_shared_memory("r")
            exporter.free(handle)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("flags", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_a_client_with_nvidias_utilities(models: Path, tmp_path: Path, kind: str, flags: tuple[str, ...]) -> None:
    driver.need_gpu()
    with serving(models, tmp_path / "log", FLAG, *flags) as served:
        command = [sys.executable, "-m", "tests.devices.tritonclient_process", kind, getattr(served, kind)]
        root = Path(__file__).parents[2]
        ended = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=120)
        assert (ended.returncode, ended.stdout.strip()) == (0, "done"), ended.stderr


@pytest.mark.slow
def test_a_server_without_devices_says_what_is_missing(models: Path, tmp_path: Path) -> None:
    if driver.has_gpu():
        pytest.skip("there is one")
    with serving(models, tmp_path / "log", FLAG) as served:
        for kind in ("http", "grpc"):
            with connected(kind, getattr(served, kind), set()) as client:
                with pytest.raises(InferenceServerException) as caught:
                    register(client, "r", bytes(64), 0)
                said = str(caught.value)
                assert "cuda-bindings is missing" in said or "no NVIDIA driver" in said or "no CUDA device" in said
                assert "failed to register shared memory region 'r'" in said
                assert status_of(caught.value) in ("501", "UNIMPLEMENTED")
                assert client.is_server_ready()


def test_it_does_not_go_with_ray(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "models", "--ray", FLAG])
    assert "does not go with --ray: the gateway has no GPU" in capsys.readouterr().err
