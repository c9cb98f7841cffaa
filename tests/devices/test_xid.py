"""Critical errors that the driver reports, and whose they are."""

import queue
import threading

import pytest

from tests.devices.fake_nvml import GPU_IS_LOST, Card, FakeNvml, NVMLError
from tutti.devices.nvml import Nvml
from tutti.devices.xid import is_of_device, watch_xid

WAIT_S = 30


def test_each_xid_is_told_with_its_device() -> None:
    fake, told = FakeNvml(Card("GPU-a"), Card("GPU-b"), Card("GPU-c")), queue.Queue()
    close = watch_xid(lambda device, xid: told.put((device, xid)), Nvml(fake, {"CUDA_VISIBLE_DEVICES": "2,0"}))
    assert sorted(fake.watched) == [0, 2]
    fake.report(1, 48)  # not this process's
    fake.report(2, 79)
    fake.report(0, 31)
    assert told.get(timeout=WAIT_S) == ("cuda:0", 79)
    assert told.get(timeout=WAIT_S) == ("cuda:1", 31)
    close()
    assert told.empty() and fake.freed == 1


def test_a_listener_may_end_the_watch() -> None:
    fake, ended = FakeNvml(Card("GPU-a")), threading.Event()

    def end(device: str, xid: int) -> None:
        close()
        ended.set()

    close = watch_xid(end, Nvml(fake, {}))
    fake.report(0, 48)
    assert ended.wait(WAIT_S)
    close()
    assert fake.freed == 1


def test_lost_gpus_are_told_of_and_end_the_watch() -> None:
    fake, told = FakeNvml(Card("GPU-a"), Card("GPU-b")), queue.Queue()
    close = watch_xid(lambda device, xid: told.put((device, xid)), Nvml(fake, {}))
    fake.cards[1].is_lost = True
    fake.events.put(NVMLError(GPU_IS_LOST))
    assert told.get(timeout=WAIT_S) == ("cuda:1", 79)
    close()
    assert told.empty() and fake.freed == 1


def test_without_gpus_nothing_is_watched() -> None:
    fake = FakeNvml(Card("GPU-a", lacks={"nvmlDeviceRegisterEvents"}))
    before = threading.active_count()
    watch_xid(lambda device, xid: None, Nvml(fake, {}))()
    watch_xid(lambda device, xid: None, Nvml(FakeNvml(has_driver=False), {}))()
    assert threading.active_count() == before and fake.freed == 1


@pytest.mark.parametrize(("xid", "is_device"), [(13, False), (31, False), (45, False), (48, True), (79, True)])
def test_what_a_process_executed_is_not_the_devices_fault(xid: int, is_device: bool) -> None:
    assert is_of_device(xid) is is_device
