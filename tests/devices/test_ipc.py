"""CudaIpc through the real cuda-bindings: over a driver of our own, and over the real one where there is a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.devices import driver
from tutti.core.errors import Unsupported
from tutti.devices.ipc import CudaIpc

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def our_driver(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return driver.build(tmp_path_factory.mktemp("driver"))


def play(scenario: str, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "tests.devices.ipc_scenarios", scenario]
    ended = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert ended.returncode == 0, ended.stderr


ON_EITHER = ("reads_and_writes", "opens_count", "refuses", "serves_threads")
ON_OURS = (
    "refuses_what_is_freed", "gives_way_to_other_threads", "leaves_the_thread_as_it_was", "names_what_failed",
)  # fmt: skip


@pytest.mark.parametrize("scenario", [*ON_EITHER, *ON_OURS])
def test_over_a_driver_of_our_own(scenario: str, our_driver: dict[str, str]) -> None:
    play(scenario, our_driver)


def test_without_devices_it_says_so(our_driver: dict[str, str]) -> None:
    play("says_that_there_is_no_device", our_driver | {"FAKE_CUDA_DEVICES": "0"})


@pytest.mark.gpu
@pytest.mark.parametrize("scenario", ON_EITHER)
def test_over_the_real_driver(scenario: str) -> None:
    driver.need_gpu()
    play(scenario, {})


def test_without_the_bindings_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(Unsupported, match=r"cuda-bindings is missing: .*pip install .*\[gpu\]'"):
        CudaIpc().open(bytes(64), 0)


def test_without_a_driver_it_says_so() -> None:
    driver.need_bindings()
    if driver.has_gpu():
        pytest.skip("there is one")
    with pytest.raises(Unsupported, match=r"no NVIDIA driver|no CUDA device can be used"):
        CudaIpc().open(bytes(64), 0)
