"""A graph whose models live in several pools: cut into segments, with the answers that it has in one process."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from tests.models import Repository
from tests.ray_app.test_cluster import metrics, replicas
from tests.serving import engine_over, infer, serving, wait_until
from tutti.core.types import InferRequest, InferResponse, Tensor

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(280)]

FOUR = 'input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 4 }'
ON_CPU = "instance_group { kind: KIND_CPU }"
TENFOLD = """
    x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
    if (x > 1000).any():
        return pb_utils.InferenceResponse(error=pb_utils.TritonError("input 'x' is too large"))
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", x * 10)])
"""


def step(model: str, out: str, x: str) -> str:
    maps = f'input_map {{ key: "x" value: "{x}" }} output_map {{ key: "y" value: "{out}" }}'
    return f'step {{ model_name: "{model}" model_version: -1 {maps} }}'


def add_graph(repository: Repository, name: str = "graph") -> None:
    """X * 10 on CPUs; where that is positive, + 2 in two steps on GPUs; then * 10 on CPUs."""
    given = 'input { name: "X" data_type: TYPE_FP32 dims: 4 }'
    made = "".join(f'output {{ name: "{one}" data_type: TYPE_FP32 dims: 4 }}' for one in ("Y", "B"))
    extra = "".join(
        f'parameters {{ key: "tutti.{key}" value {{ string_value: "{value}" }} }}'
        for key, value in (("when.A", "P[0] > 0"), ("default.B", "-1"))
    )
    steps = [step("prepare", "P", "X"), step("one", "A", "P"), step("two", "B", "A"), step("after", "Y", "B")]
    text = f'platform: "ensemble" max_batch_size: 8 {given} {made} {extra} ensemble_scheduling {{ {" ".join(steps)} }}'
    repository.add(name, text, {".keep": ""})


@pytest.fixture
def placed(tmp_path: Path) -> Repository:
    repository = Repository(tmp_path / "models")
    repository.add_onnx("one")
    repository.add_onnx("two")
    for name in ("prepare", "after"):
        repository.add_python(name, f'backend: "python" max_batch_size: 8 {FOUR} {ON_CPU}', TENFOLD)
    add_graph(repository)
    return repository


class Asker:
    """Requests to the graph over gRPC."""

    def __init__(self, address: str) -> None:
        self.client = grpcclient.InferenceServerClient(address)

    def __call__(self, x: np.ndarray, outputs: tuple[str, ...] = ("Y", "B"), **more: Any) -> dict[str, np.ndarray]:
        tensor = grpcclient.InferInput("X", list(x.shape), "FP32")
        tensor.set_data_from_numpy(x)
        wanted = [grpcclient.InferRequestedOutput(name) for name in outputs]
        result = self.client.infer("graph", [tensor], outputs=wanted, **{"client_timeout": 60, **more})
        return {name: result.as_numpy(name) for name in outputs}

    def explained(self) -> dict[str, Any]:
        tensor = grpcclient.InferInput("X", [1, 4], "FP32")
        tensor.set_data_from_numpy(np.ones((1, 4), np.float32))
        answer = self.client.infer("graph", [tensor], parameters={"tutti_explain": True}, client_timeout=60)
        found = json.loads(answer.get_response().parameters["tutti_explain"].string_param)
        assert isinstance(found, dict)
        return found


def expected(root: Path, arrays: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
    with engine_over(root) as engine:
        answers = infer(engine, [InferRequest("graph", {"X": Tensor.of("X", x)}) for x in arrays])
    made = []
    for answer in answers:
        assert isinstance(answer, InferResponse)
        made.append({output.name: output.array() for output in answer.outputs})
    return made


def check(ask: Asker, root: Path) -> None:
    numbers = np.random.default_rng(0)
    arrays = [numbers.normal(0, 5, (rows, 4)).astype(np.float32) for rows in (1, 3, 8, 1, 2)]
    for x, right in zip(arrays, expected(root, arrays), strict=True):
        got = ask(x)
        for name in right:
            np.testing.assert_allclose(got[name], right[name], rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(ask(x, ("B",))["B"], right["B"], rtol=1e-6)


def requests(page: str) -> dict[str, float]:
    lines = [line for line in page.splitlines() if line.startswith("tutti_pool_requests_total{")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in lines}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_by_the_kinds_of_instances(placed: Repository, tmp_path: Path) -> None:
    flags = ("--ray", "--num-gpus", "1", "--model-control-mode", "explicit", "--load-model", "*", "--log-verbose", "1")
    with serving(placed.root, tmp_path / "log", *flags) as served:
        ask = Asker(served.grpc)
        check(ask, placed.root)
        before = requests(metrics(served))
        assert (ask(np.ones((1, 4), np.float32))["Y"] == 120).all()
        after = requests(metrics(served))
        assert (after["gpu"] - before["gpu"], after["cpu"] - before["cpu"]) == (1, 2), "two steps are one hop"
        with pytest.raises(InferenceServerException) as failed:
            ask(np.full((1, 4), 2000, np.float32))
        assert "in ensemble 'graph', step 'prepare': input 'x' is too large" in str(failed.value)

        told = ask.explained()
        assert {step.get("pool") for step in told["steps"] if "skipped" not in step} == {"gpu", "cpu"}
        (joined,) = [step for step in told["steps"] if step.get("at_replica", {}).get("steps")]
        assert len(joined["at_replica"]["steps"]) == 2

        # A replica that comes back is told of the segment; until then the other pool has it, but for those who wait.
        for victim in replicas(served, "gpu"):
            os.kill(victim.pid, signal.SIGKILL)
        check(ask, placed.root)
        before = requests(metrics(served))
        assert (ask(np.ones((1, 4), np.float32), parameters={"tutti_fallback": False})["Y"] == 120).all()
        assert requests(metrics(served))["gpu"] == before["gpu"] + 1
        wait_until(lambda: bool(replicas(served, "gpu")), timeout_s=60)
        count = requests(metrics(served))["gpu"]
        wait_until(lambda: bool(ask(np.ones((1, 4), np.float32))) and requests(metrics(served))["gpu"] > count, 60)
        check(ask, placed.root)

        # Another graph under the same name.
        config = placed.root / "graph" / "config.pbtxt"
        config.write_text(config.read_text().replace('"-1"', '"-7"'))
        ask.client.load_model("graph")
        assert ask(np.full((1, 4), -1, np.float32))["B"].tolist() == [[-7.0] * 4]
        check(ask, placed.root)
        ask.client.unload_model("graph")
        with pytest.raises(InferenceServerException):
            ask(np.ones((1, 4), np.float32))
        ask.client.load_model("graph")
        check(ask, placed.root)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_by_a_placement_file(placed: Repository, tmp_path: Path) -> None:
    pools = [
        {"name": "encoders", "replicas": 2, "models": ["one", "t*"]},
        {"name": "front", "models": ["prepare", "after"]},
    ]
    file = tmp_path / "placement.yaml"
    file.write_text(json.dumps({"pools": pools}))  # JSON is YAML
    with serving(placed.root, tmp_path / "log", "--ray", "--placement", str(file)) as served:
        ask = Asker(served.grpc)
        check(ask, placed.root)
        assert set(requests(metrics(served))) == {"encoders", "front"}
        assert len(replicas(served, "encoders")) == 2


def test_a_placement_that_leaves_a_model_out_says_why(placed: Repository, tmp_path: Path) -> None:
    file = tmp_path / "placement.yaml"
    file.write_text('pools: [{name: front, models: ["prepare", "after", "one"]}]')
    refused = pytest.raises(RuntimeError, match="model 'two': no pool takes it: front does not list it")
    with refused, serving(placed.root, tmp_path / "log", "--ray", "--placement", str(file)):
        pytest.fail("it has started")
