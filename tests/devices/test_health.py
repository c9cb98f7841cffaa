"""What is remembered, and told, of devices that have failed."""

from tutti.devices.health import DeviceHealth


def test_the_first_reason_stands_and_is_told_once() -> None:
    health, told = DeviceHealth(), []
    health.listen(lambda device, reason: told.append((device, reason)))
    health.fail("cuda:0", "device-side assert")
    health.fail("cuda:0", "illegal access")
    health.fail("cuda:1", "lost")
    assert told == [("cuda:0", "device-side assert"), ("cuda:1", "lost")]
    assert health.reason("cuda:0") == "device-side assert"
    assert health.reason("cuda:2") == ""
    assert health.failures() == {"cuda:0": "device-side assert", "cuda:1": "lost"}


def test_who_listens_late_is_told_of_what_was() -> None:
    health, told = DeviceHealth(), []
    health.fail("cuda:0", "lost")
    end = health.listen(lambda device, reason: told.append(device))
    assert told == ["cuda:0"]
    end()
    health.fail("cuda:1", "lost")
    assert told == ["cuda:0"]
