"""Several gateways on the same ports: one order of changes, updates under load, and one of them killed."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient

from tests.models import Repository
from tests.ray_app.conftest import Application
from tests.ray_app.test_cluster import replicas
from tests.serving import Served, wait_until
from tutti.app import front_end_setup
from tutti.app.front_end_server import Addresses
from tutti.loadtest.process import free_ports, stop
from tutti.ray_app.journal import Journal
from tutti.ray_app.options import Options
from tutti.ray_app.watch import group
from tutti.serving.interface import Override

ON_RAY = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(280)]


class Memory:
    """A store in this process."""

    def __init__(self) -> None:
        self.entries: dict[str, bytes] = {}

    def add(self, key: str, value: bytes) -> bool:
        return self.entries.setdefault(key, value) is value

    def get(self, key: str) -> bytes | None:
        return self.entries.get(key)

    def replace(self, key: str, value: bytes) -> None:
        self.entries[key] = value

    def clear(self, prefix: str) -> None:
        self.entries = {key: value for key, value in self.entries.items() if not key.startswith(prefix)}


def test_gateways_agree_on_the_order_of_changes() -> None:
    store = Memory()
    one, other = Journal(store, "app"), Journal(store, "app")
    assert one.record("a", Override("1")).generation == 1
    assert other.record("b", Override("2")).generation == 2, "it has read the first entry, and taken the next"
    assert [change.model for change in other.news()] == ["a"]
    assert other.news() == []
    assert [change.model for change in one.news()] == ["b"]
    other.record("a", Override("3"))
    (change,) = one.news()
    assert one.desired.last("a") is change
    assert one.desired.since(0) == other.desired.since(0)
    late = Journal(store, "app")
    assert [(c.generation, c.model) for c in late.news()] == [(2, "b"), (3, "a")], "what was replaced is not kept"
    assert late.desired.generation == 3
    assert Journal(store, "another").news() == []


def test_gateways_that_race_lose_no_change() -> None:
    store = Memory()
    journals = [Journal(store, "app") for _ in range(4)]

    def write(number: int) -> None:
        for turn in range(50):
            journals[number].record(f"m{number}-{turn}", Override())

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Journal(store, "app").news()) == 200


def test_what_gateways_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="expected no port 0"):
        Options(model_repository="r", gateways=2, http_port=0)
    with pytest.raises(ValueError, match="allow_client_shm"):
        Options(model_repository="r", gateways=2, allow_client_shm=True)
    with pytest.raises(ValueError, match="the gateway has none"):
        Options(model_repository="r", allow_client_cuda_shm=True)
    for door in ("http", "grpc", "metrics"):  # a door that is not there has no port to share
        Options.model_validate({"model_repository": "r", "gateways": 2, f"{door}_port": 0, f"allow_{door}": False})


def test_gateways_without_http_are_told_apart_by_grpc() -> None:
    """Those of several applications on one machine: they neither watch each other nor share what they change."""
    groups, journals = set(), set()
    for doors in ({"grpc_port": 1}, {"grpc_port": 2}, {"grpc_port": 1, "grpc_address": "127.0.0.2"}):
        options = Options.model_validate({"model_repository": "r", "allow_http": False, **doors})
        wanted = front_end_setup.addresses(options)
        assert wanted.http_port is None
        groups.add(group(Addresses(wanted.host, None, wanted.grpc_port, 3), wanted.grpc_host))
        journals.add(options.journal)
    assert groups == {"127.0.0.1-grpc-1", "127.0.0.1-grpc-2", "127.0.0.2-grpc-1"}
    assert len(journals) == 2
    with_http = Options(model_repository="r", http_port=1)
    assert group(Addresses("127.0.0.1", 1, 2, 3), "127.0.0.2") == "127.0.0.1-1"
    assert with_http.journal not in journals


TIMES = """
    import time
    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
    time.sleep(0.003)
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", x * VERSION)])
"""
CONFIG = """
    backend: "python" max_batch_size: 16 dynamic_batching {}
    input { name: "x" data_type: TYPE_FP32 dims: 2 } output { name: "y" data_type: TYPE_FP32 dims: 2 }
"""
# What gRPC clients do when a server goes: https://grpc.io/docs/guides/retry
RETRY = """{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 5, "initialBackoff": "0.05s",
"maxBackoff": "1s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"]}}]}"""


def add_version(repository: Repository, version: int) -> None:
    """The next version of "times", which is the only one from then on."""
    if version == 1:
        repository.add_python("times", CONFIG, TIMES.replace("VERSION", "1"))
        return
    old, new = (repository.root / "times" / str(number) for number in (version - 1, version))
    source = (old / "model.py").read_text().replace(f"x * {version - 1}", f"x * {version}")
    shutil.rmtree(old)
    new.mkdir()
    (new / "model.py").write_text(source)


class Load:
    """Closed-loop clients over both protocols: the versions that answered, and what failed or was mixed."""

    def __init__(self, http: str, grpc: str, reconnects: bool = False) -> None:
        """A client that `reconnects` makes a connection for each request."""
        self.versions: Counter[float] = Counter()
        self.failures: list[str] = []
        self._addresses = {"http": http, "grpc": grpc}
        self._reconnects = reconnects
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(kind,)) for kind in ("http", "grpc") * 4]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self, protocol: str) -> None:
        library = httpclient if protocol == "http" else grpcclient
        more = {} if protocol == "http" else {"channel_args": [("grpc.service_config", RETRY)]}
        client = library.InferenceServerClient(self._addresses[protocol], **more)
        x = np.ones((8, 2), np.float32)
        tensor = library.InferInput("x", [8, 2], "FP32")
        tensor.set_data_from_numpy(x)
        while not self._stop.is_set():
            try:
                answer = client.infer("times", [tensor]).as_numpy("y")
            except Exception as error:
                self.failures.append(f"{protocol}: {type(error).__name__}: {error}")
                continue
            if np.unique(answer).size != 1:
                self.failures.append(f"mixed: {answer}")
            self.versions[float(answer[0, 0])] += 1
        client.close()

    def wait_for(self, version: int, answers: int = 20) -> None:
        wait_until(lambda: self.versions[float(version)] >= answers, timeout_s=60)


def loader(served: Served) -> grpcclient.InferenceServerClient:
    """A client over a connection of its own, with whichever gateway takes it."""
    return grpcclient.InferenceServerClient(served.grpc, channel_args=[("grpc.use_local_subchannel_pool", 1)])


@pytest.mark.filterwarnings("ignore::ResourceWarning")
class TestOnRay:
    pytestmark = ON_RAY

    def test_models_are_updated_through_any_gateway_without_loss(self, application: Application) -> None:
        served, repository = application.served, application.repository
        add_version(repository, 1)
        repository.add_onnx("extra")
        application.load("times")
        with Load(served.http, served.grpc) as load:
            load.wait_for(1)
            for version in (2, 3, 4):
                add_version(repository, version)
                with loader(served) as client:
                    client.load_model("times")
                load.wait_for(version)
        assert load.failures == []
        assert set(load.versions) == {1, 2, 3, 4}

        def states() -> list[dict[str, str]]:
            """As several gateways tell them: each connection may be another's."""
            found = []
            for _ in range(12):
                with loader(served) as client:
                    index = client.get_model_repository_index().models
                    found.append({f"{one.name}/{one.version}": one.state for one in index})
            return found

        with loader(served) as client:
            client.load_model("extra")
        wait_until(lambda: all(one.get("extra/1") == "READY" for one in states()))
        assert all(one.get("times/4") == "READY" and "times/1" not in one for one in states())

        # One that starts anew knows what was loaded while it was not there.
        first = replicas(served, "gateway")
        assert len(first) == 2
        with Load(served.http, served.grpc) as load:
            load.wait_for(4)
            os.kill(first[0].pid, signal.SIGKILL)
            load.wait_for(4, 500)
        broken = [one for one in load.failures if "http" not in one]
        assert broken == [], "gRPC clients ask again; of HTTP's, those on its connections fail once"
        assert len(load.failures) <= 4
        wait_until(lambda: len({p.pid for p in replicas(served, "gateway")} - {p.pid for p in first}) == 1, 60)
        wait_until(lambda: all(one.get("extra/1") == "READY" and one.get("times/4") == "READY" for one in states()), 60)
        with loader(served) as client:
            client.unload_model("extra")
        wait_until(lambda: all(one.get("extra/1") == "UNAVAILABLE" for one in states()))

    def test_the_application_is_updated_without_loss(self, tmp_path: Path) -> None:
        repository = Repository(tmp_path / "models")
        add_version(repository, 1)
        http, grpc, metrics = free_ports(3)
        script = tmp_path / "deploy.py"
        script.write_text(
            f"""
import sys
from tutti.ray_app import environment, processes
environment.apply()
processes.adopt_orphans()
import ray
from ray import serve
from tutti.ray_app.app import build
from tutti.ray_app.options import Options
from tutti.ray_app.watch import group
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
         runtime_env={{"env_vars": environment.SETTINGS}})
serve.start(proxy_location="Disabled")
def deploy(**changes):
    serve.run(build(Options(model_repository={str(repository.root)!r}, http_port={http}, grpc_port={grpc},
              metrics_port={metrics}, cpu_replicas=2, gateways=2, model_control_mode="explicit", load_model=["times"],
              **changes)), name="another", route_prefix=None)
    print("deployed", flush=True)
deploy()
for line in sys.stdin:
    deploy(hang_timeout_secs=float(line))
serve.shutdown()
ray.shutdown()
processes.end_descendants(5.0)
"""
        )
        log = (tmp_path / "log").open("wb")
        process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == "deployed\n", (tmp_path / "log").read_text()
            add_version(repository, 2)
            with grpcclient.InferenceServerClient(f"127.0.0.1:{grpc}") as client:
                client.load_model("times")
            served = Served(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", "", process)  # type: ignore[arg-type]
            before = {one.pid for pool in ("gateway", "cpu") for one in replicas(served, pool, "another")}
            assert len(before) == 4
            with Load(served.http, served.grpc) as load:
                load.wait_for(2)
                process.stdin.write("50\n")
                process.stdin.flush()
                assert process.stdout.readline() == "deployed\n"
                load.wait_for(2, sum(load.versions.values()) + 200)
            after = {one.pid for pool in ("gateway", "cpu") for one in replicas(served, pool, "another")}
            assert not before & after, "everything was replaced"
            assert load.failures == []
        finally:
            process.stdin.close()  # type: ignore[union-attr]
            process.stdout.close()  # type: ignore[union-attr]
            assert process.wait(60) == 0 or stop(process)  # type: ignore[arg-type]
            log.close()
