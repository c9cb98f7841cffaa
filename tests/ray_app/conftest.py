"""One application on a cluster for the tests that end its replicas and gateways one at a time, and change its models.

Each test has models of its own and leaves whoever it has ended to be replaced; the next one waits for that.
"""

import contextlib
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tritonclient.http as httpclient

from tests.models import Repository
from tests.ray_app.test_cluster import replicas
from tests.serving import Served, serving, wait_until


@dataclass(frozen=True)
class Application:
    """Two replicas without GPUs behind two gateways, in explicit mode; began with the models "kept" and "dropped"."""

    served: Served
    repository: Repository

    def is_whole(self) -> bool:
        """Whether every gateway there is hears of two replicas."""
        host, port = self.served.metrics.split(":")
        # Each gateway has a page of its own, on the first port that was free.
        heard = [self._replicas_heard_of(f"{host}:{int(port) + number}") for number in range(4)]
        return len(replicas(self.served, "cpu")) == 2 and heard.count(2) == len(replicas(self.served, "gateway")) == 2

    def load(self, model: str) -> None:
        """Until every gateway has it."""
        with httpclient.InferenceServerClient(self.served.http) as client:
            client.load_model(model)
        wait_until(lambda: all(self._has(model) for _ in range(32)), timeout_s=60)

    def _replicas_heard_of(self, address: str) -> float:
        found = None
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as page:
            found = re.search(r'^tutti_pool_replicas{pool="cpu"} (\S+)', page.read().decode(), re.MULTILINE)
        return float(found[1]) if found else 0

    def _has(self, model: str) -> bool:
        with httpclient.InferenceServerClient(self.served.http) as client:
            return bool(client.is_model_ready(model))


@pytest.fixture(scope="package")
def shared_application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    folder: Path = tmp_path_factory.mktemp("shared")
    repository = Repository(folder / "models")
    repository.add_onnx("kept")
    repository.add_onnx("dropped")
    flags = ("--ray", "--num-gpus", "0", "--cpu-replicas", "2", "--gateways", "2")
    flags += ("--model-control-mode", "explicit", "--load-model", "kept", "--load-model", "dropped")  # type: ignore[assignment]
    with serving(repository.root, folder / "log", *flags) as served:
        yield Application(served, repository)


@pytest.fixture
def application(shared_application: Application) -> Application:
    wait_until(shared_application.is_whole, timeout_s=90)
    return shared_application
