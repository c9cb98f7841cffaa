"""Every public method of tritonclient's four clients, against each way to serve: both gRPC servers, and Ray.

The last test of each server checks that none was left out.
"""

import base64
import http.client
import json
import uuid
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException

from tests.conformance.clients import LIBRARIES, AnyClient, connected, public_methods
from tests.models import Repository, onnx_add_one
from tests.serving import Served, serving, wait_until

pytestmark = [
    pytest.mark.slow,
    # The client libraries leave sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SERVERS = {
    "native": (),
    "grpcio": ("--grpc-server", "grpcio"),
    "front-ends": ("--front-end-processes", "2"),
    "ray": ("--ray", "--cpu-replicas", "2"),
}
# Server -> client -> methods called.
CALLED: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
X = np.array([[1, 2, 3, 4]], np.float32)

COUNT = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            count = int(pb_utils.get_input_tensor_by_name(request, "x").as_numpy()[0])
            if count < 0:
                sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError("negative")))
            else:
                for n in range(count):
                    sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("y", np.array([n], np.int32))]))
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
SUMS = """
    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
    if pb_utils.get_input_tensor_by_name(request, "START").as_numpy().item():
        self.sums[request.correlation_id()] = 0
    self.sums[request.correlation_id()] += int(x.item())
    total = self.sums[request.correlation_id()]
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", np.full_like(x, total))])
"""
TELLS = """
    seen = {"parameters": json.loads(request.parameters()), "id": request.request_id(), "timeout": request.timeout()}
    text = np.array([[json.dumps(seen).encode()]], dtype=object)
    return pb_utils.InferenceResponse([pb_utils.Tensor("seen", text)], parameters={"made": 7, "by": "tells"})
"""


ENDLESS = """
import json, os, threading
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.folder = json.loads(args["model_config"])["parameters"]["folder"]["string_value"]

    def execute(self, requests):
        for request in requests:
            threading.Thread(target=self.answer, args=(request.request_id(), request.get_response_sender())).start()

    def answer(self, key, sender):
        n = 0
        while not sender.is_cancelled() and n < 3000:
            sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("y", np.array([n], np.int32))]))
            threading.Event().wait(0.01)
            n += 1
        with open(os.path.join(self.folder, key), "w") as file:
            file.write("cancelled" if sender.is_cancelled() else "never cancelled")
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


def fill(repository: Repository) -> None:
    repository.add_onnx()
    (repository.root / "add_one" / "2").mkdir()
    (repository.root / "add_one" / "2" / "model.onnx").write_bytes(onnx_add_one())
    config = repository.root / "add_one" / "config.pbtxt"
    config.write_text(config.read_text() + "version_policy { all {} }\n")
    ends = 'input { name: "x" data_type: TYPE_INT32 dims: 1 } output { name: "y" data_type: TYPE_INT32 dims: 1 }'
    policy = "model_transaction_policy { decoupled: true }"
    repository.add("count", f'backend: "python" {ends} {policy}', {"model.py": COUNT})
    folder = f'parameters {{ key: "folder" value {{ string_value: "{repository.root.parent}" }} }}'
    repository.add("endless", f'backend: "python" {ends} {policy} {folder}', {"model.py": ENDLESS})
    repository.add_python(
        "sums",
        f"""
        backend: "python" max_batch_size: 4 {ends}
        sequence_batching {{
          oldest {{ max_candidate_sequences: 4 }}
          control_input {{ name: "START" control {{ kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] }} }}
        }}
        """,
        SUMS,
        "self.sums = {}",
    )
    repository.add_python(
        "tells",
        """
        backend: "python" max_batch_size: 1
        input { name: "x" data_type: TYPE_FP32 dims: 4 }
        output { name: "seen" data_type: TYPE_STRING dims: 1 }
        """,
        TELLS,
    )


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.ray if n == "ray" else ()) for n in SERVERS])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Served]]:
    scratch = tmp_path_factory.mktemp("every")
    repository = Repository(scratch / "models")
    fill(repository)
    flags = (
        "--model-control-mode", "explicit", "--load-model", "*", "--allow-client-shm",
        "--trace-config", f"triton,file={scratch / 'trace.json'}",
        "--http-header-forward-pattern", "x-told.*", "--grpc-header-forward-pattern", "x-told.*",
    )  # fmt: skip
    with serving(repository.root, scratch / "log", *flags, *SERVERS[request.param]) as served:
        yield request.param, served


@pytest.fixture(params=LIBRARIES)
def client(request: pytest.FixtureRequest, server: tuple[str, Served]) -> Iterator[AnyClient]:
    name, served = server
    kind = request.param
    options = {"concurrency": 4} if kind == "http" else {}
    with connected(kind, getattr(served, kind.split(".")[0]), CALLED[name][kind], **options) as made:
        yield made


def y(result: Any) -> Any:
    return result.as_numpy("y").tolist()


def test_health(client: AnyClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("add_one")
    assert client.is_model_ready("add_one", "2")
    assert not client.is_model_ready("add_one", "3")
    assert not client.is_model_ready("nowhere")


def test_metadata_and_configuration(client: AnyClient) -> None:
    assert client.as_json("get_server_metadata")["name"] == "tutti"
    metadata = client.as_json("get_model_metadata", "add_one")
    assert metadata["versions"] == ["1", "2"]
    assert client.as_json("get_model_metadata", "add_one", "2")["versions"] == ["2"]
    assert [int(n) for n in metadata["inputs"][0]["shape"]] == [-1, 4]
    config = client.as_json("get_model_config", "add_one", "1")
    config = config.get("config", config)
    assert config["max_batch_size"] == 8
    with pytest.raises(InferenceServerException, match="unknown model: 'nowhere'"):
        client.get_model_metadata("nowhere")


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_infer(client: AnyClient, server: tuple[str, Served], compression: str | None) -> None:
    options: dict[str, Any] = {}
    if compression is not None and client.protocol == "http":
        options = {"request_compression_algorithm": compression, "response_compression_algorithm": compression}
    elif compression is not None:
        options = {"compression_algorithm": compression}
    if (client.protocol, compression) == ("grpc", "deflate") and server[0] != "grpcio":
        pytest.skip("the native gRPC server knows gzip only")
    result = client.ask("add_one", {"x": X}, request_id="me", outputs=[client.output("y")], **options)
    assert y(result) == (X + 1).tolist()
    response = result.get_response()
    assert (response["id"] if isinstance(response, dict) else response.id) == "me"


def test_infer_a_version(client: AnyClient) -> None:
    for version in ("1", "2"):
        response = client.ask("add_one", {"x": X}, model_version=version).get_response()
        assert (response["model_version"] if isinstance(response, dict) else response.model_version) == version
    with pytest.raises(InferenceServerException, match="'add_one' version 9 is not found"):
        client.ask("add_one", {"x": X}, model_version="9")


def test_infer_classes(client: AnyClient) -> None:
    result = client.ask("add_one", {"x": X}, outputs=[client.output("y", class_count=2)])
    assert y(result) == [[b"5.000000:3", b"4.000000:2"]]


def test_infer_parameters_both_ways_and_headers(client: AnyClient) -> None:
    headers = {"x-told-you": "so", "x-other": "no"}
    result = client.ask(
        "tells", {"x": X}, parameters={"a": 1, "b": "two", "c": True}, timeout=123_000_000, headers=headers
    )
    seen = json.loads(result.as_numpy("seen").item())
    assert seen["parameters"] == {"a": 1, "b": "two", "c": True, "x-told-you": "so"}
    assert seen["timeout"] == 123_000_000
    response = result.get_response()
    if isinstance(response, dict):
        made = response["parameters"]
        assert (made["made"], made["by"]) == (7, "tells")
    else:
        assert response.parameters["made"].int64_param == 7
        assert response.parameters["by"].string_param == "tells"


def test_infer_with_priority_and_client_timeout(client: AnyClient) -> None:
    options = {"client_timeout": 20.0} if client.protocol == "grpc" else {}
    assert y(client.ask("add_one", {"x": X}, priority=2, **options)) == (X + 1).tolist()


@pytest.mark.parametrize("key", [0, "text"])
def test_infer_a_sequence(client: AnyClient, key: int | str) -> None:
    sequence: Any = f"{uuid.uuid4()}" if key else uuid.uuid4().int >> 66
    total = 0
    for n in (5, 6, 7):
        total += n
        arrays = {"x": np.array([[n]], np.int32)}
        result = client.ask("sums", arrays, sequence_id=sequence, sequence_start=n == 5, sequence_end=n == 7)
        assert y(result) == [[total]]
    with pytest.raises(InferenceServerException, match="START flag"):
        client.ask("sums", {"x": np.ones((1, 1), np.int32)}, sequence_id=sequence)


def test_async_infer(client: AnyClient) -> None:
    if client.kind == "http":
        waiting = [client.async_infer("add_one", client.inputs({"x": X * n})) for n in range(8)]
        assert [y(one.get_result()) for one in waiting] == [(X * n + 1).tolist() for n in range(8)]
    elif client.kind == "grpc":
        results: list[Any] = []

        def keep(result: Any, error: Any) -> None:
            results.append((result, error))

        for n in range(8):
            client.async_infer("add_one", client.inputs({"x": X * n}), keep)
        wait_until(lambda: len(results) == 8)
        assert sorted(y(result)[0][0] for result, error in results if error is None) == [n + 1.0 for n in range(8)]
    else:
        pytest.skip("asyncio's clients have infer alone")


def final(result: Any) -> bool:
    return bool(result.get_response().parameters["triton_final_response"].bool_param)


def test_streams(client: AnyClient) -> None:
    if client.protocol == "http":
        pytest.skip("streams are gRPC's")
    arrays = {"x": np.array([3], np.int32)}
    answers = client.stream("count", [{"arrays": arrays, "request_id": "a"}])
    assert [(y(result), final(result), error) for result, error in answers] == [([n], False, None) for n in range(3)]
    if client.kind == "grpc":  # the other has no argument for it
        answers = client.stream("count", [{"arrays": arrays, "request_id": "b", "enable_empty_final_response": True}])
        assert [final(result) for result, _ in answers] == [False, False, False, True]
        assert answers[-1][0].get_response().id == "b"
        assert not answers[-1][0].get_response().outputs
    ((result, error),) = client.stream("count", [{"arrays": {"x": np.array([-1], np.int32)}, "request_id": "c"}])
    assert result is None
    assert "negative" in str(error)


def test_a_stream_carries_requests_to_plain_models(client: AnyClient) -> None:
    if client.protocol == "http":
        pytest.skip("streams are gRPC's")
    answers = client.stream("add_one", [{"arrays": {"x": X * n}, "request_id": str(n)} for n in range(20)])
    assert {result.get_response().id: y(result) for result, _ in answers} == {
        str(n): (X * n + 1).tolist() for n in range(20)
    }
    assert all(final(result) for result, _ in answers)


def test_a_stream_carries_sequences(client: AnyClient) -> None:
    if client.protocol == "http":
        pytest.skip("streams are gRPC's")
    key = uuid.uuid4().int >> 66
    requests = []
    for n in range(1, 7):
        ends = {"sequence_start": n == 1, "sequence_end": n == 6}
        requests.append({"arrays": {"x": np.array([[n]], np.int32)}, "sequence_id": key, **ends})
    assert [y(result) for result, _ in client.stream("sums", requests)] == [[[n * (n + 1) // 2]] for n in range(1, 7)]


def scratch_of(client: AnyClient) -> Path:
    config = client.as_json("get_model_config", "endless")
    return Path(config.get("config", config)["parameters"]["folder"]["string_value"])


def test_a_client_that_leaves_a_stream_stops_the_model(client: AnyClient) -> None:
    key = f"left-{uuid.uuid4().hex}"
    marker = scratch_of(client) / key
    if client.kind == "grpc":
        answers: list[Any] = []
        client.start_stream(lambda result, error: answers.append(result))
        client.async_stream_infer("endless", client.inputs({"x": np.zeros(1, np.int32)}), request_id=key)
        wait_until(lambda: len(answers) >= 3)
        client.stop_stream(cancel_requests=True)
    elif client.kind == "http":
        connection = http.client.HTTPConnection(client.url, timeout=20)
        body = json.dumps({"x": 0, "id": key})
        connection.request("POST", "/v2/models/endless/generate_stream", body)
        response = connection.getresponse()
        assert response.read(60).startswith(b"data: ")
        connection.close()
        response.close()
    else:
        pytest.skip("as the blocking clients")
    wait_until(marker.exists)
    wait_until(lambda: marker.read_text() == "cancelled")


def test_a_decoupled_model_answers_no_plain_infer(client: AnyClient) -> None:
    with pytest.raises(InferenceServerException, match="decoupled"):
        client.ask("count", {"x": np.array([1], np.int32)})


def test_statistics(client: AnyClient) -> None:
    def successes() -> int:
        (stats,) = client.as_json("get_inference_statistics", "add_one", "2")["model_stats"]
        return int(stats["inference_stats"]["success"].get("count", 0))

    before = successes()
    client.ask("add_one", {"x": X})
    assert successes() == before + 1
    every = client.as_json("get_inference_statistics")["model_stats"]
    assert {stats["name"] for stats in every} == {"add_one", "count", "endless", "sums", "tells"}
    (stats,) = [one for one in every if (one["name"], one["version"]) == ("add_one", "2")]
    assert sum(int(one["compute_infer"]["count"]) for one in stats["batch_stats"]) >= 1


def index(client: AnyClient) -> dict[tuple[str, str], str]:
    entries = client.as_json("get_model_repository_index")
    entries = entries.get("models", []) if isinstance(entries, dict) else entries
    return {(entry["name"], entry.get("version", "")): entry.get("state", "") for entry in entries}


def test_repository_control(client: AnyClient) -> None:
    client.unload_model("add_one")
    assert not client.is_model_ready("add_one")
    assert index(client)["add_one", "2"] == "UNAVAILABLE"
    with pytest.raises(InferenceServerException, match="no available versions"):
        client.ask("add_one", {"x": X})
    client.load_model("add_one")
    assert index(client)["add_one", "2"] == "READY"
    for _ in range(6):  # whichever replica answers
        assert y(client.ask("add_one", {"x": X})) == (X + 1).tolist()
    with pytest.raises(
        InferenceServerException, match="failed to load 'nowhere', failed to poll from model repository"
    ):
        client.load_model("nowhere")


def test_load_with_configuration_and_files(client: AnyClient) -> None:
    config = {
        "backend": "onnxruntime",
        "max_batch_size": 2,
        "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [4]}],
        "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [4]}],
    }
    client.load_model("sent", config=json.dumps(config), files={"file:5/model.onnx": onnx_add_one()})
    assert index(client)["sent", "5"] == "READY"
    for _ in range(6):
        assert y(client.ask("sent", {"x": X})) == (X + 1).tolist()
    with pytest.raises(InferenceServerException, match="batch-size must be <= 2"):
        client.ask("sent", {"x": np.repeat(X, 3, axis=0)})
    for files in ({"file:../1/model.onnx": b"x"}, {"file:1/../../x": b"x"}):
        with pytest.raises(InferenceServerException, match="VERSION/FILE"):
            client.load_model("sent", config=json.dumps(config), files=files)
    assert client.is_model_ready("sent")
    client.unload_model("sent")
    assert not client.is_model_ready("sent")


def test_trace_settings(client: AnyClient) -> None:
    def values(settings: Any) -> dict[str, Any]:
        settings = settings.get("settings", settings)
        return {key: value["value"] if isinstance(value, dict) else value for key, value in settings.items()}

    assert values(client.as_json("get_trace_settings"))["trace_level"] == ["OFF"]
    changed = values(
        client.as_json("update_trace_settings", "add_one", {"trace_level": ["TIMESTAMPS"], "trace_rate": "1"})
    )
    assert changed["trace_level"] == ["TIMESTAMPS"]
    client.ask("add_one", {"x": X}, request_id=f"traced-{client.kind}")
    values(client.as_json("update_trace_settings", "add_one", {"trace_level": None, "trace_rate": None}))
    traced = values(client.as_json("get_trace_settings", "add_one"))
    assert traced["trace_level"] == ["OFF"]
    file = traced["trace_file"]
    entries = json.loads(Path(file if isinstance(file, str) else file[0]).read_text())
    (mine,) = [e["id"] for e in entries if e.get("request_id") == f"traced-{client.kind}"]
    (times,) = [e["timestamps"] for e in entries if e["id"] == mine and "timestamps" in e]
    names = [time["name"] for time in times if not time["name"].startswith(("HTTP_", "GRPC_", "INFER_"))]
    assert names[0] == "REQUEST_START"
    assert names[-1] == "REQUEST_END"
    assert {"QUEUE_START", "COMPUTE_START", "COMPUTE_END"} <= set(names)
    with pytest.raises(InferenceServerException, match="can not be updated"):
        client.update_trace_settings(settings={"trace_file": "/tmp/elsewhere"})


def test_log_settings(client: AnyClient) -> None:
    def verbose(settings: Any) -> int:
        value = settings.get("settings", settings)["log_verbose_level"]
        return int(value.get("uint32_param", 0) if isinstance(value, dict) else value)

    assert verbose(client.as_json("update_log_settings", {"log_verbose_level": 1})) == 1
    assert verbose(client.as_json("get_log_settings")) == 1
    assert verbose(client.as_json("update_log_settings", {"log_verbose_level": 0})) == 0
    with pytest.raises(InferenceServerException, match="can not be updated"):
        client.update_log_settings({"log_file": "/tmp/elsewhere"})


def test_system_shared_memory(client: AnyClient) -> None:
    name = f"tutti_{uuid.uuid4().hex[:12]}"
    size = X.nbytes
    region = shm.create_shared_memory_region(name, f"/{name}", 2 * size)
    try:
        shm.set_shared_memory_region(region, [X])
        client.register_system_shared_memory(name, f"/{name}", 2 * size)
        with pytest.raises(InferenceServerException, match="already in manager"):
            client.register_system_shared_memory(name, f"/{name}", 2 * size)
        status = client.as_json("get_system_shared_memory_status")
        assert name in json.dumps(status)
        (sent,) = client.inputs({"x": X})
        sent.set_shared_memory(name, size)
        wanted = client.output("y")
        wanted.set_shared_memory(name, size, offset=size)
        result = client.infer("add_one", [sent], outputs=[wanted])
        assert result.get_output("y") is not None
        got = shm.get_contents_as_numpy(region, np.float32, [1, 4], offset=size)
        assert got.tolist() == (X + 1).tolist()
        wanted.set_shared_memory(name, size - 1, offset=size)
        with pytest.raises(InferenceServerException, match="should be at least 16 bytes"):
            client.infer("add_one", [sent], outputs=[wanted])
        sent.set_shared_memory(name, size, offset=size + 1)
        with pytest.raises(InferenceServerException, match="Invalid offset"):
            client.infer("add_one", [sent])
        client.unregister_system_shared_memory(name)
        sent.set_shared_memory(name, size)
        with pytest.raises(InferenceServerException, match="Unable to find"):
            client.infer("add_one", [sent])
        client.unregister_system_shared_memory()
    finally:
        shm.destroy_shared_memory_region(region)


def test_cuda_shared_memory_is_off_by_default(client: AnyClient) -> None:
    assert not client.as_json("get_cuda_shared_memory_status")
    with pytest.raises(InferenceServerException, match="CUDA shared memory is off"):
        client.register_cuda_shared_memory("c", base64.b64encode(bytes(64)), 0, 16)
    client.unregister_cuda_shared_memory("c")
    client.unregister_cuda_shared_memory()


def test_what_only_concerns_the_client(client: AnyClient) -> None:
    from tritonclient._plugin import InferenceServerClientPlugin

    class Plugin(InferenceServerClientPlugin):
        def __call__(self, request: Any) -> None:
            request.headers["x-told-by"] = "plugin"

    client.register_plugin(Plugin())
    assert client.plugin() is not None
    seen = json.loads(client.ask("tells", {"x": X}).as_numpy("seen").item())
    assert seen["parameters"] == {"x-told-by": "plugin"}
    client.unregister_plugin()


def test_bodies_made_and_read_by_hand(client: AnyClient) -> None:
    if client.protocol == "grpc":
        pytest.skip("bodies are HTTP's")
    body, length = client.generate_request_body(client.inputs({"x": X}))
    connection = http.client.HTTPConnection(client.url, timeout=20)
    connection.request("POST", "/v2/models/add_one/infer", body, {"Inference-Header-Content-Length": str(length)})
    response = connection.getresponse()
    header_length = response.getheader("Inference-Header-Content-Length")
    content = response.read()
    connection.close()
    parsed = client.parse_response_body(content, header_length=int(header_length) if header_length else None)
    assert y(parsed) == (X + 1).tolist()


def test_every_method_was_called(server: tuple[str, Served]) -> None:
    name, _ = server
    for kind in LIBRARIES:
        assert public_methods(kind) - CALLED[name][kind] == set(), (name, kind)
