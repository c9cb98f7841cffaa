"""What a failed device means to the models of its process: not ready, refused at once, everything else served on."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from tests.models import Repository
from tests.serving import Gather, infer, timer, wait_until
from tutti import ensembles
from tutti.backends import registry
from tutti.core.errors import DeviceLost
from tutti.core.types import Call, InferRequest, InferResponse, Tensor
from tutti.devices.health import DeviceHealth
from tutti.frontends.grpc.methods import NOT_SERVING, SERVICE, SERVING, methods
from tutti.frontends.http import routes as http_api
from tutti.frontends.v2.api import Api
from tutti.frontends.v2.metrics_page import Metrics
from tutti.scheduling import interface
from tutti.serving import local
from tutti.serving.engine import Engine

REASON = "device-side assert triggered"
SEQUENCES = """
    backend: "onnxruntime" max_batch_size: 8
    input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 4 }
    sequence_batching { oldest { max_candidate_sequences: 2 } }
"""
ENSEMBLE = """
    platform: "ensemble" max_batch_size: 8
    input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 4 }
    ensemble_scheduling { step {
      model_name: "on_gpu" model_version: -1 input_map { key: "x" value: "x" } output_map { key: "y" value: "y" }
    } }
"""


class OnDevice:
    """A backend as on a device, whose batches execute when they may."""

    def __init__(self, backend: interface.Backend, device: str, may_execute: threading.Event) -> None:
        self.device = device
        self.runs_inline = False
        self.kind = "cuda"
        self.close = backend.close
        self.begun = 0
        self._execute = backend.execute
        self._may_execute = may_execute

    def execute(self, calls: Sequence[Call]) -> interface.Executed:
        self.begun += 1
        assert self._may_execute.wait(30)
        return self._execute(calls)


class World:
    """An engine with a model on "cuda:0", one on "cuda:1" and one on the processor."""

    def __init__(self, root: Path, devices: DeviceHealth, monkeypatch: pytest.MonkeyPatch) -> None:
        self.devices = devices
        self.may_execute = threading.Event()
        self.may_execute.set()
        self.made: dict[str, OnDevice] = {}
        load = registry.load

        def on_devices(folder, version, serve):  # type: ignore[no-untyped-def]
            loaded = load(folder, version, serve)
            name = folder.config.name
            if name == "add_one":
                return loaded
            device = "cuda:1" if name == "other" else "cuda:0"
            self.made[name] = OnDevice(loaded[0], device, self.may_execute)
            return [self.made[name], *loaded[1:]]

        monkeypatch.setattr(registry, "load", on_devices)
        self.engine: Engine = local.make_engine(root, timer, ensembles.load, devices=devices)
        self.engine.load_all()

    def reason(self, name: str) -> str:
        return next(entry.reason for entry in self.engine.index() if entry.name == name)

    def start(self, name: str, count: int, **parameters: int) -> tuple[list[Call], Gather]:
        gather = Gather(count)
        calls = [Call(request(name, **parameters), gather) for _ in range(count)]
        for call in calls:
            self.engine([call])
        return calls, gather


def request(name: str, **parameters: int) -> InferRequest:
    return InferRequest(name, {"x": Tensor.of("x", np.ones((1, 4), np.float32))}, parameters=dict(parameters))


@pytest.fixture
def world(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    for name in ("add_one", "on_gpu", "other"):
        repository.add_onnx(name, max_batch_size=1, extra="")
    repository.add("sequences", SEQUENCES, {"model.onnx": (repository.root / "add_one/1/model.onnx").read_bytes()})
    repository.add("ensemble", ENSEMBLE, {})
    made = World(repository.root, DeviceHealth(), monkeypatch)
    yield made
    made.may_execute.set()
    made.engine.close()


def test_models_of_the_device_are_refused_and_all_others_are_served(world: World) -> None:
    assert world.engine.is_ready()
    world.devices.fail("cuda:0", REASON)
    for name in ("on_gpu", "sequences", "ensemble"):
        (answer,) = infer(world.engine, [request(name, sequence_id=1, sequence_start=True)])
        assert isinstance(answer, DeviceLost)
        for part in ("cuda:0", REASON, "on_gpu" if name == "ensemble" else name):
            assert part in answer.message
    for name in ("add_one", "other"):
        (answer,) = infer(world.engine, [request(name)])
        assert isinstance(answer, InferResponse)
    assert world.engine.model("on_gpu").statistics.counts.fail.count == 2, "its own and the ensemble's"
    assert world.engine.model("add_one").statistics.counts.fail.count == 0


def test_every_place_that_tells_of_readiness_says_so(world: World) -> None:
    api = Api(world.engine)
    client = TestClient(http_api.make_app(api))
    grpc = methods(api)
    health = "/grpc.health.v1.Health/Check"
    assert client.get("/v2/models/on_gpu/ready").status_code == 200
    assert grpc[health].answer(b"") == SERVING
    world.devices.fail("cuda:0", REASON)
    assert client.get("/v2/health/live").status_code == 200
    assert client.get("/v2/health/ready").status_code == 400
    assert client.get("/v2/models/on_gpu/ready").status_code == 400
    assert client.get("/v2/models/add_one/ready").status_code == 200
    assert grpc[health].answer(b"") == NOT_SERVING
    assert grpc[SERVICE + "ServerReady"].answer(b"") == b""
    index = {entry["name"]: entry for entry in client.post("/v2/repository/index").json()}
    assert {name: entry["state"] for name, entry in index.items()} == {
        "add_one": "READY", "other": "READY", "on_gpu": "UNAVAILABLE", "sequences": "UNAVAILABLE",
        "ensemble": "UNAVAILABLE",
    }  # fmt: skip
    for name in ("on_gpu", "sequences", "ensemble"):
        assert "cuda:0" in index[name]["reason"] and REASON in index[name]["reason"]
    page = Metrics(world.engine).render()[0].decode()
    assert 'tutti_model_ready{model="on_gpu",version="1"} 0.0' in page
    assert 'tutti_model_ready{model="add_one",version="1"} 1.0' in page


@pytest.mark.parametrize("name", ["on_gpu", "sequences"])
def test_what_waits_is_refused_while_a_batch_hangs(world: World, name: str) -> None:
    world.may_execute.clear()
    (held,), first = world.start(name, 1, sequence_id=1, sequence_start=1)
    wait_until(lambda: world.made[name].begun)
    waiting, rest = world.start(name, 3, sequence_id=1)
    world.devices.fail("cuda:0", REASON)
    rest.wait()
    assert all(isinstance(call.answer, DeviceLost) for call in waiting)
    assert world.engine.model(name).pending() == 0
    assert held.answer is None, "what is inside is the instance's to answer"
    world.may_execute.set()
    first.wait()


def test_a_model_that_is_loaded_after_the_failure_is_refused_too(world: World) -> None:
    world.devices.fail("cuda:0", REASON)
    world.engine.load_all(["on_gpu"])
    (answer,) = infer(world.engine, [request("on_gpu")])
    assert isinstance(answer, DeviceLost)


def test_a_failure_between_the_check_and_the_queue_leaves_nobody_waiting(world: World) -> None:
    world.may_execute.clear()
    _, first = world.start("on_gpu", 1)
    wait_until(lambda: world.made["on_gpu"].begun)
    threads, answered = [], []
    for _ in range(8):
        thread = threading.Thread(target=lambda: answered.extend(infer(world.engine, [request("on_gpu")])))
        thread.start()
        threads.append(thread)
    world.devices.fail("cuda:0", REASON)
    for thread in threads:
        thread.join(30)
    assert [type(answer) for answer in answered] == [DeviceLost] * 8
    world.may_execute.set()
    first.wait()
