"""A device fails, a model crashes its process, a process is killed: clients keep their connections and get answers."""

import json
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException

from tests.models import IN_PROCESS, Repository
from tests.serving import Served, serving, wait_until
from tutti.app.restarts import UNUSABLE
from tutti.devices.simulated import SIMULATED

REASON = "test: device-side assert"
FOUR = 'input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 4 }'
# What a request's first value asks for.
GOOD, FAILS, IS_KILLED, CRASHES, FAILS_AND_HANGS, SLOW = 0.0, 1.0, 2.0, 3.0, 4.0, 5.0
# The instance says that it lives on a device.
ON_GPU = "import sys\nsys._getframe(1).f_locals['self'].device = 'cuda:0'"
FRAGILE = f"""
    import ctypes, os, signal, time
    from tutti.devices.health import health
    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
    what = x[0, 0]
    if what == {IS_KILLED}:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == {CRASHES}:
        ctypes.string_at(0)
    if what in ({FAILS}, {FAILS_AND_HANGS}):
        health.fail("cuda:0", "{REASON}")
    if what == {FAILS_AND_HANGS}:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        ctypes.PyDLL(None).sleep(3600)  # as a driver's call that never returns, and keeps the interpreter's lock
    if what in ({FAILS}, {SLOW}):
        time.sleep(0.5)
    if what == {FAILS}:
        raise pb_utils.TritonModelException("the device has failed")
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", x + 1)])
"""
HANGS = f"""
    import threading
    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
    if x[0, 0] != {GOOD}:
        threading.Event().wait()
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", x + 1)])
"""
ON_GPU_FOR_1_S = """
    instance_group { kind: KIND_GPU count: 2 }
    parameters { key: "tutti.hang_timeout_s" value { string_value: "1" } }
"""
STREAM = """
    import threading
    sender = request.get_response_sender()
    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()

    def answer():
        sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("y", x)]))
        threading.Event().wait(3600)
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    threading.Thread(target=answer, daemon=True).start()
"""


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    made = Repository(tmp_path / "repository")
    made.add_onnx()
    # What they do is to befall the process that has all models.
    made.add_python("fragile", f'backend: "python" max_batch_size: 1 {FOUR} {IN_PROCESS}', FRAGILE, ON_GPU)
    decoupled = "model_transaction_policy { decoupled: true }"
    made.add_python("streams", f'backend: "python" {FOUR} {decoupled} {IN_PROCESS}', STREAM)
    source = made.root / "streams/1/model.py"
    source.write_text(
        source.read_text().replace(
            "return [self.answer(request) for request in requests]", "[self.answer(request) for request in requests]"
        )
    )
    return made


def commands(part: str, parent: int = 0) -> dict[int, str]:
    """The command lines, by pid, of the living processes (children of `parent`) that have `part` in theirs."""
    lines = {}
    for process in psutil.process_iter():
        try:
            if part in (line := " ".join(process.cmdline())) and parent in (0, process.ppid()):
                lines[process.pid] = line
        except psutil.Error:
            continue
    return lines


@dataclass
class Server:
    """A server's processes; `log` is what they say."""

    served: Served
    log: Path

    def engine(self) -> int:
        """The pid of the engine's process, 0 while there is none."""
        return next(iter(commands("--engine-of", self.served.process.pid)), 0)

    def workers(self) -> list[int]:
        return list(commands("tutti.frontends.processes.worker", self.served.process.pid))

    def is_ready(self) -> bool:
        return self._says("ready")

    def is_live(self) -> bool:
        return self._says("live")

    def _says(self, what: str) -> bool:
        connection = HTTPConnection(self.served.http, timeout=10)
        try:
            connection.request("GET", f"/v2/health/{what}")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()


@contextmanager
def running(repository: Repository, tmp_path: Path, *flags: str) -> Iterator[Server]:
    log = tmp_path / "log"
    with serving(repository.root, log, *(flags or ("--supervise",))) as served:
        server = Server(served, log)
        assert server.engine() and server.workers()
        (task,) = {
            Path(line.split()[-2]) for line in commands("tutti.frontends.processes.worker", served.process.pid).values()
        }
        yield server
    # The engines' command lines have the repository's path, all the others' that of the sockets.
    wait_until(lambda: not commands(str(repository.root)) and not commands(str(task.parent)), timeout_s=10)
    assert not task.parent.exists()


def body(value: float) -> bytes:
    data = [value, 0.0, 0.0, 0.0]
    return json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": data}]}).encode()


class Client(threading.Thread):
    """Asks a good model again and again over one connection, and counts the answers. A broken one is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: Counter[str] = Counter()
        self.texts: set[str] = set()
        self.error: BaseException | None = None
        self.asked = 0
        self._stop_asking = threading.Event()

    def run(self) -> None:
        try:
            while not self._stop_asking.wait(0.002):
                self.asked += 1
                kind, text = self.ask()
                self.answers[kind] += 1
                if text:
                    self.texts.add(text)
        except BaseException as error:
            self.error = error

    def ask(self) -> tuple[str, str]:
        raise NotImplementedError

    def end(self) -> None:
        self._stop_asking.set()
        self.join(30)
        assert self.error is None, repr(self.error)
        assert set(self.answers) <= {"ok", "unavailable"}, self.answers
        assert sum(self.answers.values()) == self.asked


class HttpClient(Client):
    """One socket, which is never opened anew."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._connection = HTTPConnection(address, timeout=30)
        self._connection.connect()
        self._connection.auto_open = 0

    def ask(self) -> tuple[str, str]:
        self._connection.request("POST", "/v2/models/add_one/infer", body(GOOD))
        response = self._connection.getresponse()
        text = response.read().decode()
        assert response.getheader("connection") is None
        if response.status == 503:
            assert response.getheader("retry-after") == "1"
            return "unavailable", text
        assert response.status == 200, text
        assert json.loads(text)["outputs"][0]["data"] == [1.0] * 4
        # Routes that the engine answers leave the connection open, too; this one is answered without it.
        self._connection.request("GET", "/v2/health/live")
        live = self._connection.getresponse()
        live.read()
        assert live.status == 200
        return "ok", ""

    def end(self) -> None:
        super().end()
        self._connection.close()


class GrpcClient(Client):
    """One channel, which must not reconnect: its state is watched."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.channel = grpc.insecure_channel(address)
        grpc.channel_ready_future(self.channel).result(10)
        self.states: list[grpc.ChannelConnectivity] = []
        self.channel.subscribe(self.states.append)
        service = "/inference.GRPCInferenceService/"
        self._infer = self.channel.unary_unary(service + "ModelInfer")
        self._live = self.channel.unary_unary(service + "ServerLive")
        tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 4])
        message = pb.ModelInferRequest(model_name="add_one", inputs=[tensor], raw_input_contents=[bytes(16)])
        self._message = message.SerializeToString()

    def ask(self) -> tuple[str, str]:
        assert pb.ServerLiveResponse.FromString(self._live(b"", timeout=30)).live
        try:
            response = pb.ModelInferResponse.FromString(self._infer(self._message, timeout=30))
        except grpc.RpcError as error:
            return error.code().name.lower(), str(error.details())
        assert np.frombuffer(response.raw_output_contents[0], np.float32).tolist() == [1.0] * 4
        return "ok", ""

    def end(self) -> None:
        super().end()
        assert set(self.states) <= {grpc.ChannelConnectivity.READY}, "the channel has lost its connection"
        self.channel.close()


@contextmanager
def clients(server: Server) -> Iterator[list[Client]]:
    """Clients of both protocols at work, each over one connection for all the time."""
    made: list[Client] = [HttpClient(server.served.http), GrpcClient(server.served.grpc)]
    for client in made:
        client.start()
    try:
        wait_until(lambda: all(client.answers["ok"] > 5 for client in made))
        yield made
        for client in made:
            before = client.answers["ok"]
            wait_until(lambda client=client, before=before: client.error or client.answers["ok"] > before + 5)
    finally:
        for client in made:
            client.end()


def ask_fragile(server: Server, what: float) -> tuple[int, str]:
    """The answer to whoever asks for trouble."""
    connection = HTTPConnection(server.served.http, timeout=60)
    connection.request("POST", "/v2/models/fragile/infer", body(what))
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def inferences(server: Server) -> int:
    with httpclient.InferenceServerClient(server.served.http) as client:
        return int(client.get_inference_statistics("fragile")["model_stats"][0]["inference_count"])


def wait_for_another(server: Server, engine: int) -> int:
    wait_until(lambda: server.engine() not in (0, engine), timeout_s=60)
    wait_until(server.is_ready, timeout_s=60)
    return server.engine()


TROUBLE = {
    "device": (FAILS, f"device cuda:0 has failed: {REASON}"),
    "hang": (FAILS_AND_HANGS, f"device cuda:0 has failed: {REASON}"),
    "killed": (IS_KILLED, "it was killed by SIGKILL"),
    "crash": (CRASHES, "it was killed by SIGSEGV"),
}


@pytest.mark.parametrize("kind", TROUBLE)
def test_clients_keep_their_connections_while_the_engine_is_replaced(
    repository: Repository, tmp_path: Path, kind: str
) -> None:
    what, reason = TROUBLE[kind]
    with running(repository, tmp_path) as server:
        assert ask_fragile(server, GOOD)[0] == 200
        assert inferences(server) == 1
        before, workers = server.engine(), server.workers()
        with clients(server) as asking:
            with ThreadPoolExecutor(1) as pool:
                troubled = pool.submit(ask_fragile, server, what)
                wait_until(lambda: not server.is_ready())
                is_there = server.engine() == before
                status, text = troubled.result(60)
            assert status in (500, 503), text
            assert is_there or kind != "hang", "clients are told though the engine answers no more"
            after = wait_for_another(server, before)
        assert after != before
        assert server.workers() == workers
        for client in asking:
            assert client.answers["unavailable"], "there is a time without an engine"
            assert any(reason in text for text in client.texts), client.texts
        assert ask_fragile(server, GOOD)[0] == 200
        assert inferences(server) == 1, "statistics start anew"
        assert f"has ended: {reason}; it is started anew" in server.log.read_text()


def test_an_engine_that_hangs_for_no_known_reason_is_not_said_to_live(repository: Repository, tmp_path: Path) -> None:
    with running(repository, tmp_path) as server:
        before = server.engine()
        os.kill(before, signal.SIGSTOP)
        assert not server.is_live()
        assert not server.is_ready()
        os.kill(before, signal.SIGCONT)
        wait_until(server.is_ready)
        assert server.is_live()
        assert server.engine() == before


class Caller(threading.Thread):
    """Asks a model whose execution never ends, and keeps the answer: ok, or what it was refused with."""

    def __init__(self, served: Served, is_http: bool) -> None:
        super().__init__()
        self.kind, self.text = "", ""
        self._served = served
        self._is_http = is_http

    def run(self) -> None:
        self.kind, self.text = self._ask_http() if self._is_http else self._ask_grpc()

    def _ask_http(self) -> tuple[str, str]:
        connection = HTTPConnection(self._served.http, timeout=60)
        connection.request("POST", "/v2/models/hangs/infer", body(FAILS))
        response = connection.getresponse()
        answer = str(response.status), response.read().decode()
        connection.close()
        return answer

    def _ask_grpc(self) -> tuple[str, str]:
        tensor = grpcclient.InferInput("x", [1, 4], "FP32")
        tensor.set_data_from_numpy(np.full((1, 4), FAILS, np.float32))
        with grpcclient.InferenceServerClient(self._served.grpc) as client:
            try:
                client.infer("hangs", [tensor])
            except InferenceServerException as error:
                return str(error.status()), str(error.message())
        return "ok", ""

    def check(self) -> None:
        self.join(60)
        assert self.kind == ("503" if self._is_http else "StatusCode.UNAVAILABLE"), (self.kind, self.text)
        assert "device cuda:0 has failed: an execution of 'hangs' has not ended after" in self.text


@pytest.fixture
def hanging(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> Repository:
    monkeypatch.setenv(SIMULATED, "1")
    repository.add_python("hangs", f'backend: "python" max_batch_size: 1 {FOUR} {ON_GPU_FOR_1_S}', HANGS)
    return repository


def test_callers_of_what_hangs_are_answered_and_all_others_keep_their_connections(
    hanging: Repository, tmp_path: Path
) -> None:
    with running(hanging, tmp_path) as server:
        before = server.engine()
        with clients(server) as asking:
            # Two are inside, the others wait in the queue.
            callers = [Caller(server.served, is_http) for is_http in (True, False, True, False)]
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.check()
            wait_for_another(server, before)
        for client in asking:
            assert any("an execution of 'hangs' has not ended" in text for text in client.texts), client.texts


@pytest.mark.parametrize("flags", [(), ("--grpc-server", "grpcio")])
def test_callers_of_what_hangs_in_one_process_are_answered_before_it_ends(
    hanging: Repository, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    with serving(hanging.root, tmp_path / "log", "--front-end-processes", "1", *flags) as served:
        callers = [Caller(served, is_http) for is_http in (True, False, True, False)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.check()
        assert served.process.wait(30) == 75


def test_a_failed_device_is_told_at_once_while_the_process_still_lives(repository: Repository, tmp_path: Path) -> None:
    with running(repository, tmp_path) as server:
        before = server.engine()
        held = threading.Thread(target=ask_fragile, args=(server, FAILS))
        held.start()
        with grpcclient.InferenceServerClient(server.served.grpc) as client:
            wait_until(lambda: not client.is_server_ready())
            assert client.is_server_live()
            assert not client.is_model_ready("fragile")
            tensor = grpcclient.InferInput("x", [1, 4], "FP32")
            tensor.set_data_from_numpy(np.zeros((1, 4), np.float32))
            with pytest.raises(InferenceServerException, match=f"cuda:0 has failed: {REASON}") as refused:
                client.infer("fragile", [tensor])
            assert refused.value.status() == "StatusCode.UNAVAILABLE"
        held.join()
        wait_for_another(server, before)


def test_without_an_engine_all_routes_are_answered(repository: Repository, tmp_path: Path) -> None:
    """A model that cannot be loaded any more keeps the engine away."""
    with running(repository, tmp_path) as server:
        connection = HTTPConnection(server.served.http, timeout=30)
        connection.connect()
        connection.auto_open = 0
        channel = grpc.insecure_channel(server.served.grpc)
        grpc.channel_ready_future(channel).result(10)

        def ask(method: str, path: str, content: bytes | None = None) -> tuple[int, str]:
            connection.request(method, path, content)
            response = connection.getresponse()
            return response.status, response.read().decode()

        assert ask("GET", "/v2")[0] == 200
        (repository.root / "add_one/config.pbtxt").rename(repository.root / "kept")
        (repository.root / "add_one/config.pbtxt").write_text("nonsense")
        os.kill(server.engine(), signal.SIGKILL)
        wait_until(lambda: "it ended with status 2; it is started anew in 2 s" in server.log.read_text())
        assert ask("GET", "/v2/health/live") == (200, "")
        assert ask("GET", "/v2/health/ready") == (400, "")
        status, text = ask("GET", "/v2/models/add_one/ready")
        assert status == 400 and "model 'add_one' is not ready" in text
        for method, path in (
            ("GET", "/v2"), ("GET", "/v2/models/add_one/stats"), ("POST", "/v2/models/add_one/infer"),
            ("POST", "/v2/models/add_one/generate_stream"), ("GET", "/nowhere"),
        ):  # fmt: skip
            status, text = ask(method, path, b"{}" if method == "POST" else None)
            assert status in (400, 503), (path, text)
        status, text = ask("POST", "/v2/models/add_one/infer", body(GOOD))
        assert status == 503
        assert "the engine's process has ended (it ended with status 2); it is started anew" in text
        assert ask("HEAD", "/v2") == (503, "")
        stub = channel.unary_unary("/inference.GRPCInferenceService/ServerMetadata")
        with pytest.raises(grpc.RpcError) as refused:
            stub(b"", timeout=30)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "it is started anew" in refused.value.details()
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        with pytest.raises(grpc.RpcError) as refused:
            list(stream(iter([b""]), timeout=30))
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "it is started anew" in refused.value.details()
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert check(b"", timeout=30) == b"\x08\x02"
        (victim,) = server.workers()
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: server.is_live() and server.workers() != [victim])
        assert not server.is_ready()
        connection.close()
        connection.connect()
        (repository.root / "kept").rename(repository.root / "add_one/config.pbtxt")
        wait_until(server.is_ready, timeout_s=60)
        assert ask("POST", "/v2/models/add_one/infer", body(GOOD))[0] == 200
        assert stub(b"", timeout=30)
        channel.close()
        connection.close()


@pytest.mark.parametrize("what", [FAILS, IS_KILLED])
def test_streams_end_with_an_error_and_their_connections_stay(
    repository: Repository, tmp_path: Path, what: float
) -> None:
    with running(repository, tmp_path) as server:
        before = server.engine()
        connection = HTTPConnection(server.served.http, timeout=30)
        connection.connect()
        connection.auto_open = 0
        connection.request("POST", "/v2/models/streams/generate_stream", b'{"x": [1, 2, 3, 4]}')
        events = connection.getresponse()
        assert events.status == 200, events.read()
        assert events.readline().startswith(b"data: {")
        channel = grpc.insecure_channel(server.served.grpc)
        tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[4])
        message = pb.ModelInferRequest(model_name="streams", inputs=[tensor], raw_input_contents=[bytes(16)])
        is_over = threading.Event()

        def requests() -> Iterator[bytes]:
            yield message.SerializeToString()
            is_over.wait(60)

        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(requests())
        assert next(stream)
        ask_fragile(server, what)
        assert b"the engine's process has ended" in events.read()
        with pytest.raises(grpc.RpcError) as ended:
            next(stream)
        is_over.set()
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        if what == FAILS:
            assert f"cuda:0 has failed: {REASON}" in ended.value.details()
        wait_for_another(server, before)
        connection.request("GET", "/v2/health/ready")
        response = connection.getresponse()
        response.read()
        assert response.status == 200
        again = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(iter([b""]))
        assert next(again), "an answer to a request that does not parse: the engine reads it"
        channel.close()
        connection.close()


def test_a_front_end_that_is_killed_is_started_anew(repository: Repository, tmp_path: Path) -> None:
    with running(repository, tmp_path) as server:
        (victim,) = server.workers()
        before = server.engine()
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: server.workers() not in ([], [victim]))
        wait_until(server.is_ready)
        assert ask_fragile(server, GOOD)[0] == 200
        assert server.engine() == before


@pytest.mark.parametrize("moment", ["ready", "restarting", "waiting", "hanging"])
def test_sigterm_ends_all_processes_at_any_time(repository: Repository, tmp_path: Path, moment: str) -> None:
    with running(repository, tmp_path, "--front-end-processes", "2") as server:
        before = server.engine()
        if moment == "hanging":
            asking = HTTPConnection(server.served.http)
            asking.request("POST", "/v2/models/fragile/infer", body(FAILS_AND_HANGS))
            wait_until(lambda: REASON in server.log.read_text())
        elif moment != "ready":
            os.kill(before, signal.SIGKILL)
            wait_until(lambda: "it is started anew" in server.log.read_text())
            if moment == "restarting":
                wait_until(lambda: server.engine() not in (0, before))
        server.served.process.send_signal(signal.SIGTERM)
        assert server.served.process.wait(30) == 0
        if moment == "hanging":
            asking.close()


def test_with_the_supervisor_they_end(repository: Repository, tmp_path: Path) -> None:
    with running(repository, tmp_path) as server:
        family = [psutil.Process(pid) for pid in (server.engine(), *server.workers())]
        os.kill(server.served.process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive


def test_a_server_in_one_process_ends_with_its_device(repository: Repository, tmp_path: Path) -> None:
    with serving(repository.root, tmp_path / "log", "--front-end-processes", "1") as served:
        assert not psutil.Process(served.process.pid).children()
        status, text = ask_fragile(Server(served, tmp_path / "log"), FAILS)
        assert status == 500 and "the device has failed" in text, "who was inside is answered"
        assert served.process.wait(30) == 75


def test_a_start_that_fails_ends_the_server(repository: Repository, tmp_path: Path) -> None:
    (repository.root / "add_one/config.pbtxt").write_text("nonsense")
    start = time.monotonic()
    with (
        pytest.raises(RuntimeError, match=r"exit status 2") as failed,
        serving(repository.root, tmp_path / "log", "--supervise"),
    ):
        pass
    assert "1 models could not be loaded" in str(failed.value)
    assert time.monotonic() - start < 60


def test_ports_in_use_are_told(repository: Repository, tmp_path: Path) -> None:
    with running(repository, tmp_path) as server:
        port = server.served.http.split(":")[1]
        command = [*server.served.process.args[:3], "serve", str(repository.root), "--supervise", "--http-port", port]  # type: ignore[index]
        second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert second.returncode == UNUSABLE
        assert "cannot listen" in second.stderr
