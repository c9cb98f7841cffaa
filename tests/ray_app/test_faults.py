"""What hangs and what dies on a real local cluster: a gateway among several, the head, and whoever started it."""

import os
import signal
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.models import Repository
from tests.ray_app.test_cluster import replicas
from tests.serving import Served, serving, wait_until

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(500),
    # Sockets of a gateway that was killed with them.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

HANGS = """
    backend: "python" max_batch_size: 0
    input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 4 }
"""


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults") / "log"


@pytest.fixture(scope="module")
def served(log: Path) -> Iterator[Served]:
    repository = Repository(log.parent / "models")
    repository.add_onnx()
    repository.add_python("hangs", HANGS, "return None", "import threading\nthreading.Event().wait()")
    flags = ["--ray", "--num-gpus", "0", "--gateways", "2", "--model-control-mode", "explicit"]
    flags += ["--load-model", "add_one", "--control-timeout-secs", "2"]
    with serving(repository.root, log, *flags) as found:
        wait_until(lambda: len(replicas(found, "gateway")) == 2, 120)
        yield found


def is_ready(served: Served, timeout_s: float = 20.0) -> bool:
    """Over a connection of its own."""
    try:
        with urllib.request.urlopen(f"http://{served.http}/v2/health/ready", timeout=timeout_s):
            return True
    except OSError:
        return False


def head(served: Served, name: str) -> psutil.Process:
    (found,) = [one for one in psutil.Process(served.process.pid).children(recursive=True) if one.name() == name]
    return found


class Connections:
    """Clients that make a connection for each request, some at a time."""

    def __init__(self, served: Served) -> None:
        self.answers = 0
        self._served = served
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(8)]

    def __enter__(self) -> "Connections":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.answers += is_ready(self._served, 1.0)


def test_a_gateway_that_hangs_is_killed_and_replaced(served: Served) -> None:
    """Its socket would be given half of all connections for as long as it is there."""
    first = replicas(served, "gateway")
    hung, other = first
    with Connections(served) as connections:
        os.kill(hung.pid, signal.SIGSTOP)
        before = connections.answers
        wait_until(lambda: not hung.is_running() or hung.status() == psutil.STATUS_ZOMBIE, 120)
        assert connections.answers > before, "the other one has served meanwhile"
    assert all(is_ready(served) for _ in range(20)), "none of many connections goes where nobody is"
    wait_until(lambda: len({one.pid for one in replicas(served, "gateway")} - {one.pid for one in first}) == 1, 200)
    assert other.is_running()


def test_a_load_that_hangs_is_answered_within_the_time_of_the_flag(served: Served) -> None:
    url = f"http://{served.http}/v2/repository/models/hangs/load"
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(url, b"{}"), timeout=120)
    with refused.value:
        assert "model 'hangs' has been loading for 2 s, and goes on" in refused.value.read().decode()


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_when_the_head_dies_another_cluster_takes_its_place(served: Served, log: Path, name: str) -> None:
    family = psutil.Process(served.process.pid).children(recursive=True)
    count = log.read_text().count("is started anew")
    os.kill(head(served, name).pid, signal.SIGKILL)
    wait_until(lambda: log.read_text().count("is started anew") > count, 120)
    _, alive = psutil.wait_procs(family, timeout=120)
    assert not alive, "nothing is left of the old cluster"
    wait_until(lambda: is_ready(served), 240)
    assert served.process.poll() is None


def test_whoever_kills_the_command_kills_the_cluster(served: Served) -> None:
    """The last test: nothing is served any more."""
    family = psutil.Process(served.process.pid).children(recursive=True)
    os.kill(served.process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=120)
    assert not alive
