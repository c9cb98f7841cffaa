"""The TensorRT backend as far as no GPU is needed: what a plan must agree with, and what is said where it does not."""

from types import SimpleNamespace

import pytest

from tests.models import Repository
from tests.tutti.test_pytorch_backend import load_error
from tutti.core.errors import ConfigError, InvalidArgument
from tutti.repository import config

torch = pytest.importorskip("torch")
tensorrt = pytest.importorskip("tutti.backends.tensorrt")

CONFIG = """
backend: "tensorrt" max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: 4 }
output { name: "y" data_type: TYPE_FP16 dims: 2 }
"""
TRT = SimpleNamespace(TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"))


class Engine:
    """The questions that TensorRT's engine answers, with a table for answers."""

    def __init__(self, tensors: dict[str, tuple[str, str]], largest: int = 8) -> None:
        self._tensors = tensors
        self._largest = largest
        self.num_io_tensors = len(tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> str:
        return self._tensors[name][0]

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=self._tensors[name][1])

    def get_tensor_profile_shape(self, name: str, profile: int) -> tuple[tuple[int, ...], ...]:
        return (1, 4), (4, 4), (self._largest, 4)


GOOD = {"x": ("in", "FLOAT"), "y": ("out", "HALF")}


def test_a_plan_that_agrees_passes() -> None:
    tensorrt.check(config.parse(CONFIG, "m"), Engine(GOOD), TRT)


@pytest.mark.parametrize(
    ("engine", "why"),
    [
        (Engine({**GOOD, "x": ("in", "HALF")}), "input 'x': configured as FP32, the plan has FP16"),
        (Engine({"y": GOOD["y"], "z": GOOD["x"]}), r"input 'x': the plan has \['z'\]"),
        (Engine({**GOOD, "z": GOOD["x"]}), r"the plan also needs \['z'\]"),
        (Engine({"x": GOOD["x"]}), r"output 'y': the plan has \[\]"),
        (Engine(GOOD, largest=4), "max_batch_size is 8, the plan's profile ends at 4"),
    ],
)
def test_a_plan_that_does_not_is_refused_by_name(engine: Engine, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        tensorrt.check(config.parse(CONFIG, "m"), engine, TRT)


def test_a_shape_outside_of_the_profile_is_told() -> None:
    profile = tensorrt._Profile(Engine(GOOD), ["x"])
    profile.check({"x": (8, 4)})
    with pytest.raises(
        InvalidArgument, match=r"input 'x': the plan takes shapes from \[1, 4\] to \[8, 4\], got \[9, 4\]"
    ):
        profile.check({"x": (9, 4)})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_or_tensorrt_loading_says_so(repository: Repository) -> None:
    repository.add("m", CONFIG, {"model.plan": b"plan"})
    assert "needs a GPU" in load_error(repository) or "needs TensorRT" in load_error(repository)
