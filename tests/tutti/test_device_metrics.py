"""What the metrics page says of devices: nothing without one, and of a simulated one what it has done."""

import logging
import threading
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.models import Repository
from tests.serving import engine_over, infer
from tests.tutti.test_device_backend import IDS, Embed, ids_request
from tests.tutti.test_pytorch_backend import scripted
from tutti.core.errors import DeviceLost
from tutti.devices import health, process_engines
from tutti.frontends.v2.metrics_page import Metrics
from tutti.serving.engine import Engine

if TYPE_CHECKING:
    import torch
else:
    torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# 100 vectors of 4 numbers with 32 bits.
TABLE_BYTES = 100 * 4 * 4


class Tied(torch.nn.Module):
    """The same table twice, a buffer, a constant, and what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(100, 4)
        self.other = torch.nn.Embedding(100, 4)
        self.other.weight = self.table.weight
        self.register_buffer("offset", torch.zeros(4))
        self.scale = torch.ones(3)[:1]
        self.name = "tied"

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return (self.table(ids) + self.other(ids) + self.offset) * self.scale


def values(engine: Engine) -> dict[str, float]:
    """ "name value ..." -> value, of the families of devices, their labels in the order of the labels' names."""
    page = Metrics(engine).render()[0].decode()
    return {
        " ".join((sample.name, *sample.labels.values())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if "device" in sample.labels or "pinned_memory_pool" in sample.name
    }


def test_without_a_device_there_is_nothing(repository: Repository) -> None:
    repository.add_onnx()
    with engine_over(repository.root) as engine:
        assert values(engine) == {}


@pytest.mark.usefixtures("simulated_gpu")
def test_what_a_device_has_done(repository: Repository, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("m", "other"):
        repository.add(name, IDS.replace("KIND_GPU", "KIND_GPU count: 2"), {"model.pt": scripted(Embed())})
    with caplog.at_level(logging.INFO), engine_over(repository.root) as engine:
        infer(engine, [ids_request(n) for n in range(50)])
        page = values(engine)
        assert page["tutti_device_busy_seconds_total cuda:0"] > 0
        assert page["tutti_device_busy_seconds_total cuda:0"] == pytest.approx(
            page["tutti_device_model_seconds_total cuda:0 m"]
        )
        assert page["tutti_device_pinned_bytes cuda:0"] == process_engines.engine_of("cuda:0").arena.bytes > 0
        assert page["nv_pinned_memory_pool_total_bytes"] == page["tutti_device_pinned_bytes cuda:0"]
        assert 0 < page["nv_pinned_memory_pool_used_bytes"] <= page["nv_pinned_memory_pool_total_bytes"]
        assert page["tutti_device_failed cuda:0"] == 0
        for name in ("m", "other"):
            assert page[f"tutti_model_device_memory_bytes cuda:0 {name} 1"] == TABLE_BYTES, "both instances share it"
    assert "model 'm' version 1: 0.0 MiB on cuda:0" in caplog.text
    before = page["tutti_device_model_seconds_total cuda:0 m"]
    with engine_over(repository.root) as engine:
        infer(engine, [ids_request(1)])
        assert values(engine)["tutti_device_model_seconds_total cuda:0 m"] > before, "a reload does not set it back"
    assert "tutti_model_device_memory_bytes cuda:0 m 1" not in values(engine)


@pytest.mark.usefixtures("simulated_gpu")
def test_memory_that_is_shared_counts_once(repository: Repository) -> None:
    from tutti.backends.torch_modules import _held_bytes

    own_bytes = TABLE_BYTES + 4 * 4 + 3 * 4
    assert _held_bytes(Tied()) == own_bytes
    assert _held_bytes(lambda ids: ids) == 0
    example = (torch.zeros(2, 3, dtype=torch.int64),)
    assert _held_bytes(torch.export.export(Tied(), example).module()) == own_bytes
    repository.add("m", IDS, {"model.pt": scripted(Tied())})
    with engine_over(repository.root) as engine:
        in_script = values(engine)["tutti_model_device_memory_bytes cuda:0 m 1"]
    assert in_script == own_bytes - 3 * 4, "TorchScript does not tell of constants"


@pytest.mark.usefixtures("simulated_gpu")
def test_a_device_that_has_failed_is_shown_and_is_not_asked(repository: Repository) -> None:
    repository.add("m", IDS, {"model.pt": scripted(Embed())})
    with engine_over(repository.root) as engine:
        device_engine = process_engines.engine_of("cuda:0")
        health.health.fail("cuda:0", "test")
        health.health.fail("cuda:7", "one that nothing runs on")
        (answer,) = infer(engine, [ids_request(1)])
        assert isinstance(answer, DeviceLost)
        pages = []
        with device_engine._lock:  # as somebody who waits for the device
            reader = threading.Thread(target=lambda: pages.append(values(engine)), daemon=True)
            reader.start()
            reader.join(30)
        assert [pages[0][f"tutti_device_failed cuda:{n}"] for n in (0, 7)] == [1, 1]
