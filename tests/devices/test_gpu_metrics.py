"""GPUs on the metrics page."""

import asyncio
import threading
from pathlib import Path

import pytest

from tests.devices.fake_nvml import Card, FakeNvml
from tutti.devices.gpu_metrics import GpuMetrics
from tutti.devices.nvml import Nvml
from tutti.frontends.v2.metrics_page import Metrics
from tutti.serving.engine import Engine


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def samples(metrics: GpuMetrics) -> dict[str, dict[str, float]]:
    return {
        family.name: {sample.labels["gpu_uuid"]: sample.value for sample in family.samples}
        for family in metrics.collect()
    }


def test_values_are_in_tritons_units() -> None:
    metrics = GpuMetrics(Nvml(FakeNvml(Card("GPU-a"), Card("GPU-b", busy_percent=100)), {}))
    metrics.sample()
    assert samples(metrics) == {
        "nv_gpu_utilization": {"GPU-a": 0.4, "GPU-b": 1.0},
        "nv_gpu_memory_total_bytes": {"GPU-a": 80 << 30, "GPU-b": 80 << 30},
        "nv_gpu_memory_used_bytes": {"GPU-a": 3 << 30, "GPU-b": 3 << 30},
        "nv_gpu_power_usage": {"GPU-a": 350.5, "GPU-b": 350.5},
        "nv_gpu_power_limit": {"GPU-a": 700.0, "GPU-b": 700.0},
        "nv_energy_consumption": {"GPU-a": 0.0, "GPU-b": 0.0},
    }


def test_energy_counts_from_the_first_sample() -> None:
    card, clock = Card("GPU-a"), Clock()
    metrics = GpuMetrics(Nvml(FakeNvml(card), {}), clock)
    metrics.sample()
    card.energy_mj += 2500
    clock.now += 1
    metrics.sample()
    assert samples(metrics)["nv_energy_consumption"] == {"GPU-a": 2.5}


def test_values_are_read_once_a_second() -> None:
    card, clock = Card("GPU-a"), Clock()
    metrics = GpuMetrics(Nvml(FakeNvml(card), {}), clock)
    for _ in range(3):
        metrics.sample()
    assert card.reads == 1
    clock.now += 0.99
    card.busy_percent = 90
    metrics.sample()
    assert samples(metrics)["nv_gpu_utilization"] == {"GPU-a": 0.4}
    clock.now += 0.01
    metrics.sample()
    assert card.reads == 2 and samples(metrics)["nv_gpu_utilization"] == {"GPU-a": 0.9}


def test_only_what_the_process_sees_is_shown() -> None:
    metrics = GpuMetrics(Nvml(FakeNvml(Card("GPU-a"), Card("GPU-b")), {"CUDA_VISIBLE_DEVICES": "1"}))
    metrics.sample()
    assert samples(metrics)["nv_gpu_utilization"] == {"GPU-b": 0.4}


def test_what_a_card_lacks_is_left_out() -> None:
    lacks = {"nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"}
    metrics = GpuMetrics(Nvml(FakeNvml(Card("GPU-a", lacks=lacks), Card("GPU-b", lacks=lacks)), {}))
    metrics.sample()
    assert set(samples(metrics)) == {
        "nv_gpu_utilization", "nv_gpu_memory_total_bytes", "nv_gpu_memory_used_bytes", "nv_gpu_power_limit"
    }  # fmt: skip
    metrics = GpuMetrics(Nvml(FakeNvml(Card("GPU-a", lacks=lacks), Card("GPU-b")), {}))
    metrics.sample()
    assert samples(metrics)["nv_gpu_power_usage"] == {"GPU-b": 350.5}


def test_without_gpus_there_are_no_families() -> None:
    metrics = GpuMetrics(Nvml(FakeNvml(has_driver=False), {}))
    metrics.sample()
    assert samples(metrics) == {}
    assert list(GpuMetrics(Nvml(FakeNvml(Card("GPU-a")), {})).collect()) == []  # nor before the first sample


def test_the_page_has_tritons_names(tmp_path: Path) -> None:
    gpus = GpuMetrics(Nvml(FakeNvml(Card("GPU-a")), {}))
    gpus.sample()
    page = Metrics(Engine(tmp_path, lambda *_: pytest.fail("nothing is loaded")), gpus.collect).render()[0].decode()
    assert 'nv_gpu_utilization{gpu_uuid="GPU-a"} 0.4\n' in page
    assert "# TYPE nv_energy_consumption counter\n" in page
    assert 'nv_energy_consumption{gpu_uuid="GPU-a"} 0.0\n' in page


def test_a_scrape_samples_in_a_thread_before_the_page_is_made() -> None:
    from tutti.frontends.gate import Gate
    from tutti.frontends.http.routes import metrics_app

    threads: list[int] = []
    sent: list[dict] = []

    def render() -> tuple[bytes, str]:
        return str(len(threads)).encode(), "text/plain"

    async def scrape() -> None:
        app = metrics_app(render, Gate(), lambda: threads.append(threading.get_ident()))
        scope = {
            "type": "http", "method": "GET", "path": "/metrics", "headers": [], "query_string": b"",
            "http_version": "1.1",
        }  # fmt: skip

        async def receive() -> dict:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: dict) -> None:
            sent.append(message)

        await app(scope, receive, send)

    asyncio.run(scrape())
    assert b"".join(message.get("body", b"") for message in sent) == b"1"
    assert threads[0] != threading.get_ident()
