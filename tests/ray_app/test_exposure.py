"""Every port that a secured deployment opens, and what somebody without a key or a token gets there."""

import contextlib
import ipaddress
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest

from tests.conformance.test_access import METHODS, ROUTES, SERVICE
from tests.models import Repository
from tests.serving import Served, serving, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(280)]

# Methods of Ray's own servers, real ones: with a token each does something.
RAY_METHODS = [
    f"/ray.rpc.{name}"
    for name in (
        "NodeInfoGcsService/GetAllNodeInfo", "InternalKVGcsService/InternalKVGet", "JobInfoGcsService/GetAllJobInfo",
        "ActorInfoGcsService/GetAllActorInfo", "NodeManagerService/GetNodeStats",
        "NodeManagerService/RequestWorkerLease", "CoreWorkerService/PushTask", "CoreWorkerService/KillActor",
    )
]  # fmt: skip
# What replicas answer for Serve's handles: the requests are unpickled.
REPLICA_METHODS = [
    f"/ray.serve.ASGIService/{name}"
    for name in (
        "HandleRequest", "HandleRequestStreaming", "HandleRequestWithRejection", "HandleRequestWithRejectionStreaming",
    )
]  # fmt: skip
RAY_PATHS = [
    "/", "/api/version", "/api/jobs/", "/api/job_agent/jobs/", "/api/serve/applications/", "/api/actors", "/nodes",
    "/logs", "/log_proxy", "/get_or_create_runtime_env", "/worker/traceback", "/api/gcs_healthz",
    "/api/local_raylet_healthz",
]  # fmt: skip
HEALTH = {"/api/local_raylet_healthz", "/api/gcs_healthz"}


@dataclass(frozen=True)
class Port:
    """A listening socket of a process."""

    host: str
    number: int
    process: str

    @property
    def is_loopback(self) -> bool:
        address = ipaddress.ip_address(self.host)
        mapped = getattr(address, "ipv4_mapped", None)
        return (mapped or address).is_loopback

    @property
    def address(self) -> str:
        """Where a caller on this machine reaches it."""
        return f"127.0.0.1:{self.number}"

    @property
    def nearest(self) -> str:
        """Where it listens itself, on whichever of this machine's own addresses."""
        return f"{self.host}:{self.number}" if self.is_loopback and ":" not in self.host else self.address


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("secured")
    repository = Repository(folder / "models")
    repository.add_onnx("add_one")
    (folder / "keys").write_text("the-key\n")
    flags = ("--ray", "--num-gpus", "1", "--api-key-file", str(folder / "keys"), "--grpc-server", "grpcio")
    with serving(repository.root, folder / "log", *flags, is_guarded=True) as served:
        yield served


def listening(secured: Served) -> list[Port]:
    found = []
    root = psutil.Process(secured.process.pid)
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):  # it has ended
            for one in process.net_connections("tcp"):
                if one.status == psutil.CONN_LISTEN:
                    found.append(Port(one.laddr.ip, one.laddr.port, " ".join(process.cmdline())))
    return found


@pytest.fixture(scope="module")
def ports(secured: Served) -> list[Port]:
    """Once Ray's agents are there, too, which are not waited for where models are served.

    They are three, but for one whose port is always the same, which another cluster of this machine may have.
    """
    wait_until(lambda: sum(get(port.nearest, "/")[0] > 0 for port in of_ray(secured)) >= 2, 90)
    found = listening(secured)
    assert len(found) > 10
    return found


def of_ray(secured: Served) -> list[Port]:
    return [port for port in listening(secured) if port.number not in ours(secured)]


def get(address: str, path: str, method: str = "GET") -> tuple[int, str]:
    """Status and body; (0, "") where nobody speaks HTTP."""
    body = b"{}" if method == "POST" else None
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"http://{address}{path}", body, method=method), timeout=5
        ) as a:
            return a.status, a.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(errors="replace")
    except Exception:
        return 0, ""


def call(address: str, method: str, *metadata: tuple[str, str]) -> str:
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(method)(b"", timeout=5, metadata=metadata)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def ours(secured: Served) -> set[int]:
    return {int(address.split(":")[1]) for address in (secured.http, secured.grpc, secured.metrics)}


def test_all_but_serves_replicas_listens_on_this_machine_only(secured: Served, ports: list[Port]) -> None:
    open_to_others = [one for one in ports if not one.is_loopback]
    assert all("ServeReplica" in one.process for one in open_to_others), open_to_others
    assert not {one.number for one in open_to_others} & ours(secured)


def test_the_gateway_answers_nothing_but_health(secured: Served) -> None:
    for category, routes in ROUTES.items():
        for method, path in routes:
            status, body = get(secured.http, path, method)
            assert (status == 200) if category == "health" else (status in (401, 404, 405)), (path, status, body)
    for path in ("/", "/metrics", "/docs", "/v2/models/none", "/../v2", "/v2/models/add_one/../../repository/index"):
        assert get(secured.http, path)[0] in (400, 401, 404), path
    assert get(secured.metrics, "/metrics")[0] == 401
    for category, names in METHODS.items():
        for name in names:
            code = call(secured.grpc, name if name.startswith("/") else SERVICE + name)
            assert (code != "UNAUTHENTICATED") if category == "health" else (code == "UNAUTHENTICATED"), name
    reflection = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    assert call(secured.grpc, reflection) in ("UNAUTHENTICATED", "UNIMPLEMENTED")


def test_rays_ports_answer_nothing_but_health_and_counters(secured: Served, ports: list[Port]) -> None:
    """Its pages of metrics are on 127.0.0.1 (first test); what they show are counters, whatever they are asked for."""
    asked = 0
    for port in [one for one in ports if one.number not in ours(secured)]:
        address = port.nearest
        if get(address, "/")[0] == 0:
            continue
        asked += 1
        for path in RAY_PATHS:
            status, body = get(address, path)
            is_counters = status == 200 and body.startswith("# HELP")
            assert is_counters or status in (401, 403, 404) or (status == 200 and path in HEALTH), (port, path, body)
    assert asked >= 2
    refused = set()
    for port in [one for one in ports if one.number not in ours(secured)]:
        for method in RAY_METHODS + REPLICA_METHODS:
            code = call(port.address, method)
            assert code in ("UNAUTHENTICATED", "UNIMPLEMENTED", "UNAVAILABLE"), (port, method, code)
            if code == "UNAUTHENTICATED":
                refused.add(method)
    assert refused == {*RAY_METHODS, *REPLICA_METHODS}, "each is somewhere, and was refused"


def test_with_the_token_they_would_answer(secured: Served, ports: list[Port]) -> None:
    """The test above can fail."""
    token = os.environ.get("RAY_AUTH_TOKEN") or (Path.home() / ".ray" / "auth_token").read_text().strip()
    metadata = ("authorization", f"Bearer {token}")
    method = RAY_METHODS[0]
    codes = [call(port.address, method, metadata) for port in ports if call(port.address, method) == "UNAUTHENTICATED"]
    assert "OK" in codes


def test_nothing_listens_on_datagrams(secured: Served) -> None:
    root = psutil.Process(secured.process.pid)
    for process in [root, *root.children(recursive=True)]:
        assert [one for one in process.net_connections("udp") if one.type == socket.SOCK_DGRAM and not one.raddr] == []
