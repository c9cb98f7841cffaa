"""A replica that no longer executes is found, and replaced."""

import time
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from demo.client import Client
from ray_app.health import IDLE_S, Pulse, request_for
from tests.models import Repository
from tests.ray_app.test_cluster import replicas
from tests.serving import engine_over, infer, serving, wait_until
from tutti import config
from tutti.types import InferResponse


def test_what_is_inside_and_does_not_end_is_stuck() -> None:
    pulse = Pulse(at_s=0.0)
    assert not pulse.is_stuck(1000.0, 60)
    assert pulse.is_idle(IDLE_S + 1)
    pulse.begins(1000.0)
    pulse.begins(1050.0)
    assert not pulse.is_stuck(1060.0, 60)
    assert pulse.is_stuck(1061.0, 60)
    pulse.ends(1070.0)
    assert not pulse.is_stuck(1130.0, 60), "something ends now and then"
    assert not pulse.is_idle(1130.0)
    pulse.ends(1131.0)
    assert not pulse.is_stuck(9999.0, 60)


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
