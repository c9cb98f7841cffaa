"""A replica that no longer executes is found, and replaced."""

import time
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from demo.client import Client
from tests.models import IN_PROCESS, Repository
from tests.ray_app.conftest import Application
from tests.ray_app.test_cluster import replicas
from tests.serving import engine_over, infer, serving, wait_until
from tutti.core.errors import (
    DeadlineExceeded,
    DeviceLost,
    InferError,
    Internal,
    InvalidArgument,
    NotFound,
    OutOfMemory,
    Unavailable,
    Unknown,
)
from tutti.core.types import InferResponse
from tutti.ray_app.health import IDLE_S, Prober, Pulse, request_for
from tutti.repository import config
from tutti.repository.model_config import ModelConfig


def test_what_is_inside_and_does_not_end_is_stuck() -> None:
    pulse = Pulse(at_s=0.0)
    assert not pulse.stuck(1000.0, 60)
    assert pulse.is_idle(IDLE_S + 1)
    pulse.begins("m", 1000.0)
    pulse.begins("m", 1050.0)
    assert not pulse.stuck(1060.0, 60)
    assert pulse.stuck(1061.0, 60) == "m"
    pulse.ends("m", 1070.0)
    assert not pulse.stuck(1130.0, 60), "something ends now and then"
    assert not pulse.is_idle(1130.0)
    pulse.ends("m", 1131.0)
    assert not pulse.stuck(9999.0, 60)
    assert pulse.inside == 0


def test_a_model_that_hangs_is_not_hidden_by_one_that_is_busy() -> None:
    pulse = Pulse()
    pulse.begins("hangs", 1000.0)
    for second in range(1000, 1070):
        pulse.begins("busy", second)
        pulse.ends("busy", second + 0.9)
    assert pulse.stuck(1060.0, 60) == ""
    assert pulse.stuck(1070.0, 60) == "hangs"
    assert not pulse.is_idle(1070.0 + 2 * IDLE_S), "something is inside"


FLOATS = 'input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 4 }'
RESPONSE = InferResponse("a", "1", [])


def onnx(*names: str) -> list[ModelConfig]:
    return [config.parse(f'backend: "onnxruntime" {FLOATS}', name) for name in names]


@pytest.mark.parametrize("error", [Internal("CUDA failure 700"), Unknown("?"), OutOfMemory("0 bytes")])
def test_an_error_of_a_model_that_has_answered_is_a_symptom(error: InferError) -> None:
    prober = Prober()
    request = prober.request(onnx("a"))
    assert request is not None
    assert prober.symptom(request, RESPONSE) == ""
    assert error.message in prober.symptom(request, error)
    assert "'a'" in prober.symptom(request, error)
    assert prober.request(onnx("a")) is not None, "it is asked again: Serve believes only several failures in a row"


@pytest.mark.parametrize(
    "error", [InvalidArgument("empty"), Unavailable("full"), NotFound("gone"), DeadlineExceeded("late")]
)
def test_an_error_of_the_request_is_none(error: InferError) -> None:
    prober = Prober()
    request = prober.request(onnx("a"))
    assert request is not None
    prober.symptom(request, RESPONSE)
    assert prober.symptom(request, error) == ""


def test_a_model_that_never_liked_the_request_says_nothing_and_another_is_asked() -> None:
    prober = Prober()
    request = prober.request(onnx("a", "b"))
    assert request is not None and request.model_name == "a"
    assert prober.symptom(request, Internal("the kernel is larger than the input")) == ""
    request = prober.request(onnx("a", "b"))
    assert request is not None and request.model_name == "b"
    assert prober.request(onnx("a")) is None


def test_a_lost_device_is_a_symptom_at_any_time() -> None:
    prober = Prober()
    request = prober.request(onnx("a"))
    assert request is not None
    assert "cuda:0" in prober.symptom(request, DeviceLost("device cuda:0 has failed"))


def test_the_request_that_is_made_is_answered(repository: Repository) -> None:
    repository.add_onnx()
    with engine_over(repository.root) as engine:
        request = request_for(engine.model("add_one").config)
        assert request is not None
        (answer,) = infer(engine, [request])
        assert isinstance(answer, InferResponse)
        assert answer.outputs[0].array().tolist() == [[1.0] * 4]


def test_none_is_made_for_a_model_that_may_do_something_with_it() -> None:
    tensors = 'input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 4 }'
    assert request_for(config.parse(f'backend: "python" {tensors}', "m")) is None
    assert request_for(config.parse(f'backend: "onnxruntime" {tensors}', "m")) is not None


HANGS = """
    import time
    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
    while (x == 14).any():
        time.sleep(1)
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", x + 1)])
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_replica_whose_model_hangs_is_replaced(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "models")
    four = 'input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 4 }'
    repository.add_python("hangs", f'backend: "python" max_batch_size: 8 {four}', HANGS)
    flags = ("--ray", "--cpu-replicas", "1", "--hang-timeout-secs", "3")
    with serving(repository.root, tmp_path / "log", *flags) as served:
        client = Client("grpc", served.grpc)
        good = {"x": np.ones((1, 4), np.float32)}
        assert client.infer("hangs", good)[0]["y"].tolist() == [[2.0] * 4]
        (before,) = replicas(served, "cpu")
        tensor = grpcclient.InferInput("x", [1, 4], "FP32")
        tensor.set_data_from_numpy(np.full((1, 4), 14, np.float32))
        with (
            grpcclient.InferenceServerClient(served.grpc) as hurried,
            pytest.raises(InferenceServerException, match="Deadline"),
        ):
            hurried.infer("hangs", [tensor], client_timeout=1)
        start = time.monotonic()
        wait_until(lambda: before.pid not in {one.pid for one in replicas(served, "cpu")}, timeout_s=60)
        assert client.infer("hangs", good)[0]["y"].tolist() == [[2.0] * 4]
        assert time.monotonic() - start < 60


LOSES_ITS_DEVICE = """
    from tutti.devices.health import health
    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
    if (x == 14).any():
        health.fail("cuda:0", "test: device-side assert")
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", x + 1)])
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_replica_whose_device_fails_ends_and_no_request_to_others_is_lost(application: Application) -> None:
    served, repository = application.served, application.repository
    repository.add_python("fragile", f'backend: "python" max_batch_size: 8 {FLOATS} {IN_PROCESS}', LOSES_ITS_DEVICE)
    repository.add_onnx("good")
    for name in ("fragile", "good"):
        application.load(name)
    client = Client("grpc", served.grpc)
    good = {"x": np.ones((1, 4), np.float32)}
    before = {one.pid for one in replicas(served, "cpu")}
    assert len(before) == 2
    answer, _ = client.infer("fragile", {"x": np.full((1, 4), 14, np.float32)})
    assert answer["y"].tolist() == [[15.0] * 4], "who was inside is answered"
    wait_until(lambda: before - {one.pid for one in replicas(served, "cpu")}, timeout_s=60)
    for _ in range(50):
        assert client.infer("good", good)[0]["y"].tolist() == [[2.0] * 4]
    wait_until(lambda: len({one.pid for one in replicas(served, "cpu")}) == 2, timeout_s=90)
    assert len(before & {one.pid for one in replicas(served, "cpu")}) == 1, "the other was left alone"
