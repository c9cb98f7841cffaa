"""Which instances a model has, and where: as Triton places them."""

import json

import numpy as np
import pytest

from tests.models import Repository, onnx_add_one
from tests.serving import engine_over, infer
from tutti.backends import onnxruntime, placement
from tutti.core.errors import ConfigError, InferError
from tutti.core.types import InferRequest, Tensor
from tutti.devices import process_engines
from tutti.devices.simulated import SIMULATED
from tutti.repository import config

TENSORS = 'input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 4 }'


def placed(groups: str, gpus: int, can_use_gpus: bool = True) -> list[tuple[str, int]]:
    parsed = config.parse(f'backend: "python" {TENSORS} {groups}', "m")
    return [(group.kind, number) for group, number in placement.instances(parsed, can_use_gpus, gpus)]


@pytest.mark.parametrize(
    ("groups", "gpus", "where"),
    [
        ("", 0, [("auto", 0)]),
        ("", 3, [("gpu", 0), ("gpu", 1), ("gpu", 2)]),
        ("instance_group { count: 2 }", 2, [("gpu", 0), ("gpu", 0), ("gpu", 1), ("gpu", 1)]),
        ("instance_group { kind: KIND_GPU }", 2, [("gpu", 0), ("gpu", 1)]),
        ("instance_group { kind: KIND_GPU gpus: [ 0, 2 ] }", 3, [("gpu", 0), ("gpu", 2)]),
        ("instance_group { gpus: 1 count: 2 }", 2, [("gpu", 1), ("gpu", 1)]),
        ("instance_group { kind: KIND_CPU count: 2 }", 2, [("cpu", 0), ("cpu", 0)]),
        ("instance_group { kind: KIND_CPU gpus: [ 0, 5 ] }", 2, [("cpu", 0)]),
        # Several groups keep their order.
        (
            "instance_group { kind: KIND_CPU } instance_group { kind: KIND_GPU }",
            2,
            [("cpu", 0), ("gpu", 0), ("gpu", 1)],
        ),
        # Without GPUs the backend says what it makes of the kind.
        ("instance_group { kind: KIND_GPU count: 2 }", 0, [("gpu", 0), ("gpu", 0)]),
        ("instance_group { gpus: [ 0, 2 ] }", 0, [("auto", 0), ("auto", 2)]),
    ],
)
def test_instances_by_groups_and_gpus(groups: str, gpus: int, where: list[tuple[str, int]]) -> None:
    assert placed(groups, gpus) == where


def test_a_backend_without_cuda_has_its_instances_once() -> None:
    assert placed("instance_group { count: 2 }", 4, can_use_gpus=False) == [("auto", 0), ("auto", 0)]


@pytest.mark.parametrize(("gpus", "asked"), [("[ 0, 2 ]", 2), ("[ -1 ]", -1)])
def test_a_gpu_that_does_not_exist_is_refused(gpus: str, asked: int) -> None:
    with pytest.raises(ConfigError) as refusal:
        placed(f"instance_group {{ kind: KIND_CPU }} instance_group {{ gpus: {gpus} }}", 2)
    expected = "expected numbers below 2, as many GPUs as this process sees"
    assert str(refusal.value) == f"model 'm': instance_group[1].gpus: {expected}, got {asked}"


def test_by_default_the_gpus_of_this_process_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "gpu_count", lambda: 2)
    parsed = config.parse(f'backend: "python" {TENSORS}', "m")
    assert [number for _, number in placement.instances(parsed)] == [0, 1]


def test_a_python_model_is_told_its_gpu(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "gpu_count", lambda: 2)
    code = (
        "import json, pathlib\n"
        "class TritonPythonModel:\n"
        "    def initialize(self, args):\n"
        "        told = {key: args['model_instance_' + key] for key in ('kind', 'device_id', 'name')}\n"
        "        with open(pathlib.Path(__file__).parent / 'told', 'a') as file:\n"
        "            file.write(json.dumps(list(told.values())) + '\\n')\n"
    )
    repository.add("m", f'backend: "python" {TENSORS}', {"model.py": code})
    with engine_over(repository.root) as engine:
        assert not engine.failures()
    told = [json.loads(line) for line in (repository.root / "m" / "1" / "told").read_text().splitlines()]
    assert sorted(told) == [["GPU", "0", "m_0_0"], ["GPU", "1", "m_0_0"]], (
        "in Triton, too, each GPU has the names of its group"
    )


@pytest.mark.parametrize("listed", [False, True])
def test_onnxruntime_has_cuda_only_where_there_may_be_a_gpu(monkeypatch: pytest.MonkeyPatch, listed: bool) -> None:
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"] if listed else ["CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime.ort, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime.nvml, "may_have_gpus", lambda: True)
    assert onnxruntime._has_cuda() is listed
    monkeypatch.setattr(onnxruntime.nvml, "may_have_gpus", lambda: False)
    assert not onnxruntime._has_cuda()


@pytest.mark.usefixtures("simulated_gpu")
def test_onnxruntime_on_two_gpus_has_a_session_on_each(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SIMULATED, "2")
    monkeypatch.setattr(onnxruntime, "_has_cuda", lambda: True)
    devices: list[str] = []
    session = onnxruntime._session
    monkeypatch.setattr(
        onnxruntime, "_session", lambda config, path, device: devices.append(device) or session(config, path, "cpu")
    )
    repository.add("m", f'backend: "onnxruntime" max_batch_size: 4 {TENSORS}', {"model.onnx": onnx_add_one()})
    with engine_over(repository.root) as engine:
        assert not engine.failures()
        (answer,) = infer(engine, [InferRequest("m", {"x": Tensor.of("x", np.ones((1, 4), np.float32))})])
        assert not isinstance(answer, InferError), answer
        assert (
            len(process_engines.engine_of("cuda:0").pipelines())
            == len(process_engines.engine_of("cuda:1").pipelines())
            == 1
        )
    assert devices == ["cuda:0", "cuda:1"]
