"""Deadlines, however they are given: what cannot finish in time is refused at once, and nothing else suffers."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc
import tritonclient.http as http
from tritonclient.utils import InferenceServerException

from tests.models import Repository
from tests.serving import Served, serving, wait_until

SLOW_S = 0.4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("deadlines") / "repository"
    Repository(made).add_slow(made.parent / "began")
    return made


@pytest.fixture(scope="module", params=[(), ("--grpc-server", "grpcio")], ids=["native", "grpcio"])
def server(request: pytest.FixtureRequest, root: Path) -> Iterator[Served]:
    with serving(root, root.parent / "log", *request.param) as served:
        for _ in range(3):  # it learns how long the model takes
            over_http(served)(SLOW_S)
        yield served


@pytest.fixture
def began(root: Path, server: Served) -> Path:
    """There as soon as a request to the slow model is executed."""
    file = root.parent / "began"
    file.unlink(missing_ok=True)
    return file


def inputs(client: Any, seconds: float) -> list[Any]:
    tensor = client.InferInput("s", [1, 1], "FP32")
    tensor.set_data_from_numpy(np.full((1, 1), seconds, np.float32))
    return [tensor]


def over_http(served: Served, **options: Any) -> Callable[[float], Any]:
    def infer(seconds: float) -> Any:
        with http.InferenceServerClient(served.http) as client:
            return client.infer("slow", inputs(http, seconds), **options)

    return infer


def over_grpc(served: Served, **options: Any) -> Callable[[float], Any]:
    def infer(seconds: float) -> Any:
        with grpc.InferenceServerClient(served.grpc) as client:
            return client.infer("slow", inputs(grpc, seconds), **options)

    return infer


def executions(served: Served) -> int:
    with http.InferenceServerClient(served.http) as client:
        return int(client.get_inference_statistics("slow")["model_stats"][0]["execution_count"])


WAYS: dict[str, Callable[[Served], Callable[[float], Any]]] = {
    "HTTP parameter": lambda served: over_http(served, timeout=100_000),
    "HTTP grpc-timeout": lambda served: over_http(served, headers={"Grpc-Timeout": "100m"}),
    "HTTP of Envoy": lambda served: over_http(served, headers={"x-envoy-expected-rq-timeout-ms": "100"}),
    "gRPC parameter": lambda served: over_grpc(served, timeout=100_000),
    "gRPC deadline": lambda served: over_grpc(served, client_timeout=0.1),
}


@pytest.mark.parametrize("way", WAYS)
def test_behind_a_slow_request_it_is_refused_at_once(server: Served, began: Path, way: str) -> None:
    before = executions(server)
    busy = threading.Thread(target=over_http(server), args=(SLOW_S,))
    busy.start()
    wait_until(began.exists)
    with pytest.raises(InferenceServerException, match="cannot finish in time") as refused:
        WAYS[way](server)(0.0)
    assert refused.value.status() in ("503", "StatusCode.UNAVAILABLE")
    assert ("Deadline Exceeded" in refused.value.message()) == way.startswith("gRPC")
    assert busy.is_alive(), "the refusal did not wait for the one before"
    busy.join()
    assert executions(server) == before + 1


def test_one_that_can_is_served(server: Served) -> None:
    busy = threading.Thread(target=over_http(server), args=(0.05,))
    busy.start()
    assert over_http(server, timeout=30_000_000)(0.0) is not None
    assert over_grpc(server, client_timeout=30)(0.0) is not None
    busy.join()


@pytest.mark.parametrize("value", ["", "m", "5", "5x", "-5m", "1e3m", "123456789m", "5 m"])
def test_a_header_that_is_no_time_is_told(server: Served, value: str) -> None:
    with pytest.raises(InferenceServerException, match="grpc-timeout: expected at most 8 digits and a unit") as refused:
        over_http(server, headers={"Grpc-Timeout": value})(0.0)
    assert refused.value.status() == "400"
