"""Which GPUs a process sees, and with which numbers."""

import logging
import sys
from types import SimpleNamespace

import pytest

from tests.devices.fake_nvml import Card, FakeNvml
from tutti.devices.nvml import Nvml, gpu_count, selected

A, B, C = "GPU-aa11-1", "GPU-aa22-2", "GPU-bb33-3"
MIG = "MIG-cc44-4"


@pytest.mark.parametrize(
    ("visible", "shown"),
    [
        (None, [A, B, C]),
        ("", []),
        ("0", [A]),
        ("2,0", [C, A]),
        (" 1 , 2 ", [B, C]),
        ("-1", []),
        ("1,-1,2", [B]),
        ("0,3,1", [A]),
        ("NoDevFiles", []),
        ("1gpu2,2ampere", [B, C]),
        ("1,1", []),
        ("0,GPU-aa11-1", []),
        (C, [C]),
        (f"{C},{A}", [C, A]),
        ("GPU-bb", [C]),
        ("GPU-aa", []),
        (f"GPU-ff,{A}", []),
        (f"{A},GPU-ff,{B}", [A]),
        (MIG, [MIG]),
        (f"{A},", [A]),
    ],
)
def test_cuda_visible_devices(visible: str | None, shown: list[str]) -> None:
    assert selected(visible, [A, B, C]) == shown


def machine(*cards: Card, environment: dict[str, str] | None = None, mig: dict[str, Card] | None = None) -> Nvml:
    return Nvml(FakeNvml(*cards, mig=mig), {} if environment is None else environment)


def test_gpus_have_cudas_numbers() -> None:
    cards = Card(A), Card(B, total=16 << 30), Card(C)
    gpus = machine(*cards, environment={"CUDA_VISIBLE_DEVICES": "2,1"}).gpus()
    assert [(gpu.number, gpu.device, gpu.uuid) for gpu in gpus] == [(0, "cuda:0", C), (1, "cuda:1", B)]
    assert [gpu.memory_bytes >> 30 for gpu in gpus] == [80, 16]
    assert {gpu.name for gpu in gpus} == {"NVIDIA H100 80GB HBM3"}


def test_the_environment_is_read_anew() -> None:
    environment: dict[str, str] = {}
    nvml = machine(Card(A), Card(B), environment=environment)
    assert gpu_count(nvml) == 2
    environment["CUDA_VISIBLE_DEVICES"] = "1"
    assert [gpu.uuid for gpu in nvml.gpus()] == [B]
    environment["CUDA_VISIBLE_DEVICES"] = ""
    assert gpu_count(nvml) == 0 and not nvml.may_have_gpus()


def test_a_mig_device_is_known_by_its_uuid() -> None:
    environment = {"CUDA_VISIBLE_DEVICES": MIG}
    gpus = machine(Card(A), environment=environment, mig={MIG: Card(MIG, "H100 MIG 1g.10gb", 10 << 30)}).gpus()
    assert [(gpu.number, gpu.uuid, gpu.memory_bytes) for gpu in gpus] == [(0, MIG, 10 << 30)]


def test_a_mig_device_that_the_driver_does_not_know_is_left_out() -> None:
    assert machine(Card(A), environment={"CUDA_VISIBLE_DEVICES": f"{MIG},0"}).gpus()[0].uuid == A


def test_a_card_that_does_not_answer_is_left_out() -> None:
    assert [gpu.uuid for gpu in machine(Card(A, is_lost=True), Card(B)).gpus()] == [B]


def test_a_card_may_lack_name_and_memory() -> None:
    lacks = {"nvmlDeviceGetMemoryInfo", "nvmlDeviceGetName"}
    (gpu,) = machine(Card(A, lacks=lacks)).gpus()
    assert (gpu.name, gpu.memory_bytes) == ("", 0)


def test_without_a_driver_there_are_no_gpus_and_one_line(caplog: pytest.LogCaptureFixture) -> None:
    nvml = Nvml(FakeNvml(Card(A), has_driver=False), {})
    with caplog.at_level(logging.DEBUG, "tutti.devices.nvml"):
        assert nvml.gpus() == () and nvml.gpus() == () and not nvml.is_open()
    assert [record.levelname for record in caplog.records] == ["DEBUG"]


def test_without_the_library_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # an import of it fails
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    nvml = Nvml(environment={})
    assert nvml.gpus() == () and gpu_count(nvml) == 0


def test_the_library_is_imported_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml(Card(A), Card(B))
    nvml = Nvml(environment={})
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert gpu_count(nvml) == 2 and gpu_count(nvml) == 2
    assert fake.initialized == 1


def test_pytorch_counts_where_nvml_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(device_count=lambda: 3)))
    assert gpu_count(Nvml(FakeNvml(has_driver=False), {})) == 3
    assert gpu_count(machine(Card(A))) == 1


@pytest.mark.parametrize(("visible", "may"), [(None, True), ("0", True), ("", False), ("-1", False)])
def test_what_is_certain_without_nvml(visible: str | None, may: bool) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert Nvml(FakeNvml(has_driver=False), environment, driver="libc.so.6").may_have_gpus() is may
    assert not Nvml(FakeNvml(has_driver=False), environment, driver="libnone.so.1").may_have_gpus()


@pytest.mark.parametrize(
    ("environment", "lines"),
    [
        ({}, 1),
        ({"CUDA_VISIBLE_DEVICES": "0"}, 1),
        ({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, 0),
        ({"CUDA_VISIBLE_DEVICES": f"{B},{A}"}, 0),
    ],
)
def test_numbers_that_may_be_others_are_told_of_once(
    environment: dict[str, str], lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    nvml = machine(Card(A), Card(B, "NVIDIA T4"), environment=environment)
    assert nvml.gpus() and nvml.gpus()
    assert sum("CUDA_DEVICE_ORDER" in record.message for record in caplog.records) == lines


@pytest.mark.gpu
def test_nvml_and_cuda_see_the_same_gpus() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    pytest.importorskip("pynvml")
    from tutti.devices import nvml

    gpus = nvml.visible_gpus()
    properties = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    assert [gpu.uuid.removeprefix("GPU-") for gpu in gpus] == [str(one.uuid) for one in properties]
    assert [gpu.name for gpu in gpus] == [one.name for one in properties]
