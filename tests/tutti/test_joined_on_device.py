"""A library that submits and waits by itself, as onnxruntime on CUDA: its turns and its errors, with a fake of it."""

import threading
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pytest

from tests.models import Repository
from tests.serving import engine_over, infer
from tutti.backends import registry
from tutti.backends.joined import JoinedBackend
from tutti.core.dtypes import Array
from tutti.core.errors import DeviceLost, Internal, InvalidArgument, OutOfMemory
from tutti.core.types import Call, InferRequest, InferResponse, Tensor
from tutti.devices import health, process_engines
from tutti.devices.engine import DeviceEngine
from tutti.devices.simulated import SimulatedDevice, SimulatedFault, SimulatedMemoryError
from tutti.repository import config

pytestmark = pytest.mark.usefixtures("simulated_gpu")

TEXT = """
backend: "onnxruntime" max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 4 }
dynamic_batching { }
"""
PICKY, LOST, REFUSED = 13.0, 99.0, 77.0


class Fake(JoinedBackend):
    """y = x + 1. Has memory for `most` rows, fails on a picky row, and loses its device with another."""

    library = "a fake"

    def __init__(self, text: str = TEXT, most: int = 8) -> None:
        super().__init__(config.parse(text, "m"), "1", "cuda:0")
        self.most = most
        self.ran: list[int] = []
        self.has_turn: list[bool] = []

    def run(self, names: Sequence[str], feed: Mapping[str, Array]) -> Sequence[Array]:
        x = feed["x"]
        self.ran.append(len(x))
        self.has_turn.append(len(device()._executions.granted) == 1)
        if len(x) > self.most:
            raise SimulatedMemoryError("none left")
        if (x == LOST).any():
            simulated = device().device
            assert isinstance(simulated, SimulatedDevice)
            simulated.fail("device-side assert")
            raise SimulatedFault("device-side assert")
        if (x == REFUSED).any():
            raise InvalidArgument("seven")
        if (x == PICKY).any():
            raise ValueError("thirteen")
        return [x + 1]


def device() -> DeviceEngine:
    (engine,) = process_engines.engines()
    return engine


def request(value: float) -> InferRequest:
    return InferRequest("m", {"x": Tensor.of("x", np.full((1, 4), value, np.float32))})


def execute(backend: JoinedBackend, *values: float) -> list[object]:
    calls = [Call(request(value), None) for value in values]  # type: ignore[arg-type]
    return [
        float(answer.tensor("y").array()[0, 0]) if isinstance(answer, InferResponse) else answer
        for answer in backend.execute(calls)
    ]


@pytest.fixture
def fake() -> Iterator[Fake]:
    made = Fake()
    yield made
    made.close()
    assert not device().pipelines()


def test_it_runs_within_a_turn_that_is_measured(fake: Fake) -> None:
    assert execute(fake, 1, 2, 3) == [2, 3, 4]
    assert fake.ran == [3] and fake.has_turn == [True]
    assert not device()._executions.granted
    assert device().model_ns["m"] > 0


def test_only_the_request_that_fails_fails(fake: Fake) -> None:
    one, bad, refused, two = execute(fake, 1, PICKY, REFUSED, 2)
    assert (one, two) == (2, 3)
    assert isinstance(bad, Internal) and "model 'm': a fake failed on input 'x' FP32[1, 4]: thirteen" in bad.message
    assert isinstance(refused, InvalidArgument) and refused.message == "model 'm': seven"
    assert all(fake.has_turn) and not device()._executions.granted
    assert not health.health.failures()


def test_too_little_memory_is_no_failure_of_the_device(fake: Fake) -> None:
    fake.most = 2
    with pytest.raises(OutOfMemory, match="a fake has no memory left on cuda:0"):
        execute(fake, 1, 2, 3)
    assert fake.ran == [3], "whoever asked makes the batch smaller"
    assert execute(fake, 1, 2) == [2, 3]
    assert not health.health.failures()


def test_a_lost_device_is_told_to_all_and_nothing_is_tried_again(fake: Fake) -> None:
    with pytest.raises(DeviceLost, match="model 'm': device cuda:0 has failed: device-side assert"):
        execute(fake, 1, LOST, 2)
    assert fake.ran == [3]
    assert health.health.reason("cuda:0") == device().lost == "device-side assert"
    with pytest.raises(DeviceLost, match=r"'m': device cuda:0 has failed \(device-side assert\)"):
        execute(fake, 1)
    assert fake.ran == [3]


def test_who_waits_for_a_turn_is_told_too(fake: Fake) -> None:
    held = [device().begin_turn(device().pipeline("other")) for _ in range(2)]
    raised: list[Exception] = []

    def run() -> None:
        try:
            execute(fake, 1)
        except DeviceLost as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    health.health.fail("cuda:0", "test")
    thread.join(30)
    assert len(raised) == 1 and not fake.ran
    for turn in held:
        device().end_turn(turn)
    for pipeline in device().pipelines():
        if pipeline.name == "other":
            pipeline.close()


@pytest.mark.parametrize(("priority", "weight"), [("", 1.0), ("PRIORITY_MAX", 2.0), ("PRIORITY_MIN", 0.5)])
def test_its_share_and_its_limit_are_as_configured(priority: str, weight: float) -> None:
    text = TEXT + 'parameters { key: "tutti.hang_timeout_s" value { string_value: "1.5" } }'
    made = Fake(text + (f" optimization {{ priority: {priority} }}" if priority else ""))
    (pipeline,) = device().pipelines()
    assert (pipeline.weight, pipeline.hang_ns) == (weight, 1_500_000_000)
    made.close()


def test_batches_are_halved_where_memory_is_too_little(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Fake] = []

    def load(folder: object, version: int, serve: object) -> list[Fake]:
        made.append(Fake(most=2))
        return made

    monkeypatch.setattr(registry, "load", load)
    repository.add("m", TEXT, {"model.onnx": b"none"})
    with engine_over(repository.root) as engine:
        answers = infer(engine, [request(n) for n in range(8)])
        assert [float(a.tensor("y").array()[0, 0]) for a in answers if isinstance(a, InferResponse)] == [
            n + 1.0 for n in range(8)
        ]
        assert max(made[0].ran) > 2
        made[0].ran.clear()
        infer(engine, [request(n) for n in range(8)])
        assert max(made[0].ran) <= 2, "it is remembered"
        assert engine.model("m").is_ready()
    assert not device().pipelines()
