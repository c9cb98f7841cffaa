"""Who may call what: restricted APIs, API keys and TLS, on every route and method; traces to OpenTelemetry; polling."""

import http.server
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
import trustme
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException

from tests.models import Repository
from tests.serving import serving, wait_until
from tutti.app.cli import main
from tutti.app.restarts import UNUSABLE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SERVICE = "/inference.GRPCInferenceService/"
X = np.array([[1, 2, 3, 4]], np.float32)
GOOD = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}).encode()
ROUTES = {
    "health": [
        ("GET", "/v2/health/live"), ("GET", "/v2/health/ready"), ("GET", "/-/healthz"),
        ("GET", "/v2/models/add_one/ready"),
    ],
    "metadata": [("GET", "/v2"), ("GET", "/v2/models/add_one"), ("GET", "/v2/models/add_one/versions/1")],
    "inference": [
        ("POST", "/v2/models/add_one/infer"), ("POST", "/v2/models/add_one/versions/1/infer"),
        ("POST", "/v2/models/add_one/infer?a=b"), ("POST", "/v2/models/%61dd_one/infer"),
        ("GET", "/v2/models/add_one/infer"), ("POST", "/v2/models/add_one/generate"),
        ("POST", "/v2/models/add_one/generate_stream"),
    ],
    "shared-memory": [
        ("GET", "/v2/systemsharedmemory/status"), ("POST", "/v2/systemsharedmemory/region/a/register"),
        ("POST", "/v2/systemsharedmemory/unregister"), ("GET", "/v2/cudasharedmemory/status"),
        ("POST", "/v2/cudasharedmemory/region/a/register"),
    ],
    "model-config": [("GET", "/v2/models/add_one/config"), ("GET", "/v2/models/add_one/versions/1/config")],
    "model-repository": [
        ("POST", "/v2/repository/index"), ("POST", "/v2/repository/models/add_one/load"),
        ("POST", "/v2/repository/models/add_one/unload"),
    ],
    "statistics": [("GET", "/v2/models/stats"), ("GET", "/v2/models/add_one/stats")],
    "trace": [("GET", "/v2/trace/setting"), ("POST", "/v2/trace/setting"), ("GET", "/v2/models/add_one/trace/setting")],
    "logging": [("GET", "/v2/logging"), ("POST", "/v2/logging")],
}  # fmt: skip
METHODS = {
    "health": ["ServerLive", "ServerReady", "ModelReady", "/grpc.health.v1.Health/Check"],
    "metadata": ["ServerMetadata", "ModelMetadata"],
    "inference": ["ModelInfer"],
    "shared-memory": [
        f"{kind}SharedMemory{what}" for kind in ("System", "Cuda") for what in ("Status", "Register", "Unregister")
    ],
    "model-config": ["ModelConfig"],
    "model-repository": ["RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"],
    "statistics": ["ModelStatistics"],
    "trace": ["TraceSetting"],
    "logging": ["LogSettings"],
}


def test_the_tables_know_every_method() -> None:
    known = {name for names in METHODS.values() for name in names if not name.startswith("/")} | {"ModelStreamInfer"}
    assert known == {method.name for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods}


@pytest.fixture(params=["native", "grpcio"])
def grpc_server(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def small(tmp_path: Path) -> Repository:
    repository = Repository(tmp_path / "models")
    repository.add_onnx()
    return repository


def ask(address: str, method: str, path: str, **headers: str) -> int:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    body = GOOD if method == "POST" else None
    request = urllib.request.Request(f"http://{address}{path}", body, names, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def call(address: str, method: str, *metadata: tuple[str, str]) -> str:
    """The status of a unary call with an empty message."""
    path = method if method.startswith("/") else SERVICE + method
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(path)(b"", timeout=20, metadata=metadata)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def stream(address: str, *metadata: tuple[str, str]) -> str:
    with grpc.insecure_channel(address) as channel:
        try:
            list(channel.stream_stream(SERVICE + "ModelStreamInfer")(iter(()), timeout=20, metadata=metadata))
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


@pytest.mark.parametrize(
    "restricted", [("inference", "model-repository"), ("health", "trace", "logging", "shared-memory")]
)
def test_restricted_apis(small: Repository, tmp_path: Path, grpc_server: str, restricted: tuple[str, ...]) -> None:
    flags = (
        "--http-restricted-api", f"{','.join(restricted)}:admin-key=secret",
        "--grpc-restricted-protocol", f"{','.join(restricted)}:admin-key=secret", "--grpc-server", grpc_server,
    )  # fmt: skip
    if "health" in restricted:  # or nobody could tell when it is ready
        flags = (flags[0], flags[1].replace("health,", ""), *flags[2:])
    with serving(small.root, tmp_path / "log", *flags) as served:
        for category, routes in ROUTES.items():
            is_shut = category in restricted and category != "health"
            for method, path in routes:
                assert (ask(served.http, method, path) == 403) == is_shut, path
                assert ask(served.http, method, path, admin_key="wrong") == (
                    403 if is_shut else ask(served.http, method, path)
                )
                assert ask(served.http, method, path, admin_key="secret") != 403, path
        header = "triton-grpc-protocol-admin-key"
        for category, methods in METHODS.items():
            for name in methods:
                is_shut = category in restricted
                without, wrong = call(served.grpc, name), call(served.grpc, name, (header, "wrong"))
                right = call(served.grpc, name, (header, "secret"))
                if is_shut:
                    assert (without, wrong) == ("UNAVAILABLE", "UNAVAILABLE"), name
                else:
                    assert without == wrong == right, name
        assert stream(served.grpc, (header, "secret")) == "OK"
        assert (stream(served.grpc) == "UNAVAILABLE") == ("inference" in restricted)


def test_api_keys(small: Repository, tmp_path: Path, grpc_server: str) -> None:
    (tmp_path / "keys").write_text("# who may call\nfirst-key\n\nsecond-key\n")
    log = tmp_path / "log"
    flags = ("--api-key-file", str(tmp_path / "keys"), "--grpc-server", grpc_server)
    with serving(small.root, log, *flags, is_guarded=True) as served:
        every = [route for category, routes in ROUTES.items() if category != "health" for route in routes] + [
            ("GET", "/v2/none"),
            ("GET", "/v2/models/stats"),
        ]
        for method, path in every:
            for wrong in (
                {},
                {"authorization": "Bearer nope"},
                {"authorization": "Basic first-key"},
                {"x_api_key": ""},
            ):
                assert ask(served.http, method, path, **wrong) in (401, 404), path
            assert ask(served.http, method, path, authorization="Bearer first-key") != 401, path
            assert ask(served.http, method, path, x_api_key="second-key") != 401, path
        assert ask(served.metrics, "GET", "/metrics") == 401
        assert ask(served.metrics, "GET", "/metrics", authorization="Bearer second-key") == 200
        for method, path in ROUTES["health"]:
            assert ask(served.http, method, path) == 200, "load balancers ask without a key"
        for name in METHODS["health"]:
            # The native server looks at keys before it looks at methods.
            assert (call(served.grpc, name) == "UNAUTHENTICATED") == (grpc_server == "native"), name
        for name in [name for category, names in METHODS.items() if category != "health" for name in names]:
            assert call(served.grpc, name) == "UNAUTHENTICATED", name
            assert call(served.grpc, name, ("authorization", "Bearer first-key")) != "UNAUTHENTICATED", name
        assert stream(served.grpc) == "UNAUTHENTICATED"
        assert stream(served.grpc, ("authorization", "Bearer first-key")) == "OK"
        assert "first-key" not in log.read_text()


@pytest.mark.parametrize(
    "flags",
    [
        ("--http-restricted-api", "nonsense:a=b"),
        ("--http-restricted-api", "health"),
        ("--http-restricted-api", "health:a=b", "--http-restricted-api", "health:c=d"),
        ("--api-key-file", "/nowhere"),
        ("--trace-config", "level=LOUD"),
        ("--trace-config", "level=TIMESTAMPS"),
        ("--trace-config", "nonsense"),
        ("--cache-config", "redis,host=x"),
    ],
)
def test_flags_that_make_no_sense(
    small: Repository, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["serve", str(small.root), "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", *flags])
        == UNUSABLE
    )
    assert capsys.readouterr().err.startswith("tutti: ")


@pytest.fixture
def authority(tmp_path: Path) -> tuple[trustme.CA, Path]:
    made = trustme.CA()
    made.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    server = made.issue_cert("localhost", "127.0.0.1")
    server.private_key_pem.write_to_path(str(tmp_path / "server.key"))
    server.cert_chain_pems[0].write_to_path(str(tmp_path / "server.pem"))
    client = made.issue_cert("client.example")
    client.private_key_pem.write_to_path(str(tmp_path / "client.key"))
    client.cert_chain_pems[0].write_to_path(str(tmp_path / "client.pem"))
    return made, tmp_path


def tls_flags(folder: Path, is_mutual: bool) -> list[str]:
    flags = []
    for protocol in ("http", "grpc"):
        flags += [f"--{protocol}-use-ssl", f"--{protocol}-server-cert", str(folder / "server.pem")]
        flags += [f"--{protocol}-server-key", str(folder / "server.key")]
        if is_mutual:
            flags += [f"--{protocol}-use-ssl-mutual", f"--{protocol}-root-cert", str(folder / "ca.pem")]
    return flags


def infer(library: Any, client: Any) -> Any:
    tensor = library.InferInput("x", [1, 4], "FP32")
    tensor.set_data_from_numpy(X)
    return client.infer("add_one", [tensor]).as_numpy("y").tolist()


@pytest.mark.parametrize("is_mutual", [False, True])
def test_tls(small: Repository, tmp_path: Path, authority: tuple[trustme.CA, Path], is_mutual: bool) -> None:
    folder = authority[1]
    certificate = {"certfile": str(folder / "client.pem"), "keyfile": str(folder / "client.key")}
    with serving(small.root, tmp_path / "log", *tls_flags(folder, is_mutual), is_guarded=True) as served:
        options = {"ca_certs": str(folder / "ca.pem"), **(certificate if is_mutual else {})}
        secure = httpclient.InferenceServerClient(served.http, ssl=True, ssl_options=options)
        assert infer(httpclient, secure) == (X + 1).tolist()
        secure.close()
        with pytest.raises(Exception, match=r"."):
            infer(httpclient, httpclient.InferenceServerClient(served.http))
        files = {"root_certificates": str(folder / "ca.pem")}
        if is_mutual:
            files |= {"private_key": str(folder / "client.key"), "certificate_chain": str(folder / "client.pem")}
        with grpcclient.InferenceServerClient(served.grpc, ssl=True, **files) as client:
            assert infer(grpcclient, client) == (X + 1).tolist()
        with grpcclient.InferenceServerClient(served.grpc) as client, pytest.raises(InferenceServerException):
            client.is_server_live(client_timeout=5)
        if is_mutual:
            stranger = {"root_certificates": str(folder / "ca.pem")}
            client = grpcclient.InferenceServerClient(served.grpc, ssl=True, **stranger)
            with client, pytest.raises(InferenceServerException):
                client.is_server_live(client_timeout=5)


class Collector:
    """Takes OTLP over HTTP, as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    import gzip

                    body = gzip.decompress(body)
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for scope in resource.scope_spans:
                        collector.spans.extend(scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def test_traces_go_to_opentelemetry(small: Repository, tmp_path: Path, collector: Collector, grpc_server: str) -> None:
    flags = (
        "--trace-config", "mode=opentelemetry", "--trace-config", f"opentelemetry,url={collector.url}",
        "--trace-config", "level=TIMESTAMPS", "--trace-config", "rate=1", "--grpc-server", grpc_server,
    )  # fmt: skip
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    before_ns = time.time_ns()
    x, y = (f'put {{ name: "{name}" data_type: TYPE_FP32 dims: 4 }}' for name in "XY")
    steps = 'step { model_name: "add_one" input_map { key: "x" value: "X" } output_map { key: "y" value: "Y" } }'
    small.add(
        "pair",
        f'platform: "ensemble" max_batch_size: 8 in{x} out{y} ensemble_scheduling {{ {steps} }}',
        {".keep": ""},
    )
    with serving(small.root, tmp_path / "log", *flags) as served:
        assert ask(served.http, "POST", "/v2/models/add_one/infer", traceparent=parent) == 200
        with grpcclient.InferenceServerClient(served.grpc) as client:
            tensor = grpcclient.InferInput("x", [1, 4], "FP32")
            tensor.set_data_from_numpy(X)
            client.infer("add_one", [tensor], request_id="over grpc", headers={"traceparent": parent})
            tensor = grpcclient.InferInput("X", [1, 4], "FP32")
            tensor.set_data_from_numpy(X)
            client.infer("pair", [tensor], headers={"traceparent": parent})
        wait_until(lambda: len(collector.spans) >= 3 * 2 + 4)
    requests = [span for span in collector.spans if span.name == "InferRequest"]
    assert len(requests) == 3
    spans = {span.span_id: span for span in collector.spans}
    for span in requests:
        assert span.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c"
        assert span.parent_span_id.hex() == "b7ad6b7169203331"
        assert before_ns < span.start_time_unix_nano < span.end_time_unix_nano < time.time_ns()
        events = [event.name for event in span.events]
        assert [event.partition("_")[2] for event in events] == [
            "RECV_START", "RECV_END", "RESPONSE_COMPLETE", "SEND_START",
        ]  # fmt: skip
    ways = []
    for span in collector.spans:
        way = [span.name]
        while span.parent_span_id in spans:
            above = spans[span.parent_span_id]
            assert above.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
            assert span.end_time_unix_nano <= above.end_time_unix_nano
            span = above
            way.append(span.name)
        ways.append("/".join(reversed(way)))
    root = "InferRequest"
    assert sorted(ways) == sorted([
        *[root] * 3, *[f"{root}/add_one", f"{root}/add_one/compute"] * 2,
        f"{root}/pair", f"{root}/pair/add_one", f"{root}/pair/add_one/compute",
    ])  # fmt: skip
    for span in collector.spans:
        if span.name in ("add_one", "pair"):
            events = [event.name for event in span.events]
            assert events == ["REQUEST_START", "QUEUE_START", "REQUEST_END"]


def test_poll_mode_follows_the_repository(small: Repository, tmp_path: Path) -> None:
    flags = ("--model-control-mode", "poll", "--repository-poll-secs", "0.1")
    with serving(small.root, tmp_path / "log", *flags) as served:
        client = httpclient.InferenceServerClient(served.http)
        assert not client.is_model_ready("later")
        small.add_onnx("later")
        wait_until(lambda: bool(client.is_model_ready("later")))
        (small.root / "later").rename(tmp_path / "gone")
        wait_until(lambda: not client.is_model_ready("later"))
        assert infer(httpclient, client) == (X + 1).tolist()
        with pytest.raises(InferenceServerException, match="not allowed"):
            client.load_model("add_one")
        client.close()


def test_histograms_and_gauges_on_the_metrics_page(small: Repository, tmp_path: Path) -> None:
    path = small.root / "add_one" / "config.pbtxt"
    path.write_text(
        path.read_text() + 'metric_tags { key: "team" value: "moderation" } response_cache { enable: true }\n'
    )
    with serving(small.root, tmp_path / "log") as served:
        for _ in range(5):
            assert ask(served.http, "POST", "/v2/models/add_one/infer") == 200
        with urllib.request.urlopen(f"http://{served.metrics}/metrics", timeout=20) as page:
            text = page.read().decode()
    labels = 'model="add_one",team="moderation",version="1"'
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))

    def value(name: str, more: str = "") -> float:
        want = f"{name}{{{more}{labels}}}" if more else f"{name}{{{labels}}}"
        found = {_sorted(key): number for key, number in lines.items()}
        return float(found[_sorted(want)])

    assert value("nv_inference_request_success") == 5
    assert value("nv_cache_num_hits_per_model") == 4
    assert value("nv_inference_pending_request_count") == 0
    assert value("tutti_request_duration_seconds_count") == 5
    assert value("tutti_queue_duration_seconds_count") == 1
    assert value("tutti_request_duration_seconds_bucket", 'le="+Inf",') == 5


def _sorted(line: str) -> str:
    name, _, labels = line.partition("{")
    return name + ",".join(sorted(labels.rstrip("}").split(",")))


def test_grpc_health(small: Repository, tmp_path: Path, grpc_server: str) -> None:
    """grpc.health.v1: Check and Watch, of the server and of a model. Messages have one field: name, and status."""
    serving_now, not_serving, unknown = b"\x08\x01", b"\x08\x02", b"\x08\x03"

    def named(name: str) -> bytes:
        return pb.ModelReadyRequest(name=name).SerializeToString()

    flags = ("--model-control-mode", "explicit", "--load-model", "*", "--grpc-server", grpc_server)
    with serving(small.root, tmp_path / "log", *flags) as served, grpc.insecure_channel(served.grpc) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        for name in ("", "inference.GRPCInferenceService", "add_one"):
            assert check(named(name), timeout=20) == serving_now
        with pytest.raises(grpc.RpcError) as caught:
            check(named("none"), timeout=20)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(named("add_one"), timeout=60)
        assert next(watch) == serving_now
        assert next(channel.unary_stream("/grpc.health.v1.Health/Watch")(named("none"), timeout=20)) == unknown
        with grpcclient.InferenceServerClient(served.grpc) as client:
            client.unload_model("add_one")
            assert next(watch) == not_serving
            client.load_model("add_one")
            assert next(watch) == serving_now
        watch.cancel()
