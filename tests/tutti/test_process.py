"""What the engine's process makes of what the driver reports of its GPUs, and says while models load."""

import asyncio
import logging
import queue
from types import SimpleNamespace

import pytest

from tests.devices.fake_nvml import Card, FakeNvml
from tutti.app import process
from tutti.devices.health import DeviceHealth
from tutti.devices.nvml import Nvml
from tutti.devices.xid import watch_xid


def test_the_drivers_reports_fail_the_device_where_it_is_to_blame(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    health, failed = DeviceHealth(), queue.Queue()
    health.listen(lambda device, reason: failed.put((device, reason)))
    monkeypatch.setattr(process, "health", health)
    fake = FakeNvml(Card("GPU-a"), Card("GPU-b"))
    with caplog.at_level(logging.WARNING):
        close = watch_xid(process._told, Nvml(fake, {}))
        fake.report(0, 31)  # a page fault, of whichever process
        fake.report(1, 79)
        assert failed.get(timeout=30) == ("cuda:1", "the driver reports Xid 79")
        close()
    assert failed.empty() and list(health.failures()) == ["cuda:1"]
    assert "device cuda:0: the driver reports Xid 31" in caplog.text


def test_models_that_load_are_not_counted_as_loaded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process, "PROGRESS_S", 0)
    monkeypatch.setattr(process, "LOOK_S", 0)
    done = iter([0, 1, 3])
    engine = SimpleNamespace(started=lambda: (next(done), 4))
    with caplog.at_level(logging.INFO), pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(process._tell_progress(engine))
    said = [record.message.partition(" models")[0] for record in caplog.records if "loading: " in record.message]
    assert said == ["loading: 0 of 4", "loading: 1 of 4", "loading: 3 of 4"]
